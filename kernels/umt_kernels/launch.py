"""Kernel launches: number of programs that a device can hold, and plans, made once per combination of shapes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from umt_kernels.backend import triton

ABSENT_GPU = (132, 2048)
"""Number of multiprocessors and threads per multiprocessor of an H100, used when there is no GPU."""

REGISTERS = 65536
"""Registers per multiprocessor, since compute capability 5.0 (CUDA C++ Programming Guide)."""


@functools.cache
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return ABSENT_GPU
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.max_threads_per_multi_processor


def resident_programs(device: torch.device, warps: int, registers: int) -> int:
    """Number of programs that the device can run at a time, each of `warps` warps, with `registers` per thread."""
    count, threads = _multiprocessors(device)
    return count * max(1, min(32, threads // (32 * warps), REGISTERS // (32 * warps * registers)))


def share(rows: int, programs: int, tile: int) -> tuple[int, int]:
    """Rows per program, a multiple of `tile`, and the number of programs with rows, at most `programs`."""
    per_program = max(1, triton.cdiv(triton.cdiv(rows, programs), tile)) * tile
    return per_program, triton.cdiv(rows, per_program)


def last_contiguous(x: Tensor) -> Tensor:
    """x, copied unless its last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_is(x: Tensor) -> Tensor:
    return x


def as_rows(x: Tensor) -> Tensor:
    """x, copied unless all dimensions but the last can be read as one."""
    return x.contiguous() if row_stride(x) is None else x


def row_stride(x: Tensor) -> int | None:
    """Distance between two rows of x; None if this varies, or if rows are not contiguous."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.stride(-1) != 1:
        return None
    leading = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size != 1]
    if any(outer != size * inner for (_, outer), (size, inner) in itertools.pairwise(leading)):
        return None
    return leading[-1][1] if leading else x.shape[-1]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


class Plan:
    """A kernel with its grid, numbers and compile-time settings, for one combination of shapes, dtypes and strides.

    At every launch Triton inspects all arguments to find the compiled kernel, 15 us on a CPU core. Only the pointers'
    alignment can change between calls, so a plan keeps the compiled kernel for aligned pointers and launches it
    directly. The kernel's parameters are tensors, numbers and settings, in this order. A grid of 0 launches nothing.

    outputs    shape and dtype of each tensor that `allocate` makes; None for one that is not requested.
    parts      plans of other kernels of the same call.
    unaligned  plan to use instead if a tensor is not aligned, for kernels with tensor descriptors.

    `KernelOp` sets the other fields, which describe the calls that use this plan:

    inputs          settings of the op.
    copies          (index, copying function) of each tensor whose strides the kernel cannot read.
    differentiable  whether autograd records the calls.
    """

    __slots__ = (
        "compiled",
        "copies",
        "differentiable",
        "grid",
        "inputs",
        "kernel",
        "nothing",
        "numbers",
        "outputs",
        "parts",
        "settings",
        "tail",
        "unaligned",
    )

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple,
        settings: dict[str, Any],
        outputs: Sequence[tuple[Sequence[int], torch.dtype] | None] = (),
        parts: tuple[Plan, ...] = (),
        unaligned: Plan | None = None,
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.settings = settings
        self.outputs = [x if x is None else (tuple(x[0]), _strides(x[0]), x[1]) for x in outputs]
        self.parts = parts
        self.unaligned = unaligned
        self.nothing = 0 in self.grid
        self.tail = (*numbers, *(settings[name] for name in kernel.arg_names if name in settings))
        self.compiled: Any = None
        self.inputs: tuple = ()
        self.copies: tuple[tuple[int, Callable[[Tensor], Tensor]], ...] = ()
        self.differentiable = False

    def allocate(self, device: torch.device) -> list[Any]:
        """Uninitialised contiguous outputs, allocated by the fastest of PyTorch's functions."""
        return [x if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device=device) for x in self.outputs]

    def launch(
        self,
        tensors: Sequence[Any],
        outputs: Sequence[Tensor | None] = (),
        pointers: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Launch on `tensors` (the first is not None), then `outputs`, in the order of the kernel's parameters.

        outputs   from `allocate`, which aligns them.
        pointers  tensors whose alignment is checked, if `tensors` holds tensor descriptors.
        """
        if self.nothing:
            return None
        checked = tensors if pointers is None else pointers
        first = checked[0] if checked else outputs[0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():  # type: ignore[union-attr]
            with torch.cuda.device(first.device):  # type: ignore[union-attr]
                return self.launch(tensors, outputs, pointers)
        addresses = 0
        for x in checked:
            if x is not None:
                addresses |= x.data_ptr()
        if addresses & 15:
            self.kernel[self.grid](*tensors, *outputs, *self.numbers, **self.settings)
        elif self.compiled is None:  # always, in the interpreter
            self.compiled = self.kernel[self.grid](*tensors, *outputs, *self.numbers, **self.settings)
        else:
            self.compiled[self.grid](*tensors, *outputs, *self.tail)
        return None


PLANS: dict[tuple, Plan] = {}
MOST_PLANS = 4096
"""At this number all plans are dropped: the memory of a program whose shapes change at every step must not grow."""


def keep(key: tuple, plan: Plan) -> Plan:
    if len(PLANS) >= MOST_PLANS:
        PLANS.clear()
    PLANS[key] = plan
    return plan

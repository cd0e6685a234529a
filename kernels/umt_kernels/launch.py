"""Launches: how many programs a device can hold, and plans, which are made once per combination of shapes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    """Programs of `warps` warps that the device can run at a time, each thread with `registers` registers."""
    count, threads = _multiprocessors(device)
    return count * max(1, min(32, threads // (32 * warps), REGISTERS // (32 * warps * registers)))


def share(rows: int, programs: int, tile: int) -> tuple[int, int]:
    """Rows per program, a multiple of `tile`, and how many of at most `programs` programs have any."""
    per_program = max(1, triton.cdiv(triton.cdiv(rows, programs), tile)) * tile
    return per_program, triton.cdiv(rows, per_program)


def last_contiguous(x: Tensor) -> Tensor:
    """x, copied unless its last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


class Plan:
    """A kernel with its grid, numbers and compile-time settings, for one combination of shapes, dtypes and strides.

    Triton inspects every argument at every launch, to find the compiled kernel that fits: 15 us on a CPU core. The
    combination decides all of that but the alignment of the pointers, so a plan keeps the compiled kernel for aligned
    ones and launches it directly. The kernel's parameters are tensors, then numbers, then settings, in that order. A
    grid of 0 launches nothing.

    outputs         shape and dtype of each tensor that `allocate` makes.
    parts           plans of smaller kernels launched before or after.
    inputs          of the first call, None in place of tensors.
    differentiable  whether autograd records calls that use this plan.
    """

    __slots__ = (
        "compiled",
        "differentiable",
        "grid",
        "inputs",
        "kernel",
        "numbers",
        "outputs",
        "parts",
        "settings",
        "tail",
    )

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple,
        settings: dict[str, Any],
        outputs: Sequence[tuple[Sequence[int], torch.dtype]] = (),
        parts: tuple[Plan, ...] = (),
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.settings = settings
        self.outputs = [(tuple(shape), _strides(shape), dtype) for shape, dtype in outputs]
        self.parts = parts
        self.tail = (*numbers, *(settings[name] for name in kernel.arg_names if name in settings))
        self.compiled: Any = None
        self.inputs: tuple = ()
        self.differentiable = False

    def allocate(self, device: torch.device) -> list[Tensor]:
        """Unwritten, contiguous outputs. The quickest of PyTorch's ways to get one."""
        return [
            torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in self.outputs
        ]

    def launch(self, *tensors: Any, pointers: tuple[Tensor | None, ...] | None = None) -> None:
        """Launch on tensors or None, in the order of the kernel's parameters, a tensor first.

        Where some are tensor descriptors, `pointers` are the tensors whose alignment counts.
        """
        if 0 in self.grid:
            return None
        pointers = tensors if pointers is None else pointers
        device = pointers[0].device  # type: ignore[union-attr]
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(tensors, pointers)
        return self._launch(tensors, pointers)

    def _launch(self, tensors: tuple[Any, ...], pointers: tuple[Tensor | None, ...]) -> None:
        addresses = 0
        for x in pointers:
            if x is not None:
                addresses |= x.data_ptr()
        if addresses & 15:
            self.kernel[self.grid](*tensors, *self.numbers, **self.settings)
        elif self.compiled is None:
            self.compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.settings)  # None if interpreted
        else:
            self.compiled[self.grid](*tensors, *self.tail)


PLANS: dict[tuple, Plan] = {}
MOST_PLANS = 4096
"""Beyond them all are forgotten: a program whose shapes change at every step must not grow for ever."""


def keep(key: tuple, plan: Plan) -> Plan:
    if len(PLANS) >= MOST_PLANS:
        PLANS.clear()
    PLANS[key] = plan
    return plan

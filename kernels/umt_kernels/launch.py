"""Launches: how many programs a device can hold, and kernels that are looked up once per combination of shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


class Plan:
    """A kernel with its grid, numbers and compile-time settings, for one combination of shapes, dtypes and strides.

    Triton inspects every argument at every launch, to find the compiled kernel that fits: 15 us on a CPU core. The
    combination decides all of that but the alignment of the pointers, so a plan keeps the compiled kernel for aligned
    ones and launches it directly. The kernel's parameters are tensors, then numbers, then settings, in that order.
    """

    __slots__ = ("compiled", "grid", "kernel", "numbers", "settings", "tail")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple, settings: dict[str, Any]) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.settings = settings
        self.tail = (*numbers, *(settings[name] for name in kernel.arg_names if name in settings))
        self.compiled: Any = None

    def launch(self, *tensors: Tensor | None) -> None:
        device = tensors[0].device  # type: ignore[union-attr]
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(tensors)
        return self._launch(tensors)

    def _launch(self, tensors: tuple[Tensor | None, ...]) -> None:
        addresses = 0
        for x in tensors:
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


def plan(key: tuple, make: Callable[..., Plan], *arguments: Any) -> Plan:
    """The plan kept under `key`, or a new one, `make(*arguments)`.

    The key names the kernel and holds the device and all that decides the kernel's numbers, its settings and the
    dtypes of its tensors.
    """
    found = PLANS.get(key)
    if found is None:
        if len(PLANS) >= MOST_PLANS:
            PLANS.clear()
        found = PLANS[key] = make(*arguments)
    return found

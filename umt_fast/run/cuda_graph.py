"""A training step as one CUDA graph: recorded once, then replayed without launches by the host."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

WARM_UPS = 3
DDP_WARM_UPS = 11
"""DDP rebuilds its buckets and measures times in its first ten steps (PyTorch's notes on CUDA graphs and DDP)."""


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def capture_stream(capturing: bool) -> contextlib.AbstractContextManager[object]:
    """The stream context in which to build DDP: recorded steps need its gradient hooks on the capture stream."""
    return torch.cuda.stream(_stream()) if capturing else contextlib.nullcontext()


class CapturedStep(Generic[Result]):
    """`step(clip)` as a CUDA graph; the step must not read from the device. Every call makes exactly one step.

    The first calls run eagerly on a side stream, so that libraries, optimiser state and DDP are initialised. The next
    call records. Every later call copies its clip into the recorded buffer and replays. The result is the memory of the
    recorded step, which the next call overwrites: clone what must be kept. Raises ValueError for a clip of another
    shape or dtype.
    """

    def __init__(self, step: Callable[[Tensor], Result], warm_ups: int = WARM_UPS) -> None:
        self._step = step
        self._left = warm_ups
        self._stream = _stream()
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor, Result] | None = None

    def __call__(self, clip: Tensor) -> Result:
        if self._left:
            self._left -= 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._step(clip)
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._recorded is None:
            self._recorded = self._record(clip)
        graph, buffer, result = self._recorded
        if clip.shape != buffer.shape or clip.dtype != buffer.dtype:
            raise ValueError(
                f"clip is {clip.dtype} {list(clip.shape)}, but the step was recorded with {buffer.dtype} "
                f"{list(buffer.shape)}"
            )
        buffer.copy_(clip, non_blocking=True)
        graph.replay()
        return result

    def _record(self, clip: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Result]:
        graph, buffer = torch.cuda.CUDAGraph(), clip.clone()
        # thread_local: the loader's pinning thread and NCCL's watchdog call CUDA during the capture
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = self._step(buffer)
        return graph, buffer, result

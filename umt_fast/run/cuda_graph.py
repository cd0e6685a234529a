"""A training step as one CUDA graph: recorded once, then replayed without the host launching anything."""

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
"""DDP regroups its buckets and times itself in its first ten steps (PyTorch's notes on CUDA graphs and DDP)."""


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def capture_stream(capturing: bool) -> contextlib.AbstractContextManager[object]:
    """Where DDP is to be built if its steps are recorded: gradients are summed on the stream they are made on."""
    return torch.cuda.stream(_stream()) if capturing else contextlib.nullcontext()


class CapturedStep(Generic[Result]):
    """`step(clip)`, which must not read anything on the host; every call makes exactly one step.

    The first calls run as they are, on a stream of their own, and let libraries, optimiser state and DDP settle. The
    next one records. Every call after that copies its clip into the recorded buffer and replays. What comes back is
    the recorded step's own memory: the next call overwrites it, so clone what is to be kept.
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
        # thread_local: the loader's pinning thread and NCCL's watchdog go on calling CUDA meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = self._step(buffer)
        return graph, buffer, result

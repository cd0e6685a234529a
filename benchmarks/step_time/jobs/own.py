"""Shared code for umt_fast's steps: plain ops below the rung with kernels, and the recorded step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import umt_kernels.backend
from torch import Tensor
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD

from benchmarks.step_time.ladder import Rung, TimedStep
from benchmarks.step_time.phases import Mark, no_mark
from umt_fast.config import MLP_RATIO
from umt_fast.run.cuda_graph import CapturedStep


@contextlib.contextmanager
def reference_ops() -> Iterator[None]:
    """Inside this context the ops of umt_kernels run as plain PyTorch, on a GPU too."""
    before = umt_kernels.backend.REFERENCE_ONLY
    umt_kernels.backend.REFERENCE_ONLY = True
    try:
        yield
    finally:
        umt_kernels.backend.REFERENCE_ONLY = before


def timed_step(
    rung: Rung, draw: Callable[[bool], Tensor], step: Callable[[Tensor, Mark], Tensor], drawing: str
) -> TimedStep:
    """`draw` returns the clip of a step and draws all other inputs into its own buffers; `step` trains on them.

    `drawing` is the name of the phase of `draw`.
    """
    recorded: list[CapturedStep[Tensor]] = []

    def run(shared: bool, mark: Mark) -> Tensor:
        with contextlib.nullcontext() if rung.kernels else reference_ops():
            clip = draw(shared)
            mark(drawing)
            if not rung.captured:
                return step(clip, mark)
            if not recorded:
                recorded.append(CapturedStep(lambda clip: step(clip, no_mark)))
            return recorded[0](clip)

    return run


def normalised(clip: Tensor) -> Tensor:
    """uint8 [B,T,H,W,3] -> normalised float32 [B,3,T,H,W], as from the published loaders."""
    mean, std = (torch.tensor(values, device=clip.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((clip.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()


def block_flops(tokens: int, width: int) -> int:
    """Forward operations of a transformer block over a sequence of `tokens`."""
    return 2 * tokens * width * width * (4 + 2 * MLP_RATIO) + 4 * tokens * tokens * width

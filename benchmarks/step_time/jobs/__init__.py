"""The training jobs with timed steps, each with its published step in plain PyTorch and umt_fast's step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from benchmarks.step_time.jobs import finetune, pixels, pretrain, stage2
from benchmarks.step_time.ladder import Rung, TimedStep, ladder
from umt_fast.config import StudentConfig


class Work(Protocol):
    """Input of every rung of a ladder, on one device: the same clips, weights and random choices."""

    @property
    def device(self) -> torch.device: ...

    def build(self, rung: Rung) -> TimedStep:
        """The rung's step, its models on the device. The first call compiles."""

    def flops(self, lean: bool) -> dict[str, int]:
        """Floating-point operations of one step by phase: needed by the method (`lean`), or the published step's."""


@dataclass(frozen=True)
class Job:
    models: tuple[str, ...]
    """Models of the published recipes, smallest first, then `tiny` for a trial."""
    batch: int
    """Clips per step on a GPU, by default."""
    cpu_batch: int
    ladder: Callable[[torch.device], tuple[Rung, ...]]
    prepare: Callable[[str, int, torch.device], Work]
    student: Callable[[str], StudentConfig] | None = None
    """The model for timing decoding and all-reduce; None: neither is timed."""


def _exact_ladder(device: torch.device) -> tuple[Rung, ...]:
    return ladder(device, frozen_teacher=False)


def _pixels_ladder(device: torch.device) -> tuple[Rung, ...]:
    return tuple(replace(rung, loss_tolerance=pixels.LOSS_TOLERANCE) for rung in _exact_ladder(device))


JOBS = {
    "pretrain": Job(tuple(pretrain.MODELS), 64, 2, ladder, pretrain.prepare, lambda model: pretrain.MODELS[model][0]),
    "finetune": Job(tuple(finetune.MODELS), 32, 2, _exact_ladder, finetune.prepare),
    "pixels": Job(tuple(pixels.MODELS), 32, 2, _pixels_ladder, pixels.prepare),
    "stage2": Job(tuple(stage2.MODELS), 128, 4, stage2.stage2_ladder, stage2.prepare),
}

"""Section `run`: a run's folder, its log and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from umt_fast.config.base import ConfigError, check_at_least
from umt_fast.files import expand_home


@dataclass(frozen=True)
class RunConfig:
    """The run's folder, its log and its checkpoints."""

    name: str = "pretrain"
    """The run's folder under `dir`."""
    dir: str = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Seed of the weights, the order of the videos, their frames and crops, and the masks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    log_every: int = 10
    """Steps between log lines. In between, the host does not read from the device."""
    save_every: int = 1000
    """Steps between checkpoints. A checkpoint is also saved at the end and on a signal."""
    save_minutes: float | None = None
    """Minutes after which a checkpoint is saved too, checked at each log line; None: by steps only."""
    keep: int = 3
    """Number of checkpoints to keep."""
    resume: str = "auto"
    """auto: resume from this run's last checkpoint if it has one; never: start anew; or a checkpoint's path."""
    stop_at: int | None = None
    """Save and stop after this step; the schedule is still that of the whole run."""
    start_timeout: float = 1800.0
    """Seconds that the ranks wait for each other until the first step."""
    step_timeout: float = 600.0
    """Seconds that the ranks wait for each other after the first step; then the run ends and names the missing rank."""

    def __post_init__(self) -> None:
        check_at_least(
            self,
            "run",
            seed=0,
            log_every=1,
            save_every=1,
            keep=1,
            stop_at=1,
            save_minutes=0,
            start_timeout=1,
            step_timeout=1,
        )
        if self.name in ("", "..") or Path(self.name).name != self.name or "\0" in self.name:
            raise ConfigError(f"run.name = {self.name!r} is not a plain folder name")
        if "\0" in self.dir:
            raise ConfigError(f"run.dir = {self.dir!r} is not the name of a folder")

    @property
    def folder(self) -> Path:
        return expand_home(self.dir) / self.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def last_step(self, total: int) -> int:
        """The step to stop after: `stop_at`, but at most `total`, the steps of the schedule."""
        return total if self.stop_at is None else min(self.stop_at, total)

    def nothing_left(self, step: int, total: int) -> str:
        """Message of a run that has reached its last step already."""
        last = self.last_step(total)
        longer = "--optim.epochs" if last == total else "--run.stop-at"
        return f"nothing to train: step {step} of {last} is reached; raise {longer} or add --run.name NEW"

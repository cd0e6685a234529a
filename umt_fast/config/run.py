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
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = 10
    """Steps between log lines. Nothing is read from the device in between."""
    save_every: int = 1000
    """Steps between checkpoints; one is always saved at the end and on a signal."""
    save_minutes: float | None = None
    """Minutes after which one is saved too, looked at when a line is logged; None: by steps alone."""
    keep: int = 3
    """Checkpoints kept."""
    resume: str = "auto"
    """auto: go on from this run's last checkpoint if it has one; never; or a checkpoint's path."""
    stop_at: int | None = None
    """Save and stop after this step; the schedule stays that of the whole run."""
    start_timeout: float = 1800.0
    """Seconds that the processes wait for each other until the first step."""
    step_timeout: float = 600.0
    """Seconds that they wait for each other from then on; then the run ends and names the one that was waited for."""

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
        if not self.name or Path(self.name).name != self.name:
            raise ConfigError(f"run.name = {self.name!r} is not a plain folder name")

    @property
    def folder(self) -> Path:
        return expand_home(self.dir) / self.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def last_step(self, total: int) -> int:
        """The step to stop after, of a schedule of `total` steps."""
        return total if self.stop_at is None else min(self.stop_at, total)

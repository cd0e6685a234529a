"""What a run tells: a progress bar or lines, metrics.jsonl, TensorBoard, bad_files.txt."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from umt_fast.errors import RunError
from umt_fast.files import escape, read_reasons, write_reasons


class NotFinite(RunError):
    """A loss or gradient that is not finite."""


@dataclass
class _Step:
    """What a step leaves to be looked at later."""

    number: int
    losses: list[Tensor] = field(default_factory=list)
    grad_norm: Tensor | None = None
    files: list[str] = field(default_factory=list)


class Ledger:
    """One rank's losses since the last log line. They stay on the device until `report` reads them, all at once."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._bad: list[tuple[str, str]] = []
        self._waited = 0.0

    def begin(self, step: int) -> None:
        self._steps.append(_Step(step))

    def drop(self) -> bool:
        """Forget the step that was begun last. Returns whether one is left to report."""
        self._steps.pop()
        return bool(self._steps)

    def add_batch(self, files: list[str], bad: list[tuple[str, str]], waited: float) -> None:
        """The files of a batch of the present step, those that could not be read, and the seconds it was awaited."""
        self._steps[-1].files += files
        self._bad += bad
        self._waited += waited

    def add_loss(self, loss: Tensor) -> None:
        self._steps[-1].losses.append(loss.detach())

    def end(self, grad_norm: Tensor) -> None:
        self._steps[-1].grad_norm = grad_norm

    def report(self) -> Report:
        """What happened since the last report. Waits for the device."""
        losses = torch.stack([torch.stack(step.losses).mean() for step in self._steps])
        norms = torch.stack([step.grad_norm for step in self._steps if step.grad_norm is not None])
        rows = torch.stack((losses.float(), norms.float())).T.tolist()
        report = Report(bad=self._bad)
        for step, (loss, norm) in zip(self._steps, rows, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                report.not_finite = (step.number, f"loss {loss}, gradient norm {norm}", step.files)
                break
        report.means = {
            "loss": sum(row[0] for row in rows) / len(rows),
            "grad_norm": sum(row[1] for row in rows) / len(rows),
            "data_wait_seconds": self._waited,
        }
        self._steps, self._bad, self._waited = [], [], 0.0
        return report


@dataclass
class Report:
    """A rank's part of a log line."""

    means: dict[str, float] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    not_finite: tuple[int, str, list[str]] | None = None
    """The first step whose loss or gradient is not finite, the values, and its files."""


def merge(reports: list[Report]) -> Report:
    """The ranks' reports as one."""
    means = {key: sum(report.means[key] for report in reports) / len(reports) for key in reports[0].means}
    broken = [report.not_finite for report in reports if report.not_finite is not None]
    first = min(broken, default=None)
    if first is not None:
        first = (*first[:2], sorted({file for step, _, files in broken if step == first[0] for file in files}))
    return Report(means, [file for report in reports for file in report.bad], first)


class RunLog:
    """The written record of a run in `folder`; silent on all ranks but the main one.

    A run resumed at `step` drops what an earlier session recorded after it.
    """

    def __init__(self, folder: Path, main: bool, step: int, total_steps: int, global_batch: int) -> None:
        self.folder = folder
        self.main = main
        self._global_batch = global_batch
        self._total_steps = total_steps
        self._since = (time.monotonic(), step)
        self._bad: set[str] = set()
        self._waited = self._elapsed = 0.0
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._bad_path = folder / "bad_files.txt"
        if step and self._bad_path.exists():
            self._bad.update(read_reasons(self._bad_path.read_bytes()))
        else:
            self._bad_path.unlink(missing_ok=True)
        self.metrics_path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.metrics_path) if line["step"] <= step] if step else []
        self.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = open(self.metrics_path, "a")  # noqa: SIM115, closed by close()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)
        self._terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def restart_clock(self, step: int) -> None:
        """Leave what came before, say a checkpoint, out of the next rate."""
        self._since = (time.monotonic(), step)
        if self.main and self._terminal and self._bar is None:
            self._bar = tqdm(total=self._total_steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One step done."""
        if self.main and self._bar is not None:
            self._bar.update()

    def record(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        """Write the metrics of the steps since the last record, adding their rate and the share of time spent waiting.

        The loop may wait for data while a GPU still has work: data_stall is the most that the device can have idled.
        """
        now = time.monotonic()
        seconds, steps = now - self._since[0], step - self._since[1]
        self._since = (now, step)
        rate = steps * self._global_batch / max(seconds, 1e-9)
        stall = min(values["data_wait_seconds"] / max(seconds, 1e-9), 1.0)
        self._waited += stall * seconds
        self._elapsed += seconds
        line = {"step": step, **values, "data_stall": round(stall, 4), "clips_per_second": round(rate, 2)}
        if not self.main:
            return line
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.metrics_path)) from error
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        shown = {"loss": f"{values['loss']:.4f}", "clips/s": f"{rate:.1f}", "data stall": f"{stall:.1%}"}
        shown["lr"] = f"{values['lr']:.2e}"
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
        else:
            left = timedelta(seconds=round((self._total_steps - step) * seconds / max(steps, 1)))
            parts = [f"step {step}/{self._total_steps}", *(f"{k} {v}" for k, v in shown.items()), f"ETA {left}"]
            self.say("  ".join(parts))
        return line

    @property
    def stall(self) -> float:
        """Share of the time so far that the loop waited for data."""
        return self._waited / max(self._elapsed, 1e-9)

    def record_bad(self, files: list[tuple[str, str]]) -> int:
        """Add unreadable videos to bad_files.txt, each once. Returns how many the main rank knows."""
        fresh = {name: reason for name, reason in files if name not in self._bad}
        self._bad.update(fresh)
        if fresh and self.main:
            with open(self._bad_path, "ab") as file:
                file.write(write_reasons(fresh.items()))
            for name, reason in fresh.items():
                self.say(f"skipped {escape(name)}: {reason}".encode("utf-8", "replace").decode())
        return len(self._bad)

    def close(self) -> None:
        if self.main:
            if self._bar is not None:
                self._bar.close()
            self._board.close()
            self._metrics.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, less one that a crash cut off."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines

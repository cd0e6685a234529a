"""The log of a run: a progress bar or lines, metrics.jsonl, TensorBoard, bad_files.txt."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from umt_fast.errors import RunError
from umt_fast.files import append_whole, escape, read_reasons, write_reasons, write_whole
from umt_fast.run.hardware import peak_flops
from umt_fast.run.train_state import TrainState
from umt_fast.run.world import World

if TYPE_CHECKING:
    from tqdm import tqdm

    from umt_fast.data.batch import Batch


@dataclass
class _Step:
    number: int
    values: dict[str, Tensor]
    grad_norm: Tensor
    files: list[str]


class LossBuffer:
    """One rank's losses since the last log line. They stay on the device until `take` reads all of them at once."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._bad: list[tuple[str, str]] = []
        self._waited = 0.0

    def __len__(self) -> int:
        return len(self._steps)

    def add_data(self, batches: Sequence[Batch], waited: float) -> None:
        """Record the unreadable files of a step's batches, and the seconds that the loop waited for the batches."""
        self._bad += [bad for batch in batches for bad in batch.bad]
        self._waited += waited

    def add(
        self, step: int, losses: Sequence[Mapping[str, Tensor]], grad_norm: Tensor, batches: Sequence[Batch]
    ) -> None:
        """Record a step: the losses of its micro-batches by name, its gradient norm, its batches."""
        values = {name: torch.stack([micro[name].detach() for micro in losses]).mean() for name in losses[0]}
        self._steps.append(_Step(step, values, grad_norm, [path for batch in batches for path in batch.paths]))

    def take(self, device: torch.device) -> Report:
        """Report on the steps since the last call. Waits for the device."""
        report = Report(bad=self._bad, waited=self._waited, peak_bytes=peak_memory(device))
        steps, self._steps, self._bad, self._waited = self._steps, [], [], 0.0
        if not steps:
            return report
        names = [*steps[0].values, "grad_norm"]
        rows = torch.stack(
            [torch.stack([*(v.float() for v in step.values.values()), step.grad_norm.float()]) for step in steps]
        ).tolist()
        for step, row in zip(steps, rows, strict=True):
            if not all(map(math.isfinite, row)):
                shown = ", ".join(
                    f"{name.replace('grad_norm', 'gradient norm')} {v}" for name, v in zip(names, row, strict=True)
                )
                report.not_finite = (step.number, shown, step.files)
                break
        report.means = {
            name: sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }
        return report


@dataclass
class Report:
    """A rank's part of a log line."""

    means: dict[str, float] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    waited: float = 0.0
    peak_bytes: int = 0
    not_finite: tuple[int, str, list[str]] | None = None
    """The first step with a loss or gradient that is not finite: its number, the values, its files."""


def merge(reports: list[Report]) -> Report:
    """The ranks' reports as one."""
    means = {key: sum(report.means[key] for report in reports) / len(reports) for key in reports[0].means}
    broken = [report.not_finite for report in reports if report.not_finite is not None]
    first = min(broken, default=None)
    if first is not None:
        first = (*first[:2], sorted({file for step, _, files in broken if step == first[0] for file in files}))
    bad = [file for report in reports for file in report.bad]
    waited = sum(report.waited for report in reports) / len(reports)
    return Report(means, bad, waited, max(report.peak_bytes for report in reports), first)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process, bytes: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Throughput:
    """Numbers for computing MFU, the share of the devices' peak FLOP/s in use (arXiv 2204.02311)."""

    step_flops: float
    """FLOP of a step over all ranks."""
    peak_flops: float
    """Peak FLOP/s of all ranks' devices together."""

    @classmethod
    def measure(cls, rank_flops: float, world: World, bf16: bool) -> Throughput:
        """For a step of `rank_flops` FLOP on each rank; every rank must call this."""
        return cls(rank_flops * world.size, sum(world.gather(peak_flops(world.device, bf16).flops)))


class RunLog:
    """The written record of a run in `folder`; only the main rank writes.

    A run resumed at `step` drops the records after this step. A log that cannot be written (closed terminal or pipe,
    full disk) never ends a run that has begun.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        step: int,
        total_steps: int,
        step_clips: int,
        throughput: Throughput | None = None,
    ) -> None:
        self.folder = folder
        self.metrics_path = folder / "metrics.jsonl"
        self._bad_path = folder / "bad_files.txt"
        self._world = world
        self._step_clips = step_clips
        self._first_step = step
        self._total_steps = total_steps
        self._throughput = throughput
        self._since = (time.monotonic(), step)
        self._bad: set[str] = set()
        self._failed: set[Path] = set()
        """Files that could not be written and were reported."""
        self._waited = self._elapsed = 0.0
        self._bar: tqdm | None = None
        if not world.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if step and self._bad_path.is_file() and not self._bad_path.is_symlink():
            self._bad.update(read_reasons(self._bad_path.read_bytes()))
        else:
            self._bad_path.unlink(missing_ok=True)
        kept = [line for line in read_metrics(self.metrics_path) if line["step"] <= step] if step else []
        write_whole(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._board = TensorBoard(folder / "tensorboard", purge_step=step or None)

    def say(self, text: str) -> None:
        """Print on the main rank."""
        if self._world.main:
            say(text)

    def start_clock(self, step: int) -> None:
        """Restart the clock of the next rate, such as after saving a checkpoint."""
        self._since = (time.monotonic(), step)
        if self._world.main and self._bar is None and _is_terminal():
            from tqdm import tqdm  # here and below: a program without it says in one line how to install it

            self._bar = tqdm(total=self._total_steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update()

    def report(self, state: TrainState, losses: LossBuffer, max_bad: float = math.inf, **values: float) -> None:
        """Record the steps since the last report; every rank must call this.

        Raises RunError for a loss or gradient that is not finite, naming the step and its files, and if more than
        `max_bad` videos of the list could not be read.
        """
        merged = merge(self._world.gather(losses.take(self._world.device)))
        bad = self._world.gather(self._record_bad(merged.bad))[0]
        if merged.not_finite is not None:
            number, shown, files = merged.not_finite
            raise RunError(
                f"step {number} is not finite ({shown}). Last good checkpoint: {state.last_saved or 'none'}. "
                f"Files of that step: {', '.join(files)}"
            )
        if merged.means:
            self._record(state.step, merged, values)
        if bad > max_bad:
            raise RunError(
                f"{bad} videos of the list could not be read, more than --data.max-bad-fraction allows; see "
                f"{self._bad_path}"
            )

    def _record(self, step: int, merged: Report, values: dict[str, float]) -> None:
        now = time.monotonic()
        seconds, steps = max(now - self._since[0], 1e-9), max(step - self._since[1], 1)
        self._since = (now, step)
        stall = min(merged.waited / seconds, 1.0)
        self._waited += stall * seconds
        self._elapsed += seconds
        line = {"step": step, **merged.means, "data_wait_seconds": merged.waited, **values}
        # data_stall is an upper bound of the device's idle time: the loop may wait for data while a GPU still works.
        line |= {"data_stall": round(stall, 4), "clips_per_second": round(steps * self._step_clips / seconds, 2)}
        line |= {"step_ms": round(1e3 * seconds / steps, 3), "peak_gib": round(merged.peak_bytes / 2**30, 3)}
        if self._throughput is not None:
            line["mfu"] = round(self._throughput.step_flops * steps / seconds / self._throughput.peak_flops, 4)
        if not self._world.main:
            return
        self._write(line)
        shown = {"loss": f"{line['loss']:.4f}", "lr": f"{line['lr']:.2e}"} if "lr" in line else {}
        shown |= {"ms": f"{line['step_ms']:.4g}", "clips/s": f"{line['clips_per_second']:.1f}"}
        shown |= {key.replace("_", " "): f"{value:.4g}" for key, value in values.items() if key.endswith("_ms")}
        if "mfu" in line:
            shown["MFU"] = f"{line['mfu']:.1%}"
        shown |= {"peak GiB": f"{line['peak_gib']:.2f}", "data stall": f"{stall:.1%}"}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            return
        left = timedelta(seconds=round((self._total_steps - step) * seconds / steps))
        self.say(
            "  ".join((f"step {step}/{self._total_steps}", *(f"{k} {v}" for k, v in shown.items()), f"ETA {left}"))
        )

    def _write(self, line: dict[str, Any]) -> None:
        """Append to metrics.jsonl and TensorBoard; recreates the folder if it was removed."""
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            self.say(f"{self.folder} was removed meanwhile; it is made again")
        self._append(self.metrics_path, json.dumps(line).encode() + b"\n")
        self._append(self._board.path, self._board.events(line))

    def _append(self, path: Path, content: bytes) -> None:
        """Append all of `content` or nothing; a failure is reported once per file."""
        try:
            append_whole(path, content)
        except OSError as error:
            if path not in self._failed:
                self._failed.add(path)
                self.say(f"note: cannot write {path}: {error.strerror or error}; the run continues")

    def finish(self, state: TrainState, label: str, parts: Sequence[str] = ()) -> None:
        """Print how the run ended. Draw its losses: `label` names the curve, `parts` other losses.

        A run that was killed between its last save and its picture is drawn when it is started again.
        """
        trained, picture = state.step > self._first_step, self.folder / "loss.png"
        if self._world.main and (trained or (state.step and not picture.exists())):
            from umt_fast.run.pictures import draw_loss_curve

            lines = read_metrics(self.metrics_path)
            metrics = [line for line in lines if all(isinstance(line.get(key), int | float) for key in ("loss", "lr"))]
            parts = [name for name in parts if any(line.get(name) for line in metrics)]
            draw_loss_curve(metrics, picture, label, parts)
            if len(metrics) > 1:
                losses = f"loss {metrics[0]['loss']:.4f} -> {metrics[-1]['loss']:.4f}"
                self.say(f"{losses}; pictures and metrics in {self.folder}")
            if trained:
                self.say(f"waited for data {self._waited / max(self._elapsed, 1e-9):.1%} of the time")
        ended = "done" if state.step >= self._total_steps else "stopped"
        self.say(f"{ended} at step {state.step}: {state.last_saved or 'nothing to save'}")

    def _record_bad(self, files: list[tuple[str, str]]) -> int:
        """Add unreadable videos to bad_files.txt, each once. Returns their total number (on the main rank)."""
        fresh = {name: reason for name, reason in files if name not in self._bad}
        self._bad.update(fresh)
        if fresh and self._world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._append(self._bad_path, write_reasons(fresh.items()))
            for name, reason in fresh.items():
                self.say(f"skipped {escape(name)}: {reason}")
        return len(self._bad)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()


class TensorBoard:
    """An event file of scalars. torch's SummaryWriter writes in a thread, whose errors the run could not catch."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        """TensorBoard ignores the records of earlier event files from `purge_step` on."""
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._purge_step = purge_step

    def events(self, line: Mapping[str, float]) -> bytes:
        """The bytes to append to the file `path` for a record of a step."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        now, step = time.time(), int(line["step"])
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in line.items() if tag != "step"]
        events = [Event(wall_time=now, step=step, summary=Summary(value=values))]
        if not self.path.exists() or not self.path.stat().st_size:
            if self._purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                events.insert(0, Event(wall_time=now, step=self._purge_step, session_log=start))
            events.insert(0, Event(wall_time=now, file_version="brain.Event:2"))
        content = io.BytesIO()
        for event in events:
            RecordWriter(content).write(event.SerializeToString())
        return content.getvalue()


def say(text: str) -> None:
    """Print a line, above the progress bar if there is one. If the reader has gone (`| head`), print nothing more."""
    from tqdm import tqdm

    encoding = sys.stdout.encoding or "utf-8"
    printable = text.encode("utf-8", "replace").decode().encode(encoding, "backslashreplace").decode(encoding)
    try:
        tqdm.write(printable)
        sys.stdout.flush()
    except (OSError, ValueError):  # ValueError: closed
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except ValueError:  # closed
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records in a metrics.jsonl; incomplete and foreign lines are skipped."""
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            lines.append(record)
    return lines

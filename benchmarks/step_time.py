"""Where the time of a training step goes, rung by rung from the published step to the fastest one.

    python -m benchmarks.step_time                          # every rung that runs here, both models on a GPU
    python -m benchmarks.step_time --rungs "baseline" "+ lean math" --repeats 5
    python -m benchmarks.step_time --compare old.json       # exits with 1 if a rung is over 5% slower
    python -m benchmarks.step_time --predict a100 --from benchmarks/results/h200/umt_b16/step_time.json
    torchrun --nproc-per-node 8 -m benchmarks.step_time --videos list.csv     # with the all-reduce, and own videos

Writes step_time.json, .md and .html and two plots into benchmarks/results/<gpu or cpu>, or --out. Times are medians.
On a CPU one step of every rung is timed in turn, again and again, so that both sides of a ratio share the machine's
moods; on a GPU each rung has the device for itself. Before it is timed, a rung makes 20 steps, recorded and compiled
as it will be; one whose losses leave the float32 reference's by more than its tolerance is refused, and the command
exits with 1. Decoding and the all-reduce go on beside a step: they are timed apart (benchmarks/beside.py), by all
processes, before the first one makes the steps alone.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import beside
from benchmarks import step_time_report as report
from benchmarks.beside import Beside
from benchmarks.kernels.environment import describe, gpu_name
from benchmarks.phases import PhaseClock, no_mark, wait_for
from benchmarks.rungs import MODELS, Rung, TimedStep, Work, build, ladder, missing, prepare
from umt_fast.arguments import whole_number_from
from umt_fast.config import DataConfig
from umt_fast.data.manifest import read_manifest
from umt_fast.errors import RunError
from umt_fast.run import costs
from umt_fast.run import world as processes
from umt_fast.run.world import World

RESULTS = Path(__file__).parent / "results"
GEMM_SIDE = {"cuda": 8192, "cpu": 2048}
STEPS = 10
"""Of a GPU between two looks at the clock: its queue must fill."""
CHECKED_STEPS = 20
"""Whose losses are compared: of a captured rung the warm-up, the recording and many replays."""


@dataclass
class Result:
    """One rung of one model at one batch. What was not measured is None, and `not_run` says why."""

    model: str
    batch: int
    rung: str
    precision: str
    not_run: str | None = None
    seconds: float | None = None
    """Median of one step."""
    samples: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    """Median seconds of each phase; empty where the step is one graph."""
    clips_per_second: float | None = None
    peak_bytes: int | None = None
    """Of the GPU's memory; None on a CPU, where rungs share a process."""
    model_flops: int = 0
    """Operations that the method needs: those of the lean step, for every rung alike."""
    flops: dict[str, int] = field(default_factory=dict)
    """Operations that this rung makes, by phase."""
    gemm_share: float | None = None
    """Of the rate of a large matmul in the rung's precision, measured in the same run."""
    losses: list[float] = field(default_factory=list)
    """Of the first steps, from the same weights, clips and visible set on every rung."""
    loss_error: float | None = None
    """Largest distance of one of them from the reference's at the same step; None of the reference."""
    loss_tolerance: float | None = None
    """What it may be."""
    k710_days: float | None = None
    """Days that the published 200 epochs of K710 would take on 32 such devices, if data and network kept up."""


def gemm_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Of one square matmul of random numbers."""
    side = GEMM_SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    for _ in range(3):
        a @ b
    return _window(lambda: a @ b, 10 if device.type == "cuda" else 2, device)


def _window(call: Any, steps: int, device: torch.device) -> float:
    """Seconds per call over `steps` of them."""
    wait_for(device)
    started = time.perf_counter()
    for _ in range(steps):
        call()
    wait_for(device)
    return (time.perf_counter() - started) / steps


class Contender:
    """A rung being measured."""

    def __init__(self, rung: Rung, work: Work, result: Result) -> None:
        self.rung, self.work, self.result = rung, work, result
        self.step: TimedStep = build(rung, work)
        self.spent: list[dict[str, float]] = []

    def check(self, reference: list[float]) -> bool:
        """Make the first steps on the common visible set. A wrong loss is no speed-up: the rung is refused.

        Without a reference it becomes one.
        """
        result, tolerance = self.result, self.rung.loss_tolerance
        result.losses = [float(self.step(self.work.visible, no_mark)) for _ in range(CHECKED_STEPS)]
        errors = [abs(ours - theirs) for ours, theirs in zip(result.losses, reference or result.losses, strict=True)]
        if reference:
            result.loss_error, result.loss_tolerance = max(errors), tolerance
        for step, error in enumerate(errors):
            if not error <= tolerance:  # NaN included
                result.not_run = (
                    f"{report.REFUSED}: the loss of step {step + 1} is {result.losses[step]:.4f}, the reference's "
                    f"{(reference or result.losses)[step]:.4f}; {tolerance:g} apart are allowed"
                )
                return False
        return True

    def warm_up(self) -> None:
        for _ in range(6 if self.rung.captured else 1):
            loss = float(self.step(None, no_mark))
        if not math.isfinite(loss):  # of the recorded step, where there is one
            raise ValueError(f"its loss is {loss} after the warm-up")

    def time_once(self) -> None:
        device = self.work.clip.device
        clock = PhaseClock(device)
        if device.type == "cpu":  # its clock costs nothing, so one step gives both
            self.result.samples.append(_window(lambda: self.step(None, clock), 1, device))
            self.spent.append(clock.seconds())
            return
        self.result.samples.append(_window(lambda: self.step(None, no_mark), STEPS, device))
        if self.rung.timed_by_phase:
            clock = PhaseClock(device)
            self.step(None, clock)
            self.spent.append(clock.seconds())

    def settle(self) -> None:
        """Medians, and what follows from them."""
        result = self.result
        result.seconds = statistics.median(result.samples)
        if self.spent:
            result.phases = {phase: statistics.median(s[phase] for s in self.spent) for phase in self.spent[0]}
        result.clips_per_second = result.batch / result.seconds
        result.k710_days = report.k710_days(result.clips_per_second)


def measure_model(
    model: str,
    batch: int,
    rungs: list[Rung],
    repeats: int,
    device: torch.device,
    gemm: dict[str, list[float]],
    known: list[Result] | None = None,
    save: Callable[[list[Result]], None] = lambda _results: None,
) -> list[Result]:
    """All rungs of one model and batch, the first of which is the reference of the losses.

    Those in `known` are not measured again; `save` is called after each other.
    """
    work = prepare(model, batch, device)
    seen = work.visible[0].numel()
    lean = costs.lean_flops(work.student, work.teacher, batch, seen)
    published = costs.published_flops(work.student, work.teacher, batch, seen)
    results = []
    before = {result.rung: result for result in known or () if (result.model, result.batch) == (model, batch)}
    for rung in rungs:
        if rung.name in before:
            results.append(before[rung.name])
            continue
        lacks = missing(rung, device)
        result = Result(model, batch, rung.name, rung.precision, lacks and f"not run: needs {lacks}")
        result.model_flops, result.flops = lean.total, (lean if rung.lean else published).by_phase()
        results.append(result)
    contenders: list[Contender] = []
    reference: list[float] = []
    for rung, result in zip(rungs, results, strict=True):
        if result.rung in before:
            reference = reference or result.losses
            continue
        if result.not_run is not None:
            continue
        print(f"{model} x {batch}: {rung.name} ...", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        contender: Contender | None = None
        try:
            contender = Contender(rung, work, result)
            if contender.check(reference):
                reference = reference or result.losses
                if not rung.timed:
                    result.not_run = "not timed: the reference of the losses"
                elif device.type == "cuda":
                    contender.warm_up()
                    _measure([contender], repeats, device, gemm)
                    result.peak_bytes = torch.cuda.max_memory_allocated(device)
                else:
                    contender.warm_up()
                    contenders.append(contender)
        except torch.OutOfMemoryError:
            result.not_run = "not run: out of memory"
        except Exception as error:  # a rung that breaks must not cost the others their measurement
            result.not_run = f"failed: {(str(error) or type(error).__name__).strip().splitlines()[0]}"
            traceback.print_exc()
        if device.type == "cuda":  # sound or not, it leaves the memory to the next
            del contender
            torch._dynamo.reset()
            gc.collect()
            save(results)
    _measure(contenders, repeats, device, gemm)
    return results


def _measure(contenders: list[Contender], repeats: int, device: torch.device, gemm: dict[str, list[float]]) -> None:
    """In turn, the matmul among them."""
    precisions = {contender.rung.precision for contender in contenders}
    for _ in range(repeats):
        for contender in contenders:
            contender.time_once()
        for precision in precisions:
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
            gemm.setdefault(precision, []).append(gemm_seconds(dtype, device))
    for contender in contenders:
        contender.settle()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: umt_b16, and umt_l16 on a GPU")
    parser.add_argument("--batch", nargs="+", type=whole_number_from(1), help="clips per step; default: 64, on a CPU 2")
    parser.add_argument("--rungs", nargs="+", help="names, as the table has them; default: all but the last")
    parser.add_argument("--fp8-student", action="store_true", help="the last rung, an experiment, too")
    parser.add_argument(
        "--repeats", type=whole_number_from(1), default=5, help="timings per rung, of which the median counts"
    )
    parser.add_argument("--videos", metavar="DATA", help="what is decoded, as --data.train; default: a few made ones")
    parser.add_argument(
        "--workers", type=whole_number_from(0), default=DataConfig().workers, help="that decode (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="keep what this commit has already measured there")
    parser.add_argument("--compare", type=Path, metavar="OLD.JSON", help="flag rungs that became over 5%% slower")
    parser.add_argument("--predict", choices=report.PREDICTED, help="estimate another GPU from a measurement")
    parser.add_argument("--from", dest="source", type=Path, help="the measurement to predict from; default: this run's")
    options = parser.parse_args(arguments)
    if options.predict and options.source is None and options.device == "cpu":
        parser.error(f"--predict {options.predict} starts from a GPU's times: give its step_time.json by --from")
    return options


def choose_rungs(options: argparse.Namespace, device: torch.device) -> list[Rung]:
    """Those asked for, the reference first: untimed where it was not asked for."""
    reference, *rungs = ladder(device)
    if not options.rungs:
        return [reference, *(rung for rung in rungs if options.fp8_student or not rung.fp8_student)]
    known = {rung.name: rung for rung in (reference, *rungs)}
    if unknown := [name for name in options.rungs if name not in known]:
        sys.exit(f"error: no rung {unknown[0]!r} on a {device.type}; there are {', '.join(known)}")
    if reference.name not in options.rungs:
        reference = replace(reference, timed=False)
    return [reference, *(known[name] for name in options.rungs if name != reference.name)]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Everything asked for, written into `folder` as it comes. Returns what step_time.json holds.

    Of several processes the first does so; the others decode and reduce with it first, and return None.
    """
    if options.videos:
        read_manifest(options.videos)  # a wrong name is told now
    folder.mkdir(parents=True, exist_ok=True)
    world = processes.start(options.device)
    device, rungs = world.device, choose_rungs(options, world.device)
    models = options.models or (["umt_b16", "umt_l16"] if device.type == "cuda" else ["umt_b16"])
    cases = [(model, batch) for model in models for batch in options.batch or [64 if device.type == "cuda" else 2]]
    content: dict[str, Any] = {
        **describe(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else report.cpu_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "gemm_flops_per_second": {},
        "copy_bytes_per_second": None,
        "beside": [],
        "results": [],
    }
    measured = previous(folder, content) if options.resume else {}
    try:
        beside_steps = measure_beside(options, cases, measured.get("beside", []), world)
    finally:
        world.close()
    if not world.main:
        return None
    content["beside"] = [asdict(found) for found in beside_steps]
    content["copy_bytes_per_second"] = report.copy_rate() if device.type == "cuda" else None
    rates = dict(measured.get("gemm_flops_per_second", {}))
    untimed = {rung.name for rung in rungs if not rung.timed}
    before = (Result(**result) for result in measured.get("results", []))
    done = [result for result in before if result.seconds or (result.losses and result.rung in untimed)]
    gemm: dict[str, list[float]] = {}
    results: list[Result] = []

    def save(latest: list[Result]) -> None:
        rates.update({name: 2 * GEMM_SIDE[device.type] ** 3 / statistics.median(took) for name, took in gemm.items()})
        written = [*results, *(result for result in latest if result.seconds or result.not_run)]
        for result in written:
            if result.seconds is not None:
                result.gemm_share = result.model_flops / result.seconds / rates[result.precision]
        content.update(gemm_flops_per_second=rates, results=[asdict(result) for result in written])
        (folder / "step_time.json").write_text(json.dumps(content, indent=1) + "\n")

    for model, batch in cases:
        latest = measure_model(model, batch, rungs, options.repeats, device, gemm, done, save)
        save(latest)
        results += latest
    report.write(content, folder)
    print(f"\nin {folder}: step_time.json, .md, .html and plots")
    return content


def measure_beside(
    options: argparse.Namespace, cases: list[tuple[str, int]], measured: list[dict[str, Any]], world: World
) -> list[Beside]:
    """What goes on beside the steps of each case; the first process tells which are known from before."""
    known = {(found.model, found.batch): found for found in (Beside(**found) for found in world.gather(measured)[0])}
    found = []
    for model, batch in cases:
        if (model, batch) not in known:
            if world.main:
                print(f"{model} x {batch}: decoding and all-reduce ...", flush=True)
            student, _ = MODELS[model]
            known[model, batch] = beside.measure(
                model, batch, student, options.videos, options.workers, options.repeats, world
            )
        found.append(known[model, batch])
    return found


def previous(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The measurement in `folder`, if it was taken on this device from this very commit."""
    path = folder / "step_time.json"
    if not path.exists():
        return {}
    found = report.read(path)
    same = all(found[key] == content[key] for key in ("device", "torch", "triton", "commit", "threads"))
    return found if same and not content["commit"].endswith("+") else {}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    content: dict[str, Any] | None
    before = report.read(options.compare) if options.compare else None  # which may be written over
    if options.source is not None:
        content = report.read(options.source)
    else:
        name = gpu_name(torch.cuda.get_device_name()) if options.device == "cuda" else "cpu"
        try:
            content = measure(options, options.out or RESULTS / name)
        except (RunError, OSError) as error:
            sys.exit(f"error: {error}")
        if content is None:
            return
    print(report.table(content))
    print(report.beside_table(content))
    if options.predict:
        print(report.predict(content, options.predict))
    complaints: list[str] = []
    if before is not None and (slower := report.regressions(before, content)):
        complaints += ["slower than before:", *slower]
    if options.source is None and (refused := report.refusals(content)):
        complaints += ["other losses than the reference:", *refused]
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()

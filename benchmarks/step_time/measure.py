"""Times of the rungs of one model at one batch. Each rung's losses are compared with the first rung's before timing.

On a CPU the rungs are timed in turn, one step each, so that both times of a ratio see the same load; on a GPU each rung
runs alone. Before timing, a rung makes 20 steps in its compiled and recorded form; if a loss differs from the float32
reference by more than the rung's tolerance, the rung is refused.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.step_time import report
from benchmarks.step_time.jobs import Job, Work
from benchmarks.step_time.ladder import Rung, TimedStep, missing
from benchmarks.step_time.memory import peak_on_cpu
from benchmarks.step_time.phases import PhaseClock, no_mark, wait_for

GEMM_SIDE = {"cuda": 8192, "cpu": 2048}
STEPS = 10
"""Steps on a GPU between two readings of the clock, so that its queue fills."""
CHECKED_STEPS = 20
"""Steps with compared losses: for a captured rung the warm-up, the recording and many replays."""


@dataclass
class RungResult:
    """One rung of one model at one batch. A missing figure is None, and `not_run` has the reason."""

    model: str
    batch: int
    rung: str
    precision: str
    not_run: str | None = None
    seconds: float | None = None
    """Median seconds of one step."""
    samples: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    """Median seconds of each phase; empty where the step is one graph."""
    clips_per_second: float | None = None
    peak_bytes: int | None = None
    """Peak bytes of the allocator: on a GPU of all its tensors, on a CPU from `memory.peak_on_cpu`."""
    model_flops: int = 0
    """Operations that the method needs (those of the lean step), the same on every rung."""
    flops: dict[str, int] = field(default_factory=dict)
    """Operations of this rung, by phase."""
    gemm_share: float | None = None
    """Share of the rate of a large matmul in the rung's precision, measured in the same run."""
    losses: list[float] = field(default_factory=list)
    """Losses of the first steps, from the same weights, clips and random choices on every rung."""
    loss_error: float | None = None
    """Largest difference of a loss from the reference at the same step; None for the reference."""
    loss_tolerance: float | None = None
    """Largest error allowed."""


def gemm_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one square matmul of random numbers."""
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

    def __init__(self, rung: Rung, work: Work, result: RungResult) -> None:
        self.rung, self.work, self.result = rung, work, result
        self.step: TimedStep = work.build(rung)
        self.spent: list[dict[str, float]] = []

    def check(self, reference: list[float], steps: int = CHECKED_STEPS) -> bool:
        """Make the first steps with the shared random choices; return whether the losses agree with `reference`.

        Without a reference the rung becomes the reference, if its losses are finite.
        """
        result, tolerance = self.result, self.rung.loss_tolerance
        result.losses = [float(self.step(True, no_mark)) for _ in range(steps)]
        errors = [abs(ours - theirs) for ours, theirs in zip(result.losses, reference or result.losses, strict=False)]
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
            loss = float(self.step(False, no_mark))
        if not math.isfinite(loss):  # the loss of the recorded step, if there is one
            raise ValueError(f"its loss is {loss} after the warm-up")

    def time_once(self) -> None:
        device = self.work.device
        clock = PhaseClock(device)
        if device.type == "cpu":  # its clock costs no time, so one step gives the total and the phases
            self.result.samples.append(_window(lambda: self.step(False, clock), 1, device))
            self.spent.append(clock.seconds())
            return
        self.result.samples.append(_window(lambda: self.step(False, no_mark), STEPS, device))
        if self.rung.timed_by_phase:
            clock = PhaseClock(device)
            self.step(False, clock)
            self.spent.append(clock.seconds())

    def settle(self) -> None:
        """Set the medians."""
        result = self.result
        result.seconds = statistics.median(result.samples)
        if self.spent:
            result.phases = {phase: statistics.median(s[phase] for s in self.spent) for phase in self.spent[0]}
        result.clips_per_second = result.batch / result.seconds


def measure_model(
    job: Job,
    model: str,
    batch: int,
    rungs: list[Rung],
    repeats: int,
    device: torch.device,
    gemm: dict[str, list[float]],
    known: list[RungResult] | None = None,
    save: Callable[[list[RungResult]], None] = lambda _results: None,
    checked_steps: int = CHECKED_STEPS,
    timed: bool = True,
) -> list[RungResult]:
    """All rungs of one model and batch; the first is the reference of the losses.

    Rungs in `known` are not measured again; `save` is called after each rung. Without `timed` only the losses of the
    first `checked_steps` steps are compared.
    """
    work = job.prepare(model, batch, device)
    before = {result.rung: result for result in known or () if (result.model, result.batch) == (model, batch)}
    results = [before.get(rung.name) or _new_result(work, rung, model, batch) for rung in rungs]
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
            if contender.check(reference, checked_steps):
                reference = reference or result.losses
                if not timed:
                    result.not_run = f"{report.CHECKED} over {len(result.losses)} step(s), not timed"
                elif not rung.timed:
                    result.not_run = "not timed: the reference of the losses"
                else:
                    contender.warm_up()
                    if device.type == "cuda":
                        _time_in_turn([contender], repeats, device, gemm)
                        result.peak_bytes = torch.cuda.max_memory_allocated(device)
                    else:
                        result.peak_bytes = peak_on_cpu(work, rung)
                        contenders.append(contender)
        except torch.OutOfMemoryError:
            result.not_run = "not run: out of memory"
        except Exception as error:  # the other rungs are still measured
            result.not_run = f"failed: {(str(error) or type(error).__name__).strip().splitlines()[0]}"
            traceback.print_exc()
        if device.type == "cuda":  # free the memory for the next rung
            del contender
            torch._dynamo.reset()
            gc.collect()
        if device.type == "cuda" or not timed:
            save(results)
    _time_in_turn(contenders, repeats, device, gemm, lambda: save(results))
    return results


def _new_result(work: Work, rung: Rung, model: str, batch: int) -> RungResult:
    lacks = missing(rung, work.device)
    result = RungResult(model, batch, rung.name, rung.precision, lacks and f"not run: needs {lacks}")
    lean = work.flops(lean=True)
    result.model_flops, result.flops = sum(lean.values()), lean if rung.lean else work.flops(lean=False)
    return result


def _time_in_turn(
    contenders: list[Contender],
    repeats: int,
    device: torch.device,
    gemm: dict[str, list[float]],
    after_round: Callable[[], None] = lambda: None,
) -> None:
    """Time one step of each contender in turn, and a large matmul of each precision, `repeats` times.

    Each round updates the medians, so an interrupted measurement keeps its finished rounds.
    """
    precisions = {contender.rung.precision for contender in contenders}
    for _ in range(repeats):
        for contender in contenders:
            contender.time_once()
        for precision in precisions:
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
            gemm.setdefault(precision, []).append(gemm_seconds(dtype, device))
        for contender in contenders:
            contender.settle()
        after_round()

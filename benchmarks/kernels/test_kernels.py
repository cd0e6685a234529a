"""Times every op: `make bench-kernels` on a GPU. Without one: tiny shapes through the reference, to see that it runs.

A contender whose numbers are wrong is refused before it is timed.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.kernels import timing
from benchmarks.kernels.case import Case
from benchmarks.kernels.cases import cases
from benchmarks.kernels.libraries import Unavailable
from benchmarks.kernels.published import Inputs
from benchmarks.kernels.shapes import TINY, UMT_B, UMT_L

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MODELS = (UMT_B, UMT_L) if ON_GPU else (TINY,)
TIMER = timing.EventTimer() if ON_GPU else time.perf_counter


def _parameters() -> Iterator[Any]:
    """Contenders of a case stand together: they share its inputs."""
    for case in itertools.chain.from_iterable(cases(shapes) for shapes in MODELS):
        for contender in case.contenders:
            name = f"{case.group} {contender}".replace(",", "").replace(" ", "_")
            mark = pytest.mark.benchmark(group=case.group, timer=TIMER, disable_gc=True)
            yield pytest.param(case, contender, id=name, marks=mark)


@functools.cache
def _copy_bandwidth() -> float:
    return timing.copy_bandwidth()


@functools.cache
def _environment() -> dict[str, str]:
    return environment.describe()


@functools.lru_cache(maxsize=1)
def _prepared(case: Case) -> tuple[list[Inputs], tuple[Tensor, ...]]:
    """Sets of inputs to rotate, and the right result of the first."""
    if ON_GPU:
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    count = timing.sets_needed(case.read) if ON_GPU else 2
    sets = [case.make(DEVICE) for _ in range(count)]
    return sets, case.truth(sets[0])


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Fill what torch.empty gives with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ops that are not deterministic: it is the filling that is wanted
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("case", "contender"), list(_parameters()))
def test_kernel(case: Case, contender: str, benchmark: Any) -> None:
    sets, truth = _prepared(case)
    try:
        run = case.run(contender)
        # Deterministic mode would have torch.compile compile twice, and other libraries take other paths.
        with fresh_memory_is_nan() if contender == "triton" else nullcontext():
            results = case.step(run, contender, sets[0])
    except Unavailable as reason:
        pytest.skip(str(reason))
    fault = case.fault(contender, results, truth)
    if fault is not None:
        pytest.fail(f"refused: {case.group}, {contender}: {fault}", pytrace=False)
    del results
    rotation = itertools.cycle(sets)

    def call() -> tuple[Tensor, ...]:
        return case.step(run, contender, next(rotation))

    benchmark.extra_info.update(facts(case, contender), **_environment())
    if not ON_GPU:
        benchmark.pedantic(call, rounds=2, iterations=1)
        return
    plan = timing.plan(call)
    assert isinstance(TIMER, timing.EventTimer)
    TIMER.lead(plan.lead)
    benchmark.pedantic(call, rounds=plan.rounds, iterations=plan.iterations, warmup_rounds=2)
    bandwidth = _copy_bandwidth()
    info = {"input_sets": len(sets), "host_seconds": plan.host_seconds, "copy_bytes_per_second": bandwidth}
    if benchmark.stats is not None:  # None if pytest-benchmark is disabled
        info["share_of_copy"] = case.least_bytes / benchmark.stats["median"] / bandwidth
    benchmark.extra_info.update(info)


def facts(case: Case, contender: str) -> dict[str, Any]:
    """What a result needs to be understood alone."""
    shapes = case.shapes
    return {
        "op": case.op,
        "form": case.form,
        "direction": case.direction,
        "model": shapes.model,
        "contender": contender,
        "batch": shapes.batch,
        "dtype": str(shapes.dtype).removeprefix("torch."),
        "shapes": {name: list(x.shape) for name, x in _prepared(case)[0][0].items()},
        "least_bytes": case.least_bytes,
        "flops": case.flops,
        "interpreted": os.environ.get("TRITON_INTERPRET", "0") == "1",
    }

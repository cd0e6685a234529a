"""The cases of `python -m benchmarks.kernels` for pytest-benchmark, with its options to compare, filter and save them.

    pytest benchmarks/kernels --benchmark-autosave          # then, after a change: --benchmark-compare
    pytest benchmarks/kernels -k "pixel_loss and triton"

One iteration is a batch of calls with one synchronisation at its end, so the time of a short GPU kernel may be its
launch on the host; `python -m benchmarks.kernels` uses the GPU's own clock. A contender with wrong results fails and is
not timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels.case import OpCase
from benchmarks.kernels.cases import cases
from benchmarks.kernels.libraries import Unavailable
from benchmarks.kernels.shapes import TINY, UMT_B, UMT_L

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = (UMT_B, UMT_L) if DEVICE.type == "cuda" else (TINY,)
ROUNDS, CALLS = (20, 50) if DEVICE.type == "cuda" else (2, 1)


def _parameters() -> Iterator[Any]:
    """All contenders, those of a case next to each other, as they share its inputs."""
    for case in itertools.chain.from_iterable(cases(shapes) for shapes in MODELS):
        for contender in case.contenders:
            name = f"{case.group} {contender}".replace(",", "").replace(" ", "_")
            yield pytest.param(case, contender, id=name, marks=pytest.mark.benchmark(group=case.group, disable_gc=True))


@pytest.mark.parametrize(("case", "contender"), list(_parameters()))
def test_kernel(case: OpCase, contender: str, benchmark: Any) -> None:
    sets, truth = kernels.prepared(case, DEVICE)
    try:
        run = case.run(contender)
        results = case.step(run, contender, sets[0])
    except Unavailable as reason:
        pytest.skip(str(reason))
    fault = case.fault(contender, results, truth)
    if fault is not None:
        pytest.fail(f"refused: {case.group}, {contender}: {fault}", pytrace=False)
    del results
    rotation = itertools.cycle(sets)

    def calls() -> None:
        for _ in range(CALLS):
            case.step(run, contender, next(rotation))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(calls_per_iteration=CALLS, least_bytes=case.least_bytes, flops=case.flops)
    benchmark.pedantic(calls, rounds=ROUNDS, iterations=1, warmup_rounds=1)

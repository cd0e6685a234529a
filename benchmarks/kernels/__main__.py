"""Time of every op of umt_kernels, its published eager form, torch.compile and other libraries' kernels.

    python -m benchmarks.kernels                            # on a GPU, UMT-B/16 and UMT-L/16: minutes
    python -m benchmarks.kernels --resume --out DIR         # measures what DIR/kernels.json lacks
    python -m benchmarks.kernels --check                    # results only: each op once against float64

A contender with wrong results is refused, and the command exits with 1. kernels.json is written after each contender;
kernels.md and kernels.png at the end. Without a GPU the plain PyTorch forms run with tiny shapes, to try the command.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import RESULTS, describe, gpu_name
from benchmarks.kernels import report, timing
from benchmarks.kernels.case import OpCase
from benchmarks.kernels.cases import cases
from benchmarks.kernels.libraries import Unavailable
from benchmarks.kernels.published import Inputs
from benchmarks.kernels.report import KernelTime
from benchmarks.kernels.shapes import TINY, UMT_B, UMT_L

MODELS = {shapes.model: shapes for shapes in (UMT_B, UMT_L, TINY)}


@functools.lru_cache(maxsize=1)
def prepared(case: OpCase, device: torch.device) -> tuple[list[Inputs], tuple[Tensor, ...]]:
    """Sets of inputs to rotate, and the right result of the first. The last case is cached for its next contender."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    count = timing.sets_needed(case.read) if device.type == "cuda" else 2
    sets = [case.make(device) for _ in range(count)]
    return sets, case.truth(sets[0])


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Inside this context torch.empty gives NaN, which shows elements that a kernel does not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about non-deterministic ops: only the fill value matters here
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def measure(case: OpCase, contender: str, device: torch.device, check: bool) -> KernelTime:
    """Check a contender's results, then time it unless `check`. Errors are in `not_run` of the returned time."""
    found = KernelTime(
        case.op,
        case.form,
        case.direction,
        case.shapes.model,
        contender,
        case.shapes.batch,
        case.least_bytes,
        case.flops,
    )
    try:
        sets, truth = prepared(case, device)
        run = case.run(contender)
        # In deterministic mode torch.compile would compile twice, and other libraries would run other code.
        with fresh_memory_is_nan() if contender == "triton" else nullcontext():
            results = case.step(run, contender, sets[0])
        fault = case.fault(contender, results, truth)
        if fault is not None:
            found.not_run = f"{report.REFUSED}: {fault}"
        elif check:
            found.not_run = report.CHECKED
        else:
            del results
            rotation = itertools.cycle(sets)
            found.seconds = timing.median_seconds(lambda: case.step(run, contender, next(rotation)), device)
    except Unavailable as reason:
        found.not_run = f"not run: {reason}"
    except Exception as error:  # the other contenders are still measured
        found.not_run = f"failed: {(str(error) or type(error).__name__).strip().splitlines()[0]}"
    return found


def run(options: argparse.Namespace, path: Path | None) -> report.Content:
    """Measure every requested contender of every case, and write each to `path`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {**describe(), "date": time.strftime("%Y-%m-%d"), "copy_bytes_per_second": None}
    content: report.Content = {"facts": facts, "results": []}
    if options.resume and path is not None and path.exists():
        before = report.read(path)
        if all(before["facts"].get(key) == facts[key] for key in ("device", "torch", "triton", "sources")):
            content = before
    facts = content["facts"]
    final = [found for found in map(report.load, content["results"]) if found.is_final(options.check)]
    content["results"], done = [asdict(found) for found in final], {report.key_of(found) for found in final}
    if device.type == "cuda" and facts["copy_bytes_per_second"] is None:
        facts["copy_bytes_per_second"] = timing.copy_bandwidth()
    for case in itertools.chain.from_iterable(cases(MODELS[model]) for model in options.models):
        if options.ops and case.op not in options.ops:
            continue
        for contender in ["triton"] if options.check else case.contenders:
            if (report.key(case), contender) in done:
                continue
            found = measure(case, contender, device, options.check)
            outcome = f"{1e6 * found.seconds:.1f} us" if found.seconds else found.not_run
            print(f"{case.group}, {contender}: {outcome}", flush=True)
            content["results"].append(asdict(found))
            if path is not None:
                path.write_text(json.dumps(content, indent=1) + "\n")
    return content


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    default = [UMT_B.model, UMT_L.model] if on_gpu else [TINY.model]
    ops = sorted({case.op for case in cases(TINY)})
    parser.add_argument("--models", nargs="+", choices=MODELS, default=default, help="default: both, on a CPU tiny")
    parser.add_argument("--ops", nargs="+", choices=ops, help="default: all")
    parser.add_argument("--check", action="store_true", help="check the numbers of the ops once, time nothing")
    parser.add_argument("--resume", action="store_true", help="keep what these sources have already measured there")
    parser.add_argument("--out", type=Path, help="folder of the results; default on a GPU: benchmarks/results/<gpu>")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    folder = options.out
    if folder is None and torch.cuda.is_available() and not options.check:
        folder = RESULTS / gpu_name(torch.cuda.get_device_name())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    content = run(options, folder / "kernels.json" if folder else None)
    if not options.check:
        print(report.table(content))
    if folder is not None and not options.check:
        report.write(content, folder)
    refused = [found for found in content["results"] if (found["not_run"] or "").startswith((report.REFUSED, "failed"))]
    if refused:
        lines = [f"{f['op']} ({f['form']}) {f['direction']}, {f['contender']}: {f['not_run']}" for f in refused]
        sys.exit("\n".join(["wrong or failed:", *lines]))


if __name__ == "__main__":
    main()

"""Time of a training step, rung by rung from the published step to the fastest one.

    python -m benchmarks.step_time                          # every rung that runs here, both models on a GPU
    python -m benchmarks.step_time --job finetune           # another job, with its own plain baseline
    python -m benchmarks.step_time --rungs "baseline" "+ lean math" --repeats 5
    python -m benchmarks.step_time --compare old.json       # exits with 1 if a rung is over 5% slower
    python -m benchmarks.step_time --predict a100           # by arithmetic, without a GPU; see prediction.py
    torchrun --nproc-per-node 8 -m benchmarks.step_time --videos list.csv     # with all-reduce, on your own videos

Writes step_time.json, .md and .html and two plots to benchmarks/results/<gpu or cpu>/<job>, or --out. Times are medians
(see measure.py). Exits with 1 if a rung's losses differ from the reference's. Decoding and the all-reduce overlap with
a step: all processes time them separately (overlap.py), and then the first process times the steps alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, describe, gpu_name
from benchmarks.rates import GPUS
from benchmarks.step_time import overlap, page, prediction, report
from benchmarks.step_time.jobs import JOBS, Job
from benchmarks.step_time.ladder import Rung
from benchmarks.step_time.measure import CHECKED_STEPS, GEMM_SIDE, RungResult, measure_model
from benchmarks.step_time.overlap import Overlap
from umt_fast.config import DataConfig
from umt_fast.data.manifest import read_manifest
from umt_fast.errors import RunError
from umt_fast.run import world as processes
from umt_fast.run.world import World


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.step_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--job", choices=JOBS, default="pretrain", help="default %(default)s")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu", help="default here: %(default)s"
    )
    parser.add_argument("--models", nargs="+", help="default: all sizes on a GPU, the smallest on a CPU")
    parser.add_argument("--batch", nargs="+", type=int, help="clips per step; default: the job's, 64 and on a CPU 2")
    parser.add_argument("--rungs", nargs="+", help="names, as the table has them; default: all but + fp8 student")
    parser.add_argument("--fp8-student", action="store_true", help="the rung + fp8 student too, an experiment")
    parser.add_argument("--repeats", type=int, default=5, help="timings per rung, of which the median counts")
    parser.add_argument("--videos", metavar="DATA", help="videos to decode, as --data.train; default: synthetic ones")
    parser.add_argument("--no-decoding", action="store_true", help="do not time decoding and the all-reduce")
    parser.add_argument(
        "--workers", type=int, default=DataConfig().workers, help="processes that decode (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="keep what these sources have already measured there")
    parser.add_argument("--check-only", type=int, metavar="N", help="N steps per rung, losses compared, nothing timed")
    parser.add_argument("--checked-steps", type=int, default=CHECKED_STEPS, help="steps compared first (%(default)s)")
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile; aot_eager: a quick try")
    parser.add_argument("--compare", type=Path, metavar="OLD.JSON", help="flag rungs that became over 5%% slower")
    parser.add_argument("--predict", choices=GPUS, help="predict a GPU's step times; measure nothing")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="JSON",
        help="a measurement to report on, or to compare with --predict",
    )
    options = parser.parse_args(arguments)
    job = JOBS[options.job]
    if options.predict and options.job != "pretrain":
        parser.error(f"--predict: the kernels of {options.job} are not listed; only those of pretrain are")
    if options.models is None:
        options.models = [*job.models[:-1]] if options.device == "cuda" or options.predict else [job.models[0]]
    if unknown := [name for name in options.models if name not in job.models]:
        parser.error(f"--models {unknown[0]}: the job {options.job} has {', '.join(job.models)}")
    for name, least in (("batch", 1), ("repeats", 1), ("workers", 0), ("check_only", 1), ("checked_steps", 1)):
        given = getattr(options, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < least:
                parser.error(f"--{name.replace('_', '-')} {number}: must be an integer >= {least}")
    return options


def choose_rungs(options: argparse.Namespace, device: torch.device) -> list[Rung]:
    """The reference, then the requested rungs. With --rungs the reference is timed only if --rungs names it."""
    reference, *rungs = (replace(rung, backend=options.compile_backend) for rung in JOBS[options.job].ladder(device))
    if not options.rungs:
        return [reference, *(rung for rung in rungs if options.fp8_student or not rung.fp8_student)]
    known = {rung.name: rung for rung in (reference, *rungs)}
    if unknown := [name for name in options.rungs if name not in known]:
        sys.exit(f"error: no rung {unknown[0]!r} on a {device.type}; there are {', '.join(known)}")
    if reference.name not in options.rungs:
        reference = replace(reference, timed=False)
    return [reference, *(known[name] for name in options.rungs if name != reference.name)]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Measure all requests, write each result to `folder`, and return the content of step_time.json.

    With several processes all decode and reduce; then the first measures the steps, and the others return None.
    """
    if options.videos:
        read_manifest(options.videos)  # to fail early for a wrong name
    folder.mkdir(parents=True, exist_ok=True)
    world = processes.start(options.device)
    device, job = world.device, JOBS[options.job]
    rungs, on_gpu = choose_rungs(options, device), device.type == "cuda"
    batches = options.batch or [job.batch if on_gpu else job.cpu_batch]
    cases = [(model, batch) for model in options.models for batch in batches]
    content: dict[str, Any] = {
        **describe(),
        "job": options.job,
        "device": torch.cuda.get_device_name() if on_gpu else report.cpu_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "gemm_flops_per_second": {},
        "copy_bytes_per_second": None,
        "beside": [],
        "results": [],
    }
    measured = previous(folder, content) if options.resume else {}
    try:
        if job.student is not None and not (options.no_decoding or options.check_only):
            content["beside"] = measure_overlap(options, job, cases, measured.get("beside", []), world)
    finally:
        world.close()
    if not world.main:
        return None
    content["copy_bytes_per_second"] = report.copy_rate() if on_gpu else None
    rates = dict(measured.get("gemm_flops_per_second", {}))
    untimed = {rung.name for rung in rungs if not rung.timed}
    before = [RungResult(**result) for result in measured.get("results", [])]
    done = [r for r in before if r.seconds or (r.losses and (r.rung in untimed or options.check_only))]
    order = [rung.name for rung in job.ladder(device)]
    gemm: dict[str, list[float]] = {}
    results: list[RungResult] = []

    def save(latest: list[RungResult]) -> None:
        rates.update({name: 2 * GEMM_SIDE[device.type] ** 3 / statistics.median(took) for name, took in gemm.items()})
        written = [*results, *(result for result in latest if result.seconds or result.not_run)]
        listed = {(result.model, result.batch, result.rung) for result in (*results, *latest)}
        written += [result for result in before if (result.model, result.batch, result.rung) not in listed]
        written.sort(key=lambda result: (job.models.index(result.model), result.batch, order.index(result.rung)))
        for result in written:
            if result.seconds is not None:
                result.gemm_share = result.model_flops / result.seconds / rates[result.precision]
        content.update(gemm_flops_per_second=rates, results=[asdict(result) for result in written])
        (folder / "step_time.json").write_text(json.dumps(content, indent=1) + "\n")

    for model, batch in cases:
        latest = measure_model(
            job,
            model,
            batch,
            rungs,
            options.repeats,
            device,
            gemm,
            done,
            save,
            options.check_only or options.checked_steps,
            not options.check_only,
        )
        save(latest)
        results += latest
    page.write(content, folder)
    print(f"\nin {folder}: step_time.json, .md, .html and plots")
    return content


def measure_overlap(
    options: argparse.Namespace, job: Job, cases: list[tuple[str, int]], measured: list[dict[str, Any]], world: World
) -> list[dict[str, Any]]:
    """Decoding and all-reduce of each case, except those in `measured`, the list of the first process."""
    assert job.student is not None
    known = {(found.model, found.batch): found for found in (Overlap(**found) for found in world.gather(measured)[0])}
    found = []
    for model, batch in cases:
        if (model, batch) not in known:
            if world.main:
                print(f"{model} x {batch}: decoding and all-reduce ...", flush=True)
            known[model, batch] = overlap.measure(
                model, batch, job.student(model), options.videos, options.workers, options.repeats, world
            )
        found.append(asdict(known[model, batch]))
    return found


def previous(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The measurement in `folder`, if it has the same job, device, versions, threads and sources."""
    path = folder / "step_time.json"
    if not path.exists():
        return {}
    found = report.read(path)
    same = all(found.get(key) == content[key] for key in ("job", "device", "torch", "triton", "sources", "threads"))
    return found if same else {}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    content: dict[str, Any] | None
    if options.predict:
        found = report.read(options.source) if options.source else prediction.find_measurement(options.predict)
        for batch in options.batch or [JOBS["pretrain"].batch]:
            print(prediction.predict(options.predict, options.models, batch, found))
        return
    before = report.read(options.compare) if options.compare else None  # read first: the results may overwrite it
    if options.source is not None:
        content = report.read(options.source)
    else:
        name = gpu_name(torch.cuda.get_device_name()) if options.device == "cuda" else "cpu"
        try:
            content = measure(options, options.out or RESULTS / name / options.job)
        except (RunError, OSError) as error:
            sys.exit(f"error: {error}")
        if content is None:
            return
    print(report.table(content))
    print(report.overlap_table(content))
    complaints: list[str] = []
    if before is not None and (slower := report.regressions(before, content)):
        complaints += ["slower than before:", *slower]
    if options.source is None and (refused := report.refusals(content)):
        complaints += ["other losses than the reference:", *refused]
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()

"""Clips per second of data loading, from original videos and from training copies, and its cost in memory.

    python -m benchmarks.input_pipeline VIDEOS --out benchmarks/results/<machine>

VIDEOS is a list or folder as for --data.train. From VIDEOS the benchmark makes originals like those of data sets (10 s,
340x256, 30 fps, H.264 with a key frame every 250, looped if short), and from these `umt_fast.data.prepare` makes copies
with a key frame every 1, 4 and 8 frames. With --as-they-are, VIDEOS are the originals. The contenders are

    bare          PyAV alone: seek, decode and convert a clip's frames to RGB, in the same number of processes
    bare + crop   the same with one crop and torch's resize of each frame, into the clip's memory
    pyav          the loader of a training run, crops and resizing included
    dali          the same with DALI, where it is installed, for the files that it supports: on NVDEC with --pipelines
                  pipelines, or on the CPU

Every contender runs in turn, --rounds times; the table has medians. With the clips per second of a training step
(--step-rate, or --step-from a step_time.json), it also has the share of time that the step would wait for data.
--soak N records the memory over N clips instead.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.environment import describe
from benchmarks.input_pipeline import cost, report
from benchmarks.input_pipeline.contenders import FRAMES, Row, loader_of, measure_bare, measure_loader
from benchmarks.input_pipeline.files import Files, make_copies, make_originals, read_files
from benchmarks.step_time.jobs.pretrain import MODELS
from umt_fast.data import synthetic
from umt_fast.data.dali_loader import DaliSupport
from umt_fast.data.decode import nvdec
from umt_fast.data.decode.choice import choose_decoder, has_dali
from umt_fast.data.decode.container import look_up
from umt_fast.data.manifest import read_manifest
from umt_fast.errors import RunError


def soaked(files: Files, device: torch.device) -> list[str]:
    """The decoders whose memory these files test: copies of key frames only, in a codec that DALI supports here."""
    if files.gop > 1:
        return []
    by_dali = files.codec == "h264" if device.type == "cuda" else files.codec == "mjpeg"
    return ["pyav"] * (files.codec == "h264") + ["dali"] * (by_dali and has_dali())


def soak(files: Files, decoder: str, workers: int, clips: int, batch: int, device: torch.device) -> dict[str, float]:
    """Memory in MB over `clips` clips: after a tenth of them, then the minimum and maximum, and at the end.

    Pages of program files are not counted.
    """
    seen: list[float] = []
    with loader_of(files, decoder, workers, batch, device) as loader:
        for number in range(1, clips // batch + 1):
            next(loader)
            if number >= clips // batch // 10 and number % max(clips // batch // 100, 1) == 0:
                seen.append(cost.memory(cost.NO_FILES))
    return {"after a tenth": seen[0], "least": min(seen), "most": max(seen), "end": seen[-1]}


def plan_rows(
    files: list[Files], workers: list[int], pipelines: list[int] | None, engines: dict[str, nvdec.Limits] | None
) -> list[Row]:
    """The contenders. `engines` are NVDEC's limits; None for DALI on the CPU. Files that DALI does not support have no
    row for DALI."""
    rows = []
    for kept in files:
        rows += [Row(kept.name, decoder, count) for decoder in ("bare", "bare + crop", "pyav") for count in workers]
        if not has_dali() or any(DaliSupport(engines).why_not(look_up(video)) for video in kept.known):
            continue
        if engines is None:
            rows += [Row(kept.name, "dali", count) for count in workers]
        else:
            counts = pipelines or sorted({1, nvdec.count_engines(engines)})
            rows += [Row(kept.name, "dali", max(workers), count) for count in counts]
    return rows


def run(options: argparse.Namespace, device: torch.device, work: Path) -> tuple[list[Files], list[Row]]:
    files = make_files(options, work)
    engines = choose_decoder("dali", device).engines if has_dali() else None
    rows = plan_rows(files, options.workers, options.pipelines, engines)
    by_name = {kept.name: kept for kept in files}
    memory: dict[int, list[float]] = {id(row): [] for row in rows}
    for number in range(options.rounds):
        for row in rows:
            kept = by_name[row.files]
            if row.decoder.startswith("bare"):
                rate, used = measure_bare(kept, row.workers, options.seconds, crop=row.decoder == "bare + crop")
            else:
                rate, used, row.gpu_memory_mb, row.nvdec_percent = measure_loader(
                    kept, row, options.seconds, options.batch, device
                )
            row.rounds.append(rate)
            memory[id(row)].append(used)
            progress = f"round {number + 1}: {row.files:<12} {row.decoder:<11} x{row.workers:<3} {rate:8.1f} clips/s"
            print(progress if row.pipelines is None else f"{progress}, {row.pipelines} pipelines", file=sys.stderr)
    for row in rows:
        row.clips_per_second = statistics.median(row.rounds)
        row.memory_mb = statistics.median(memory[id(row)])
    return files, rows


SYNTHETIC_VIDEOS = 8


def make_files(options: argparse.Namespace, work: Path) -> list[Files]:
    original = options.videos
    if original is None:
        (work / "synthetic").mkdir()
        original = options.videos = str(synthetic.write_videos(work / "synthetic", SYNTHETIC_VIDEOS))
    if not options.as_they_are:
        original = work / "original"
        original.mkdir()
        make_originals(read_manifest(options.videos), original)
    files = [read_files("original", original)]
    copies = [("h264", gop) for gop in (8, 4, 1)]
    if has_dali():
        copies += [("vp9", 4), ("mjpeg", 1)]
    for codec, gop in copies:
        folder = work / f"{codec}-{gop}"
        make_copies(original, folder, codec, gop)
        files.append(read_files(f"{codec} gop {gop}", folder))
    return files


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.input_pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", nargs="?", help="as --data.train; default: synthetic ones, far easier than real ones")
    parser.add_argument(
        "--out", type=Path, help="folder for input_pipeline.json, .md and .png; without it, a table only"
    )
    parser.add_argument("--as-they-are", action="store_true", help="VIDEOS are the originals; none are made")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), help="processes")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, by turns (default 3)")
    parser.add_argument("--batch", type=int, default=8, help="clips")
    parser.add_argument("--pipelines", type=int, nargs="+", help="of DALI on a GPU; default: one, and one per NVDEC")
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--step-rate", type=float, metavar="CLIPS_PER_SECOND", help="what a training step takes")
    step.add_argument("--step-from", type=Path, metavar="FILE", help="a step_time.json: its fastest exact rung")
    parser.add_argument("--step-model", choices=MODELS, default="umt_b16", help="whose, in that; default %(default)s")
    parser.add_argument("--soak", type=int, metavar="CLIPS", help="watch the memory of each decoder instead")
    options = parser.parse_args(arguments)
    for name in ("workers", "seconds", "rounds", "batch", "pipelines", "step_rate", "soak"):
        given = getattr(options, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and not number > 0:  # NaN included
                parser.error(f"--{name.replace('_', '-')} {number:g}: must be above 0")
    if options.soak is not None and options.soak < options.batch:
        parser.error(
            f"--soak {options.soak} is less than one batch of {options.batch}; give more, or a smaller --batch"
        )
    return options


def measure(options: argparse.Namespace) -> None:
    """Measure, print and write what the options request."""
    step_rate, step_name = options.step_rate, "as given"
    if options.step_from is not None:
        step_rate, step_name = report.read_step(options.step_from, options.step_model)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="input-pipeline-") as work:
        if options.soak is not None:
            for kept in make_files(options, Path(work)):
                for decoder in soaked(kept, device):
                    watched = soak(kept, decoder, options.workers[-1], options.soak, options.batch, device)
                    figures = ", ".join(f"{name} {value:.0f}" for name, value in watched.items())
                    print(f"{decoder}, {kept.name}, {options.soak} clips, MB: {figures}")
            return
        files, rows = run(options, device, Path(work))
    facts: dict[str, object] = {**describe(), "processors": os.cpu_count()}
    if step_rate is not None:
        facts |= {"step": step_name, "step_clips_per_second": round(step_rate, 2)}
    stored = {kept.name: {"codec": kept.codec, "gop": kept.gop, "bytes": kept.bytes_per_video} for kept in files}
    content = {"facts": facts, "frames": FRAMES, "files": stored, "rows": [asdict(row) for row in rows]}
    print(report.table(content))
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    if options.out:
        report.write(content, options.out)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        measure(options)
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""How many clips a second the data side delivers, from original videos and from training copies, and at what cost.

    python -m benchmarks.input_pipeline VIDEOS --out benchmarks/results/<machine>

VIDEOS is what --data.train takes. They are first made into originals as data sets hold them (10 s, 340x256, 30 fps,
H.264 with a key frame every 250, looped to fill), from which `umt_fast.data.prepare` makes copies with a key frame
every 1, 4 and 8 frames; --as-they-are takes VIDEOS for the originals. Measured are

    bare    PyAV alone: seek, decode and convert to RGB the frames that a clip needs, in as many processes
    pyav    the loader of a training run, crops and resizing included
    dali    likewise with DALI, where it is installed: on NVDEC, or on the CPU for the VP9 and MJPEG copies

Every contender runs in turn, --rounds times; the table holds medians. Then a step of a model is timed on this device,
and the table tells for how much of its time it would wait for data. --soak N watches the memory over N clips instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

import umt_fast
from benchmarks.kernels.environment import describe
from umt_fast.config import STUDENTS, TEACHERS, DataConfig, OptimConfig
from umt_fast.data import pyav
from umt_fast.data.decoder import has_dali, open_loader
from umt_fast.data.index import Video, VideoList
from umt_fast.data.loader import Loader
from umt_fast.data.manifest import read_manifest
from umt_fast.data.stream import ClipStream
from umt_fast.masking import count_visible
from umt_fast.optim import build_optimizer

FRAMES, SIDE = 8, 224
SECONDS, FPS, SIZE, GOP = 10, 30, (340, 256), 250


@dataclass(frozen=True)
class Files:
    """One way of keeping the videos."""

    name: str
    codec: str
    gop: int
    videos: VideoList
    bytes_per_video: float


@dataclass
class Row:
    """A contender and what it delivered."""

    files: str
    decoder: str
    workers: int
    clips_per_second: float = 0.0
    memory_mb: float = 0.0
    """Of all its processes, what they share counted once."""
    gpu_memory_mb: float | None = None
    nvdec_percent: float | None = None
    rounds: list[float] = field(default_factory=list)

    @property
    def frames_per_second(self) -> float:
        return self.clips_per_second * FRAMES


def make_originals(sources: VideoList, folder: Path) -> None:
    """Write each source as a 10 s video: played forwards and backwards until it is long enough."""
    for number, source in enumerate(sources):
        pictures = pyav.read_frames(source, lambda count: range(min(count, SECONDS * FPS)))
        looped = pictures + pictures[-2:0:-1]
        with av.open(str(folder / f"{number:03d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "g": str(GOP)})
            stream.width, stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            for place in range(SECONDS * FPS):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(looped[place % len(looped)]), "rgb24")
                container.mux(stream.encode(picture.reformat(*SIZE, format="yuv420p")))
            container.mux(stream.encode())


def prepare(source: Path | str, folder: Path, codec: str, gop: int) -> None:
    """Make copies with the command that users have."""
    command = [sys.executable, "-m", "umt_fast.data.prepare", str(source), str(folder)]
    subprocess.run([*command, "--codec", codec, "--gop", str(gop)], check=True)


def read_files(name: str, codec: str, gop: int, source: Path | str) -> Files:
    videos = read_manifest(str(source))
    size = statistics.mean(os.path.getsize(v.path) if v.size is None else v.size for v in videos)
    return Files(name, codec, gop, videos, size)


def stream_of(files: Files, decoder: str, workers: int) -> ClipStream:
    config = DataConfig(workers=workers, decoder=decoder)  # type: ignore[arg-type]
    return ClipStream(files.videos, config, FRAMES, SIDE, seed=0)


# The contenders.


def decode_bare(video: Video, indices: list[int]) -> None:
    """PyAV and nothing else. Times and key frames are known beforehand, as to whoever decodes all frames in turn."""
    assert video.facts is not None
    times, keys = video.facts.times, video.facts.keys
    with av.open(video.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        decoder = container.decode(stream)
        to_rgb = VideoReformatter()
        at: int | None = None
        for index in indices:
            key = int(keys[np.searchsorted(keys, times[index], "right") - 1])
            if at is None or key > at:
                container.seek(key, stream=stream)
                decoder = container.decode(stream)
            for frame in decoder:
                at = frame.pts
                if at is not None and at >= times[index]:
                    to_rgb.reformat(frame, format="rgb24", **pyav.ONE_THREAD).to_ndarray()
                    break


def _bare_worker(
    stream: ClipStream, videos: list[Video], rank: int, workers: int, seconds: float, done: object
) -> None:
    clips = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        index, rng = next(stream.attempts(rank + clips * workers))
        facts = videos[index].facts
        assert facts is not None
        decode_bare(videos[index], stream.draw_frames(facts.frames, rng))
        clips += 1
    done.put((clips / (time.perf_counter() - begun), _own_memory()))  # type: ignore[attr-defined]


def measure_bare(files: Files, workers: int, seconds: float) -> tuple[float, float]:
    """Clips per second and memory of `workers` processes that each run `decode_bare` in a loop."""
    stream = stream_of(files, "pyav", workers)
    videos = [video if video.facts else replace(video, facts=pyav.probe(video)) for video in files.videos]
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    processes = [
        context.Process(target=_bare_worker, args=(stream, videos, rank, workers, seconds, done))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    found = [done.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(rate for rate, _ in found), sum(memory for _, memory in found)


@contextlib.contextmanager
def loader_of(files: Files, decoder: str, workers: int, batch: int, device: torch.device) -> Iterator[Loader]:
    stream = stream_of(files, decoder, workers)
    loader = open_loader(stream, device, lambda _text: None, start=0, batches=10**9, batch_size=batch)
    with loader:
        yield loader


def measure_loader(
    files: Files, decoder: str, workers: int, seconds: float, batch: int, device: torch.device
) -> tuple[float, float, float | None, float | None]:
    """Clips per second, memory of the processes, GPU memory and NVDEC use, once what was made ready is used up."""
    with loader_of(files, decoder, workers, batch, device) as loader:
        ready = 2 + workers * DataConfig().prefetch
        for _ in range(ready):
            next(loader)
        begun = time.perf_counter()
        clips = 0
        use: list[float] = []
        while (spent := time.perf_counter() - begun) < seconds:
            clips += sum(len(next(loader).clip) for _ in range(workers))  # they deliver in turn: one round
            if device.type == "cuda" and len(use) < spent:  # once a second
                use.append(_nvdec_use())
        rate = clips / (time.perf_counter() - begun)
        return rate, _memory(), _gpu_memory(device), statistics.mean(use) if use else None


def step_rate(name: str, device: torch.device, batch: int, steps: int = 5) -> float:
    """Clips per second of a training step of UMT `name`, random weights, on clips that are there already."""
    student_config, teacher_config = STUDENTS[name], TEACHERS[{"umt_b16": "clip_b16", "umt_l16": "clip_l14"}[name]]
    student = umt_fast.VideoStudent(student_config).to(device)
    teacher = umt_fast.ClipTeacher(teacher_config).to(device).eval()
    optimizer = build_optimizer(student, OptimConfig())
    clip = torch.randint(256, (batch, FRAMES, SIDE, SIDE, 3), dtype=torch.uint8, device=device)
    num_visible = count_visible(student_config.grid**2, 0.8)
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            out = umt_fast.alignment_step(student, teacher, clip, num_visible)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        out.loss.item()
        seconds.append(time.perf_counter() - begun)
    return batch / statistics.median(seconds[1:])


# What it costs.


def _own_memory(process: int | str = "self") -> float:
    """MB of a process, its part of what it shares."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def _memory() -> float:
    """MB of this process and those it started."""
    processes = [process.pid for process in multiprocessing.active_children()]
    return _own_memory() + sum(_own_memory(process) for process in processes if process is not None)


def _gpu_memory(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**20


def _nvdec_use() -> float:
    query = ["nvidia-smi", "--query-gpu=utilization.decoder", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def soaked(files: Files, device: torch.device) -> list[str]:
    """The decoders whose memory these files show: copies with key frames alone, of a codec that DALI takes here."""
    if files.gop != 1:
        return []
    by_dali = files.codec == "h264" if device.type == "cuda" else files.codec == "mjpeg"
    return ["pyav"] * (files.codec == "h264") + ["dali"] * (by_dali and has_dali())


def soak(files: Files, decoder: str, workers: int, clips: int, batch: int, device: torch.device) -> dict[str, float]:
    """Memory in MB over `clips` clips: when a tenth of them is through, the least and the most after that, the end."""
    seen: list[float] = []
    with loader_of(files, decoder, workers, batch, device) as loader:
        for number in range(1, clips // batch + 1):
            next(loader)
            if number >= clips // batch // 10 and number % max(clips // batch // 100, 1) == 0:
                seen.append(_memory())
    return {"after a tenth": seen[0], "least": min(seen), "most": max(seen), "end": seen[-1]}


# The report.


def run(options: argparse.Namespace, device: torch.device, work: Path) -> tuple[list[Files], list[Row]]:
    files = make_files(options, work)
    rows = [
        Row(kept.name, decoder, workers)
        for kept in files
        for decoder in ("bare", "pyav", "dali")
        for workers in options.workers
        if decoder != "dali" or (has_dali() and (device.type == "cuda" or kept.codec in ("vp9", "mjpeg")))
    ]
    by_name = {kept.name: kept for kept in files}
    memory: dict[int, list[float]] = {id(row): [] for row in rows}
    for number in range(options.rounds):
        for row in rows:
            kept = by_name[row.files]
            if row.decoder == "bare":
                rate, used = measure_bare(kept, row.workers, options.seconds)
            else:
                rate, used, row.gpu_memory_mb, row.nvdec_percent = measure_loader(
                    kept, row.decoder, row.workers, options.seconds, options.batch, device
                )
            row.rounds.append(rate)
            memory[id(row)].append(used)
            told = f"round {number + 1}: {row.files:<12} {row.decoder:<5} x{row.workers:<3} {rate:8.1f} clips/s"
            print(told, file=sys.stderr)
    for row in rows:
        row.clips_per_second = statistics.median(row.rounds)
        row.memory_mb = statistics.median(memory[id(row)])
    return files, rows


def make_files(options: argparse.Namespace, work: Path) -> list[Files]:
    original = options.videos
    if not options.as_they_are:
        original = work / "original"
        original.mkdir()
        make_originals(read_manifest(options.videos), original)
    files = [read_files("original", "h264", GOP, original)]
    copies = [("h264", gop) for gop in (8, 4, 1)]
    if has_dali():
        copies += [("vp9", 4), ("mjpeg", 1)]
    for codec, gop in copies:
        folder = work / f"{codec}-{gop}"
        prepare(original, folder, codec, gop)
        files.append(read_files(f"{codec} gop {gop}", codec, gop, folder))
    return files


def table(files: list[Files], rows: list[Row], step: float | None) -> str:
    """Markdown."""
    base = {(row.decoder, row.workers): row.clips_per_second for row in rows if row.files == "original"}
    bare = {(row.files, row.workers): row.clips_per_second for row in rows if row.decoder == "bare"}
    size = {kept.name: kept.bytes_per_video for kept in files}
    head = ("files", "bytes", "decoder", "workers", "clips/s", "frames/s", "x original", "bare / this", "memory MB")
    lines = [(*head, "GPU MB", "NVDEC %", "data stall %"), ("---",) * 12]
    for row in rows:
        original = base.get((row.decoder, row.workers))
        fed = None if step is None or row.decoder == "bare" else min(row.clips_per_second / step, 1)
        lines.append(
            (
                row.files,
                f"{size[row.files] / size['original']:.2f}x",
                row.decoder,
                str(row.workers),
                f"{row.clips_per_second:.1f}",
                f"{row.frames_per_second:.0f}",
                f"{row.clips_per_second / original:.2f}" if original else "-",
                f"{bare[row.files, row.workers] / row.clips_per_second:.2f}",
                f"{row.memory_mb:.0f}",
                "-" if row.gpu_memory_mb is None else f"{row.gpu_memory_mb:.0f}",
                "-" if row.nvdec_percent is None else f"{row.nvdec_percent:.0f}",
                "-" if fed is None else f"{100 * (1 - fed):.1f}",
            )
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Clips per second of each way of keeping the files, a group of bars each."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    files = list(dict.fromkeys(row.files for row in rows))
    contenders = list(dict.fromkeys((row.decoder, row.workers) for row in rows))
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    width = 0.8 / len(contenders)
    for number, (decoder, workers) in enumerate(contenders):
        shown = [row for row in rows if (row.decoder, row.workers) == (decoder, workers)]
        places = [files.index(row.files) + (number - (len(contenders) - 1) / 2) * width for row in shown]
        bars = axes.bar(places, [row.clips_per_second for row in shown], width * 0.9, label=f"{decoder}, {workers}")
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(files)), files)
    axes.set(ylabel="clips per second", title=title)
    axes.legend(title="decoder, processes")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", help="what --data.train takes")
    parser.add_argument(
        "--out", type=Path, help="folder for input_pipeline.json, .md and .png; without it, a table only"
    )
    parser.add_argument("--as-they-are", action="store_true", help="VIDEOS are the originals; none are made")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), help="processes")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="clips")
    parser.add_argument(
        "--step", choices=["none", *sorted(STUDENTS)], default="umt_b16", help="model whose step is timed"
    )
    parser.add_argument("--step-batch", type=int, help="its clips; 64 on a GPU, else 2")
    parser.add_argument("--soak", type=int, metavar="CLIPS", help="watch the memory of each decoder instead")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="input-pipeline-") as work:
        if options.soak:
            for kept in make_files(options, Path(work)):
                for decoder in soaked(kept, device):
                    watched = soak(kept, decoder, options.workers[-1], options.soak, options.batch, device)
                    told = ", ".join(f"{name} {value:.0f}" for name, value in watched.items())
                    print(f"{decoder}, {kept.name}, {options.soak} clips, MB: {told}")
            return
        files, rows = run(options, device, Path(work))
    facts: dict[str, object] = {**describe(), "processors": os.cpu_count()}
    step = None
    if options.step != "none":
        batch = options.step_batch or (64 if device.type == "cuda" else 2)
        step = step_rate(options.step, device, batch)
        facts |= {"step": f"{options.step}, batch {batch}, bf16", "step_clips_per_second": round(step, 2)}
    found = table(files, rows, step)
    print(found)
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "input_pipeline"
        content = {"facts": facts, "rows": [asdict(row) for row in rows]}
        path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        told = "".join(f"- {name.replace('_', ' ')}: {value}\n" for name, value in facts.items())
        page = f"# Input pipeline\n\n{told}\n{found}\n![Clips per second](input_pipeline.png)\n"
        path.with_suffix(".md").write_text(page)
        plot(
            rows,
            f"{FRAMES} frames of 10 s videos, {facts['device']}, {facts['processors']} cores",
            path.with_suffix(".png"),
        )


if __name__ == "__main__":
    main()

"""How many clips a second the data side delivers, from original videos and from training copies, and at what cost.

    python -m benchmarks.input_pipeline VIDEOS --out benchmarks/results/<machine>

VIDEOS is what --data.train takes. They are first made into originals as data sets hold them (10 s, 340x256, 30 fps,
H.264 with a key frame every 250, looped to fill), from which `umt_fast.data.prepare` makes copies with a key frame
every 1, 4 and 8 frames; --as-they-are takes VIDEOS for the originals. Measured are

    bare          PyAV alone: seek, decode and convert to RGB the frames that a clip needs, in as many processes
    bare + crop   and then one crop and torch's resize of each frame, into the clip's memory
    pyav          the loader of a training run, crops and resizing included
    dali          likewise with DALI, where it is installed, of the files that it takes: on NVDEC, with --pipelines at
                  work, or on the CPU

Every contender runs in turn, --rounds times; the table holds medians. Given how many clips a step takes (--step-rate,
or --step-from a step_time.json), it tells for how much of its time the step would wait for data. --soak N watches the
memory over N clips instead.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter

from benchmarks import input_pipeline_report as report
from benchmarks.kernels.environment import describe
from benchmarks.rungs import MODELS
from umt_fast.arguments import number_above, whole_number_from
from umt_fast.config import DataConfig
from umt_fast.data import open_loader
from umt_fast.data.clips import ClipStream
from umt_fast.data.dali_loader import DaliSupport
from umt_fast.data.decode import choose_decoder, has_dali, nvdec, probe, read_frames
from umt_fast.data.decode.container import ONE_THREAD, look_up
from umt_fast.data.index import BadVideo, Video, VideoList
from umt_fast.data.loader import Loader
from umt_fast.data.manifest import read_manifest
from umt_fast.data.storage import file_size
from umt_fast.errors import RunError

FRAMES, SIDE = 8, 224
CROP_SCALES = (1, 0.875, 0.75, 0.66)
SECONDS, FPS, SIZE, GOP = 10, 30, (340, 256), 250


@dataclass(frozen=True)
class Files:
    """One way of keeping the videos."""

    name: str
    codec: str
    gop: float
    """Frames from one key frame to the next, on average."""
    videos: VideoList
    known: list[Video]
    """The same with their facts, as an index has them."""
    bytes_per_video: float


@dataclass
class Row:
    """A contender and what it delivered."""

    files: str
    decoder: str
    workers: int
    pipelines: int | None = None
    """Of DALI, each at work on a batch of its own; None: not on a GPU."""
    clips_per_second: float = 0.0
    memory_mb: float = 0.0
    """Of all its processes, what they share counted once."""
    gpu_memory_mb: float | None = None
    nvdec_percent: float | None = None
    rounds: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """By the loader: what it leaves to another decoder."""


def make_originals(sources: VideoList, folder: Path) -> None:
    """Write each source as a 10 s video: played forwards and backwards until it is long enough."""
    for number, source in enumerate(sources):
        try:
            pictures = read_frames(source, lambda count: range(min(count, SECONDS * FPS)))
        except BadVideo as error:
            _refuse(source, error)
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


def read_files(name: str, source: Path | str) -> Files:
    """The videos of `source` and what is in them."""
    videos = read_manifest(str(source))
    for video in videos:
        if video.remote or video.offset is not None:
            sys.exit(f"error: {video.name} is no file of its own here, as the bare loop wants; leave out --as-they-are")
    known = [video if video.facts else _look_into(video) for video in videos]
    facts = [video.facts for video in known if video.facts]
    return Files(
        name,
        codec=" and ".join(sorted({one.codec for one in facts})),
        gop=sum(one.frames for one in facts) / sum(max(len(one.keys), 1) for one in facts),
        videos=videos,
        known=known,
        bytes_per_video=statistics.mean(file_size(video) for video in videos),
    )


def _look_into(video: Video) -> Video:
    """With its facts. Exits where the bare loop could not read it."""
    try:
        facts = probe(video)
    except BadVideo as error:
        _refuse(video, error)
    if not len(facts.keys):
        _refuse(video, "no times to seek by")
    return replace(video, facts=facts)


def _refuse(video: Video, reason: object) -> NoReturn:
    sys.exit(f"error: {video.name}: {reason}; leave it out of VIDEOS")


def stream_of(files: Files, decoder: str, workers: int, pipelines: int | None = None) -> ClipStream:
    config = DataConfig(workers=workers, decoder=decoder, pipelines=pipelines or 0)  # type: ignore[arg-type]
    return ClipStream(files.videos, config, FRAMES, SIDE, seed=0)


# The contenders.


def _leave(_what: object) -> None:
    pass


def decode_bare(video: Video, indices: list[int], then: Callable[[np.ndarray], None] = _leave) -> None:
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
                    then(to_rgb.reformat(frame, format="rgb24", threads=ONE_THREAD).to_ndarray())
                    break


class Crop:
    """Puts one square part of each picture, resized, into the next place of a clip."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.clip = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
        self.places = iter(self.clip)
        self.scale = rng.choice(CROP_SCALES)
        self.corner = rng.random(2)

    def __call__(self, picture: np.ndarray) -> None:
        side = int(min(picture.shape[:2]) * self.scale)
        top, left = (self.corner * (np.array(picture.shape[:2]) - side)).astype(int)
        part = np.ascontiguousarray(picture[top : top + side, left : left + side])
        planes = torch.from_numpy(part)[None].permute(0, 3, 1, 2)  # channels last, which torch resizes faster
        resized = F.interpolate(planes, (SIDE, SIDE), mode="bilinear", antialias=True)
        next(self.places)[:] = resized[0].permute(1, 2, 0).numpy()


def _bare_worker(
    stream: ClipStream, videos: list[Video], crop: bool, rank: int, workers: int, seconds: float, done: Connection
) -> None:
    torch.set_num_threads(1)
    clips = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        index, rng = next(stream.attempts(rank + clips * workers))
        facts = videos[index].facts
        assert facts is not None
        indices = list(stream.draw_frames(facts.timeline, rng))
        if crop:
            decode_bare(videos[index], indices, Crop(rng))
        else:
            decode_bare(videos[index], indices)
        clips += 1
    done.send((clips / (time.perf_counter() - begun), _own_memory()))


def measure_bare(files: Files, workers: int, seconds: float, crop: bool) -> tuple[float, float]:
    """Clips per second and memory of `workers` processes that each run `decode_bare` in a loop. Exits if one fails."""
    stream = stream_of(files, "pyav", workers)
    context = multiprocessing.get_context("fork")
    processes, answers = [], []
    for rank in range(workers):
        answer, done = context.Pipe(duplex=False)
        arguments = (stream, files.known, crop, rank, workers, seconds, done)
        process = context.Process(target=_bare_worker, args=arguments, daemon=True)
        process.start()
        done.close()  # so that its end is seen here when the process ends
        processes.append(process)
        answers.append(answer)
    try:
        found = [answer.recv() for answer in answers]
    except EOFError:
        sys.exit(f"error: a bare loop over {files.name} ended before its time; is every frame of VIDEOS whole?")
    for process in processes:
        process.join()
    return sum(rate for rate, _ in found), sum(memory for _, memory in found)


@contextlib.contextmanager
def loader_of(
    files: Files,
    decoder: str,
    workers: int,
    batch: int,
    device: torch.device,
    pipelines: int | None = None,
    say: Callable[[str], None] = _leave,
) -> Iterator[Loader]:
    stream = stream_of(files, decoder, workers, pipelines)
    loader = open_loader(stream, device, say, start=0, batches=10**9, batch_size=batch)
    with loader:
        yield loader


def measure_loader(
    files: Files, row: Row, seconds: float, batch: int, device: torch.device
) -> tuple[float, float, float | None, float | None]:
    """Clips per second, memory of the processes, GPU memory and NVDEC use, once what was made ready is used up."""
    workers, said = row.workers, set(row.said)
    with loader_of(files, row.decoder, workers, batch, device, row.pipelines, said.add) as loader:
        ready = 2 + workers * DataConfig().prefetch + (row.pipelines or 0)
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
        row.said = sorted(said)
        return rate, _memory(), _gpu_memory(device), statistics.mean(use) if use else None


# What it costs.


EVERYTHING = ("Pss:",)
NO_FILES = ("Pss_Anon:", "Pss_Shmem:")
"""Without the pages of program files: the part of those that falls to a process changes by tens of MB whenever any
other program of the machine that uses the same libraries starts or ends."""


def _own_memory(process: int | str = "self", kinds: tuple[str, ...] = EVERYTHING) -> float:
    """MB of a process, its part of what it shares."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(kinds))


def _memory(kinds: tuple[str, ...] = EVERYTHING) -> float:
    """MB of this process and those it started."""
    processes = [process.pid for process in multiprocessing.active_children()]
    return _own_memory(kinds=kinds) + sum(_own_memory(process, kinds) for process in processes if process is not None)


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
    if files.gop > 1:
        return []
    by_dali = files.codec == "h264" if device.type == "cuda" else files.codec == "mjpeg"
    return ["pyav"] * (files.codec == "h264") + ["dali"] * (by_dali and has_dali())


def soak(files: Files, decoder: str, workers: int, clips: int, batch: int, device: torch.device) -> dict[str, float]:
    """Memory in MB over `clips` clips: when a tenth of them is through, the least and the most after that, the end.

    That of program files is not counted.
    """
    seen: list[float] = []
    with loader_of(files, decoder, workers, batch, device) as loader:
        for number in range(1, clips // batch + 1):
            next(loader)
            if number >= clips // batch // 10 and number % max(clips // batch // 100, 1) == 0:
                seen.append(_memory(NO_FILES))
    return {"after a tenth": seen[0], "least": min(seen), "most": max(seen), "end": seen[-1]}


# All of it.


def plan_rows(
    files: list[Files], workers: list[int], pipelines: list[int] | None, engines: dict[str, nvdec.Limits] | None
) -> list[Row]:
    """The contenders. `engines`: what NVDEC takes; None for DALI on the CPU. Files that DALI leaves to PyAV have no
    row of its."""
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
            told = f"round {number + 1}: {row.files:<12} {row.decoder:<11} x{row.workers:<3} {rate:8.1f} clips/s"
            print(told if row.pipelines is None else f"{told}, {row.pipelines} pipelines", file=sys.stderr)
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
    files = [read_files("original", original)]
    copies = [("h264", gop) for gop in (8, 4, 1)]
    if has_dali():
        copies += [("vp9", 4), ("mjpeg", 1)]
    for codec, gop in copies:
        folder = work / f"{codec}-{gop}"
        prepare(original, folder, codec, gop)
        files.append(read_files(f"{codec} gop {gop}", folder))
    return files


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", help="what --data.train takes")
    parser.add_argument(
        "--out", type=Path, help="folder for input_pipeline.json, .md and .png; without it, a table only"
    )
    parser.add_argument("--as-they-are", action="store_true", help="VIDEOS are the originals; none are made")
    count, amount = whole_number_from(1), number_above(0)
    parser.add_argument("--workers", type=count, nargs="+", default=sorted({1, os.cpu_count() or 1}), help="processes")
    parser.add_argument("--seconds", type=amount, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--batch", type=count, default=8, help="clips")
    parser.add_argument("--pipelines", type=count, nargs="+", help="of DALI on a GPU; default: one, and one per NVDEC")
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--step-rate", type=amount, metavar="CLIPS_PER_SECOND", help="what a training step takes")
    step.add_argument("--step-from", type=Path, metavar="FILE", help="a step_time.json: its fastest exact rung")
    parser.add_argument("--step-model", choices=MODELS, default="umt_b16", help="whose, in that; default %(default)s")
    parser.add_argument("--soak", type=count, metavar="CLIPS", help="watch the memory of each decoder instead")
    options = parser.parse_args(arguments)
    if options.soak is not None and options.soak < options.batch:
        parser.error(
            f"--soak {options.soak} is less than one batch of {options.batch}; give more, or a smaller --batch"
        )
    return options


def measure(options: argparse.Namespace) -> None:
    """All that was asked for, printed and written."""
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
                    told = ", ".join(f"{name} {value:.0f}" for name, value in watched.items())
                    print(f"{decoder}, {kept.name}, {options.soak} clips, MB: {told}")
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
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(f"error: {' '.join(error.cmd)} failed")
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

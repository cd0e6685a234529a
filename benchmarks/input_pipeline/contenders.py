"""The sources of clips: PyAV in a bare loop, and the loader of a training run."""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter

from benchmarks.input_pipeline import cost
from benchmarks.input_pipeline.files import Files
from umt_fast.config import DataConfig
from umt_fast.data import open_loader
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode.rgb import ONE_THREAD
from umt_fast.data.loader import Loader
from umt_fast.data.video import Video

FRAMES, SIDE = 8, 224
CROP_SCALES = (1, 0.875, 0.75, 0.66)


@dataclass
class Row:
    """A contender and its measurements."""

    files: str
    decoder: str
    workers: int
    pipelines: int | None = None
    """Number of DALI pipelines, each with its own batch; None: not on a GPU."""
    clips_per_second: float = 0.0
    memory_mb: float = 0.0
    """MB of memory of all its processes; shared pages count once."""
    gpu_memory_mb: float | None = None
    nvdec_percent: float | None = None
    rounds: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """Messages of the loader about videos that another decoder reads."""


def stream_of(files: Files, decoder: str, workers: int, pipelines: int | None = None) -> ClipStream:
    config = DataConfig(workers=workers, decoder=decoder, pipelines=pipelines or 0)  # type: ignore[arg-type]
    return ClipStream(files.videos, config, FRAMES, SIDE, seed=0)


def _leave(_what: object) -> None:
    pass


def decode_bare(video: Video, indices: list[int], then: Callable[[np.ndarray], None] = _leave) -> None:
    """Decode with PyAV only. Times and key frames are known before, as from an index."""
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
    """Writes a resized square part of each frame to the next place of a clip."""

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
    done.send((clips / (time.perf_counter() - begun), cost.own_memory()))


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
        done.close()  # so that reading here fails when the process ends
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
    """Clips per second, memory of the processes, GPU memory and NVDEC use, after the prefetched batches are used up."""
    workers, said = row.workers, set(row.said)
    with loader_of(files, row.decoder, workers, batch, device, row.pipelines, said.add) as loader:
        ready = 2 + workers * DataConfig().prefetch + (row.pipelines or 0)
        for _ in range(ready):
            next(loader)
        begun = time.perf_counter()
        clips = 0
        use: list[float] = []
        while (spent := time.perf_counter() - begun) < seconds:
            clips += sum(len(next(loader).clip) for _ in range(workers))  # one batch from each worker, in turn
            if device.type == "cuda" and len(use) < spent:  # once a second
                use.append(cost.nvdec_use())
        rate = clips / (time.perf_counter() - begun)
        row.said = sorted(said)
        return rate, cost.memory(), cost.gpu_memory(device), statistics.mean(use) if use else None

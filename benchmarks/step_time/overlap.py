"""Time of the work that overlaps with a step: decoding the next clips and, on several processes, averaging gradients.

Each is timed alone, on all processes at once. In a run the workers decode while the step computes, so only decoding
that takes longer than the step costs time; DDP reduces gradients while the backward pass computes the next ones.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from benchmarks.step_time.phases import wait_for
from umt_fast.config import DataConfig, StudentConfig
from umt_fast.data import open_loader
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode.choice import choose_decoder
from umt_fast.data.index import VideoList
from umt_fast.data.manifest import read_manifest
from umt_fast.errors import RunError
from umt_fast.run import costs
from umt_fast.run.world import World

BUCKET = 25 * 2**20
"""Bytes that DDP reduces at once by default."""
SYNTHETIC_VIDEOS = 16


@dataclass
class Overlap:
    """Times for one model and batch. A missing time is None, and its text says why."""

    model: str
    batch: int
    decode_seconds: float | None
    """Seconds from one batch of a process to the next, while all processes decode."""
    decode: str
    all_reduce_seconds: float | None
    """Seconds to average the student's gradients."""
    all_reduce: str


def measure(
    model: str, batch: int, student: StudentConfig, source: str | None, workers: int, rounds: int, world: World
) -> Overlap:
    """Every process calls this and gets the slowest one's times. `source`: as --data.train; None: synthetic videos."""
    seconds: float | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="step-time-") as folder:
            videos = read_manifest(source or _synthetic(Path(folder)))
            seconds = decode_seconds(videos, batch, student, workers, rounds, world)
        how = f"{choose_decoder('auto', world.device).text}, {workers} workers, {len(videos)} videos "
        how += f"of {source}" if source else "made for it"
    except ModuleNotFoundError as error:
        how = f"needs {error.name} (pip install {error.name})"
    except (RunError, OSError) as error:
        how = f"failed: {error}"
    decoded = world.gather((seconds, how))
    failed = [found for found in decoded if found[0] is None]
    seconds, how = failed[0] if failed else max(decoded)
    if world.size == 1:
        return Overlap(model, batch, seconds, how, None, "needs several processes (torchrun)")
    numbers = costs.student_parameters(student)
    reduced = max(world.gather(all_reduce_seconds(numbers, rounds, world)))
    by = f"{world.size} processes, {dist.get_backend()}, {4 * numbers / 2**20:.0f} MiB in float32"
    return Overlap(model, batch, seconds, how, reduced, by)


def _synthetic(folder: Path) -> str:
    from umt_fast.data import synthetic  # needs PyAV

    return str(synthetic.write_videos(folder, SYNTHETIC_VIDEOS))


def decode_seconds(
    videos: VideoList, batch: int, student: StudentConfig, workers: int, rounds: int, world: World
) -> float:
    """Median seconds between two batches of a run's loader, after its prefetched batches are used up.

    Raises NothingReadable, WorkerDied.
    """
    config = DataConfig(workers=workers)
    stream = ClipStream(videos, config, student.frames, student.image_size, seed=0)
    options = {"start": 0, "batches": 10**9, "batch_size": batch, "rank": world.rank, "world_size": world.size}
    turn = max(workers, 1)  # the workers deliver in turn
    took = []
    with open_loader(stream, world.device, lambda _text: None, **options) as loader:
        for _ in range(turn * (config.prefetch + 1)):
            next(loader)
        for _ in range(rounds):
            begun = time.perf_counter()
            for _ in range(turn):
                next(loader)
            took.append((time.perf_counter() - begun) / turn)
    return statistics.median(took)


def all_reduce_seconds(numbers: int, rounds: int, world: World) -> float:
    """Median seconds to average `numbers` float32 numbers over the processes, in DDP's buckets."""
    buckets = torch.zeros(numbers, device=world.device).split(BUCKET // 4)
    took = []
    for _ in range(1 + rounds):  # the first connects the processes
        wait_for(world.device)
        world.gather(None)  # so that all processes begin at the same time
        begun = time.perf_counter()
        works = [dist.all_reduce(bucket.div_(world.size), async_op=True) for bucket in buckets]
        for work in works:
            work.wait()
        wait_for(world.device)
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])

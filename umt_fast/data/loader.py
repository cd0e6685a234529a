"""The endless stream of clips: which video comes when, decoded in worker processes, in batches.

The run's clips are numbered 0, 1, 2, ...: clip number i belongs to epoch i // n of a list of n videos, each epoch in
its own random order. Whatever the number of ranks and workers, clip i is the same; a run is resumed at clip i.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from umt_fast.config import DataConfig
from umt_fast.data import pyav
from umt_fast.data.augment import draw_view, show
from umt_fast.data.sampling import epoch_order, sample_rng, segment_frames
from umt_fast.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import UInt8

REPLACEMENTS = 20
"""Other videos tried in the place of one that cannot be read."""


class NothingReadable(RunError):
    """A video and all its replacements could not be read."""


class WorkerDied(RunError):
    """A decoding process was killed."""


@dataclass
class Batch:
    clip: UInt8[Tensor, "b t h w 3"]
    paths: list[str]
    """The video each clip is from."""
    bad: list[tuple[str, str]]
    """Videos that could not be read while making the batch, and why."""

    def pin_memory(self) -> Batch:
        self.clip = self.clip.pin_memory()
        return self


@dataclass
class Clip:
    frames: UInt8[Tensor, "t h w 3"] | None
    path: str
    bad: list[tuple[str, str]]


class ClipDataset(Dataset[Clip]):
    """Clip number i of a run over `videos`: TSN frames, multi-scale crop, flip; a function of (seed, i) alone."""

    def __init__(self, videos: list[str], config: DataConfig, frames: int, side: int, seed: int) -> None:
        self.videos = videos
        self.config = config
        self.frames = frames
        self.side = side
        self.seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, number: int) -> Clip:
        """A video that cannot be read is replaced by another, drawn from (seed, epoch, index, attempt)."""
        epoch, place = divmod(number, len(self.videos))
        first = index = int(self._epoch_order(epoch)[place])
        bad: list[tuple[str, str]] = []
        for attempt in range(1 + REPLACEMENTS):
            rng = sample_rng(self.seed, epoch, first, attempt)
            if attempt:
                index = int(rng.integers(len(self.videos)))
            path = self.videos[index]
            try:
                return Clip(self._read(path, rng), path, bad)
            except pyav.BadVideo as error:
                bad.append((path, str(error)))
            except Exception as error:  # a decoder's own surprise must not end the run either
                bad.append((path, f"{type(error).__name__}: {error}"))
        return Clip(None, path, bad)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, len(self.videos)))
        return self._order[1]

    def _read(self, path: str, rng: np.random.Generator) -> Tensor:
        frames = pyav.read_frames(path, lambda count: segment_frames(count, self.frames, rng))
        height, width = frames[0].shape[:2]
        view = draw_view(width, height, self.side, self.config.crop_scales, self.config.flip, rng)
        return torch.from_numpy(np.stack([show(frame, view, self.side) for frame in frames]))


class _RankBatches(Sampler[list[int]]):
    """Clip numbers of one rank: the ranks take turns, `batch_size` clips each."""

    def __init__(self, start: int, batches: int, batch_size: int, rank: int, world_size: int) -> None:
        self.start = start
        self.batches = batches
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.batches):
            first = self.start + (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


class ClipLoader:
    """Batches of one rank, from clip number `start` of the run on. Close it, or use it in a `with`.

    Iterating raises NothingReadable when a video and all its replacements fail, WorkerDied when a worker was killed.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        *,
        start: int,
        batches: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        workers = dataset.config.workers
        options: dict[str, Any] = {"prefetch_factor": dataset.config.prefetch} if workers else {}
        self._loader = DataLoader(
            dataset,
            batch_sampler=_RankBatches(start, batches, batch_size, rank, world_size),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else the loader takes a number from the run's own
            **options,
        )
        self._batches: Iterator[Batch] | None = iter(self._loader)

    def __iter__(self) -> ClipLoader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise WorkerDied(f"a decoding process ended unexpectedly, is there memory enough? {error}") from error
        if len(batch.clip) < len(batch.paths):
            path, reason = batch.bad[-1]
            raise NothingReadable(
                f"{1 + REPLACEMENTS} videos in a row could not be read, the last one {path}: {reason}"
            )
        return batch

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers.

        Not left to the collector: after an error the traceback keeps the iterator, and Python's exit then waits for
        workers that nobody told to stop.
        """
        batches, self._batches = self._batches, None
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()


def _collate(clips: list[Clip]) -> Batch:
    frames = [clip.frames for clip in clips if clip.frames is not None]
    stacked = torch.stack(frames) if frames else torch.empty(0, dtype=torch.uint8)
    return Batch(stacked, [clip.path for clip in clips], [bad for clip in clips for bad in clip.bad])


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the training process decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

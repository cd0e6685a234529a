"""Batches of clips that worker processes decode with PyAV, and the base class of all loaders."""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.random import Generator
from torch.utils.data import Dataset

from umt_fast.data.batch import Batch, VisitedVideo
from umt_fast.data.clips import REPLACEMENTS, ClipStream
from umt_fast.data.crops import Clip
from umt_fast.data.decode import open_video, read_places
from umt_fast.data.decode.time_limit import TimeLimit
from umt_fast.data.index import BadIndex
from umt_fast.data.shared_memory import BufferPool, empty_for_parent
from umt_fast.data.storage import start_reading
from umt_fast.data.video import BadVideo, Video
from umt_fast.data.watch import IDLE, note_reading
from umt_fast.data.workers import WorkerBatches
from umt_fast.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from torch import Tensor
    from typing_extensions import Self

READS_AHEAD = 8
"""Remote videos that a worker fetches while it decodes."""
HELD_BATCHES = 2
"""Batches of each worker that the training process may hold, in addition to the prefetched ones."""


class NothingReadable(RunError):
    """A video and all its replacements could not be read."""


def read_visit(
    stream: ClipStream,
    visit: int,
    content: Future[bytes] | None,
    read: Callable[[Video, Generator, bytes | None], Any],
) -> tuple[VisitedVideo | None, list[tuple[str, str]]]:
    """Call `read` with a visit's video and random generator; on failure try its replacements.

    Returns the video that was read, or None, and the name and reason of each failure. `content`: bytes of the first
    video, if they are being fetched.
    """
    bad = []
    for row, rng in stream.attempts(visit):
        name = f"row {row + 1} of the list"
        try:
            video = stream.videos[row]
            name = video.name
            note_reading(row)
            fetched, content = content, None  # only the first attempt can use it
            with TimeLimit(video.limits.time_limit):
                drawn = read(video, rng, None if fetched is None else fetched.result())
        except (BadVideo, OSError) as error:
            bad.append((name, str(error)))
        except Exception as error:  # unexpected errors of a decoder must not end the run
            bad.append((name, f"{type(error).__name__}: {error}"))
        else:
            note_reading(IDLE)
            return VisitedVideo(visit, row, name, video.label, video.caption, drawn), bad
    note_reading(IDLE)
    return None, bad


def make_clips(stream: ClipStream, video: Video, rng: Generator, content: bytes | None, out: np.ndarray) -> Any:
    """Write a visit's clips of `video` to `out` [R,T,H,W,3]. Returns `stream.drawn`. Raises BadVideo."""
    clips: Sequence[Clip] = ()
    with open_video(video, content, stream.config.square_pixels, stream.motion, stream.file_decoder) as reader:
        indices = stream.choose_frames(video, reader.timeline, rng)
        for places, frame in read_places(reader, indices):
            if not clips:
                clips = stream.begin_clips(frame.shape[1], frame.shape[0], rng, out)
            for clip in clips:
                clip.add(places, frame)
    for clip in clips:
        clip.finish()
    return stream.drawn


def fetch_ahead(stream: ClipStream, visits: list[int]) -> Iterator[Future[bytes] | None]:
    """For each visit the bytes of its video, fetched some visits ahead; None for a local video."""
    if not stream.videos.may_be_remote:
        yield from itertools.repeat(None, len(visits))
        return
    ahead: deque[Future[bytes] | None] = deque()
    for visit in visits:
        row, _ = next(stream.attempts(visit))
        try:
            video = stream.videos[row]
        except BadIndex:  # read_visit will report it
            ahead.append(None)
        else:
            ahead.append(start_reading(video) if video.remote else None)
        if len(ahead) >= READS_AHEAD:
            yield ahead.popleft()
    yield from ahead


class ClipDataset(Dataset[Batch]):
    """Batches of a stream by the numbers of their visits, decoded file by file."""

    def __init__(self, stream: ClipStream, pool: BufferPool | None = None) -> None:
        """`pool`: shared buffers for the clips; None: fresh memory."""
        self.stream = stream
        self.pool = pool

    def __getitem__(self, visits: list[int]) -> Batch:
        """If a video and all its replacements fail, the batch has no clip; a stream without replacement leaves out
        the video."""
        stream = self.stream
        shape, dtype = (len(visits), *stream.clips_shape), stream.dtype
        clips, lease = (self.pool and self.pool.lease(shape, dtype)) or (self._fresh(shape, dtype), None)
        videos: list[VisitedVideo] = []
        bad: list[tuple[str, str]] = []
        for visit, content in zip(visits, fetch_ahead(stream, visits), strict=True):
            read = functools.partial(make_clips, stream, out=clips[len(videos)])
            video, failed = read_visit(stream, visit, content, read)
            bad += failed
            if video is not None:
                videos.append(video)
            elif stream.replace:
                videos = []
                break
        return Batch(torch.from_numpy(clips[: len(videos)]).flatten(0, 1), videos, bad, lease)

    def _fresh(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return empty_for_parent((math.prod(shape) * dtype.itemsize,)).numpy().view(dtype).reshape(shape)


def first_clips(stream: ClipStream, visits: int = 4) -> UInt8[Tensor, "b t h w 3"]:
    """The clips of a run's first visits, decoded in this process. Raises NothingReadable."""
    batch = ClipDataset(stream)[list(range(visits))]
    if not len(batch.clip):
        raise nothing_readable(batch.bad)
    return batch.clip


class Loader(Iterator[Batch]):
    """Batches of one rank, with any decoder. Call `close`, or use it in a `with`.

    Iterating raises NothingReadable when a video and all its replacements fail, WorkerDied when workers are killed
    repeatedly, NoSharedMemory when a worker finds no shared memory for its clips.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


class ClipLoader(Loader):
    """Batches of clips that `stream.config.workers` processes decode, file by file.

    The options are those of `WorkerBatches`; workers, prefetched batches and time limits are in `stream.config`.
    """

    def __init__(self, stream: ClipStream, *, batch_size: int, **options: Any) -> None:
        config = stream.config
        size = batch_size // stream.clips_per_visit * math.prod(stream.clips_shape) * stream.dtype.itemsize
        pool = BufferPool.for_workers(config.workers, config.prefetch + HELD_BATCHES, size)
        self._stream = stream
        self._batches = WorkerBatches(ClipDataset(stream, pool), stream, batch_size=batch_size, **options)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if self._stream.replace and not len(batch.clip):
            raise nothing_readable(batch.bad)
        return batch

    def close(self) -> None:
        self._batches.close()


def nothing_readable(bad: list[tuple[str, str]]) -> NothingReadable:
    path, reason = bad[-1]
    return NothingReadable(f"{1 + REPLACEMENTS} videos in a row could not be read, the last one {path}: {reason}")

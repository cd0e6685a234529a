"""Clips decoded in worker processes, in batches."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import math
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from umt_fast.data.clips import REPLACEMENTS, ClipStream
from umt_fast.data.crops import Clip
from umt_fast.data.decode import open_video, read_places
from umt_fast.data.decode.time_limit import time_limit
from umt_fast.data.index import BadIndex, BadVideo, Video
from umt_fast.data.shared_memory import BufferPool, Lease
from umt_fast.data.storage import start_reading
from umt_fast.data.torch_private import empty_shared, ignore_dead_workers, is_dead_worker, stop_workers
from umt_fast.data.watch import IDLE, WorkerWatch, end_with_parent, note_reading
from umt_fast.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import Int64, Shaped, UInt8
    from typing_extensions import Self

T = TypeVar("T")

READS_AHEAD = 8
"""Remote videos that a worker fetches while it decodes."""
GRACE = 1.0
"""Seconds that workers get to finish their work when the loader is closed."""
NO_LABEL = -1
"""Label of a video without one."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of the options in malloc.h."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MAX_DEATHS = 3
"""Times that workers may be killed at one batch before the loader gives up. The out-of-memory killer picks its victims
at random, so one death proves nothing."""
HELD_BATCHES = 2
"""Batches of a worker that the training process is assumed to hold, besides those that wait for it."""


class NothingReadable(RunError):
    """A video and all its replacements could not be read."""


class WorkerDied(RunError):
    """A decoding process was killed."""


class NoSharedMemory(RunError):
    """A decoding process has no memory in which to hand over its clips."""


@dataclass(frozen=True)
class VisitedVideo:
    """The video that a visit read, and what the list says of it."""

    visit: int
    row: int
    path: str
    label: int | None
    caption: str | None
    drawn: Any = None
    """What the stream says of its choices, such as `view_pairs.DrawnPair`s."""


@dataclass
class Batch:
    """The clips of some visits, those of one visit next to each other."""

    clip: Shaped[Tensor, b * shape]
    """uint8 [B,T,H,W,3], or what the stream's transform makes."""
    videos: list[VisitedVideo]
    """One for each visit."""
    bad: list[tuple[str, str]]
    """Videos that could not be read while making the batch, and why."""
    lease: Lease | None = None
    """The buffer that holds `clip`, in a worker."""

    @property
    def paths(self) -> list[str]:
        """Path of each visit's video."""
        return [video.path for video in self.videos]

    @property
    def visits(self) -> list[int]:
        """Number of each visit in the run."""
        return [video.visit for video in self.videos]

    @property
    def rows(self) -> list[int]:
        """Row of each visit's video in the list, from 0."""
        return [video.row for video in self.videos]

    @property
    def labels(self) -> Int64[Tensor, " b"]:
        """Label of each clip; -1 if the list has none."""
        labels = [NO_LABEL if video.label is None else video.label for video in self.videos]
        return torch.tensor(labels, dtype=torch.int64).repeat_interleave(self._clips_per_visit)

    @property
    def captions(self) -> list[str]:
        """Caption of each clip; empty if the list has none."""
        return [video.caption or "" for video in self.videos for _ in range(self._clips_per_visit)]

    @property
    def _clips_per_visit(self) -> int:
        return len(self.clip) // max(len(self.videos), 1)

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        """A worker sends the lease in place of the clips."""
        if self.lease is None:
            return Batch, (self.clip, self.videos, self.bad)
        clip = self.clip.numpy()
        return _receive, (self.lease, clip.shape, clip.dtype, self.videos, self.bad)

    def pin_memory(self) -> Batch:
        self.clip = self.clip.pin_memory()
        return self


def _receive(
    lease: Lease,
    shape: tuple[int, ...],
    dtype: np.dtype,
    videos: list[VisitedVideo],
    bad: list[tuple[str, str]],
) -> Batch:
    return Batch(lease.open(shape, dtype), videos, bad)


def read_visit(
    stream: ClipStream,
    visit: int,
    content: Future[bytes] | None,
    read: Callable[[Video, Generator, bytes | None], Any],
) -> tuple[VisitedVideo | None, list[tuple[str, str]]]:
    """`read` a visit's video or, while that fails, a replacement, with its random generator.

    Returns the video that was read, None if none could be, and those that could not, each with the reason.
    `content`: the bytes of the first, if they are being fetched.
    """
    bad = []
    for row, rng in stream.attempts(visit):
        name = f"row {row + 1} of the list"
        try:
            video = stream.videos[row]
            name = video.name
            note_reading(row)
            fetched, content = content, None  # it belongs to the first attempt
            with time_limit(video.limits.time_limit):
                drawn = read(video, rng, None if fetched is None else fetched.result())
        except (BadVideo, OSError) as error:
            bad.append((name, str(error)))
        except Exception as error:  # an unexpected error of a decoder must not end the run either
            bad.append((name, f"{type(error).__name__}: {error}"))
        else:
            note_reading(IDLE)
            return VisitedVideo(visit, row, name, video.label, video.caption, drawn), bad
    note_reading(IDLE)
    return None, bad


def decode(stream: ClipStream, video: Video, rng: Generator, content: bytes | None, out: np.ndarray) -> Any:
    """Write a visit's clips of `video` to `out` [R,T,H,W,3]. Returns what the stream says of it. Raises BadVideo."""
    clips: Sequence[Clip] = ()
    with open_video(video, content, stream.config.square_pixels) as reader:
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
    """Bytes of each visit's first video, if that is remote, fetched some visits ahead."""
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


def empty_for_parent(shape: tuple[int, ...]) -> UInt8[Tensor, ...]:
    """Bytes that a worker fills and the training process reads, without a copy. Raises NoSharedMemory."""
    if get_worker_info() is None or 0 in shape:
        return torch.empty(shape, dtype=torch.uint8)
    try:
        return empty_shared(shape)
    except RuntimeError as error:
        raise NoSharedMemory(
            f"a decoding process found no {math.prod(shape)} bytes in /dev/shm ({error}); enlarge that (docker run "
            "--shm-size 8g), or lower --data.workers or --data.prefetch"
        ) from None


class ClipDataset(Dataset[Batch]):
    """Batches of a stream by the numbers of their visits, decoded by PyAV."""

    def __init__(self, stream: ClipStream, pool: BufferPool | None = None) -> None:
        """`pool`: buffers that workers write to; None: fresh memory."""
        self.stream = stream
        self.pool = pool

    def __getitem__(self, visits: list[int]) -> Batch:
        """Where a video and all its replacements fail, the batch holds no clip; a stream that does not replace leaves
        out the video."""
        stream = self.stream
        shape, dtype = (len(visits), *stream.clips_shape), stream.dtype
        clips, lease = (self.pool and self.pool.lease(shape, dtype)) or (self._fresh(shape, dtype), None)
        videos: list[VisitedVideo] = []
        bad: list[tuple[str, str]] = []
        for visit, content in zip(visits, fetch_ahead(stream, visits), strict=True):
            read = functools.partial(decode, stream, out=clips[len(videos)])
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


class _RankBatches(Sampler[list[int]]):
    """Visits of one rank: the ranks take turns, `visits` each, up to visit `end` if there is one."""

    def __init__(self, start: int, batches: int, visits: int, rank: int, world_size: int, end: int | None) -> None:
        self.start = start
        self.batches = batches
        self.visits = visits
        self.rank = rank
        self.world_size = world_size
        self.end = end
        if end is not None:
            own = end - start - rank * visits
            self.batches = min(batches, max(-(-own // (visits * world_size)), 0))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.batches):
            first = self.start + (batch * self.world_size + self.rank) * self.visits
            last = first + self.visits
            yield list(range(first, last if self.end is None else min(last, self.end)))


class WorkerBatches(Iterator[T]):
    """What a data set makes of each batch of a rank's visits, in worker processes, from clip `start` of the run on."""

    def __init__(
        self,
        dataset: Dataset[T],
        stream: ClipStream,
        *,
        start: int,
        batches: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        end: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """`start` and `batch_size` count clips, `end` visits: the last batch may be smaller. None: no end."""
        clips = stream.clips_per_visit
        self._dataset, self._stream, self._pin_memory, self._say = dataset, stream, pin_memory, say
        self._visits = functools.partial(
            _RankBatches, visits=batch_size // clips, rank=rank, world_size=world_size, end=end
        )
        self._next = start // clips
        """First visit, over all ranks, of the batch to come."""
        self._step = batch_size // clips * world_size
        self._left = batches
        self._deaths = 0
        self._watch = WorkerWatch(stream.config.workers, stream.config.stall_timeout)
        self._items: Iterator[T] | None = self._start()

    def _start(self) -> Iterator[T]:
        config = self._stream.config
        options: dict[str, Any] = {}
        if config.workers:
            options = {"prefetch_factor": config.prefetch}
            # A garbage collection writes to every object it visits, and so copies the pages, 37 MB, that the workers
            # share with this process. Objects that exist now are not visited again while the workers run.
            gc.collect()
            gc.freeze()
        loader = DataLoader(
            self._dataset,
            sampler=self._visits(self._next, self._left),
            batch_size=None,  # the data set makes whole batches
            num_workers=config.workers,
            worker_init_fn=functools.partial(_begin_worker, os.getpid(), self._watch),
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # otherwise the loader draws a number from the run's own
            **options,
        )
        with ignore_dead_workers():
            items = iter(loader)
        if config.workers:
            self._watch.start()
        return items

    def __next__(self) -> T:
        """The next batch; workers that were killed or stalled are replaced, and the visits stay the same.

        Raises WorkerDied when workers are killed `MAX_DEATHS` times in a row, NoSharedMemory.
        """
        while self._items is not None:
            try:
                item = next(self._items)
            except NoSharedMemory as error:  # torch has put the worker's traceback before the message
                raise NoSharedMemory(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
            except RuntimeError as error:
                if not is_dead_worker(error):
                    raise
                self._replace_workers(error)
            else:
                self._next += self._step
                self._left -= 1
                self._deaths = 0
                return item
        raise StopIteration

    def _replace_workers(self, error: RuntimeError) -> None:
        """End all workers and start others at the batch that is missing."""
        self._watch.close()
        for activity in self._watch.take_killed():
            name = self._stream.videos[activity.row].name
            self._say(f"{name} has stalled a decoding process for {activity.seconds:.0f} s; it is left out from now on")
            self._deaths = 0
        self._deaths += 1
        reason = str(error).splitlines()[0]
        if self._deaths >= MAX_DEATHS:
            raise WorkerDied(
                f"decoding processes ended unexpectedly {self._deaths} times at the same batch, is there enough "
                f"memory? {reason}"
            ) from error
        self._say(f"a decoding process ended unexpectedly; others begin again at the same clips ({reason})")
        items, self._items = self._items, None
        assert items is not None
        gc.unfreeze()
        stop_workers(items, GRACE)
        del items
        if isinstance(pool := getattr(self._dataset, "pool", None), BufferPool):
            pool.reclaim()
        self._items = self._start()

    def close(self) -> None:
        """Stop the workers. One that is stuck, as in a read from a silent server, is killed."""
        items, self._items = self._items, None
        self._watch.close()
        if items is not None and self._stream.config.workers:
            gc.unfreeze()
            stop_workers(items, GRACE)


class Loader(Iterator[Batch]):
    """Batches of one rank, whatever decodes them. Close it, or use it in a `with`.

    Iterating raises NothingReadable when a video and all its replacements fail, WorkerDied when workers are killed
    again and again, NoSharedMemory when a worker found no room for its clips.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


class ClipLoader(Loader):
    """Batches decoded by PyAV; the options are those of `WorkerBatches`."""

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


def _begin_worker(parent: int, watch: WorkerWatch, worker: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:  # Ctrl-C reaches every process of the terminal, but only the training process decides
        signal.signal(number, signal.SIG_IGN)  # when to stop
    end_with_parent(parent)
    watch.join(worker)
    gc.freeze()  # the garbage collector leaves alone what was forked
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc would return memory to the system, page by page, that the next clip needs
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 8 << 20)

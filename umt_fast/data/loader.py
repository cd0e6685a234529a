"""Clips decoded in worker processes, in batches."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from umt_fast.config import DataConfig
from umt_fast.data.clips import REPLACEMENTS, ClipStream
from umt_fast.data.crops import Clip
from umt_fast.data.decode import by_index as packets
from umt_fast.data.decode import container as pyav
from umt_fast.data.index import BadIndex, Video
from umt_fast.data.shared_memory import Buffers, Loan
from umt_fast.data.storage import start_reading
from umt_fast.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from typing_extensions import Self

T = TypeVar("T")

READS_AHEAD = 8
"""Remote videos that a worker fetches while it decodes."""
GRACE = 1.0
"""Seconds that workers get to finish what they are at when the loader is closed."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As malloc.h numbers them."""
IN_HAND = 2
"""Batches of a worker that the training process is assumed to hold on to, beside those that wait for it."""


class NothingReadable(RunError):
    """A video and all its replacements could not be read."""


class WorkerDied(RunError):
    """A decoding process was killed."""


class NoSharedMemory(RunError):
    """Decoding processes cannot hand over what they made."""


@dataclass
class Batch:
    clip: UInt8[Tensor, "b t h w 3"]
    """The clips of one visit stand next to each other."""
    paths: list[str]
    """The video each visit is to."""
    bad: list[tuple[str, str]]
    """Videos that could not be read while making the batch, and why."""
    visits: list[int]
    """Their numbers in the run."""
    rows: list[int]
    """The place of each visit's video in the list."""
    loan: Loan | None = None
    """In a worker: the buffer that `clip` lies in."""

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        """A worker sends the loan in the place of the clips."""
        told = self.paths, self.bad, self.visits, self.rows
        if self.loan is None:
            return Batch, (self.clip, *told)
        return _claim, (self.loan, tuple(self.clip.shape), *told)

    def pin_memory(self) -> Batch:
        self.clip = self.clip.pin_memory()
        return self


def _claim(loan: Loan, shape: tuple[int, ...], *told: Any) -> Batch:
    return Batch(loan.claim(shape), *told)


def try_candidates(
    stream: ClipStream,
    visit: int,
    content: Future[bytes] | None,
    read: Callable[[Video, Generator, bytes | None], None],
) -> tuple[str | None, list[tuple[str, str]]]:
    """`read` a visit's video or, while that fails, another in its place, given the source of what is drawn for it.

    Returns the name of the one that was read, None if none could be, and those that could not, each with the reason.
    `content`: the bytes of the first, where they are being fetched.
    """
    bad = []
    for index, rng in stream.attempts(visit):
        name = f"row {index + 1} of the list"
        try:
            video = stream.videos[index]
            name = video.name
            fetched, content = content, None  # it is the first candidate's
            read(video, rng, None if fetched is None else fetched.result())
        except (pyav.BadVideo, OSError) as error:
            bad.append((name, str(error)))
        except Exception as error:  # a decoder's own surprise must not end the run either
            bad.append((name, f"{type(error).__name__}: {error}"))
        else:
            return name, bad
    return None, bad


def decode(stream: ClipStream, video: Video, rng: Generator, content: bytes | None, out: np.ndarray) -> None:
    """Write a visit's clips of `video` to `out` [R,T,H,W,3]. Raises pyav.BadVideo."""
    cuts: list[Clip] = []
    for places, frame in packets.iterate_frames(video, lambda count: stream.draw_frames(count, rng), content):
        if not cuts:
            height, width = frame.shape[:2]
            cuts = stream.begin_clips(width, height, rng, out)
        for cut in cuts:
            cut.add(places, frame)
    for cut in cuts:
        cut.finish()


def fetch_ahead(stream: ClipStream, visits: list[int]) -> Iterator[Future[bytes] | None]:
    """For each visit the bytes of the video to try first, if it is remote, fetched some visits ahead."""
    if not stream.videos.may_be_remote:
        yield from itertools.repeat(None, len(visits))
        return
    ahead: deque[Future[bytes] | None] = deque()
    for visit in visits:
        index, _ = next(stream.attempts(visit))
        try:
            video = stream.videos[index]
        except BadIndex:  # try_candidates will tell
            ahead.append(None)
        else:
            ahead.append(start_reading(video) if video.remote else None)
        if len(ahead) >= READS_AHEAD:
            yield ahead.popleft()
    yield from ahead


def empty_for_parent(shape: tuple[int, ...]) -> Tensor:
    """Bytes that a worker hands to the training process: written once, where that reads them. Raises NoSharedMemory."""
    if get_worker_info() is None or 0 in shape:
        return torch.empty(shape, dtype=torch.uint8)
    try:
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
    except RuntimeError as error:
        raise NoSharedMemory(
            f"a decoding process found no {math.prod(shape)} bytes in /dev/shm ({error}); enlarge that (docker run "
            "--shm-size 8g), or lower --data.workers or --data.prefetch"
        ) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class ClipDataset(Dataset[Batch]):
    """Batches of a stream by the numbers of their visits, decoded by PyAV."""

    def __init__(self, stream: ClipStream, buffers: Buffers | None = None) -> None:
        """`buffers`: where workers write; fresh memory where there is none."""
        self.stream = stream
        self.buffers = buffers

    def __getitem__(self, visits: list[int]) -> Batch:
        """A video that cannot be read is replaced by another. Where that fails too, the batch holds no clip."""
        stream = self.stream
        shape = (len(visits), *stream.clips_shape)
        clips, loan = (self.buffers and self.buffers.take(shape)) or (empty_for_parent(shape), None)
        batch = Batch(clips.flatten(0, 1), [], [], visits, [], loan)
        for visit, content, out in zip(visits, fetch_ahead(stream, visits), clips.numpy(), strict=True):
            name, bad = try_candidates(stream, visit, content, functools.partial(decode, stream, out=out))
            batch.bad += bad
            if name is None:
                batch.clip = batch.clip[:0]
                break
            batch.paths.append(name)
            batch.rows.append(stream.row_of(visit, len(bad)))
        return batch


def first_clips(stream: ClipStream, visits: int = 4) -> UInt8[Tensor, "b t h w 3"]:
    """The clips of a run's first visits, decoded here and now. Raises NothingReadable."""
    batch = ClipDataset(stream)[list(range(visits))]
    if not len(batch.clip):
        raise nothing_readable(batch.bad)
    return batch.clip


class _RankBatches(Sampler[list[int]]):
    """Visits of one rank: the ranks take turns, `visits` each."""

    def __init__(self, start: int, batches: int, visits: int, rank: int, world_size: int) -> None:
        self.start = start
        self.batches = batches
        self.visits = visits
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.batches):
            first = self.start + (batch * self.world_size + self.rank) * self.visits
            yield list(range(first, first + self.visits))


def _is_of_a_dead_worker(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _worker_died(error: BaseException | None) -> WorkerDied:
    return WorkerDied(f"a decoding process ended unexpectedly, is there memory enough? {error}")


class Prepared(Iterator[T]):
    """What a data set makes of each batch of a rank's visits, in worker processes, from clip `start` of the run on."""

    def __init__(
        self,
        dataset: Dataset[T],
        config: DataConfig,
        *,
        start: int,
        batches: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        workers, crops = config.workers, config.crops_per_clip
        options: dict[str, Any] = {"prefetch_factor": config.prefetch} if workers else {}
        self._loader = DataLoader(
            dataset,
            sampler=_RankBatches(start // crops, batches, batch_size // crops, rank, world_size),
            batch_size=None,  # the data set makes whole batches
            num_workers=workers,
            worker_init_fn=_begin_worker,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else the loader takes a number from the run's own
            **options,
        )
        if workers:
            # A search for garbage writes to every object that it looks at, and so takes the pages, 37 MB, from those
            # that the workers share with this process. What is here now is not searched again while they run.
            gc.collect()
            gc.freeze()
        self._items: Iterator[T] | None = iter(self._loader)

    def __next__(self) -> T:
        """Raises WorkerDied when a worker was killed, NoSharedMemory."""
        if self._items is None:
            raise StopIteration
        try:
            return next(self._items)
        except NoSharedMemory as error:  # torch has put the worker's traceback before the message
            raise NoSharedMemory(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
        except RuntimeError as error:
            if not _is_of_a_dead_worker(error):
                raise
            raise _worker_died(error) from error

    def close(self) -> None:
        """Stop the workers.

        Not left to the collector: after an error the traceback keeps the iterator, and Python's exit then waits for
        workers that nobody told to stop. One that is stuck, as in a read from a server that is silent, is killed.
        """
        items, self._items = self._items, None
        if not isinstance(items, _MultiProcessingDataLoaderIter):
            return
        gc.unfreeze()
        late = threading.Timer(GRACE, _kill, (items._workers,))
        late.start()
        try:
            items._shutdown_workers()
        except RuntimeError as error:  # torch tells of the killed
            if not _is_of_a_dead_worker(error):
                raise
        finally:
            late.cancel()


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


class Loader(Iterator[Batch]):
    """Batches of one rank, whatever decodes them. Close it, or use it in a `with`.

    Iterating raises NothingReadable when a video and all its replacements fail, WorkerDied when a worker was killed,
    NoSharedMemory when one found no room for what it made.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Raises WorkerDied in the place of torch's own error, which comes wherever the program is at the moment."""
        self.close()
        if _is_of_a_dead_worker(error):
            raise _worker_died(error) from error

    def close(self) -> None:
        raise NotImplementedError


class ClipLoader(Loader):
    """Batches decoded by PyAV; the options are those of `Prepared`."""

    def __init__(self, stream: ClipStream, *, batch_size: int, **options: Any) -> None:
        config = stream.config
        size = batch_size // config.crops_per_clip * math.prod(stream.clips_shape)
        buffers = Buffers.for_workers(config.workers, config.prefetch + IN_HAND, size)
        self._batches = Prepared(ClipDataset(stream, buffers), config, batch_size=batch_size, **options)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if not len(batch.clip):
            raise nothing_readable(batch.bad)
        return batch

    def close(self) -> None:
        self._batches.close()


def nothing_readable(bad: list[tuple[str, str]]) -> NothingReadable:
    path, reason = bad[-1]
    return NothingReadable(f"{1 + REPLACEMENTS} videos in a row could not be read, the last one {path}: {reason}")


def _begin_worker(_worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches every process of the terminal; only the
        signal.signal(number, signal.SIG_IGN)  # training process decides when to stop
    gc.freeze()  # what was forked is not searched for garbage again
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc would return to the system, page by page, what the next clip's frames need
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 8 << 20)

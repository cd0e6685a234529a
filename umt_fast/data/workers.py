"""Worker processes that make the batches. Killed or stalled workers are replaced; the batches stay the same."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from umt_fast.data.clips import ClipStream
from umt_fast.data.shared_memory import BufferPool, NoSharedMemory, check_locks
from umt_fast.data.torch_private import end_if_one_died, ignore_dead_workers, is_dead_worker, stop_workers
from umt_fast.data.watch import WorkerWatch, end_with_parent
from umt_fast.errors import RunError

T = TypeVar("T")

GRACE = 1.0
"""Seconds that workers have to finish when the loader is closed."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of the options in malloc.h."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MAX_DEATHS = 3
"""The loader gives up when workers are killed this often at one batch. The out-of-memory killer picks its victims at
random, so one death proves nothing."""


class WorkerDied(RunError):
    """Decoding processes were killed repeatedly."""


class _RankBatches(Sampler[list[int]]):
    """Visit numbers of one rank: the ranks take turns with `visits` visits each, up to `end` (None: no end)."""

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
    """The items of a data set for one rank, made in worker processes, from clip `start` of the run on."""

    def __init__(
        self,
        dataset: Dataset[T],
        stream: ClipStream,
        *,
        start: int = 0,
        batches: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        end: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """`start` and `batch_size` count clips, `end` counts visits (None: no end); the last batch may be smaller.

        `stream.config` has the number of workers, the batches that each keeps ready, and their time limit.
        """
        clips = stream.clips_per_visit
        self._dataset, self._stream, self._pin_memory, self._say = dataset, stream, pin_memory, say
        self._visits = functools.partial(
            _RankBatches, visits=batch_size // clips, rank=rank, world_size=world_size, end=end
        )
        self._next = start // clips
        """First visit, over all ranks, of the next batch."""
        self._step = batch_size // clips * world_size
        self._left = batches
        self._deaths = 0
        self._watch = WorkerWatch(stream.config.workers, stream.config.stall_timeout)
        self._items: Iterator[T] | None = self._start()

    def _start(self) -> Iterator[T]:
        config = self._stream.config
        options: dict[str, Any] = {}
        if config.workers:
            check_locks()
            options = {"prefetch_factor": config.prefetch}
            # Garbage collection writes to every object it visits, which would copy the 37 MB of pages that the workers
            # share with this process. `freeze` excludes all existing objects from it while the workers run.
            gc.collect()
            gc.freeze()
        with warnings.catch_warnings(), ignore_dead_workers():
            # More workers than cores are the user's choice; the log shows what the run waits for.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            items = iter(
                DataLoader(
                    self._dataset,
                    sampler=self._visits(self._next, self._left),
                    batch_size=None,  # the data set makes whole batches
                    num_workers=config.workers,
                    worker_init_fn=functools.partial(_begin_worker, os.getpid(), self._watch),
                    pin_memory=self._pin_memory,
                    generator=torch.Generator(),  # otherwise the loader draws from the run's default generator
                    **options,
                )
            )
        if config.workers:
            running = weakref.ref(items)  # a loader that is dropped without being closed must end its workers
            self._watch.start(lambda: end_if_one_died(running()))
        return items

    def __next__(self) -> T:
        """The next batch; workers that were killed or stalled are replaced, and the visits stay the same.

        Raises WorkerDied when workers are killed `MAX_DEATHS` times in a row, NoSharedMemory.
        """
        while self._items is not None:
            try:
                item = next(self._items)
            except NoSharedMemory as error:  # torch puts the worker's traceback before the message
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
        """Stop all workers and start new ones at the missing batch."""
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
        """Stop the workers. A stuck worker, for example one that waits for a silent server, is killed."""
        items, self._items = self._items, None
        self._watch.close()
        if items is not None and self._stream.config.workers:
            gc.unfreeze()
            stop_workers(items, GRACE)


def _begin_worker(parent: int, watch: WorkerWatch, worker: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:  # Ctrl-C reaches every process of the terminal, but only the training process decides
        signal.signal(number, signal.SIG_IGN)  # when to stop
    end_with_parent(parent)
    watch.join(worker)
    gc.freeze()  # keeps the garbage collector from copying the forked pages
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # otherwise glibc returns memory to the system that the next clip needs
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 8 << 20)

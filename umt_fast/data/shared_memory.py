"""Memory that workers share with the training process and reuse for every batch.

Fresh shared memory costs a page fault per 4 KB: half a millisecond per clip, a tenth of its decoding time.
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from umt_fast.data.torch_private import empty_shared
from umt_fast.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import UInt8

_numbers = itertools.count()
_pools: weakref.WeakValueDictionary[int, BufferPool] = weakref.WeakValueDictionary()
"""All pools by number, so that the training process can look up a lease."""


class NoSharedMemory(RunError):
    """A decoding process has no shared memory for its clips."""


@dataclass(frozen=True)
class Lease:
    """The right to use one buffer. A worker sends the lease instead of the buffer's content."""

    pool: int
    buffer: int

    def open(self, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        """Open the buffer in the training process. It becomes free when no tensor or array shares its memory."""
        return _pools[self.pool].open(self.buffer, shape, dtype)


class BufferPool:
    """Buffers for the workers that are forked from this process. A worker leases a buffer, this process frees it."""

    def __init__(self, workers: int, per_worker: int, size: int) -> None:
        """`per_worker` buffers of `size` bytes each; they use no memory before they are first written to."""
        size += -size % mmap.PAGESIZE
        # Anonymous memory, not a file in /dev/shm, which is small in many containers.
        self._memory = np.frombuffer(mmap.mmap(-1, workers * per_worker * size), np.uint8)
        self._memory = self._memory.reshape(workers * per_worker, size)
        self._leased = np.frombuffer(mmap.mmap(-1, workers * per_worker), np.uint8)
        self._per_worker = per_worker
        self._opened: set[int] = set()
        self._number = next(_numbers)
        _pools[self._number] = self

    @classmethod
    def for_workers(cls, workers: int, per_worker: int, size: int) -> BufferPool | None:
        """A pool; None if workers do not inherit this process's memory, or the system refuses this much memory."""
        if not workers or multiprocessing.get_start_method() != "fork":
            return None
        try:
            return cls(workers, per_worker, size)
        except OSError:
            return None

    def lease(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, Lease] | None:
        """In a worker: a free buffer and its lease. None if all buffers are in use or too small."""
        if math.prod(shape) * dtype.itemsize > self._memory.shape[1]:
            return None
        worker = get_worker_info()
        first = worker.id * self._per_worker if worker else 0
        free = np.flatnonzero(self._leased[first : first + self._per_worker] == 0)
        if not len(free):
            return None
        buffer = first + int(free[0])
        self._leased[buffer] = 1
        return self._array(buffer, shape, dtype), Lease(self._number, buffer)

    def reclaim(self) -> None:
        """After the workers have ended: free the buffers that they leased and this process has not opened."""
        for buffer in range(len(self._leased)):
            if buffer not in self._opened:
                self._leased[buffer] = 0

    def open(self, buffer: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        array = self._array(buffer, shape, dtype)  # every tensor or view made from it keeps this array alive
        self._opened.add(buffer)
        weakref.finalize(array, _free, self._leased, self._opened, buffer, os.getpid()).atexit = False
        return torch.from_numpy(array)

    def _array(self, buffer: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.ndarray(shape, dtype, self._memory[buffer])


def _free(leased: np.ndarray, opened: set[int], buffer: int, opened_by: int) -> None:
    if os.getpid() == opened_by:  # a later fork may drop its copy while this process still uses the buffer
        opened.discard(buffer)
        leased[buffer] = 0


def check_locks() -> None:
    """Raise NoSharedMemory if processes cannot share a lock, which workers need; locks are in /dev/shm."""
    try:
        multiprocessing.Lock()
    except (OSError, ImportError) as error:  # ImportError: a system without semaphores
        reason = getattr(error, "strerror", None) or error
        raise NoSharedMemory(
            f"worker processes need locks in /dev/shm, where none can be made: {reason}; make it writable and larger "
            "(docker run --shm-size 8g), or train with --data.workers 0"
        ) from None


def empty_for_parent(shape: tuple[int, ...]) -> UInt8[Tensor, ...]:
    """Memory that a worker fills and the training process reads without a copy. Raises NoSharedMemory."""
    if get_worker_info() is None or 0 in shape:
        return torch.empty(shape, dtype=torch.uint8)
    try:
        return empty_shared(shape)
    except RuntimeError as error:
        raise NoSharedMemory(
            f"a decoding process found no {math.prod(shape)} bytes in /dev/shm ({error}); enlarge that (docker run "
            "--shm-size 8g), or lower --data.workers or --data.prefetch"
        ) from None

"""Memory that workers share with the training process and write anew, batch after batch.

Fresh shared memory costs a page fault per 4 KB, half a millisecond per clip: a tenth of what decoding one takes.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import os
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, Buffers] = weakref.WeakValueDictionary()
"""Where the training process finds what a loan is of."""


@dataclass(frozen=True)
class Loan:
    """One of the buffers, in a few bytes: what a worker sends."""

    buffers: int
    place: int

    def claim(self, shape: tuple[int, ...]) -> Tensor:
        """In the training process: the buffer, which is free again once no tensor or array shares its memory."""
        return _known[self.buffers].claim(self.place, shape)


class Buffers:
    """Some buffers for each of the workers that are forked from here. A worker takes, this process gives back."""

    def __init__(self, workers: int, each: int, size: int) -> None:
        """`each` of `size` bytes per worker; none is more than an address before it is first written to."""
        size += -size % mmap.PAGESIZE
        # Not by a name in /dev/shm, which is small in many containers.
        self._memory = np.frombuffer(mmap.mmap(-1, workers * each * size), np.uint8).reshape(workers * each, size)
        self._taken = np.frombuffer(mmap.mmap(-1, workers * each), np.uint8)
        self._each = each
        self._number = next(_numbers)
        _known[self._number] = self

    @classmethod
    def for_workers(cls, workers: int, each: int, size: int) -> Buffers | None:
        """None where workers do not inherit this process's memory, or the system does not promise so much."""
        if not workers or multiprocessing.get_start_method() != "fork":
            return None
        try:
            return cls(workers, each, size)
        except OSError:
            return None

    def take(self, shape: tuple[int, ...]) -> tuple[Tensor, Loan] | None:
        """In a worker: uint8 memory of one of its buffers and what to send for it. None while all are in use."""
        worker = get_worker_info()
        first = worker.id * self._each if worker else 0
        free = np.flatnonzero(self._taken[first : first + self._each] == 0)
        if not len(free):
            return None
        place = first + int(free[0])
        self._taken[place] = 1
        return torch.from_numpy(self._part(place, shape)), Loan(self._number, place)

    def claim(self, place: int, shape: tuple[int, ...]) -> Tensor:
        part = self._part(place, shape)  # every tensor made of it, however indirectly, keeps this array
        weakref.finalize(part, _give_back, self._taken, place, os.getpid()).atexit = False
        return torch.from_numpy(part)

    def _part(self, place: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.ndarray(shape, np.uint8, self._memory[place])


def _give_back(taken: np.ndarray, place: int, claimed_by: int) -> None:
    if os.getpid() == claimed_by:  # what a process forked since lets go, this one may still hold
        taken[place] = 0

"""What each data worker is doing, so that one that is killed or stalls costs only its own video."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass

from umt_fast.data.video import BadVideo

_PR_SET_PDEATHSIG = 1
"""Number of the option in linux/prctl.h."""
IDLE = -1
"""Stands in place of a row while the worker reads none."""


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this worker when process `parent`, which started it, ends, however it ends (Linux only)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The fork server, the parent of what it forks, ends with the process that uses it.
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent:  # it has ended already
        os._exit(1)


@dataclass(frozen=True)
class Activity:
    """A row of the list that a worker was reading, and the seconds that it had spent on it."""

    row: int
    seconds: float


class WorkerWatch:
    """A board on which every worker, forked from this process, notes the row that it reads and since when.

    A thread kills the workers that read one video for more than `limit` seconds.
    """

    _INTERVAL = 1.0  # seconds between two looks

    def __init__(self, workers: int, limit: float, stalled: dict[int, str] | None = None) -> None:
        # Three numbers for each worker. A memoryview: numpy would take ten times as long to write one.
        self._board = memoryview(mmap.mmap(-1, max(workers, 1) * 24)).cast("q")
        self._set_idle()  # until a worker joins: it may take its time, and a spawned one never does
        self._limit = limit
        self._killed: list[Activity] = []
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.stalled: dict[int, str] = stalled or {}
        """Rows that are not read again, each with the reason. A worker has those known when it was forked."""

    def __reduce__(self) -> tuple[type[WorkerWatch], tuple[int, float, dict[int, str]]]:
        """A spawned worker shares no memory: it writes to its own board, which nobody reads."""
        return WorkerWatch, (len(self._board) // 3, self._limit, dict(self.stalled))

    def start(self) -> None:
        """Begin to look, once the workers run."""
        self._closed.clear()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._set_idle()

    def join(self, worker: int) -> None:
        """Register this process as `worker`, before it begins."""
        global _own
        _own = (self, worker)
        self._board[3 * worker] = os.getpid()

    def begin(self, worker: int, row: int) -> None:
        self._board[3 * worker + 2] = time.monotonic_ns()
        self._board[3 * worker + 1] = row
        if row in self.stalled:
            raise BadVideo(self.stalled[row])

    def take_killed(self) -> list[Activity]:
        """The workers that were killed since the last time, and what they read."""
        killed, self._killed = self._killed, []
        return killed

    def _set_idle(self) -> None:
        for place in range(1, len(self._board), 3):
            self._board[place] = IDLE

    def _look(self) -> None:
        while not self._closed.wait(min(self._INTERVAL, self._limit / 2)):
            now = time.monotonic_ns()
            for place in range(0, len(self._board), 3):
                pid, row, since = self._board[place : place + 3].tolist()
                seconds = (now - since) / 1e9
                # Never process 0: that is a kill of our own process group.
                if pid > 0 and row != IDLE and row not in self.stalled and seconds > self._limit:
                    self.stalled[row] = f"it stalled a decoding process for {seconds:.0f} s"
                    self._killed.append(Activity(row, seconds))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


_own: tuple[WorkerWatch, int] | None = None
"""The watch and the number of this process, in a worker."""


def note_reading(row: int) -> None:
    """Note that this worker now reads `row`; -1: none. Raises BadVideo for a row that stalled a worker before."""
    if _own is not None:
        _own[0].begin(_own[1], row)

"""Records what each data worker reads, so that a killed or stalled worker costs only its own video."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from umt_fast.data.video import BadVideo

_PR_SET_PDEATHSIG = 1
"""Number of the option in linux/prctl.h."""
IDLE = -1
"""Row number of a worker that reads no video."""


def end_with_parent(parent: int) -> None:
    """Make the kernel kill this worker when its `parent` process ends in any way (Linux only)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # With the fork server, getppid() is the server, which ends with the process that uses it.
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent:  # it has ended already
        os._exit(1)


@dataclass(frozen=True)
class Activity:
    """The row that a worker was reading, and for how many seconds."""

    row: int
    seconds: float


class WorkerWatch:
    """Shared memory in which every worker forked from this process writes its current row and start time.

    A thread kills workers that read one video for more than `limit` seconds, and checks for others that have died.
    """

    _INTERVAL = 1.0  # seconds between two checks

    def __init__(self, workers: int, limit: float, stalled: dict[int, str] | None = None) -> None:
        # Process, row and start time of each worker. A memoryview is ten times as fast as numpy for single writes.
        self._board = memoryview(mmap.mmap(-1, max(workers, 1) * 24)).cast("q")
        self._set_idle()  # until a worker joins; a spawned worker never joins this board
        self._limit = limit
        self._killed: list[Activity] = []
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.stalled: dict[int, str] = stalled or {}
        """Rows that are not read again, with the reason. A worker knows the rows from before it was forked."""

    def __reduce__(self) -> tuple[type[WorkerWatch], tuple[int, float, dict[int, str]]]:
        """A spawned worker shares no memory: it gets a board of its own, which is not read."""
        return WorkerWatch, (len(self._board) // 3, self._limit, dict(self.stalled))

    def start(self, check_for_dead: Callable[[], None] = lambda: None) -> None:
        """Start the checks, after the workers have started; `check_for_dead` is called every second."""
        self._closed.clear()
        self._thread = threading.Thread(target=self._look, args=(check_for_dead,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._set_idle()

    def join(self, worker: int) -> None:
        """Register this process as `worker`, before its first video."""
        global _own
        _own = (self, worker)
        self._board[3 * worker] = os.getpid()

    def begin(self, worker: int, row: int) -> None:
        self._board[3 * worker + 2] = time.monotonic_ns()
        self._board[3 * worker + 1] = row
        if row in self.stalled:
            raise BadVideo(self.stalled[row])

    def take_killed(self) -> list[Activity]:
        """What the workers read that were killed since the last call."""
        killed, self._killed = self._killed, []
        return killed

    def _set_idle(self) -> None:
        for place in range(1, len(self._board), 3):
            self._board[place] = IDLE

    def _look(self, check_for_dead: Callable[[], None]) -> None:
        while not self._closed.wait(min(self._INTERVAL, self._limit / 2)):
            check_for_dead()
            now = time.monotonic_ns()
            for place in range(0, len(self._board), 3):
                pid, row, since = self._board[place : place + 3].tolist()
                seconds = (now - since) / 1e9
                # Never process 0, which would kill our own process group.
                if pid > 0 and row != IDLE and row not in self.stalled and seconds > self._limit:
                    self.stalled[row] = f"it stalled a decoding process for {seconds:.0f} s"
                    self._killed.append(Activity(row, seconds))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


_own: tuple[WorkerWatch, int] | None = None
"""In a worker: its watch and its worker number."""


def note_reading(row: int) -> None:
    """Note that this worker now reads `row`; -1: none. Raises BadVideo for a row that stalled a worker before."""
    if _own is not None:
        _own[0].begin(_own[1], row)

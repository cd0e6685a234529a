"""Worker processes that may die without taking the work of the others with them."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

ATTEMPTS = 2
"""Processes that may die over one task. Whom a machine without memory kills is chance, so one death proves nothing."""

_LONGEST_WAIT = 3600.0  # seconds; the system knows none without end
_STOP = (signal.SIGINT, signal.SIGTERM)


def keep_bars_here() -> None:
    """Let tqdm draw from this process alone: with no thread of its own, as processes are forked, and with no lock that
    those share, which one of them that is killed could keep."""
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())


class Died(Exception):
    """The processes that worked on a task were killed or crashed."""


class Overdue(Died):
    """A task took longer than it may, and the process that worked on it was killed."""


class Pool:
    """Runs `work(task)` for each added task in one of up to `size` processes. Use as a context manager.

    Unlike the standard library's, it knows which task each process has, so that the death of one costs one task.
    Workers ignore Ctrl-C, and end when this process does, however it ends. `work` should not raise.
    """

    def __init__(self, work: Callable[[Any], Any], size: int) -> None:
        self._work = work
        self._size = size
        self._waiting: deque[_Assignment] = deque()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def add(self, task: Any, first: bool = False, time_limit: float = math.inf) -> None:
        """Queue a task, in front of the others if `first`. After `time_limit` seconds its worker is killed."""
        (self._waiting.appendleft if first else self._waiting.append)(_Assignment(task, time_limit))

    def results(self) -> Iterator[tuple[Any, Any]]:
        """Each task and what `work` returned, as they finish; Died in its place for a task that killed its workers,
        Overdue for one that took too long.

        Tasks may be added meanwhile.
        """
        while True:
            self._hand_out()
            busy = [worker for worker in self._workers if worker.busy]
            if not busy:
                return
            patience = max(min(worker.due for worker in busy) - time.monotonic(), 0)
            ready = wait([worker.connection for worker in busy], min(patience, _LONGEST_WAIT))
            for worker in [worker for worker in busy if worker.connection in ready]:
                given = worker.assigned
                try:
                    outcome = worker.take()
                except (EOFError, ConnectionError):
                    self._workers.remove(worker)
                    ending = worker.end(grace=1.0)  # its connection closes a little before
                    if given.deaths + 1 < ATTEMPTS:
                        self._waiting.appendleft(replace(given, deaths=given.deaths + 1))
                        continue
                    told = f"the process that worked on it ended by {ending}, {ATTEMPTS} times"
                    outcome = Died(f"{told}; is there memory enough?")
                yield given.task, outcome
            for worker in busy:
                late = worker.connection not in ready and worker.due <= time.monotonic()
                if late and not worker.connection.poll():  # it may have been done while results were looked at
                    self._workers.remove(worker)
                    worker.end()
                    given = worker.assigned
                    told = f"not through after {given.time_limit:g} seconds"
                    yield given.task, Overdue(f"{told}; it is damaged, or wants a longer --time-limit")

    def _hand_out(self) -> None:
        idle = [worker for worker in self._workers if not worker.busy]
        while self._waiting and (idle or len(self._workers) < self._size):
            if not idle:
                idle.append(_Worker(self._work))
                self._workers.append(idle[-1])
            idle.pop().give(self._waiting.popleft())


@dataclass(frozen=True)
class _Assignment:
    task: Any
    time_limit: float
    """Seconds."""
    deaths: int = 0
    """Of processes that worked on it."""


class _Worker:
    def __init__(self, work: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context()
        self.connection, theirs = context.Pipe()
        self.assigned = _Assignment(None, math.inf)
        self.due = math.inf
        """When its task should be done."""
        self.busy = False
        self._process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        # Held meanwhile: a signal would kill the new process, and Python may drop one that comes while it forks.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()  # so that its end is seen here when the process ends

    def give(self, assignment: _Assignment) -> None:
        self.assigned, self.busy = assignment, True
        self.due = time.monotonic() + assignment.time_limit
        with contextlib.suppress(ConnectionError):  # it died idle; `take` will tell
            self.connection.send(assignment.task)

    def take(self) -> Any:
        outcome = self.connection.recv()
        self.busy = False
        return outcome

    def end(self, grace: float = 0.0) -> str:
        """Kill the process, unless it ends within `grace` seconds; how it ended."""
        if grace:
            self._process.join(grace)
        self._process.kill()
        self._process.join()
        self.connection.close()
        code = self._process.exitcode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches every process of a terminal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(work(task))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)

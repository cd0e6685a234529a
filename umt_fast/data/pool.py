"""Worker processes that may die without taking the work of the others with them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

ATTEMPTS = 2
"""Processes that may die over one task. Whom a machine without memory kills is chance, so one death proves nothing."""

_STOP = (signal.SIGINT, signal.SIGTERM)


def keep_bars_here() -> None:
    """Let tqdm draw from this process alone: with no thread of its own, as processes are forked, and with no lock that
    those share, which one of them that is killed could keep."""
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())


class Died(Exception):
    """The processes that worked on a task were killed or crashed."""


class Pool:
    """Runs `work(task)` for each added task in one of up to `size` processes. Use as a context manager.

    Unlike the standard library's, it knows which task each process has, so that the death of one costs one task.
    Workers ignore Ctrl-C, and end when this process does, however it ends. `work` should not raise.
    """

    def __init__(self, work: Callable[[Any], Any], size: int) -> None:
        self._work = work
        self._size = size
        self._waiting: deque[tuple[Any, int]] = deque()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def add(self, task: Any, first: bool = False) -> None:
        """Queue a task, in front of the others if `first`."""
        (self._waiting.appendleft if first else self._waiting.append)((task, 0))

    def results(self) -> Iterator[tuple[Any, Any]]:
        """Each task and what `work` returned, as they finish; Died in its place for a task that killed its workers.

        Tasks may be added meanwhile.
        """
        while True:
            self._hand_out()
            busy = [worker for worker in self._workers if worker.busy]
            if not busy:
                return
            for ready in wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is ready)
                task, deaths = worker.assigned
                try:
                    outcome = worker.take()
                except (EOFError, ConnectionError):
                    self._workers.remove(worker)
                    ending = worker.end(grace=1.0)  # its connection closes a little before
                    if deaths + 1 < ATTEMPTS:
                        self._waiting.appendleft((task, deaths + 1))
                        continue
                    outcome = Died(f"the process that worked on it ended by {ending}, {ATTEMPTS} times")
                yield task, outcome

    def _hand_out(self) -> None:
        idle = [worker for worker in self._workers if not worker.busy]
        while self._waiting and (idle or len(self._workers) < self._size):
            if not idle:
                idle.append(_Worker(self._work))
                self._workers.append(idle[-1])
            idle.pop().give(*self._waiting.popleft())


class _Worker:
    def __init__(self, work: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context()
        self.connection, theirs = context.Pipe()
        self.assigned: tuple[Any, int] = (None, 0)
        self.busy = False
        self._process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        # Held meanwhile: a signal would kill the new process, and Python may drop one that comes while it forks.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()  # so that its end is seen here when the process ends

    def give(self, task: Any, deaths: int) -> None:
        self.assigned, self.busy = (task, deaths), True
        with contextlib.suppress(ConnectionError):  # it died idle; `take` will tell
            self.connection.send(task)

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

"""Stopping a run by signal: all ranks stop after the same step, save, and exit with EXIT_STOPPED."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from umt_fast.errors import RunError
from umt_fast.run.world import World

T = TypeVar("T")

EXIT_STOPPED = 75
"""Exit status of a run that a signal stopped before its end: EX_TEMPFAIL of sysexits.h. Start it again to continue."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM and submitit send SIGUSR1 and SIGUSR2 before a job's time ends; a lost terminal sends SIGHUP."""


class StopSignal:
    """A request to stop, by signal; all ranks stop after the same step.

    A second signal ends the process at once, even in a collective: a thread reads the signals, because Python's
    handlers would run only after the collective. Use it as a context manager.
    """

    _REPEAT_SECONDS = 1.0  # Ctrl-C reaches a rank twice: from the terminal and from torchrun

    def __init__(self, world: World) -> None:
        self._world = world
        self._name = ""
        self._since = 0.0
        self._failure: RunError | None = None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._fetcher: threading.Thread | None = None

    def __enter__(self) -> StopSignal:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, lambda *_: None)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._write)
        self._tasks.put(None)
        # Join both threads, unless a fetch still waits for data: a thread that wakes during Python's exit may abort it.
        self._watcher.join()
        if self._fetcher is not None:
            self._fetcher.join(timeout=0.5)

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self._name)

    def _watch(self) -> None:
        with os.fdopen(self._read, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._receive(signal.Signals(number))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self._name:
            self._name, self._since = number.name, now
            if self._world.main:
                _tell(f"{number.name}: saving after this step; a second signal ends the run at once")
        elif self._world.size == 1 or now - self._since > self._REPEAT_SECONDS:
            _tell(f"{number.name} again: ended without saving")
            os._exit(128 + number)

    def fetch(self, loader: Iterator[T], count: int) -> list[T] | None:
        """The `count` batches of a step, or None if the run must save and end because of a signal or a data error.

        `raise_failure` raises the data error after the run has saved. With several ranks the error is raised here,
        because the others wait for this rank in their step.
        """
        try:
            return self.unless_requested(lambda: [next(loader) for _ in range(count)])
        except RunError as error:
            if self._world.size > 1:
                raise
            self._failure = error
            return None

    def raise_failure(self) -> None:
        """Raise the error that ended the data, if there was one."""
        if self._failure is not None:
            raise self._failure

    def unless_requested(self, fetch: Callable[[], T]) -> T | None:
        """`fetch()`, or None if a stop is requested before it returns: data may never come.

        With several ranks this always waits, since the ranks could not agree on the step to stop at.
        """
        if self._world.size > 1:
            return fetch()
        if self._fetcher is None:
            self._fetcher = threading.Thread(target=self._fetch, daemon=True)
            self._fetcher.start()
        future: Future[T] = Future()
        self._tasks.put((future, fetch))
        while True:
            with contextlib.suppress(FutureTimeout):
                return future.result(timeout=0.1)
            if self._name:
                return None

    def _fetch(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)  # each thread has its own current device
        while (task := self._tasks.get()) is not None:
            future, fetch = task
            try:
                future.set_result(fetch())
            except BaseException as error:  # raised again by future.result()
                future.set_exception(error)

    def requested(self) -> bool:
        """Whether any rank was asked to stop; every rank must call this once per step. With several ranks the answer is
        one step old."""
        if self._world.size == 1:
            return bool(self._name)
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._flag.item())
        self._flag.fill_(bool(self._name))
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._world.host_group, async_op=True)
        return stop

    def settle(self) -> None:
        """Wait for the last all-reduce, so that the group can be closed."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal is gone
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())

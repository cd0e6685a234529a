"""Stopping a run by signal: all ranks stop after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from umt_fast.run.world import World


class StopSignal:
    """Turns SIGINT and SIGTERM into a wish to stop that all ranks learn of at the same step.

    A second signal ends the process at once. Use as a context manager and ask `requested` once a step on every rank.
    """

    _REPEAT_SECONDS = 1.0  # torchrun sends its children again the signal that the terminal sent them

    def __init__(self, world: World) -> None:
        self._world = world
        self._name = ""
        self._since = 0.0
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None
        self._waiting = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._name:
            self._name, self._since = signal.Signals(number).name, now
            if self._world.main:
                os.write(
                    sys.stderr.fileno(),
                    f"\n{self._name}: saving after this step; once more ends the run at once\n".encode(),
                )
            if self._waiting:
                raise KeyboardInterrupt
        elif self._world.size == 1 or now - self._since > self._REPEAT_SECONDS:
            os.write(sys.stderr.fileno(), f"\n{signal.Signals(number).name} again: gone without saving\n".encode())
            os._exit(128 + number)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for what may never come. In a run of one process the signal ends it with KeyboardInterrupt;
        several could not agree on the step to stop at."""
        self._waiting = self._world.size == 1
        try:
            if self._waiting and self._name:
                raise KeyboardInterrupt
            yield
        finally:
            self._waiting = False

    def requested(self) -> bool:
        """Whether any rank was told to stop. With several ranks the answer is that of the step before."""
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
        """Wait for the last exchange, so that the group can be closed."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

"""The processes of a run, and how they agree: torchrun's environment, or one process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from umt_fast.config import ConfigError
from umt_fast.files import FolderInUse, lock_folder

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the run's processes."""

    rank: int
    size: int
    device: torch.device
    host_group: Any = None
    """A gloo group for talk between hosts, which keeps the device out of it."""

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def start(device: str) -> World:
    """Join the run's processes. `device` is auto, cpu or cuda; auto takes a GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device = cuda, but torch sees no GPU; use --run.device cpu, or see python -m umt_fast.doctor"
        )
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    if size == 1:
        return World(rank, size, place)
    if device == "cuda":
        dist.init_process_group("nccl", device_id=place)
        return World(rank, size, place, dist.new_group(backend="gloo"))
    dist.init_process_group("gloo")
    return World(rank, size, place, dist.group.WORLD)


@contextlib.contextmanager
def hold_folder(folder: Path, world: World) -> Iterator[None]:
    """Make the folder of a run and keep other runs out of it meanwhile.

    Raises ConfigError if another run is in it.
    """
    if not world.main:
        yield
        return
    try:
        with lock_folder(folder):
            yield
    except FolderInUse:
        raise ConfigError(f"another run is using {folder}; stop it, or choose another --run.name") from None


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

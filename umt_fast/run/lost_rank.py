"""Handling of a lost or late rank: the others save the last whole step, name the rank, and end."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from umt_fast.errors import RunError
from umt_fast.run.world import World, shorten

if TYPE_CHECKING:
    from umt_fast.run.train_state import TrainState

ARRIVAL_SECONDS = 2.0
"""Seconds that the main rank waits for random states that a lost rank may have sent."""


_GLOO_WORDS = ("gloo", "Timed out waiting", "Application timeout caused pair closure", "Connection closed by peer")
"""Texts of gloo's errors; some do not contain its name."""


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is lost or late; gloo has no error class for it."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _GLOO_WORDS)


class RandomStates:
    """Sends the random state of every rank after each step to the main rank, during the next step.

    A checkpoint needs the states of all ranks, and a lost rank cannot send its own. CPU only, 5 KB per rank and step.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: Any = None
        self._states: list[Tensor] | None = None

    def share(self) -> None:
        """Start sending this rank's state; every rank must call this after each step."""
        if self._pending is not None:
            self._pending.wait()
        own = torch.get_rng_state()
        self._states = [torch.empty_like(own) for _ in range(self._world.size)] if self._world.main else None
        self._pending = dist.gather(own, self._states, dst=0, group=self._world.host_group, async_op=True)

    def received(self) -> list[dict[str, Tensor]] | None:
        """On the main rank: the states after the last shared step; None unless all have arrived."""
        try:
            if self._states is None or not self._pending.wait(timedelta(seconds=ARRIVAL_SECONDS)):
                return None
        except RuntimeError:
            return None
        return [{"cpu": state} for state in self._states]


@contextlib.contextmanager
def save_if_lost(state: TrainState, folder: Path, keep: int) -> Iterator[None]:
    """Use this around the loop of a run: if another rank is lost, the main rank saves the last whole step if it can.

    The error is raised again. torchrun kills the rank after 30 s (--shutdown-timeout); the checkpoint is then either
    complete or absent.
    """
    try:
        yield
    except RuntimeError as error:
        if state.world.size > 1 and state.world.main and is_lost_rank(error):
            try:
                said = f"saved {state.save_alone(folder, keep)}"
            except (RunError, OSError) as reason:
                said = f"not saved: {reason}"
            _tell(f"another rank is lost after step {state.step}; {said}")
        raise


def end_without(world: World, error: RuntimeError) -> None:
    """Print which rank was lost and end this process at once: its collectives would wait for the lost rank."""
    lost, reason = world.find_lost(), shorten(error)
    _tell(f"error: another process of the run was lost or is late: {lost} ({reason})")
    os._exit(1)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal is gone
        print(text, file=sys.stderr, flush=True)

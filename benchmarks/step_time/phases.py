"""Times of a step's phases, by a clock that the step calls at the end of each phase."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Mark = Callable[[str], None]
"""Called with a phase's name at its end."""

PHASES = ("teacher", "sampling", "student forward", "loss", "backward", "optimiser")
"""The phases of a stage-1 step. Decoding and the all-reduce overlap with it: `benchmarks.step_time.overlap`."""


def no_mark(_phase: str) -> None:
    """A mark that does nothing, for a step that is not timed."""


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PhaseClock:
    """Seconds between marks. On a GPU by CUDA events, so that the host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self("start")

    def __call__(self, phase: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, in order. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, float) and isinstance(after, float):
                passed = after - before
            else:
                assert isinstance(before, torch.cuda.Event)
                assert isinstance(after, torch.cuda.Event)
                passed = before.elapsed_time(after) / 1e3
            spent[phase] = spent.get(phase, 0.0) + passed
        return spent

"""Time and MFU of the steps of a run whose batches are of several kinds, such as pictures and videos."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class _Lap:
    kind: str
    flops: int
    end: Any
    """A CUDA event, or seconds of the host's clock."""


class KindClock:
    """Wall time of the steps since the last `take`, by kind of batch. The host does not read from the device in
    between.

    A step lasts from the end of the previous step to its own end, so it includes the wait for its data. MFU is the
    share of the device's peak FLOP/s in use (arXiv 2204.02311).
    """

    def __init__(self, device: torch.device, peak_flops: float) -> None:
        """`peak_flops`: peak FLOP/s of one device."""
        self._device = device
        self._peak_flops = peak_flops
        self._laps: list[_Lap] = []
        self.start()

    def start(self) -> None:
        """Restart the clock, such as after saving a checkpoint."""
        self._laps = []
        self._begin = self._now()

    def add(self, kind: str, flops: int) -> None:
        """Record the end of a step with `flops` FLOP on this process."""
        self._laps.append(_Lap(kind, flops, self._now()))

    def take(self) -> dict[str, float]:
        """`mfu` and, with several kinds, `KIND_ms` and `KIND_mfu` of each. Waits for the last step."""
        if not self._laps:
            return {}
        if self._device.type == "cuda":
            self._laps[-1].end.synchronize()
        seconds: dict[str, float] = {}
        steps: dict[str, int] = {}
        flops: dict[str, int] = {}
        before = self._begin
        for lap in self._laps:
            seconds[lap.kind] = seconds.get(lap.kind, 0.0) + self._between(before, lap.end)
            steps[lap.kind] = steps.get(lap.kind, 0) + 1
            flops[lap.kind] = flops.get(lap.kind, 0) + lap.flops
            before = lap.end
        self._begin, self._laps = before, []
        found = {"mfu": self._share(sum(flops.values()), sum(seconds.values()))}
        if len(steps) > 1:
            for kind in sorted(steps):
                found[f"{kind}_ms"] = round(1e3 * seconds[kind] / steps[kind], 3)
                found[f"{kind}_mfu"] = self._share(flops[kind], seconds[kind])
        return found

    def _share(self, flops: int, seconds: float) -> float:
        return round(flops / max(seconds, 1e-9) / self._peak_flops, 4)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin

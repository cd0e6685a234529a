"""Seconds of GPU time per call, in the form that pytest-benchmark takes.

pytest-benchmark reads a timer before and after `iterations` calls and divides the difference by their number. Here
the timer records a CUDA event and returns it as an `Instant`; the difference of two is the GPU's own time between
them. The host takes tens of microseconds per launch, more than many of these kernels run. So before the first event
of a round the timer queues enough other work (reading a large buffer, which also clears the L2) for the host to
get ahead: the kernels then lie in the queue back to back, and the gaps of the host do not count. A contender that
reads a value on the host in its midst (a boolean mask does) loses that lead, and pays for its gaps as in training.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

L2_MULTIPLE = 4
"""Inputs that are rotated are together this many times the L2."""
LONGEST_LEAD = 0.02
"""Seconds; a contender that stops the host would ask for ever longer leads without a use."""


class Instant:
    """A point in the GPU's time; `later - earlier` is in seconds."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def __sub__(self, earlier: Instant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class EventTimer:
    """A timer for pytest-benchmark that reads the GPU's clock. Its calls alternate: start, end, start, end..."""

    __name__ = "cuda_events"  # pytest-benchmark writes it beside the results

    def __init__(self) -> None:
        self._starts = True
        self._fillers = 0
        self._buffer: torch.Tensor | None = None
        self._filler_seconds = 0.0

    def __call__(self) -> Instant:
        if self._starts and self._buffer is not None:
            for _ in range(self._fillers):
                self._buffer.sum()
        self._starts = not self._starts
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Instant(event)

    def lead(self, seconds: float) -> None:
        """Give the host about `seconds` before each start, at least one read of the buffer. Resets the turn."""
        if self._buffer is None:
            self._buffer = torch.ones(2**28, device="cuda")  # 1 GiB: many times any L2
            self._filler_seconds = gpu_seconds(self._buffer.sum, 10)
        self._fillers = max(1, math.ceil(min(seconds, LONGEST_LEAD) / self._filler_seconds))
        self._starts = True


def gpu_seconds(call: Call, repeats: int) -> float:
    """Median GPU time of one call, each between its own events, after three to warm up."""
    for _ in range(3):
        call()
    pairs = []
    for _ in range(repeats):
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        call()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a copy of 2 GiB within the GPU: the ceiling of memory-bound ops."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_seconds(lambda: target.copy_(source), 20)


def sets_needed(bytes_per_set: int) -> int:
    """How many sets of inputs, each read once before any is read again, exceed the L2 `L2_MULTIPLE` times."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(L2_MULTIPLE * cache / bytes_per_set))


@dataclass(frozen=True)
class Plan:
    """How a contender is timed."""

    rounds: int
    iterations: int
    host_seconds: float
    """Time the host takes to launch one call."""
    lead: float
    """Seconds that the host gets before each round."""


def plan(call: Call) -> Plan:
    """Warm `call` up and choose: rounds of about 1 ms, 20 to 200 of them in about 0.6 s with their leads."""
    seconds = gpu_seconds(call, 10)
    calls = 5
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    host = (time.perf_counter() - started) / calls
    torch.cuda.synchronize()
    # At most 20 calls a round: the queue holds about a thousand launches, and a full one stops the host.
    iterations = min(20, max(1, math.ceil(1e-3 / seconds)))
    lead = 1.5 * iterations * host
    rounds = min(200, max(20, int(0.6 / (iterations * seconds + min(lead, LONGEST_LEAD)))))
    return Plan(rounds, iterations, host, lead)

"""Seconds per call, on a GPU by its own clock.

The host needs tens of microseconds per launch, longer than many of these kernels run. So before each round the GPU
reads a large buffer (which also clears the L2) until the host has queued the round's kernels: they then run without
gaps. A contender that reads a value on the host, as with a boolean mask, loses this lead, and its gaps count as in
training.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]

L2_MULTIPLE = 4
"""Size of all rotated inputs together, in multiples of the L2."""
LONGEST_LEAD = 0.02
"""Longest lead in seconds: a contender that makes the host wait would never have enough."""
ROUND = 1e-3
"""Approximate seconds of one round."""
BUDGET = 0.6
"""Approximate seconds of all rounds of a contender with their leads."""


def gpu_seconds(call: Call, repeats: int) -> float:
    """Median GPU time of one call, each between its own events, after three warm-up calls."""
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
    """Number of input sets, read in turn, that together exceed the L2 `L2_MULTIPLE` times."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(L2_MULTIPLE * cache / bytes_per_set))


@functools.cache
def _buffer() -> tuple[torch.Tensor, float]:
    """A buffer of 1 GiB, many times any L2, and the seconds to read it."""
    buffer = torch.ones(2**28, device="cuda")
    return buffer, gpu_seconds(buffer.sum, 10)


def median_seconds(call: Call, device: torch.device) -> float:
    """Median time of one call. On a GPU over 20 to 200 rounds of about 1 ms; on a CPU over 3 calls."""
    if device.type == "cpu":
        call()
        took = []
        for _ in range(3):
            begun = time.perf_counter()
            call()
            took.append(time.perf_counter() - begun)
        return statistics.median(took)
    iterations, lead = _round(call)
    buffer, filler = _buffer()
    fillers = max(1, math.ceil(min(lead, LONGEST_LEAD) / filler))
    rounds = min(200, max(20, int(BUDGET / (ROUND + fillers * filler))))
    pairs = []
    for _ in range(rounds):
        for _ in range(fillers):
            buffer.sum()
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        for _ in range(iterations):
            call()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / iterations / 1e3


def _round(call: Call) -> tuple[int, float]:
    """Warm up, and choose the calls of a round and the lead of the host in seconds.

    At most 20 calls: the queue holds about a thousand launches, and a full queue makes the host wait.
    """
    seconds = gpu_seconds(call, 10)
    calls = 5
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    host = (time.perf_counter() - started) / calls
    torch.cuda.synchronize()
    iterations = min(20, max(1, math.ceil(ROUND / seconds)))
    return iterations, 1.5 * iterations * host

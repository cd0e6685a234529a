"""Peak memory of a rung on a CPU: the allocated bytes of torch's allocator, as on a GPU."""

from __future__ import annotations

import gc

from torch.profiler import ProfilerActivity, profile

from benchmarks.step_time.jobs import Work
from benchmarks.step_time.ladder import Rung
from benchmarks.step_time.phases import no_mark


def peak_on_cpu(work: Work, rung: Rung) -> int | None:
    """Peak bytes of all tensors while the rung is built and makes two steps.

    Weights, gradients, optimiser, activations and the rung's own form of the clip count; tensors of `work`, which all
    rungs share, and internal buffers of matmul libraries do not. The second step includes the optimiser's state. None
    if this torch does not report allocations.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step = work.build(rung)
        for _ in range(2):
            step(True, no_mark)
        del step
        gc.collect()
    results = getattr(watched.profiler, "kineto_results", None)
    events = [] if results is None else [event for event in results.events() if event.name() == "[memory]"]
    if not events:
        return None
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak

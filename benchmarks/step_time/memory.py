"""Peak memory of a rung on a CPU: the bytes that torch's allocator has handed out, as a GPU's allocator counts them."""

from __future__ import annotations

import gc

from torch.profiler import ProfilerActivity, profile

from benchmarks.step_time.jobs import Work
from benchmarks.step_time.ladder import Rung
from benchmarks.step_time.phases import no_mark


def peak_on_cpu(work: Work, rung: Rung) -> int | None:
    """Largest sum of tensors that lived at once while the rung was built and made two steps, in bytes.

    Weights, gradients, optimiser, activations and the rung's own form of the clip count; what `work` holds for every
    rung does not, nor do buffers inside the libraries of matmuls. The second step has the optimiser's state. None where
    this torch does not tell allocations.
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

"""Step times of a GPU from a measurement on another."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.environment import gpu_name
from benchmarks.step_time.report import Content, facts


@dataclass(frozen=True)
class Datasheet:
    """A GPU's published peaks, dense."""

    flops_per_second: float
    bytes_per_second: float


DATASHEETS = {
    "a100": Datasheet(312e12, 2.039e12),  # A100 80GB SXM
    "h100": Datasheet(989e12, 3.35e12),  # H100 SXM
    "h200": Datasheet(989e12, 4.8e12),
}


def predict(content: Content, target: str) -> str:
    """Step times of another GPU from this measurement, as Markdown that says it is a prediction.

    Of each phase the arithmetic (its operations at the measured matmul rate) scales with the matmul rates, what is
    left with the memory bandwidths. The target is taken to reach the same share of its datasheet as the measured GPU
    reaches of its own. Raises SystemExit for a measurement of a device without a datasheet here, such as a CPU.
    """
    source = gpu_name(content["device"])
    if source not in DATASHEETS:
        raise SystemExit(
            f"error: cannot predict from {content['device']}; give a measurement of one of {[*DATASHEETS]}"
        )
    ours, theirs = DATASHEETS[source], DATASHEETS[target]
    slower_memory = ours.bytes_per_second / theirs.bytes_per_second
    slower_matmul = ours.flops_per_second / theirs.flops_per_second
    lines = [
        f"## Prediction for {target}, not a measurement\n",
        f"From {facts(content)}\n",
        f"Arithmetic takes {slower_matmul:.2f} times as long and the rest {slower_memory:.2f} times, by the datasheets "
        f"({theirs.flops_per_second / 1e12:.0f} TFLOP/s and {theirs.bytes_per_second / 1e12:.2f} TB/s).\n",
        "| model | batch | rung | measured ms | predicted ms | predicted clips/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in content["results"]:
        if not result["seconds"]:
            continue
        if "fp8" in result["rung"] and target == "a100":
            lines.append(f"| {result['model']} | {result['batch']} | {result['rung']} | - | no float8 on it | - |")
            continue
        rate = content["gemm_flops_per_second"][result["precision"]]
        phases = result["phases"] or {"step": result["seconds"]}
        flops = result["flops"] if result["phases"] else {"step": sum(result["flops"].values())}
        # Phases are timed apart from whole steps: scale their sum to the step.
        scale = result["seconds"] / sum(phases.values())
        predicted = 0.0
        for phase, seconds in phases.items():
            spent = scale * seconds
            arithmetic = min(spent, flops.get(phase, 0) / rate)
            predicted += arithmetic * slower_matmul + (spent - arithmetic) * slower_memory
        lines.append(
            f"| {result['model']} | {result['batch']} | {result['rung']} | {1e3 * result['seconds']:.1f} | "
            f"{1e3 * predicted:.1f} | {result['batch'] / predicted:.1f} |"
        )
    return "\n".join(lines) + "\n"

"""The page of a GPU session: per rung and kernel the prediction, the measurement, and what to delete."""

from __future__ import annotations

from typing import Any

from benchmarks.environment import gpu_name
from benchmarks.input_pipeline import report as decoding_report
from benchmarks.kernels import report as kernel_report
from benchmarks.rates import GPUS, Rates, measured_rates
from benchmarks.step_time import prediction
from benchmarks.step_time import report as step_report

NOISE = 0.03
"""Share of a step within which two rungs count as equally fast."""
STANDS_ON = {
    "+ lean math": "+ torch.compile",
    "+ fused kernels": "+ lean math",
    "+ CUDA graph": "+ fused kernels",
    "+ max-autotune": "+ CUDA graph",
    "+ fp8 teacher": "+ CUDA graph",
    "+ int8 teacher": "+ CUDA graph",
    "+ own fp8 teacher": "+ fp8 teacher",
    "+ own int8 teacher": "+ int8 teacher",
    "+ fp8 student": "+ fp8 teacher",
}


def rates_of(content: dict[str, Any]) -> Rates | None:
    """Rates for the predictions: from the session's own run, else from the datasheet; for a rehearsal an H100's."""
    facts = content["facts"]
    if facts["rehearsal"]:
        return GPUS["h100"]
    return measured_rates(content.get("step_time", {"device": facts["device"]})) or GPUS.get(gpu_name(facts["device"]))


def rung_verdict(result: dict[str, Any], seconds: dict[str, float]) -> str:
    """`keep` if a rung is faster than the rung below it, else `delete`, with the speed-up; or why it did not run."""
    if result["seconds"] is None:
        return result["not_run"] or ""
    below = STANDS_ON.get(result["rung"])
    if below is None or below not in seconds:
        return ""
    gain = seconds[below] / result["seconds"]
    if gain > 1 + NOISE:
        return f"keep: {gain:.2f}x over {below}"
    return f"delete: {gain:.2f}x over {below}"


def rung_rows(content: dict[str, Any], rates: Rates | None) -> list[list[str]]:
    """Model, batch, rung, predicted ms, measured ms, error, speed-up, verdict."""
    lines = []
    for _, results in step_report.groups(content):
        seconds = {result["rung"]: result["seconds"] for result in results if result["seconds"]}
        first = next(iter(seconds.values()), None)
        for result in results:
            model, batch, rung, took = result["model"], result["batch"], result["rung"], result["seconds"]
            predicted = prediction.rung_seconds(model, batch, rung, rates) if rates else None
            cells = [model, str(batch), rung, f"{1e3 * predicted:.1f}" if predicted else ""]
            cells.append(f"{1e3 * took:.1f}" if took else "")
            cells.append(prediction.error_text(predicted, took) if predicted and took else "")
            cells.append(f"{first / took:.2f}x" if first and took else "")
            lines.append([*cells, rung_verdict(result, seconds)])
    return lines


def page(content: dict[str, Any]) -> str:
    """The text of session.md from the content of session.json."""
    facts, rates = content["facts"], rates_of(content)
    kind = "Rehearsal of a GPU session: no figure here is a result" if facts["rehearsal"] else "GPU session"
    parts = [
        f"# {kind}",
        f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}, "
        f"sources {facts['sources']}, {facts['date']}.",
        _table(("stage", "state", "seconds"), [[s["name"], s["state"], str(s["seconds"])] for s in content["stages"]]),
    ]
    deletions: list[str] = []
    if smoke := content.get("smoke"):
        lines = [
            [r["rung"], f"{r['losses'][0]:.4f}" if r["losses"] else "", r["not_run"] or ""] for r in smoke["results"]
        ]
        parts += ["## Smoke: first loss of every rung", _table(("rung", "loss", "state"), lines)]
    if checks := content.get("checks"):
        found = [kernel_report.load(one) for one in checks["results"]]
        wrong = [
            f"- {o.op} ({o.form}), {o.direction}: {o.not_run}" for o in found if o.not_run != kernel_report.CHECKED
        ]
        right = len(found) - len(wrong)
        parts += ["## Smoke: ops against float64", f"{right} of {len(found)} right.", "\n".join(wrong)]
    if timed := content.get("step_time"):
        rows = rung_rows(timed, rates)
        header = ("model", "batch", "rung", "predicted ms", "measured ms", "error", "speed-up", "verdict")
        parts += ["## Rungs", _table(header, rows)]
        deletions += [f"- rung {row[2]} on {row[0]}: {row[-1]}" for row in rows if row[-1].startswith("delete")]
    if kernels := content.get("kernels"):
        parts += ["## Kernels", kernel_report.HOW, kernel_report.table(kernels)]
        rows = kernel_report.rows(kernels)
        deletions += [f"- {row[0]}, {row[1]}, {row[2]}: {row[-1]}" for row in rows if row[-1].startswith("delete")]
    if decoding := content.get("decoding"):
        parts += ["## Decoding", decoding_report.table(decoding)]
    parts += ["## What to delete, or move to the benchmarks", "\n".join(deletions) or "Nothing so far."]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _table(header: tuple[str, ...], lines: list[list[str]]) -> str:
    return step_report.markdown(*step_report.filled(header, lines))

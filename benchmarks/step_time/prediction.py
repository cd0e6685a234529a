"""Predicted step times of a GPU, by arithmetic: `python -m benchmarks.step_time --predict a100`.

Each kernel of `expected.py` takes the longer of its arithmetic and its memory traffic at the GPU's rates
(`benchmarks.rates`); the step is their sum. A measurement of the same GPU adds columns with the measured times and the
prediction's error; a measurement of another GPU adds a column that is corrected by the error of that prediction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.environment import RESULTS, gpu_name
from benchmarks.rates import GPUS, Rates, measured_rates
from benchmarks.step_time import report
from benchmarks.step_time.expected import FORMS, Form, Kernel, expected_kernels
from benchmarks.step_time.jobs.pretrain import MASK_RATIO, MODELS
from benchmarks.step_time.ladder import BEST
from benchmarks.step_time.phases import PHASES
from benchmarks.step_time.report import Content
from umt_fast import masking

ALL_EXACT = Form(add_layer_norm=True, epilogues=True, bias_sums=True)
NEW_KERNELS = {
    "add_layer_norm's backward in the student": Form(add_layer_norm=True),
    "linear and mlp with epilogues": Form(epilogues=True, bias_sums=True),
    "their rival, max-autotune": FORMS["+ max-autotune"],
    "8-bit teacher by torchao": FORMS["+ int8 teacher"],
    "8-bit teacher of our own": FORMS["+ own int8 teacher"],
    "all that is exact": ALL_EXACT,
    "all, with the 8-bit teacher": replace(ALL_EXACT, eight_bit=True, own_eight_bit=True),
}
"""New kernels, each on top of the best exact rung, which already has the teacher's residual stream in bf16."""
KERNELS_BEFORE = {
    "add_layer_norm's bf16 residual in the teacher, in the rungs already": Form(float32_residual=True),
    "the loss's kernel, in the rungs already": Form(plain_loss=True),
}
"""Kernels that the best exact rung has, each with the form of this rung without the kernel."""
SHOWN_FORMS = {
    **{rung: form for rung, form in FORMS.items() if "8" not in rung and (rung == BEST or form != FORMS[BEST])},
    "8-bit teacher": FORMS["+ int8 teacher"],
    "own 8-bit teacher": FORMS["+ own int8 teacher"],
    "all new, exact": NEW_KERNELS["all that is exact"],
    "all new": NEW_KERNELS["all, with the 8-bit teacher"],
}
"""Columns of the table of kernels: every form of a rung once, then all new kernels."""
LEAST_SHOWN = 5e-5
"""Seconds; shorter kernels of a phase share one line."""


def kernels_of(model: str, batch: int, form: Form) -> list[Kernel]:
    """The kernels of a stage-1 step of `model`."""
    student, teacher = MODELS[model]
    student = replace(student, drop_path=0.0)
    seen = student.token_frames * masking.count_visible(student.patches, MASK_RATIO)
    return expected_kernels(student, teacher, batch, seen, form)


def step_seconds(model: str, batch: int, form: Form, rates: Rates) -> float:
    return sum(kernel.seconds(rates) for kernel in kernels_of(model, batch, form))


def rung_seconds(model: str, batch: int, rung: str, rates: Rates) -> float | None:
    """Predicted seconds of a rung; None in float32, and in float8 on a GPU without it."""
    form = FORMS.get(rung)
    if form is None or ("fp8" in rung and rates.eight_bit_type != "float8"):
        return None
    return step_seconds(model, batch, form, rates)


def find_measurement(target: str, results: Path = RESULTS) -> Content | None:
    """The stage-1 step times of this GPU in the committed results, including those of a GPU session."""
    for path in sorted((results / target).glob("**/step_time.json")):
        content = report.read(path)
        if content["job"] == "pretrain":
            return content
    session = results / target / "session.json"
    if session.exists():
        return json.loads(session.read_text()).get("step_time")
    return None


def predict(target: str, models: Sequence[str], batch: int, measured: Content | None = None) -> str:
    """Markdown: per model the rungs, the kernels with their expected milliseconds, and the saving of each new kernel.

    Raises SystemExit for a measurement on a device without a datasheet here, such as a CPU.
    """
    rates, source = GPUS[target], None
    if measured is not None:
        source = gpu_name(measured["device"])
        if source not in GPUS:
            raise SystemExit(f"error: no datasheet of {measured['device']}; give a measurement of one of {[*GPUS]}")
        if source == target:
            rates = measured_rates(measured) or rates
    parts = [
        f"# Predicted step time on {target}: arithmetic, not a measurement",
        report.markdown(("rate", rates.name, "from"), rates.rows()),
        "A kernel takes the longer of its operations and its bytes at these rates; gaps between kernels are not "
        "counted. benchmarks/step_time/expected.py says how bytes and operations are counted.",
    ]
    for model in models:
        parts += [
            f"## {model}, batch {batch}",
            report.markdown(*report.filled(*_rung_table(model, batch, rates, measured, source == target))),
            "### Milliseconds by kernel",
            f"Calls, GB and TFLOP of all calls of a step, and the bound, are those of `{BEST}`, or of the first column "
            f"that has the kernel. `+ fused kernels` is as `{BEST}`.",
            report.markdown(*report.filled(*_kernel_table(model, batch, rates))),
            f"### Expected from new kernels, on top of `{BEST}`",
            report.markdown(*_saving_table(model, batch, rates)),
        ]
        if measured is not None and source == target and (lines := _phase_lines(model, batch, rates, measured)):
            header = ("rung", "phase", "predicted ms", "measured ms", "error")
            parts += ["### Phases, predicted and measured", report.markdown(header, lines)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _measured_seconds(measured: Content | None, model: str, batch: int, rung: str) -> float | None:
    for result in (measured or {}).get("results", ()):
        if (result["model"], result["batch"], result["rung"]) == (model, batch, rung):
            return result["seconds"]
    return None


def error_text(predicted: float, measured: float) -> str:
    """Error of the prediction in percent of the measurement."""
    return f"{100 * (predicted / measured - 1):+.0f}%"


def _rung_table(
    model: str, batch: int, rates: Rates, measured: Content | None, same_gpu: bool
) -> tuple[tuple[str, ...], list[list[str]]]:
    header = ("rung", "predicted ms", "speed-up", "clips/s", "measured ms", "error", "corrected ms")
    first = step_seconds(model, batch, FORMS["baseline"], rates)
    lines = []
    for rung in FORMS:
        predicted = rung_seconds(model, batch, rung, rates)
        if predicted is None:
            lines.append([rung, f"needs float8, which {rates.name} lacks", "", "", "", "", ""])
            continue
        line = [rung, f"{1e3 * predicted:.1f}", f"{first / predicted:.2f}x", f"{batch / predicted:.0f}"]
        found = _measured_seconds(measured, model, batch, rung)
        if found is None or measured is None:
            line += ["", "", ""]
        elif same_gpu:
            line += [f"{1e3 * found:.1f}", error_text(predicted, found), ""]
        else:
            source = measured_rates(measured) or GPUS[gpu_name(measured["device"])]
            there = step_seconds(model, batch, FORMS[rung], source)
            line += ["", "", f"{1e3 * predicted * found / there:.1f}"]
        lines.append(line)
    lines.append(["+ fp8 student", "an experiment, not predicted", *[""] * 5])
    return header, lines


def _kernel_table(model: str, batch: int, rates: Rates) -> tuple[tuple[str, ...], list[list[str]]]:
    spent: dict[tuple[str, str], dict[str, float]] = {}
    shown: dict[tuple[str, str], list[Kernel]] = {}
    for column, form in SHOWN_FORMS.items():
        found: dict[tuple[str, str], list[Kernel]] = {}
        for kernel in kernels_of(model, batch, form):
            found.setdefault((kernel.phase, kernel.name.removeprefix("last block: ")), []).append(kernel)
        for key, kernels in found.items():
            spent.setdefault(key, {})[column] = sum(kernel.seconds(rates) for kernel in kernels)
            if column == BEST or key not in shown:
                shown[key] = kernels
    lines = []
    for phase in PHASES:
        small: dict[str, float] = {}
        for key in (key for key in spent if key[0] == phase):
            if max(spent[key].values()) < LEAST_SHOWN:
                small = {column: small.get(column, 0.0) + spent[key].get(column, 0.0) for column in SHOWN_FORMS}
                continue
            lines.append([phase, key[1], *_work(shown[key], rates), *_cells(spent[key])])
        if small:
            lines.append([phase, "the rest", "", "", "", "", *_cells(small)])
    total = {column: sum(row.get(column, 0.0) for row in spent.values()) for column in SHOWN_FORMS}
    lines.append(["step", "", "", "", "", "", *_cells(total)])
    return ("phase", "kernel", "calls", "GB", "TFLOP", "bound by", *SHOWN_FORMS), lines


def _work(kernels: Sequence[Kernel], rates: Rates) -> list[str]:
    """Calls, bytes and operations of one line of the table, and the bound of most of its time."""
    moved = sum(kernel.calls * kernel.bytes for kernel in kernels)
    flops = sum(kernel.calls * kernel.flops for kernel in kernels)
    longest = max(kernels, key=lambda kernel: kernel.seconds(rates))
    calls = str(sum(kernel.calls for kernel in kernels))
    cells = [calls, f"{moved / 1e9:.2f}", f"{flops / 1e12:.2f}" if flops else ""]
    return [*cells, longest.bound(rates).replace("_", "-")]


def _cells(row: dict[str, float]) -> list[str]:
    return [f"{1e3 * row[column]:.2f}" if row.get(column) else "" for column in SHOWN_FORMS]


def _saving_table(model: str, batch: int, rates: Rates) -> tuple[tuple[str, ...], list[list[str]]]:
    best = step_seconds(model, batch, FORMS[BEST], rates)
    changes = {name: (step_seconds(model, batch, form, rates), best) for name, form in KERNELS_BEFORE.items()}
    changes |= {name: (best, step_seconds(model, batch, form, rates)) for name, form in NEW_KERNELS.items()}
    lines = [
        [name, f"{1e3 * after:.1f}", f"{1e3 * (before - after):.1f}", f"{100 * (1 - after / before):.0f}%"]
        for name, (before, after) in changes.items()
    ]
    return ("kernel", "step ms", "saves ms", "of the step"), lines


def _phase_lines(model: str, batch: int, rates: Rates, measured: Content) -> list[list[str]]:
    lines = []
    for result in measured["results"]:
        form = FORMS.get(result["rung"])
        if (result["model"], result["batch"]) != (model, batch) or not result["phases"] or form is None:
            continue
        kernels = kernels_of(model, batch, form)
        for phase, found in result["phases"].items():
            predicted = sum(kernel.seconds(rates) for kernel in kernels if kernel.phase == phase)
            cells = [f"{1e3 * predicted:.2f}", f"{1e3 * found:.2f}"]
            lines.append([result["rung"], phase, *cells, error_text(predicted, found)])
    return lines

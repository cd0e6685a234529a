"""Table, plots, page, comparison and prediction from the measurements of `benchmarks.step_time`."""

from __future__ import annotations

import base64
import html
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernels.environment import gpu_name

Content = dict[str, Any]
"""What step_time.json holds."""

K710_VIDEOS, K710_EPOCHS, K710_GPUS = 658_000, 200, 32
REGRESSION = 0.05
NOT_MEASURED = "not measured"
REFUSED = "refused"
BESIDE = {"decode": "decode_seconds", "all-reduce": "all_reduce_seconds"}

HEADER = (
    *("model", "batch", "rung", "precision", "ms / step", "fastest", "speed-up", "clips/s", "TFLOP/s", "% of matmul"),
    *("peak GiB", "K710 days on 32", "GPU-days", "data stall ms", "loss error", "allowed"),
)
BESIDE_HEADER = ("model", "batch", "decode ms", "by", "all-reduce ms", "by")


def k710_days(clips_per_second: float) -> float:
    """Days for the published 200 epochs of K710's 658k videos on 32 devices of this speed."""
    return K710_VIDEOS * K710_EPOCHS / (K710_GPUS * clips_per_second) / 86400


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def copy_rate() -> float:
    """Bytes per second of a large copy on the GPU."""
    from benchmarks.kernels.timing import copy_bandwidth

    return copy_bandwidth()


def read(path: Path) -> Content:
    """A step_time.json. Raises SystemExit naming the file if it is none."""
    try:
        content = json.loads(path.read_text())
        content["results"][0]["rung"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"error: {path} is no step_time.json: {error!r}") from None
    return content


def groups(content: Content) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The ladders, each of one model and batch, by title."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in content["results"]:
        found.setdefault(f"{result['model']}, batch {result['batch']}", []).append(result)
    yield from found.items()


def beside_of(content: Content, result: dict[str, Any]) -> dict[str, Any]:
    """What goes on beside a result's step; empty in files of before it was measured."""
    alike = (b for b in content.get("beside", ()) if (b["model"], b["batch"]) == (result["model"], result["batch"]))
    return next(alike, {})


def stall(content: Content, result: dict[str, Any]) -> float | None:
    """Seconds of every step that a run would wait for its clips, where decoding was measured."""
    decode = beside_of(content, result).get("decode_seconds")
    return None if decode is None else max(0.0, decode - result["seconds"])


def rows(content: Content) -> list[list[str]]:
    """Lines of the table, in the order of HEADER. Speed-ups are over the ladder's first measured rung."""
    lines = []
    for _, results in groups(content):
        first = next((result["seconds"] for result in results if result["seconds"]), None)
        for result in results:
            line = [result["model"], str(result["batch"]), result["rung"], result["precision"]]
            if result["seconds"] is None:
                lines.append([*line, result["not_run"] or NOT_MEASURED, *[""] * (len(HEADER) - len(line) - 1)])
                continue
            seconds, peak, days = result["seconds"], result["peak_bytes"], result["k710_days"]
            waits, error = stall(content, result), result.get("loss_error")
            unknown = "reference" if result.get("losses") else NOT_MEASURED
            lines.append(
                [
                    *line,
                    f"{1e3 * seconds:.1f}",
                    f"{1e3 * min(result['samples']):.1f}",
                    f"{first / seconds:.2f}x",
                    f"{result['clips_per_second']:.2f}",
                    f"{result['model_flops'] / seconds / 1e12:.2f}",
                    f"{100 * result['gemm_share']:.0f}",
                    NOT_MEASURED if peak is None else f"{peak / 2**30:.1f}",
                    f"{days:.3g}",
                    f"{days * K710_GPUS:.3g}",
                    _milliseconds(waits),
                    unknown if error is None else f"{error:.4f}",
                    "" if error is None else f"{result['loss_tolerance']:g}",
                ]
            )
    return lines


def beside_rows(content: Content) -> list[list[str]]:
    """Lines of the table of what goes on beside the steps, in the order of BESIDE_HEADER."""
    return [
        [
            *(found["model"], str(found["batch"]), _milliseconds(found["decode_seconds"]), found["decode"]),
            *(_milliseconds(found["all_reduce_seconds"]), found["all_reduce"]),
        ]
        for found in content.get("beside", ())
    ]


def _milliseconds(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else f"{1e3 * seconds:.1f}"


def table(content: Content) -> str:
    """The rungs as Markdown."""
    return _markdown(HEADER, rows(content))


def beside_table(content: Content) -> str:
    """What goes on beside the steps as Markdown; nothing for files of before it was measured."""
    lines = beside_rows(content)
    return _markdown(BESIDE_HEADER, lines) if lines else ""


def _markdown(header: tuple[str, ...], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in ([*header], ["---"] * len(header), *lines))


def refusals(content: Content) -> list[str]:
    """Rungs whose losses are not the reference's, in words."""
    return [
        f"{result['model']}, batch {result['batch']}, {result['rung']}: {result['not_run']}"
        for result in content["results"]
        if (result["not_run"] or "").startswith(REFUSED)
    ]


def facts(content: Content) -> str:
    """What it was measured on."""
    gemm = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in content["gemm_flops_per_second"].items())
    return (
        f"{content['device']} ({content['threads']} CPU threads), torch {content['torch']}, commit "
        f"{content['commit']}, {content['date']}. A large matmul in the same run: {gemm}."
    )


HOW = (
    "Median time of one training step on random clips that lie in memory, in one process: teacher, sampling, student, "
    "loss, backward and optimiser. `fastest` is the fastest timing: far from the median, it says that the "
    "machine had other work. TFLOP/s count what the method needs (the lean step's operations) on "
    "every rung. K710 days are 200 epochs of 658,000 videos on 32 such devices, if data and network kept up. "
    "`data stall` is what decoding, which goes on beside the step, takes longer than it. `loss error` is the largest "
    "distance of a rung's loss from the reference's over 20 steps from the same start; over what is `allowed` "
    "the rung is refused. The reference is the baseline in float32, or, where that cannot run, the first rung that can."
)
HOW_BESIDE = (
    "Beside the step, each timed alone, on all processes at once. Decoding, one batch of a process to the next, by a "
    "run's own loader; where the step is on the CPU too, they will share its cores. The all-reduce of the student's "
    "gradients, which DDP begins during the backward pass."
)


def write(content: Content, folder: Path) -> None:
    """step_time.md, step_time.html, ladder.png and phases.png beside the JSON; without matplotlib no plots."""
    plots = {"ladder.png": "Speed-ups", "phases.png": "Phases"}
    try:
        draw_ladder(content, folder / "ladder.png")
        draw_phases(content, folder / "phases.png")
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is missing (pip install {error.name})")
        plots = {}
    shown = "\n\n".join(f"![{title}]({name})" for name, title in plots.items())
    (folder / "step_time.md").write_text(
        f"# Step time\n\n{HOW}\n\n{facts(content)}\n\n{table(content)}\n{HOW_BESIDE}\n\n{beside_table(content)}\n"
        f"{shown}\n"
    )
    (folder / "step_time.html").write_text(page(content, [folder / name for name in plots]))


def page(content: Content, plots: list[Path]) -> str:
    """One HTML file that needs no other."""
    pictures = "".join(
        f'<img alt="{plot.stem}" src="data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}">\n'
        for plot in plots
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Step time</title>\n'
        "<style>body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "td,th{padding:.3em .6em;border-bottom:1px solid #ccc;text-align:left}img{max-width:100%}</style>\n"
        f"<h1>Step time</h1>\n<p>{html.escape(HOW)}</p>\n<p>{html.escape(facts(content))}</p>\n"
        f"{_html_table(HEADER, rows(content))}<p>{html.escape(HOW_BESIDE)}</p>\n"
        f"{_html_table(BESIDE_HEADER, beside_rows(content))}{pictures}</html>\n"
    )


def _html_table(header: tuple[str, ...], lines: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines)
    return f"<table><tr>{head}</tr>\n{cells}</table>\n"


def draw_ladder(content: Content, path: Path) -> None:
    """Speed-up of every rung over the first."""
    figure, panels = _panels(content)
    for panel, (title, results) in zip(panels, groups(content), strict=True):
        shown = [result for result in results if result["seconds"]]
        ratios = [shown[0]["seconds"] / result["seconds"] for result in shown]
        bars = panel.barh([result["rung"] for result in shown], ratios, color="C0")
        panel.bar_label(bars, [f"{ratio:.2f}x" for ratio in ratios], padding=3)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set(title=title, xlabel="speed-up over the first rung")
    _save(figure, content, path)


def draw_phases(content: Content, path: Path) -> None:
    """Stacked times of each rung's phases and of its wait for data; below, hatched, what goes on beside the step."""
    figure, panels = _panels(content)
    for panel, (title, results) in zip(panels, groups(content), strict=True):
        shown = [result for result in results if result["seconds"]]
        stacks = [result["phases"] or {"one graph": result["seconds"]} for result in shown]
        waits = [{"data stall": stall(content, result) or 0.0} for result in shown]
        left = [0.0] * len(shown)
        for phase in dict.fromkeys(phase for stack in (*stacks, *waits) for phase in stack):
            lengths = [1e3 * {**stack, **wait}.get(phase, 0.0) for stack, wait in zip(stacks, waits, strict=True)]
            if any(lengths):
                colour = "lightgrey" if phase == "data stall" else None
                panel.barh([result["rung"] for result in shown], lengths, left=left, label=phase, color=colour)
                left = [a + b for a, b in zip(left, lengths, strict=True)]
        for name, key in BESIDE.items():
            if seconds := beside_of(content, results[0]).get(key):
                panel.barh([f"beside: {name}"], [1e3 * seconds], color="white", edgecolor="black", hatch="//")
        panel.invert_yaxis()
        panel.set(title=title, xlabel="ms per step")
        panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, content, path)


def _panels(content: Content) -> tuple[Any, list[Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    count = len(dict(groups(content)))
    figure, panels = plt.subplots(count, 1, figsize=(10, 3.6 * count), squeeze=False, layout="constrained")
    return figure, list(panels[:, 0])


def _save(figure: Any, content: Content, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.suptitle(f"{content['device']}, {content['date']}, commit {content['commit']}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def regressions(old: Content, new: Content) -> list[str]:
    """Rungs over 5% slower than in `old`, in words. Measurements of another device are not compared."""
    if old["device"] != new["device"]:
        raise SystemExit(f"error: {old['device']} and {new['device']} are not compared; give a file of the same device")
    before = {(r["model"], r["batch"], r["rung"]): r["seconds"] for r in old["results"]}
    slower = []
    for result in new["results"]:
        key = (result["model"], result["batch"], result["rung"])
        then, now = before.get(key), result["seconds"]
        if then and now is None:
            slower.append(f"{key[0]}, batch {key[1]}, {key[2]}: {1e3 * then:.1f} ms, now {result['not_run']}")
        elif then and now > then * (1 + REGRESSION):
            change = 100 * (now / then - 1)
            slower.append(
                f"{key[0]}, batch {key[1]}, {key[2]}: {1e3 * then:.1f} -> {1e3 * now:.1f} ms (+{change:.0f}%)"
            )
    return slower


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
PREDICTED = ("a100",)


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

"""Table, plot and page from the measurements of `benchmarks.input_pipeline`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Content = dict[str, Any]
"""Content of input_pipeline.json."""

HEADER = (
    *("files", "codec", "GOP", "bytes", "decoder", "workers", "pipelines", "clips/s", "frames/s", "x original"),
    *("bare / this", "bare + crop / this", "memory MB", "GPU MB", "NVDEC %", "data stall %"),
)
NOT_EXACT = ("fp8", "int8")
"""Parts of rung names that mark steps other than the published one."""


def read_step(path: Path, model: str) -> tuple[float, str]:
    """Clips per second and name of the fastest exact rung of `model` in a step_time.json. Exits if there is none."""
    try:
        results = json.loads(path.read_text())["results"]
        exact = [
            result
            for result in results
            if result["model"] == model
            and result["clips_per_second"]
            and not any(part in result["rung"] for part in NOT_EXACT)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: --step-from {path} is not a step_time.json of benchmarks.step_time: {error!r}")
    if not exact:
        sys.exit(f"error: --step-from {path} has no measured exact rung of {model}; choose another --step-model")
    best = max(exact, key=lambda result: result["clips_per_second"])
    return best["clips_per_second"], f"{model}, batch {best['batch']}, {best['rung']} ({path})"


def table(content: Content) -> str:
    """The results as a Markdown table."""
    rows, files = content["rows"], content["files"]
    rates = {(row["files"], row["decoder"], row["workers"], row["pipelines"]): row["clips_per_second"] for row in rows}
    step = content["facts"].get("step_clips_per_second")
    lines = [HEADER, ("---",) * len(HEADER)]
    for row in rows:
        name, decoder, workers, rate = row["files"], row["decoder"], row["workers"], row["clips_per_second"]
        stored = files[name]
        lines.append(
            (
                name,
                stored["codec"],
                f"{stored['gop']:.4g}",
                f"{stored['bytes'] / files['original']['bytes']:.2f}x",
                decoder,
                str(workers),
                _number(row["pipelines"], ".0f"),
                f"{rate:.1f}",
                f"{rate * content['frames']:.0f}",
                _ratio(rate, rates.get(("original", decoder, workers, row["pipelines"]))),
                _ratio(rates[name, "bare", workers, None], rate),
                _ratio(rates[name, "bare + crop", workers, None], rate),
                f"{row['memory_mb']:.0f}",
                _number(row["gpu_memory_mb"], ".0f"),
                _number(row["nvdec_percent"], ".0f"),
                "-" if step is None or decoder.startswith("bare") else f"{100 * (1 - min(rate / step, 1)):.1f}",
            )
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + notes(rows)


def notes(rows: list[dict[str, Any]]) -> str:
    """Lines under the table: which videos another decoder read."""
    said = [f"- {row['files']}, {row['decoder']}: {text}\n" for row in rows for text in row["said"]]
    return "".join(["\n", *dict.fromkeys(said)]) if said else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _ratio(value: float, to: float | None) -> str:
    return f"{value / to:.2f}" if to else "-"


def write(content: Content, folder: Path) -> None:
    """input_pipeline.json, .md and .png; without matplotlib no plot."""
    facts = content["facts"]
    (folder / "input_pipeline.json").write_text(json.dumps(content, indent=1) + "\n")
    listed = "".join(f"- {name.replace('_', ' ')}: {value}\n" for name, value in facts.items())
    shown = "\n![Clips per second](input_pipeline.png)\n"
    try:
        draw(content, folder / "input_pipeline.png")
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is missing (pip install {error.name})")
        shown = ""
    (folder / "input_pipeline.md").write_text(f"# Input pipeline\n\n{listed}\n{table(content)}{shown}")


def draw(content: Content, path: Path) -> None:
    """Draw clips per second, one group of bars for each form of the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows, facts = content["rows"], content["facts"]
    files = list(content["files"])
    contenders = list(dict.fromkeys(map(_contender, rows)))
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    width = 0.8 / len(contenders)
    for number, contender in enumerate(contenders):
        shown = [row for row in rows if _contender(row) == contender]
        places = [files.index(row["files"]) + (number - (len(contenders) - 1) / 2) * width for row in shown]
        bars = axes.bar(places, [row["clips_per_second"] for row in shown], width * 0.9, label=contender)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(files)), files)
    title = f"{content['frames']} frames a clip, {facts['device']}, {facts['processors']} cores"
    axes.set(ylabel="clips per second", title=title)
    axes.legend(title="decoder, processes, pipelines")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _contender(row: dict[str, Any]) -> str:
    parts = [row["decoder"], row["workers"], row["pipelines"]]
    return ", ".join(str(part) for part in parts if part is not None)

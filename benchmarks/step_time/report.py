"""Table, page and comparison of the measurements of `benchmarks.step_time`."""

from __future__ import annotations

import base64
import html
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Content = dict[str, Any]
"""What step_time.json holds."""

K710_VIDEOS, K710_EPOCHS, K710_GPUS = 658_000, 200, 32
REGRESSION = 0.05
REFUSED = "refused"
CHECKED = "losses right"
BESIDE = {"decode": "decode_seconds", "all-reduce": "all_reduce_seconds"}

HEADER = (
    *("model", "batch", "rung", "precision", "ms / step", "fastest", "speed-up", "clips/s", "TFLOP/s", "% of matmul"),
    *("peak GiB", "K710 days on 32", "data stall ms", "loss error", "allowed"),
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
    """A step_time.json. Raises SystemExit naming the file if it is something else."""
    try:
        content = json.loads(path.read_text())
        content["results"][0]["rung"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"error: {path} is not a step_time.json: {error!r}") from None
    return {"job": "pretrain", **content}


def groups(content: Content) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The ladders, each of one model and batch, by title."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in content["results"]:
        found.setdefault(f"{result['model']}, batch {result['batch']}", []).append(result)
    yield from found.items()


def beside_of(content: Content, result: dict[str, Any]) -> dict[str, Any]:
    """What overlaps with a result's step; empty where it was not timed."""
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
            error = result.get("loss_error")
            losses = ["reference" if result.get("losses") else "", ""]
            if error is not None:
                losses = [f"{error:.4f}", f"{result['loss_tolerance']:g}"]
            if result["seconds"] is None:
                lines.append([*line, result["not_run"] or "", *[""] * (len(HEADER) - len(line) - 3), *losses])
                continue
            seconds, peak, waits = result["seconds"], result["peak_bytes"], stall(content, result)
            lines.append(
                [
                    *line,
                    f"{1e3 * seconds:.1f}",
                    f"{1e3 * min(result['samples']):.1f}",
                    f"{first / seconds:.2f}x",
                    f"{result['clips_per_second']:.2f}",
                    f"{result['model_flops'] / seconds / 1e12:.2f}",
                    f"{100 * result['gemm_share']:.0f}",
                    "" if peak is None else f"{peak / 2**30:.1f}",
                    f"{k710_days(result['clips_per_second']):.3g}" if content["job"] == "pretrain" else "",
                    _milliseconds(waits),
                    *losses,
                ]
            )
    return lines


def beside_rows(content: Content) -> list[list[str]]:
    """Lines of the table of decoding and the all-reduce, in the order of BESIDE_HEADER."""
    return [
        [
            *(found["model"], str(found["batch"]), _milliseconds(found["decode_seconds"]), found["decode"]),
            *(_milliseconds(found["all_reduce_seconds"]), found["all_reduce"]),
        ]
        for found in content.get("beside", ())
    ]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def table(content: Content) -> str:
    """The rungs as Markdown."""
    return markdown(*filled(HEADER, rows(content)))


def beside_table(content: Content) -> str:
    """Decoding and the all-reduce as Markdown; empty where neither was timed."""
    lines = beside_rows(content)
    return markdown(BESIDE_HEADER, lines) if lines else ""


def filled(header: Sequence[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The table without its empty columns."""
    kept = [column for column in range(len(header)) if any(line[column] for line in lines)]
    return [header[column] for column in kept], [[line[column] for column in kept] for line in lines]


def markdown(header: Sequence[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in ([*header], ["---"] * len(header), *lines))


def refusals(content: Content) -> list[str]:
    """Rungs whose losses are not the reference's, in words."""
    return [
        f"{result['model']}, batch {result['batch']}, {result['rung']}: {result['not_run']}"
        for result in content["results"]
        if (result["not_run"] or "").startswith(REFUSED)
    ]


def facts(content: Content) -> str:
    """Device, versions, date and matmul rate of a measurement."""
    gemm = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in content["gemm_flops_per_second"].items())
    return (
        f"{content['device']} ({content['threads']} CPU threads), torch {content['torch']}, commit "
        f"{content['commit']}, {content['date']}. A large matmul in the same run: {gemm}."
    )


HOW = (
    "Median time of one training step on random clips that lie in memory, in one process. `fastest` is the fastest "
    "timing: a large distance from the median means that the machine had other work. TFLOP/s count the operations "
    "that the method needs (those of the lean step) on every rung. `loss error` is the largest distance of a rung's "
    "loss from the reference's over the first steps from the same start; a rung with more than `allowed` is refused. "
    "The reference is the baseline in float32, or, where that cannot run, the first rung that can."
)
HOW_PRETRAIN = (
    " K710 days are 200 epochs of 658,000 videos on 32 such devices, if data and network keep up. `data stall` is by "
    "how much decoding, which overlaps with the step, takes longer than it."
)
HOW_BESIDE = (
    "Work that overlaps with the step, timed on its own, on all processes at once: decoding, from one batch of a "
    "process to the next, by the loader of a run (a step on the CPU would share its cores with it); and the all-reduce "
    "of the student's gradients, which DDP starts during the backward pass."
)


def write(content: Content, folder: Path) -> None:
    """step_time.md, step_time.html, ladder.png and phases.png beside the JSON; without matplotlib no plots."""
    shown = {"ladder.png": "Speed-ups", "phases.png": "Phases"}
    if not any(result["seconds"] for result in content["results"]):
        shown = {}
    try:
        from benchmarks.step_time import plots

        if shown:
            plots.draw_ladder(content, folder / "ladder.png")
            plots.draw_phases(content, folder / "phases.png")
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is missing (pip install {error.name})")
        shown = {}
    pictures = "\n\n".join(f"![{title}]({name})" for name, title in shown.items())
    parts = [f"# Step time: {content['job']}", _how(content), facts(content), table(content)]
    if content.get("beside"):
        parts += [HOW_BESIDE, beside_table(content)]
    (folder / "step_time.md").write_text("\n\n".join([*(part.strip() for part in parts), pictures]).strip() + "\n")
    (folder / "step_time.html").write_text(page(content, [folder / name for name in shown]))


def _how(content: Content) -> str:
    return HOW + (HOW_PRETRAIN if content["job"] == "pretrain" else "")


def page(content: Content, plots: list[Path]) -> str:
    """One HTML file that needs no other."""
    pictures = "".join(
        f'<img alt="{plot.stem}" src="data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}">\n'
        for plot in plots
    )
    beside = ""
    if content.get("beside"):
        beside = f"<p>{html.escape(HOW_BESIDE)}</p>\n{_html_table(BESIDE_HEADER, beside_rows(content))}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Step time</title>\n'
        "<style>body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "td,th{padding:.3em .6em;border-bottom:1px solid #ccc;text-align:left}img{max-width:100%}</style>\n"
        f"<h1>Step time: {content['job']}</h1>\n<p>{html.escape(_how(content))}</p>\n"
        f"<p>{html.escape(facts(content))}</p>\n"
        f"{_html_table(*filled(HEADER, rows(content)))}{beside}{pictures}</html>\n"
    )


def _html_table(header: Sequence[str], lines: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines)
    return f"<table><tr>{head}</tr>\n{cells}</table>\n"


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

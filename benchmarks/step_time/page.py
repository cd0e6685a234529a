"""The pages of a step_time.json: Markdown with plots, and one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from benchmarks.step_time import plots
from benchmarks.step_time.report import (
    HEADER,
    OVERLAP_HEADER,
    Content,
    facts,
    filled,
    overlap_rows,
    overlap_table,
    rows,
    table,
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
HOW_OVERLAP = (
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
        if shown:
            plots.draw_ladder(content, folder / "ladder.png")
            plots.draw_phases(content, folder / "phases.png")
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is missing (pip install {error.name})")
        shown = {}
    pictures = "\n\n".join(f"![{title}]({name})" for name, title in shown.items())
    parts = [f"# Step time: {content['job']}", _how(content), facts(content), table(content)]
    if content.get("beside"):
        parts += [HOW_OVERLAP, overlap_table(content)]
    (folder / "step_time.md").write_text("\n\n".join([*(part.strip() for part in parts), pictures]).strip() + "\n")
    (folder / "step_time.html").write_text(page(content, [folder / name for name in shown]))


def _how(content: Content) -> str:
    return HOW + (HOW_PRETRAIN if content["job"] == "pretrain" else "")


def page(content: Content, pictures: list[Path]) -> str:
    """One self-contained HTML file."""
    images = "".join(
        f'<img alt="{plot.stem}" src="data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}">\n'
        for plot in pictures
    )
    overlap = ""
    if content.get("beside"):
        overlap = f"<p>{html.escape(HOW_OVERLAP)}</p>\n{_html_table(OVERLAP_HEADER, overlap_rows(content))}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Step time</title>\n'
        "<style>body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "td,th{padding:.3em .6em;border-bottom:1px solid #ccc;text-align:left}img{max-width:100%}</style>\n"
        f"<h1>Step time: {content['job']}</h1>\n<p>{html.escape(_how(content))}</p>\n"
        f"<p>{html.escape(facts(content))}</p>\n"
        f"{_html_table(*filled(HEADER, rows(content)))}{overlap}{images}</html>\n"
    )


def _html_table(header: Sequence[str], lines: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines)
    return f"<table><tr>{head}</tr>\n{cells}</table>\n"

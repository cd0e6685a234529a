"""`python -m benchmarks.leaderboard`: benchmarks/results/LEADERBOARD.md from the measurements beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.environment import RESULTS
from benchmarks.step_time import report
from benchmarks.step_time.ladder import ladder

NAME = "LEADERBOARD.md"
INTRO = """\
# Leaderboard

The fastest exact rung of every job and model on every device, over the plain writing of the published step in the same
run. `python -m benchmarks.leaderboard` writes this page from the results beside it; docs/performance.md explains the
rungs.
"""
NO_GPU = """\
No GPU has been measured yet. `make bench-gpu` measures one; `python -m benchmarks.step_time --predict a100` (or h100,
h200) predicts one by arithmetic.
"""
HEADER = (
    *("device", "job", "model", "batch", "rung", "ms / step", "clips/s", "over baseline", "% of matmul"),
    *("date", "commit", "command"),
)


def entries(content: report.Content, link: str) -> list[list[str]]:
    """A line for each model and batch of a step_time.json."""
    exact = {rung.name for rung in ladder(torch.device("cpu")) if rung.exact}
    lines = []
    for _, results in report.groups(content):
        timed = [result for result in results if result["seconds"] and result["rung"] in exact]
        base = next((result["seconds"] for result in timed if result["rung"] == "baseline"), None)
        best = min(timed, key=lambda result: result["seconds"], default=None)
        if best is None or base is None:
            continue
        model, batch, job = best["model"], best["batch"], content["job"]
        command = f"python -m benchmarks.step_time --job {job} --models {model} --batch {batch}"
        lines.append(
            [
                *(f"[{content['device']}]({link})", job, model, str(batch), best["rung"]),
                *(f"{1e3 * best['seconds']:.1f}", f"{best['clips_per_second']:.2f}", f"{base / best['seconds']:.2f}x"),
                *(f"{100 * best['gemm_share']:.0f}", content["date"], content["commit"], f"`{command}`"),
            ]
        )
    return lines


def page(folder: Path = RESULTS) -> str:
    """The leaderboard of a folder of results."""
    lines, gpus = [], set()
    for path in sorted(folder.glob("**/step_time.json")):
        place = path.relative_to(folder)
        if place.parts[0] != "cpu":
            gpus.add(place.parts[0])
        lines += entries(report.read(path), place.with_suffix(".md").as_posix())
    for path in sorted(folder.glob("*/session.json")):
        content = json.loads(path.read_text())
        if "step_time" in content:
            gpus.add(path.parent.name)
            timed = {"job": "pretrain", **content["step_time"]}
            lines += entries(timed, path.relative_to(folder).with_suffix(".md").as_posix())
    kernels = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/kernels.md"))]
    parts = [INTRO, report.markdown(HEADER, lines)]
    if kernels:
        parts.append("Kernels: " + ", ".join(f"[{name}]({name})" for name in kernels) + "\n")
    return "\n".join(parts if gpus else [*parts, NO_GPU])


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser("python -m benchmarks.leaderboard", description=__doc__).parse_args(arguments)
    (RESULTS / NAME).write_text(page())
    print(f"in {RESULTS / NAME}")


if __name__ == "__main__":
    main()

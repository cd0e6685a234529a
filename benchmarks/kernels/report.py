"""Tables and a plot of the kernels' times.

    python -m benchmarks.kernels.report benchmarks/results/h200/kernels.json   # kernels.md and kernels.png beside it
    python -m benchmarks.kernels.report                                        # benchmarks/results/README.md

What a file does not hold is "not measured" in the table; nothing is estimated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernels.case import Case
from benchmarks.kernels.cases import cases
from benchmarks.kernels.shapes import UMT_B, UMT_L

RESULTS = Path(__file__).parents[1] / "results"
GPUS = ("h200", "a100")
"""GPUs that the README lists even before anything is measured on them."""
NOT_MEASURED = "not measured"
OWN = ("triton", "eager", "compiled")

HEADER = (
    *("op", "direction", "model", "triton us", "eager us", "compiled us", "library us"),
    *("eager / triton", "compiled / triton", "GB/s", "% of copy", "TFLOP/s"),
)

HOW = """\
Median GPU time of one call, in microseconds. `backward` is forward and backward together. `triton` is the op of
`umt_kernels`, `eager` plain PyTorch as UMT's published code does it, `compiled` torch.compile of the op's reference,
`library` the fastest of the other libraries' kernels that could be run (for patch_embed: the implicit GEMM). A ratio
over 1 means that `triton` is faster. GB/s are the least bytes the op must move (each input read once, each output
written once, in each direction) over the time of `triton`, and % of copy is their share of what a large copy reached
in the same run.
"""

README = """\
# Results

Step times of whole training are in `cpu/step_time.md` and, once `make bench-gpu` has run on a GPU, in
`<gpu>/umt_b16/step_time.md` and `<gpu>/umt_l16/step_time.md`; see docs/performance.md.

# Kernel times

One folder per GPU, one table for each below. To measure a GPU, on a machine that has one:

    make bench-kernels                                        # with the project's own .venv
    make bench-kernels PY=python3 PYTHONPATH=.:kernels        # a plain checkout; needs torch, triton, pytest-benchmark

That writes `<gpu>/kernels.json`, `kernels.md` and `kernels.png`, and this page. A contender whose numbers are wrong
is refused, and its place says "not measured". Other libraries' kernels (liger-kernel, quack-kernels) are timed where
they are installed.

"""

Key = tuple[str, str, str, str]
"""op, form, direction, model"""


@dataclass(frozen=True)
class Result:
    """One contender's median."""

    contender: str
    seconds: float
    least_bytes: int
    flops: int
    copy_bytes_per_second: float | None


Results = dict[Key, dict[str, Result]]


def read(path: Path) -> tuple[Results, dict[str, str]]:
    """The results in a pytest-benchmark JSON, and what they were taken on.

    Raises ValueError if the file holds results of several devices, or none of `benchmarks/kernels`.
    """
    results: Results = {}
    facts: set[tuple[tuple[str, str], ...]] = set()
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        info: dict[str, Any] = benchmark["extra_info"]
        if "contender" not in info:
            continue
        key = (info["op"], info["form"], info["direction"], info["model"])
        results.setdefault(key, {})[info["contender"]] = Result(
            info["contender"],
            benchmark["stats"]["median"],
            info["least_bytes"],
            info["flops"],
            info.get("copy_bytes_per_second"),
        )
        facts.add(tuple((name, info[name]) for name in ("device", "torch", "triton", "commit")))
    if len(facts) != 1:
        raise ValueError(f"{path} holds kernel results of {len(facts)} devices or versions; give a file of one run")
    return results, dict(facts.pop())


def row(case: Case, measured: dict[str, Result]) -> list[str]:
    """A line of the table, in the order of HEADER."""
    seconds = {name: measured[name].seconds for name in OWN if name in measured}
    library = min(
        (measured[name] for name in case.libraries if name in measured), key=lambda r: r.seconds, default=None
    )
    cells = [f"{case.op} ({case.form})", case.direction, case.shapes.model]
    cells += [f"{1e6 * seconds[name]:.1f}" if name in seconds else NOT_MEASURED for name in OWN]
    if not case.libraries:
        cells.append("none known")
    else:
        cells.append(f"{1e6 * library.seconds:.1f} ({library.contender})" if library else NOT_MEASURED)
    for other in ("eager", "compiled"):
        both = other in seconds and "triton" in seconds
        cells.append(f"{seconds[other] / seconds['triton']:.2f}" if both else NOT_MEASURED)
    own = measured.get("triton")
    if own is None:
        return [*cells, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED if case.flops else "-"]
    rate = own.least_bytes / own.seconds
    share = f"{100 * rate / own.copy_bytes_per_second:.1f}" if own.copy_bytes_per_second else NOT_MEASURED
    return [*cells, f"{rate / 1e9:.1f}", share, f"{own.flops / own.seconds / 1e12:.1f}" if own.flops else "-"]


def table(results: Results) -> str:
    """All cases of both models as Markdown."""
    lines = [HEADER, tuple("---" for _ in HEADER)]
    for case in every_case():
        lines.append(tuple(row(case, results.get(key(case), {}))))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def every_case() -> Iterable[Case]:
    return (case for shapes in (UMT_B, UMT_L) for case in cases(shapes))


def key(case: Case) -> Key:
    return case.op, case.form, case.direction, case.shapes.model


def page(results: Results, facts: dict[str, str]) -> str:
    """kernels.md of one GPU."""
    copies = {r.copy_bytes_per_second for one in results.values() for r in one.values()} - {None}
    copied = f", copy {max(c for c in copies if c) / 1e9:.0f} GB/s" if copies else ""
    taken = f"{facts['device']}{copied}; torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}."
    return f"# Kernels on {facts['device']}\n\n{HOW}\n{taken}\n\n{table(results)}\n![Times](kernels.png)\n"


def plot(results: Results, title: str, path: Path) -> None:
    """Median times of the contenders, one panel per model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(14, 7), layout="constrained")
    for panel, shapes in zip(panels, (UMT_B, UMT_L), strict=True):
        shown = [case for case in cases(shapes) if key(case) in results]
        for place, contender in enumerate((*OWN, "liger", "quack", "implicit")):
            found = [(y, results[key(case)].get(contender)) for y, case in enumerate(shown)]
            bars = [(y + (place - 2) * 0.16, 1e6 * result.seconds) for y, result in found if result]
            if bars:
                heights, lengths = zip(*bars, strict=True)
                panel.barh(heights, lengths, height=0.15, label=contender, color=f"C{place}")
        panel.set_yticks(range(len(shown)), [f"{case.op}\n{case.form}, {case.direction}" for case in shown], fontsize=7)
        panel.invert_yaxis()
        if shown:
            panel.set_xscale("log")
            panel.legend()
        panel.set(title=f"{shapes.model}, batch {shapes.batch}", xlabel="median time, us")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def index(folder: Path) -> str:
    """results/README.md: where each GPU's table is, and a table of "not measured" for a GPU without results."""
    measured = sorted(path.parent.name for path in folder.glob("*/kernels.json"))
    parts = [f"## {gpu}\n\nSee [{gpu}/kernels.md]({gpu}/kernels.md).\n" for gpu in measured]
    parts += [f"## {gpu}\n\nNot measured yet.\n\n{table({})}" for gpu in GPUS if gpu not in measured]
    return README + HOW + "\n" + "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="?", help="kernels.json of one GPU; without it, the README is written")
    path: Path | None = parser.parse_args().json
    if path is None:
        (RESULTS / "README.md").write_text(index(RESULTS))
        return
    if not path.is_file():
        sys.exit(f"{path} is not there; `make bench-kernels` on a GPU makes it")
    results, facts = read(path)
    path.with_suffix(".md").write_text(page(results, facts))
    try:
        plot(results, facts["device"], path.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is missing (pip install {error.name})")


if __name__ == "__main__":
    main()

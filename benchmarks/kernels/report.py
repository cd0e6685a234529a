"""Table and plot of a kernels.json, written by `python -m benchmarks.kernels`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import gpu_name
from benchmarks.kernels.case import OpCase
from benchmarks.rates import GPUS

Content = dict[str, Any]
"""Content of kernels.json: `facts` of the machine, and `results`, a list of KernelTime."""

Key = tuple[str, str, str, str]
"""op, form, direction, model"""

OWN = ("triton", "eager", "compiled")
REFUSED = "refused"
CHECKED = "numbers right"
MARGIN = 1.03
"""Least gain of another contender that counts; a smaller one is noise."""

HEADER = (
    *("op", "direction", "model", "predicted us", "triton us", "eager us", "compiled us", "library us"),
    *("eager / triton", "compiled / triton", "GB/s", "% of copy", "TFLOP/s", "verdict"),
)

HOW = """\
Median GPU time of one call, in microseconds. `backward` is forward and backward together. `triton` is the op of
`umt_kernels`, `eager` plain PyTorch as UMT's published code does it, `compiled` torch.compile of the op's reference,
`library` the fastest of the other libraries' kernels that run here (for patch_embed: the implicit GEMM). `predicted` is
the longer of the least bytes (each input read once, each output written once, in each direction) at the rate of a large
copy, and the operations at the rate of a large matmul in bf16, or in 8 bits. GB/s are the least bytes over the time of
`triton`.
"""


@dataclass
class KernelTime:
    """One contender of one case. Without `seconds`, `not_run` says why."""

    op: str
    form: str
    direction: str
    model: str
    contender: str
    batch: int
    least_bytes: int
    flops: int
    seconds: float | None = None
    not_run: str | None = None

    def is_final(self, check: bool) -> bool:
        """Whether another run of the same sources can reuse this result."""
        missing = (self.not_run or "").startswith("not run")
        return self.seconds is not None or missing or (check and self.not_run == CHECKED)


def load(found: dict[str, Any]) -> KernelTime:
    return KernelTime(**found)


def key(case: OpCase) -> Key:
    return case.op, case.form, case.direction, case.shapes.model


def key_of(found: KernelTime) -> tuple[Key, str]:
    return (found.op, found.form, found.direction, found.model), found.contender


def read(path: Path) -> Content:
    """A kernels.json. Raises SystemExit naming the file if it is something else."""
    try:
        content = json.loads(path.read_text())
        content["facts"]["device"]
        [load(found) for found in content["results"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"error: {path} is not a kernels.json: {error!r}") from None
    return content


def grouped(content: Content) -> dict[Key, dict[str, KernelTime]]:
    """Contenders by case, in the order of the file."""
    found: dict[Key, dict[str, KernelTime]] = {}
    for one in map(load, content["results"]):
        found.setdefault(key_of(one)[0], {})[one.contender] = one
    return found


def predicted_seconds(one: KernelTime, facts: dict[str, Any]) -> float | None:
    """Time computed from the device's rates; None if they are not known."""
    sheet = GPUS.get(gpu_name(facts["device"]))
    copy = facts.get("copy_bytes_per_second") or (sheet and sheet.copy)
    if not copy or sheet is None:
        return None
    matmul = sheet.eight_bit if one.op == "linear_8bit" else sheet.matmul
    return max(one.least_bytes / copy, one.flops / matmul)


def verdict(contenders: dict[str, KernelTime]) -> str:
    """Whether to keep the op: `delete` and the faster contender, if one is faster by more than noise."""
    own = contenders.get("triton")
    if own is None:
        return ""
    if own.seconds is None:
        return own.not_run or ""
    rivals = {name: one.seconds for name, one in contenders.items() if name != "triton" and one.seconds}
    if not rivals:
        return "no rival measured"
    best = min(rivals, key=rivals.__getitem__)
    ratio = own.seconds / rivals[best]
    return f"delete: {best} is {ratio:.2f}x faster" if ratio > MARGIN else "keep"


def rows(content: Content) -> list[list[str]]:
    """Lines of the table, in the order of HEADER."""
    return [_row(contenders, content["facts"]) for contenders in grouped(content).values()]


def _row(contenders: dict[str, KernelTime], facts: dict[str, Any]) -> list[str]:
    one = next(iter(contenders.values()))
    seconds = {name: found.seconds for name, found in contenders.items() if found.seconds}
    libraries = {name: took for name, took in seconds.items() if name not in OWN}
    expected = predicted_seconds(one, facts)
    cells = [f"{one.op} ({one.form})", one.direction, one.model, f"{1e6 * expected:.1f}" if expected else ""]
    cells += [f"{1e6 * seconds[name]:.1f}" if name in seconds else "" for name in OWN]
    best = min(libraries, key=libraries.__getitem__, default=None)
    cells.append(f"{1e6 * libraries[best]:.1f} ({best})" if best else "")
    own = seconds.get("triton")
    for other in ("eager", "compiled"):
        cells.append(f"{seconds[other] / own:.2f}" if own and other in seconds else "")
    copy = facts.get("copy_bytes_per_second")
    rate = one.least_bytes / own if own else None
    cells.append(f"{rate / 1e9:.1f}" if rate else "")
    cells.append(f"{100 * rate / copy:.1f}" if rate and copy else "")
    cells.append(f"{one.flops / own / 1e12:.1f}" if own and one.flops else "")
    return [*cells, verdict(contenders) if facts["device"] != "cpu" else ""]  # a CPU runs only plain forms


def table(content: Content) -> str:
    """All measured cases as Markdown, without empty columns."""
    lines = rows(content)
    kept = [column for column in range(len(HEADER)) if any(line[column] for line in lines)]
    shown = [[line[column] for column in kept] for line in ([*HEADER], ["---"] * len(HEADER), *lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in shown)


def write(content: Content, folder: Path) -> None:
    """kernels.md and, with matplotlib, kernels.png."""
    facts = content["facts"]
    copy = facts.get("copy_bytes_per_second")
    copied = f", copy {copy / 1e9:.0f} GB/s" if copy else ""
    taken = f"{facts['device']}{copied}; torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}."
    shown = "\n![Times](kernels.png)\n"
    try:
        plot(content, folder / "kernels.png")
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is missing (pip install {error.name})")
        shown = ""
    text = f"# Kernels on {facts['device']}\n\n{HOW}\n{taken}\n\n{table(content)}{shown}"
    (folder / "kernels.md").write_text(text)


def plot(content: Content, path: Path) -> None:
    """Median times of the contenders, one panel per model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = grouped(content)
    models = list(dict.fromkeys(one[3] for one in found))
    figure, panels = plt.subplots(1, len(models), figsize=(7 * len(models), 7), layout="constrained", squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        shown = [one for one in found if one[3] == model]
        for place, contender in enumerate((*OWN, "liger", "quack", "implicit")):
            times = [(y, found[one].get(contender)) for y, one in enumerate(shown)]
            bars = [(y + (place - 2) * 0.16, 1e6 * one.seconds) for y, one in times if one and one.seconds]
            if bars:
                heights, lengths = zip(*bars, strict=True)
                panel.barh(heights, lengths, height=0.15, label=contender, color=f"C{place}")
        panel.set_yticks(range(len(shown)), [f"{one[0]}\n{one[1]}, {one[2]}" for one in shown], fontsize=7)
        panel.invert_yaxis()
        panel.set_xscale("log")
        panel.legend()
        panel.set(title=model, xlabel="median time, us")
    figure.suptitle(content["facts"]["device"])
    figure.savefig(path, dpi=120)
    plt.close(figure)

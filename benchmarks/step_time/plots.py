"""The plots of a step_time.json: speed-ups, and the phases of each rung."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.step_time.report import OVERLAP, Content, groups, overlap_of, stall


def draw_ladder(content: Content, path: Path) -> None:
    """Draw the speed-up of every rung over the first."""
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
    """Draw each rung's phases and its wait for data as stacked bars; below, hatched, the work that overlaps."""
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
        for name, key in OVERLAP.items():
            if seconds := overlap_of(content, results[0]).get(key):
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

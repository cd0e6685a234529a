"""Pictures of a run: its loss curve, visible patches, and reconstructions."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from umt_fast.files import write_whole
from umt_fast.masking import token_ids

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG. A run that is over does not fail for want of room for its picture: a note says so."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        print(f"note: cannot write {path}: {error.strerror or error}", file=sys.stderr)


def draw_loss_curve(metrics: list[dict[str, Any]], path: Path, label: str, parts: Sequence[str] = ()) -> None:
    """Loss and learning rate over the steps; `parts` are other losses of the metrics, drawn as thin lines."""
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    steps = [line["step"] for line in metrics]
    axes.plot(steps, [line["loss"] for line in metrics], color="C0", marker="." if len(steps) < 40 else "")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(label, color="C0")
    for number, part in enumerate(parts, 2):
        axes.plot(steps, [line[part] for line in metrics], color=f"C{number}", linewidth=0.8, label=part.upper())
    if parts:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts), frameon=False)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [line["lr"] for line in metrics], color="C1", linestyle="--", linewidth=1)
    rate.set_ylabel("learning rate", color="C1")
    rate.set_ylim(bottom=0)
    _write(figure, path, 120)


def draw_visible(
    clip: UInt8[Tensor, "t h w 3"],
    scores: Float[Tensor, "f p"],
    visible: Int[Tensor, "g n"],
    path: Path,
    title: str,
) -> None:
    """One column per token frame: the frame, the teacher's attention on it, and the patches the student sees."""
    frames, patches = scores.shape
    grid = round(patches**0.5)
    pixels = clip[:: len(clip) // frames].cpu().numpy()
    side = pixels.shape[1]
    heat = scores.float().cpu().numpy().reshape(frames, grid, grid)
    seen = np.zeros(frames * patches, dtype=bool)
    seen[token_ids(visible[None].cpu(), frames * patches)[0].numpy()] = True
    seen = seen.reshape(frames, grid, grid).repeat(side // grid, axis=1).repeat(side // grid, axis=2)

    figure = _figure(1.6 * frames + 0.6, 5.4)
    rows = figure.subplots(3, frames, squeeze=False)
    shown = None
    for column in range(frames):
        rows[0, column].imshow(pixels[column])
        rows[1, column].imshow(pixels[column])
        extent = (-0.5, side - 0.5, side - 0.5, -0.5)
        shown = rows[1, column].imshow(
            heat[column] * patches, extent=extent, cmap="inferno", alpha=0.75, vmin=0, vmax=heat.max() * patches
        )
        hidden = np.where(seen[column][..., None], pixels[column], pixels[column] // 6 + 24)
        rows[2, column].imshow(hidden)
    for row, name in zip(rows, ("frame", "teacher's attention", "visible to the student"), strict=True):
        row[0].set_ylabel(name)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    assert shown is not None
    figure.colorbar(shown, ax=rows[1, :], label="x uniform", fraction=0.02)
    printable = title.encode("utf-8", "replace").decode()  # a file name may not be valid UTF-8
    figure.suptitle(printable, fontsize=10, parse_math=False)
    _write(figure, path, 110)


def draw_reconstruction(
    clip: UInt8[Tensor, "t h w 3"],
    visible: Int[Tensor, " n"],
    restored: UInt8[Tensor, "t h w 3"],
    tokens: int,
    patch_size: int,
    path: Path,
    title: str,
) -> None:
    """One column per frame of tokens: the frame, the patches the encoder sees, and the clip with predicted patches."""
    grid = clip.shape[1] // patch_size
    frames = tokens // grid**2
    seen = np.zeros(tokens, dtype=bool)
    seen[visible.cpu().numpy()] = True
    seen = seen.reshape(frames, grid, grid).repeat(patch_size, axis=1).repeat(patch_size, axis=2)
    step = len(clip) // frames
    pixels, predicted = clip[::step].cpu().numpy(), restored[::step].cpu().numpy()
    figure = _figure(1.6 * frames + 0.6, 5.4)
    rows = figure.subplots(3, frames, squeeze=False)
    for column in range(frames):
        rows[0, column].imshow(pixels[column])
        rows[1, column].imshow(np.where(seen[column][..., None], pixels[column], pixels[column] // 6 + 24))
        rows[2, column].imshow(predicted[column])
    for row, name in zip(rows, ("frame", "visible to the encoder", "reconstructed"), strict=True):
        row[0].set_ylabel(name)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    figure.suptitle(title.encode("utf-8", "replace").decode(), fontsize=10, parse_math=False)
    _write(figure, path, 110)

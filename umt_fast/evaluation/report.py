"""The report of a test: scores, every prediction, and pictures of the mistakes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from umt_fast.data.decode import read_frames
from umt_fast.data.labels import LabelledVideos
from umt_fast.data.video import BadVideo
from umt_fast.evaluation.classification import Predictions, Scores, confusion, ranked, score
from umt_fast.files import write_whole

if TYPE_CHECKING:
    from jaxtyping import Int

_LISTED = 10
"""Number of classes in the list of the worst classes."""
_PICTURED = 12
"""Number of videos in the picture of the worst mistakes."""
_LARGEST_MATRIX = 60
"""Most classes for which the confusion matrix shows class names."""
_LARGEST_COUNTED = 20
"""Most classes for which the confusion matrix shows numbers of videos."""


def write_report(folder: Path, found: Predictions, listed: LabelledVideos, about: dict[str, Any]) -> Scores:
    """Write test.json, predictions.npz, confusion.png and mistakes.png to `folder`. Returns the scores.

    test.json has the scores in percent, `about`, the worst classes, and the unreadable videos, which are not scored.
    predictions.npz has the row in the list, path, label and probabilities of each video.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = torch.from_numpy(listed.labels)[found.rows]
    scores = score(found.probabilities, labels)
    matrix = confusion(labels, ranked(found.probabilities, 1)[:, 0], found.probabilities.shape[1])
    content = {
        **scores.as_dict(),
        "unreadable": [{"row": row + 1, "path": name, "reason": reason} for row, name, reason in found.bad],
        "worst_classes": worst_classes(matrix, listed.classes),
        **about,
    }
    write_whole(folder / "test.json", (json.dumps(content, indent=2, default=str) + "\n").encode("utf-8", "replace"))
    with open(folder / "predictions.npz", "wb") as file:
        np.savez_compressed(
            file,
            row=found.rows.numpy(),
            path=np.array([listed.videos[int(row)].name.encode("utf-8", "replace").decode() for row in found.rows]),
            label=labels.numpy(),
            probabilities=found.probabilities.numpy(),
        )
    _draw_confusion(matrix, listed.classes, folder / "confusion.png")
    _draw_mistakes(found, labels, listed, folder / "mistakes.png")
    return scores


def worst_classes(matrix: Int[Tensor, "k k"], classes: Sequence[str]) -> list[dict[str, Any]]:
    """The classes with the lowest top-1 among those that occur, each with its most frequent wrong prediction."""
    counts, right = matrix.sum(1), matrix.diagonal()
    worst = sorted((int(right[k]) / int(counts[k]), -int(counts[k]), k) for k in counts.nonzero().flatten().tolist())
    listed = []
    for share, _, k in worst[:_LISTED]:
        others = matrix[k].clone()
        others[k] = 0
        taken = classes[int(others.argmax())] if others.any() else None
        listed.append({"class": classes[k], "top1": 100 * share, "videos": int(counts[k]), "taken_for": taken})
    return listed


def _draw_confusion(matrix: Int[Tensor, "k k"], classes: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure

    count = len(matrix)
    side = max(5.0, min(0.28 * count, 14.0))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the class's videos")
    axes.set(xlabel="predicted", ylabel="label", title=f"{int(matrix.sum())} videos")
    if count <= _LARGEST_MATRIX:
        names = [_short(name) for name in classes]
        axes.set_xticks(range(count), names, rotation=90, fontsize=7)
        axes.set_yticks(range(count), names, fontsize=7)
    if count <= _LARGEST_COUNTED:
        for row, column in matrix.nonzero().tolist():
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(matrix[row, column])), ha="center", va="center", color=shade, fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_mistakes(found: Predictions, labels: Int[Tensor, " n"], listed: LabelledVideos, path: Path) -> None:
    """Draw the middle frames of the videos with the largest probability margin of a wrong class over the right one."""
    from matplotlib.figure import Figure

    said = ranked(found.probabilities, 1)
    ahead = (found.probabilities.gather(1, said) - found.probabilities.gather(1, labels[:, None]))[:, 0]
    places = [place for place in ahead.argsort(descending=True).tolist() if ahead[place] > 0][:_PICTURED]
    columns = min(max(len(places), 1), 4)
    rows = max(-(-len(places) // columns), 1)
    figure = Figure(figsize=(3.2 * columns, 2.9 * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in every:
        axes.set_axis_off()
    if not places:
        every[0].text(0.5, 0.5, "no mistakes", ha="center")
    for axes, place in zip(every, places, strict=False):
        video = listed.videos[int(found.rows[place])]
        try:
            axes.imshow(read_frames(video, lambda total: [total // 2])[0])
        except (BadVideo, OSError):  # removed or changed since the test
            axes.text(0.5, 0.5, "cannot be read any more", ha="center")
        guess = int(said[place, 0])
        title = f"{_short(listed.classes[int(labels[place])])}\npredicted {_short(listed.classes[guess])}"
        title += f" ({100 * float(found.probabilities[place, guess]):.0f}%)\n{_short(os.path.basename(video.name))}"
        axes.set_title(title, fontsize=8)
    figure.savefig(path, dpi=110)


def _short(name: str) -> str:
    """A class name as a label of a picture: without matplotlib's math mode, and shortened."""
    name = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
    return name if len(name) <= 24 else name[:22] + "..."

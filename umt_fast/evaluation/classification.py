"""Multi-view tests of a classifier: probabilities of each video, and their scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from umt_fast.config import DataConfig
from umt_fast.data.index import VideoList
from umt_fast.data.loader import ClipLoader, NothingReadable
from umt_fast.evaluation.views import Views, view_stream
from umt_fast.run.progress import OnProgress, silent
from umt_fast.run.world import World

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

Merge = Literal["probabilities", "logits"]


def merge_views(
    logits: Float[Tensor, "r k"],
    rows: Int[Tensor, " r"],
    views: Int[Tensor, " r"] | int,
    merge: Merge = "probabilities",
) -> Float[Tensor, "videos k"]:
    """Mean probabilities of each video over its views: softmax in float64, then mean, as published (UMT, 4.2).

    `rows`: the video of each row of logits; the result has one row per video, ascending. `views`: either the number of
    each view: then the result is bit-identical for any order of rows, and a repeated view counts once (the padding of a
    distributed sampler); or the number of views per video, which is checked. `merge = "logits"` averages the logits
    before the softmax. Raises ValueError.
    """
    logits, rows = torch.as_tensor(logits), torch.as_tensor(rows).to("cpu", torch.int64)
    if not isinstance(views, int) and np.ndim(views) == 0:
        views = int(views)
    if logits.dim() != 2 or len(logits) == 0 or rows.shape != logits.shape[:1]:
        raise ValueError(f"logits {list(logits.shape)} and rows {list(rows.shape)}: give [R,K] and [R] with R > 0")
    if isinstance(views, int):
        order = rows.argsort(stable=True)
    else:
        numbers = torch.as_tensor(views).to("cpu", torch.int64)
        if numbers.shape != rows.shape:
            raise ValueError(f"views {list(numbers.shape)}: give the view of each of the {len(rows)} rows")
        order = numbers.argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]
        pairs = torch.stack((rows[order], numbers[order]))
        fresh = torch.ones(len(order), dtype=torch.bool)
        fresh[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(0)
        order = order[fresh]
    videos, counts = rows[order].unique_consecutive(return_counts=True)
    if isinstance(views, int) and bool((counts != views).any()):
        wrong = int((counts != views).nonzero()[0])
        raise ValueError(f"video {int(videos[wrong])} has {int(counts[wrong])} views, not {views}")
    single = logits.detach().to("cpu", torch.float64)[order].numpy()
    if merge == "probabilities":
        single = _softmax(single)
    ends = counts.cumsum(0).tolist()
    merged = np.stack([part.mean(0) for part in np.split(single, ends[:-1])])
    return torch.from_numpy(merged if merge == "probabilities" else _softmax(merged))


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax by numpy, as in the published code; torch's float64 exp differs from numpy's in the last bit."""
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Scores:
    """Accuracy of predictions for labelled videos, in percent."""

    videos: int
    top1: float
    top5: float
    mean_class: float
    """Mean top-1 of the classes that occur in the list."""
    loss: float
    """Mean negative log-likelihood of the labels."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def score(probabilities: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Scores:
    """Top-1, top-5, mean per class and negative log-likelihood. Raises ValueError for no video or an invalid label."""
    count, classes = probabilities.shape
    if count == 0 or labels.shape != (count,):
        raise ValueError(f"{list(labels.shape)} labels for {count} videos: give one each, and one video or more")
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"labels {int(labels.min())} to {int(labels.max())} for {classes} classes")
    best = ranked(probabilities, min(5, classes))
    hit = best == labels[:, None]
    right = hit[:, 0].double()
    per_class = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, right)
    present = torch.bincount(labels, minlength=classes)
    of_label = probabilities.gather(1, labels[:, None]).double().clamp_min(torch.finfo(torch.float64).tiny)
    return Scores(
        videos=count,
        top1=100 * float(right.mean()),
        top5=100 * float(hit.any(1).double().mean()),
        mean_class=100 * float((per_class / present)[present > 0].mean()),
        loss=float(-of_label.log().mean()),
    )


def ranked(probabilities: Shaped[Tensor, "n k"], count: int) -> Int[Tensor, "n count"]:
    """The `count` most probable classes of each row, best first; ties are ordered by class number."""
    return probabilities.argsort(dim=-1, descending=True, stable=True)[:, :count]


def confusion(labels: Int[Tensor, " n"], predicted: Int[Tensor, " n"], classes: int) -> Int[Tensor, "k k"]:
    """Confusion matrix: how often each label (row) was predicted as each class (column)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


@dataclass
class Predictions:
    """A model's predictions for the videos of a list."""

    rows: Int[Tensor, " n"]
    """Row in the list of each video that was read, ascending."""
    probabilities: Float[Tensor, "n k"]
    bad: list[tuple[int, str, str]]
    """Row, name and reason of each video that could not be read and has no prediction."""


@torch.inference_mode()
def predict(
    model: nn.Module,
    videos: VideoList,
    views: Views,
    config: DataConfig,
    world: World,
    *,
    clips_per_pass: int = 16,
    bf16: bool = False,
    merge: Merge = "probabilities",
    on_progress: OnProgress = silent,
) -> Predictions:
    """Predictions of a list by all processes together; every rank returns all of them.

    Every forward pass has the same clips for any number of processes, so the result is bit-identical. `on_progress` is
    called after every batch. Raises NothingReadable if no video can be read.
    """
    count, group = views.clips, max(clips_per_pass // views.clips, 1)
    groups = -(-len(videos) // group)
    own = range(world.rank, groups, world.size)
    training = model.training
    model.eval()
    rows: list[int] = []
    merged: list[Tensor] = []
    bad: list[tuple[int, str, str]] = []
    loader = ClipLoader(
        view_stream(videos, views, config),
        start=0,
        end=len(videos),
        batches=len(own),
        batch_size=group * count,
        rank=world.rank,
        world_size=world.size,
        pin_memory=world.device.type == "cuda",
    )
    with loader:
        for done, (number, batch) in enumerate(zip(own, loader, strict=True), 1):
            wanted = range(number * group, min((number + 1) * group, len(videos)))
            missing = (row for row in wanted if row not in batch.rows)
            bad += [(row, name, reason) for row, (name, reason) in zip(missing, batch.bad, strict=True)]
            if batch.rows:
                of_clip = torch.tensor(batch.rows).repeat_interleave(count)
                logits = _forward(
                    model, batch.clip.to(world.device, non_blocking=True), group * count, clips_per_pass, bf16
                )
                merged.append(merge_views(logits, of_clip, count, merge))
                rows += batch.rows
            on_progress(len(videos) * done // len(own), len(videos))
    model.train(training)
    gathered = world.gather((rows, torch.cat(merged) if merged else None, bad))
    found = torch.tensor([row for rows, _, _ in gathered for row in rows], dtype=torch.int64)
    parts = [part for _, part, _ in gathered if part is not None]
    every_bad = sorted(one for _, _, bad in gathered for one in bad)
    if not parts:
        _, name, reason = every_bad[0]
        raise NothingReadable(f"none of the {len(videos)} videos could be read; the first, {name}: {reason}")
    order = found.argsort()
    return Predictions(found[order], torch.cat(parts)[order], every_bad)


def _forward(model: nn.Module, clips: Tensor, size: int, clips_per_pass: int, bf16: bool) -> Float[Tensor, "r k"]:
    """Logits (float32) of clips, padded with zero clips to `size`, in passes of `clips_per_pass`."""
    full = clips.new_zeros(size, *clips.shape[1:])
    full[: len(clips)] = clips
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=bf16):
        return torch.cat([model(part).float() for part in full.split(clips_per_pass)])[: len(clips)]

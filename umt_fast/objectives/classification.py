"""Classification of mixed clips: mixup, cutmix, smoothed targets and their cross-entropy (UMT's fine-tuning)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast.config import MixConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def mix(
    clips: Float[Tensor, "b c t h w"],
    labels: Int[Tensor, " b"],
    classes: int,
    mixing: MixConfig,
    rng: np.random.RandomState,
) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, "b k"]]:
    """Mixup and cutmix: clip i is mixed with clip B - 1 - i. Returns mixed clips and targets; the input is unchanged.

    Numbers are drawn from `rng` in the published order. Raises ValueError for an odd number of clips.
    """
    if not mixing.mixes:
        return clips, soft_targets(labels, classes, mixing.smoothing)
    if len(clips) % 2:
        raise ValueError(f"{len(clips)} clips in a batch: mixup and cutmix need an even number")
    if mixing.mode == "elem":
        return _mix_each(clips, labels, classes, mixing, rng)
    share, cuts = 1.0, False
    if rng.rand() < mixing.probability:
        cuts = rng.rand() < mixing.switch if mixing.mixup > 0 and mixing.cutmix > 0 else mixing.cutmix > 0
        alpha = mixing.cutmix if cuts else mixing.mixup
        share = float(rng.beta(alpha, alpha))
    if share == 1.0:
        mixed = clips
    elif cuts:
        rows, columns, share = _draw_cut(clips, share, rng)
        mixed = clips.clone()
        mixed[..., rows, columns] = clips.flip(0)[..., rows, columns]
    else:
        mixed = clips * share + clips.flip(0) * (1 - share)
    return mixed, soft_targets(labels, classes, mixing.smoothing, share)


def _mix_each(
    clips: Tensor, labels: Tensor, classes: int, mixing: MixConfig, rng: np.random.RandomState
) -> tuple[Tensor, Tensor]:
    count = len(clips)
    cuts = np.full(count, mixing.cutmix > 0)
    if mixing.mixup > 0 and mixing.cutmix > 0:
        cuts = rng.rand(count) < mixing.switch
    shares = np.ones(count)
    for chosen, alpha in ((cuts, mixing.cutmix), (~cuts, mixing.mixup)):
        if alpha > 0:
            shares = np.where(chosen, rng.beta(alpha, alpha, size=count), shares)
    shares = np.where(rng.rand(count) < mixing.probability, shares, 1.0).astype(np.float32)
    mixed = clips.clone()
    for index, share in enumerate(shares):
        other = clips[count - 1 - index]
        if share == 1:
            continue
        if cuts[index]:
            rows, columns, shares[index] = _draw_cut(clips, share, rng)
            mixed[index][..., rows, columns] = other[..., rows, columns]
        else:
            mixed[index] = clips[index] * float(share) + other * float(1 - share)
    return mixed, soft_targets(labels, classes, mixing.smoothing, torch.from_numpy(shares).to(clips.device)[:, None])


def _draw_cut(clips: Tensor, share: float, rng: np.random.RandomState) -> tuple[slice, slice, float]:
    """Rows and columns of a rectangle of 1 - share of the frame, clipped at its border, and the share outside it."""
    height, width = clips.shape[-2:]
    side = math.sqrt(1 - share)
    down, across = int(height * side), int(width * side)
    row, column = int(rng.randint(0, height)), int(rng.randint(0, width))
    top, bottom = max(row - down // 2, 0), min(row + down // 2, height)
    left, right = max(column - across // 2, 0), min(column + across // 2, width)
    left_over = 1 - (bottom - top) * (right - left) / (height * width)
    return slice(top, bottom), slice(left, right), left_over


def soft_targets(
    labels: Int[Tensor, " b"], classes: int, smoothing: float, share: float | Tensor = 1.0
) -> Float[Tensor, "b k"]:
    """share * label + (1 - share) * label of the mirrored clip, as smoothed distributions (float32)."""
    off = smoothing / classes
    hot = torch.full((len(labels), classes), off, device=labels.device)
    hot.scatter_(1, labels[:, None].long(), 1 - smoothing + off)
    return hot * share + hot.flip(0) * (1 - share)


def soft_cross_entropy(logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Mean over the batch of -sum(target * log_softmax(logits)), in float32."""
    return -(targets * F.log_softmax(logits.float(), -1)).sum(-1).mean()

"""Video-text contrast over the batches of all ranks, without a matrix of all similarities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from umt_fast.config import GatherGradient

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MOST_SIMILARITIES = 1 << 24
"""Similarities held at once, 64 MiB of float32: a chunk of this rank's rows, with all columns."""


def unit_mean(projected: Float[Tensor, "b f e"]) -> Float[Tensor, "b e"]:
    """Mean over the frames of their normalised vectors, itself not normalised. A text is one frame.

    The mean over frames of cos(frame, text) equals this mean times the normalised text.
    """
    return F.normalize(projected.float(), dim=-1).mean(dim=1)


def contrastive_loss(
    video: Float[Tensor, "b e"],
    text: Float[Tensor, "b e"],
    temperature: Float[Tensor, ""],
    idx: Int[Tensor, " b"],
    gradient: GatherGradient = "published",
    group: Any = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of each video over all texts and of each text over all videos, averaged (VTC).

    video, text  from `unit_mean`; similarity is their product divided by the temperature. The loss is over the batches
                 of all ranks of `group` (None: the default group, or this process alone), which must have equal sizes.
    idx          samples with equal numbers match each other.
    gradient     published: a rank keeps its own slice of its own gradient, so that after averaging over ranks the
                 encoders get 1 / ranks of the true gradient; true: the true gradient. The temperature always gets the
                 true gradient.

    Loss and gradient are computed together in float32, in chunks of rows. Each rank computes its own rows and its own
    columns of the matrix of similarities.
    """
    if not len(video) == len(text) == len(idx):
        raise ValueError(f"{len(video)} videos, {len(text)} texts and {len(idx)} numbers; give as many of each")
    return _Contrast.apply(video.float(), text.float(), temperature, idx, gradient, group)


class _Contrast(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(
        ctx: Any, video: Tensor, text: Tensor, temperature: Tensor, idx: Tensor, gradient: GatherGradient, group: Any
    ) -> Tensor:
        own = (video, text)
        every = (_gather(video, group), _gather(text, group))
        all_idx = _gather(idx, group)
        count, scale = len(all_idx), 1 / temperature.float()
        # Norms of this rank's videos over all texts, and of its texts over all videos.
        norms = [_log_norms(mine, others, scale) for mine, others in zip(own, every[::-1], strict=True)]
        all_norms = [_gather(norm, group) for norm in norms]
        gradients, positives = [], []
        for side in (0, 1):
            other = 1 - side
            grad, positive = _gradient(
                own[side], every[other], scale, norms[side], all_norms[other], idx, all_idx, side == 0
            )
            gradients.append(grad / count)
            positives.append(positive)
        # this rank's part of the sum over all pairs of dL/dS * S
        slope = (gradients[0] * video).sum()
        totals = torch.stack((norms[0].sum() + norms[1].sum() - 2 * positives[0], slope))
        if _ranks(group) > 1:
            dist.all_reduce(totals, group=group)
        loss = totals[0] / (2 * count)
        whole = _ranks(group) if gradient == "true" else 1
        ctx.save_for_backward(gradients[0] * whole, gradients[1] * whole, -totals[1] * scale)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        video, text, temperature = ctx.saved_tensors
        return grad * video, grad * text, (grad * temperature).to(grad.dtype), None, None, None


def _chunks(rows: int, columns: int) -> range:
    return range(0, rows, max(MOST_SIMILARITIES // columns, 1))


def _log_norms(mine: Tensor, others: Tensor, scale: Tensor) -> Float[Tensor, " b"]:
    """log of the sum of exp(similarity) over all of `others`, for each of `mine`."""
    chunks = _chunks(len(mine), len(others))
    return torch.cat([((mine[i : i + chunks.step] * scale) @ others.T).logsumexp(dim=1) for i in chunks])


def _gradient(
    mine: Tensor,
    others: Tensor,
    scale: Tensor,
    norms: Tensor,
    other_norms: Tensor,
    idx: Tensor,
    other_idx: Tensor,
    sum_positives: bool,
) -> tuple[Float[Tensor, "b e"], Float[Tensor, ""]]:
    """Gradient of count * loss for `mine`, and the sum of their mean similarities to their matches.

    The loss depends on S[i, j] through the norm of row i, the norm of column j and the targets.
    """
    chunks, parts = _chunks(len(mine), len(others)), []
    positives = torch.zeros((), device=mine.device)
    for i in chunks:
        rows = slice(i, i + chunks.step)
        similarity = (mine[rows] * scale) @ others.T
        targets = (idx[rows, None] == other_idx[None, :]).to(similarity.dtype)
        targets /= targets.sum(dim=1, keepdim=True)
        if sum_positives:
            positives += (targets * similarity).sum()
        slopes = targets.neg_()
        slopes.add_((similarity - norms[rows, None]).exp_(), alpha=0.5)
        slopes.add_(similarity.sub_(other_norms[None, :]).exp_(), alpha=0.5)
        parts.append((slopes @ others) * scale)
    return torch.cat(parts), positives


def _ranks(group: Any) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _gather(own: Tensor, group: Any) -> Tensor:
    """`own` of all ranks, concatenated."""
    ranks = _ranks(group)
    if ranks == 1:
        return own
    every = own.new_empty(ranks * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(every, own.contiguous(), group=group)
    return every

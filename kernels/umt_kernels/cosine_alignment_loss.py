"""cosine_alignment_loss, and alignment_loss for other distances between predictions and targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.checks import check_eps, check_floats, check_id_values, check_ids, check_tensors
from umt_kernels.cosine_alignment_loss_op import DISTANCES, alignment
from umt_kernels.dispatch import runs_kernel
from umt_kernels.launch import PLANS
from umt_kernels.sharding import Axes, is_distributed, on_shards

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Distance = Literal["cosine", "l1", "smooth_l1", "mse"]
Reduction = Literal["mean", "sum", "none"]


def cosine_alignment_loss(
    predictions: Float[Tensor, "*k r m c"],
    targets: Float[Tensor, "*k b n c"],
    *,
    target_ids: Int[Tensor, "r m"] | None = None,
    weight: Float[Tensor, "*k c"] | None = None,
    bias: Float[Tensor, "*k c"] | None = None,
    eps: float = 1e-6,
    row_weights: Float[Tensor, "*k r m"] | None = None,
    padded: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, ...]:
    """Mean of 2 - 2 cos(prediction, target) over all rows (UMT, arXiv 2303.16058, section 3.1).

    predictions   [k, b, m, c], or [b, m, c] for a single layer.
    target_ids    row of `targets` for each prediction; None pairs the rows in order (then n = m). With more sets of
                  predictions than samples of targets, sets 0 .. r/b - 1 belong to sample 0, and so on.
    weight, bias  LayerNorm of each layer k, applied to the predictions first, with `eps`; give both or neither.
    row_weights   factor of each row, the same for all layers if it has no axis k; it gets no gradient.
    padded        target_ids may be -1: such a row does not count.
    reduction     mean (sum of weight * loss / sum of weights), sum, or none: weight * loss of each row, [*k, r, m].

    The op L2-normalises the rows itself, in float32. A prediction shorter than 1e-12 (float16: 1e-4) has no direction:
    its cosine is 0 and it gets no gradient. For a mean or a sum, the forward pass writes the gradients of predictions,
    weight and bias, so every input is read once. `targets` get no gradient.

    Raises ValueError when shapes or devices differ, there is no row, or an id is out of range; TypeError for a dtype
    that does not fit.
    """
    return alignment_loss(
        predictions, targets, "cosine", target_ids=target_ids, weight=weight, bias=bias, eps=eps,
        row_weights=row_weights, padded=padded, reduction=reduction,
    )  # fmt: skip


def alignment_loss(
    predictions: Float[Tensor, "*k r m c"],
    targets: Float[Tensor, "*k b n c"],
    distance: Distance,
    *,
    target_ids: Int[Tensor, "r m"] | None = None,
    weight: Float[Tensor, "*k c"] | None = None,
    bias: Float[Tensor, "*k c"] | None = None,
    eps: float = 1e-6,
    beta: float = 1.0,
    row_weights: Float[Tensor, "*k r m"] | None = None,
    padded: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, ...]:
    """`cosine_alignment_loss` with another distance: `cosine`, or `l1`, `smooth_l1`, `mse` averaged over columns.

    `l1` is V-JEPA 2's (arXiv 2506.09985), `mse` MAE's (arXiv 2111.06377); `beta` is where `smooth_l1` turns linear.
    """
    tensors = (predictions, targets, target_ids, weight, bias)
    key = alignment.key((*tensors, row_weights), (distance, eps, beta, padded, reduction))
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None:
        if is_distributed(*tensors, row_weights):
            return _on_shards(
                predictions, targets, distance, target_ids, weight, bias, eps, beta, row_weights, padded, reduction
            )
        _check_settings(distance, eps, beta, reduction)
        _check(*tensors, row_weights)
    if target_ids is not None:
        check_id_values("target_ids", target_ids, targets.shape[-2], "targets have {} rows per sample", padded=padded)
    if targets.requires_grad:
        targets = targets.detach()
    if row_weights is not None and row_weights.requires_grad:
        row_weights = row_weights.detach()
    if plan is None and not _runs_kernel(predictions, targets, weight, bias, row_weights):
        settings = _settings(predictions, weight, bias, distance, eps, beta, row_weights, padded, reduction)
        rows = reference.alignment_rows(predictions, targets, target_ids, weight, bias, *settings[:5])
        if padded and target_ids is not None:
            row_weights = _without_nothing(row_weights, target_ids)
        return reference.reduce_rows(rows, row_weights, reduction)
    layered = predictions.dim() == 4
    if not layered:
        predictions, targets = predictions[None], targets[None]
        weight, bias = (p if p is None else p[None] for p in (weight, bias))
    factors, after = row_weights, None
    if row_weights is not None or padded or predictions.dtype == torch.float16:
        factors, after = _weigh(predictions, target_ids, row_weights, padded, reduction)
    if plan is not None:
        loss = alignment.planned(plan, predictions, targets, target_ids, weight, bias, factors)
    else:
        settings = _settings(predictions, weight, bias, distance, eps, beta, row_weights, padded, reduction)
        loss = alignment(predictions, targets, target_ids, weight, bias, factors, *settings, key=key)[0]
    if reduction == "none":
        return loss if layered else loss[0]
    return loss if after is None else loss * after


def _on_shards(
    predictions: Tensor, targets: Tensor, distance: Distance, target_ids: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float, beta: float, row_weights: Tensor | None, padded: bool, reduction: Reduction,
) -> Tensor:  # fmt: skip
    """The loss of DTensors. A mean divides the sum of the parts by the number, or weight, of all rows."""
    samples = predictions.dim() - 3
    axes: dict[str, Axes] = {
        "predictions": (samples,), "targets": (samples,), "target_ids": (0,), "weight": None, "bias": None,
        "row_weights": None if row_weights is None else (row_weights.dim() - 2,),
    }  # fmt: skip
    rows = reduction == "none"
    loss = on_shards(
        alignment_loss, axes, ((samples,) if rows else None,), predictions=predictions, targets=targets,
        distance=distance, target_ids=target_ids, weight=weight, bias=bias, eps=eps, beta=beta, row_weights=row_weights,
        padded=padded, reduction="none" if rows else "sum",
    )  # fmt: skip
    if reduction != "mean":
        return loss
    count = predictions.numel() // predictions.shape[-1]
    if padded and target_ids is not None:
        row_weights = _without_nothing(None if row_weights is None else row_weights.detach(), target_ids)
    if row_weights is None:
        return loss / count
    return loss / (row_weights.detach().sum() * (count // row_weights.numel()))


def _settings(
    predictions: Tensor, weight: Tensor | None, bias: Tensor | None, distance: str, eps: float, beta: float,
    row_weights: Tensor | None, padded: bool, reduction: str,
) -> tuple:  # fmt: skip
    """Settings of the kernel: distance, eps, beta, floor, padded, factor of all rows, loss per row, with gradient."""
    kind = DISTANCES["l1" if distance == "smooth_l1" and beta == 0 else distance]
    half = predictions.dtype == torch.float16
    per_row = reduction == "none"
    scaled = reduction == "mean" and not half and row_weights is None and not padded
    scale = predictions.shape[-1] / predictions.numel() if scaled else 1.0
    learns = any(x is not None and x.requires_grad for x in (predictions, weight, bias))
    with_grad = learns and not per_row and torch.is_grad_enabled()
    return kind, float(eps), float(beta), 1e-4 if half else 1e-12, padded, scale, per_row, with_grad


def _without_nothing(row_weights: Tensor | None, target_ids: Tensor) -> Tensor:
    """Weights of the rows, 0 where there is no target."""
    if row_weights is None:
        return (target_ids >= 0).float()
    return row_weights.to(torch.promote_types(row_weights.dtype, torch.float32)).masked_fill(target_ids < 0, 0)


def _weigh(
    predictions: Tensor, target_ids: Tensor | None, row_weights: Tensor | None, padded: bool, reduction: str
) -> tuple[Tensor | None, float | Tensor | None]:
    """Weights of the rows for the kernel, and the factor of its result."""
    if padded and target_ids is not None:
        row_weights = _without_nothing(row_weights, target_ids)
    if reduction != "mean":
        return row_weights, None
    count = predictions.numel() // predictions.shape[-1]
    if row_weights is None:
        return None, 1.0 / count
    row_weights = row_weights.float()
    after = 1.0 / (row_weights.sum() * (count // row_weights.numel()))
    # The gradient of a mean over many rows would underflow in float16, so the loss is divided at the end.
    return (row_weights, after) if predictions.dtype == torch.float16 else (row_weights * after, None)


def _check_settings(distance: str, eps: float, beta: float, reduction: str) -> None:
    check_eps(eps)
    if distance not in DISTANCES:
        raise ValueError(f"distance = {distance!r}; give one of {', '.join(DISTANCES)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction = {reduction!r}; give mean, sum or none")
    if not beta >= 0:
        raise ValueError(f"beta = {beta}; it must be 0 or more")


def _runs_kernel(*tensors: Tensor | None) -> bool:
    rows = tensors[0].numel() // tensors[0].shape[-1]  # type: ignore[union-attr]
    return rows < 2**31 - 2**16 and runs_kernel("cosine_alignment_loss", *tensors)  # rows are counted in int32


def _check(
    predictions: Tensor,
    targets: Tensor,
    target_ids: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_weights: Tensor | None,
) -> None:
    """Check all arguments except the values of ids."""
    floats = {"predictions": predictions, "targets": targets, "weight": weight, "bias": bias}
    check_tensors(**floats, target_ids=target_ids, row_weights=row_weights)
    check_floats(**floats, row_weights=row_weights)
    if predictions.dim() not in (3, 4) or targets.dim() != predictions.dim():
        raise ValueError(f"{_both(predictions, targets)}: give [k, b, m, c] and [k, b, n, c], or both without k")
    lead, (sets, rows, width) = predictions.shape[:-3], predictions.shape[-3:]
    batch = targets.shape[-3]
    fits = sets == batch or (target_ids is not None and batch and sets % batch == 0)
    if targets.shape[:-3] != lead or not fits or targets.shape[-1] != width:
        raise ValueError(f"{_both(predictions, targets)} differ in layers, samples or width")
    if predictions.numel() == 0:
        raise ValueError(f"predictions are empty, {list(predictions.shape)}: a mean over no rows is undefined")
    if target_ids is None:
        if targets.shape[-2] != rows:
            raise ValueError(f"{_both(predictions, targets)} differ in rows; give target_ids to choose among targets")
    else:
        check_ids("target_ids", target_ids, sets)
        if target_ids.shape[1] != rows:
            raise ValueError(f"target_ids {list(target_ids.shape)} must be [{sets}, {rows}], one per prediction")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias belong together: give both or neither")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (*lead, width):
            raise ValueError(f"{name} has shape {list(value.shape)}; give {[*lead, width]}")
    if row_weights is not None and row_weights.shape not in ((sets, rows), (*lead, sets, rows)):
        raise ValueError(f"row_weights has shape {list(row_weights.shape)}; give {[*lead, sets, rows]}")


def _both(predictions: Tensor, targets: Tensor) -> str:
    return f"predictions {list(predictions.shape)} and targets {list(targets.shape)}"

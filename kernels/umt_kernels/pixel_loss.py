"""pixel_loss: mean squared error between predictions and a clip's pixels, without targets in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import next_power_of_2, triton
from umt_kernels.checks import (
    check_eps,
    check_floats,
    check_id_values,
    check_ids,
    check_ints,
    check_tensors,
    sees_ids,
)
from umt_kernels.dispatch import KernelOp, differentiate_reference, runs_kernel
from umt_kernels.gather_patches import MOST_CHANNELS, Layout, as_pair, as_video
from umt_kernels.launch import PLANS, Plan, as_is, last_contiguous
from umt_kernels.sharding import Axes, is_distributed, on_shards

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

if triton is not None:
    import triton.language as tl

    from umt_kernels.gather_patches import normalised
    from umt_kernels.reductions import four_sums

Normalise = Literal["none", "channel", "token"]


def pixel_loss(
    predictions: Float[Tensor, "r m f"],
    clip: Shaped[Tensor, "b ..."],
    token_ids: Int[Tensor, "r m"],
    patch_size: int | tuple[int, int],
    tubelet_size: int = 2,
    *,
    normalise: Normalise = "channel",
    eps: float = 1e-6,
    eps_in_root: bool = False,
    scale: Sequence[float] | None = None,
    shift: Sequence[float] | None = None,
    layout: Layout | None = None,
    weights: Float[Tensor, "r m"] | None = None,
    padded: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Tensor, ...]:
    """Mean squared error of `predictions` against the pixels of the tokens `token_ids` (VideoMAE, arXiv 2203.12602).

    predictions  one row per token, f = tubelet * height * width * channels of a patch, always in the order (time, row,
                 column, channel).
    clip         uint8 [B,T,H,W,3] or float [B,3,T,H,W], images without T; it gets no gradient.
    layout       another order of the clip's axes, with any number of channels.
    token_ids    with r a multiple of b, sets 0 .. r/b - 1 belong to clip 0, and so on.
    patch_size   one number, or (height, width).
    normalise    to mean 0 and variance 1 (unbiased). channel: each channel of a token separately (VideoMAE); token: all
                 values of a token together (MAE, arXiv 2111.06377); none: not at all.
    scale, shift of each channel: a target pixel is `clip * scale + shift`. None: 1/255 for uint8, 1 for float; 0.
    eps_in_root  (x - mean) / sqrt(variance + eps), else (x - mean) / (sqrt(variance) + eps).
    weights      of each token in the mean, sum(weight * error) / sum(weight); they get no gradient.
    padded       token_ids may be -1: such a row does not count.
    reduction    mean over all rows, or none: the error of each row, [R,M].

    Computes in float32, float64 if `predictions` are. Raises ValueError for shapes, sizes or ids that do not fit,
    TypeError for a dtype that does not.
    """
    key = _errors.key(
        (predictions, clip, token_ids, weights),
        (patch_size, tubelet_size, normalise, eps, eps_in_root, scale, shift, layout, padded, reduction),
    )
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None and is_distributed(predictions, clip, token_ids, weights):
        return _on_shards(
            predictions, clip, token_ids, weights, reduction, patch_size=patch_size, tubelet_size=tubelet_size,
            normalise=normalise, eps=eps, eps_in_root=eps_in_root, scale=scale, shift=shift, layout=layout,
            padded=padded,
        )  # fmt: skip
    if plan is None:
        check_eps(eps)
        check_tensors(predictions=predictions, clip=clip, token_ids=token_ids, weights=weights)
        check_floats(predictions=predictions, weights=weights)
        clip, order = as_video(clip, layout)
        patch, (tubelet,) = as_pair("patch_size", patch_size), check_ints(tubelet_size=tubelet_size)
        _check(predictions, clip, token_ids, order, patch, tubelet, normalise, weights, reduction)
        mean = weights is None and reduction == "mean" and not padded
        colours = _colours(clip, order, scale, shift)
        settings: tuple[Any, ...] = (
            patch, tubelet, normalise, float(eps), bool(eps_in_root), *colours, order, bool(padded), mean
        )  # fmt: skip
    else:
        settings = plan.inputs
        order = settings[ORDER]
        clip = clip if clip.dim() == 5 else clip.unsqueeze(order.index("T"))
    if sees_ids(token_ids):
        tokens = _num_tokens(clip, order, *settings[:2])
        check_id_values("token_ids", token_ids, tokens, "a clip has {} tokens", padded=padded)
    clip = clip.detach() if clip.requires_grad else clip
    if plan is not None:
        errors = _errors.planned(plan, predictions, clip, token_ids)
    elif runs_kernel("pixel_loss", predictions, clip) and clip.shape[order.index("C")] <= MOST_CHANNELS:
        errors = _errors(predictions, clip, token_ids, *settings, key=key)
    else:
        errors = reference.pixel_errors(predictions, clip, token_ids, *settings)
    if reduction == "none" or not (padded or weights is not None):
        return errors
    weights = _weigh(token_ids, weights, padded).to(errors.dtype)
    return (errors * weights).sum() / weights.sum()


def _weigh(token_ids: Tensor, weights: Tensor | None, padded: bool) -> Tensor:
    """Weight of each row in the mean; 0 for an id of -1."""
    if not padded:
        assert weights is not None
        return weights.detach()
    return (token_ids >= 0).float() if weights is None else weights.detach().masked_fill(token_ids < 0, 0)


def _on_shards(
    predictions: Tensor, clip: Tensor, token_ids: Tensor, weights: Tensor | None, reduction: str, *, padded: bool,
    **settings: Any,
) -> Tensor:  # fmt: skip
    """The errors of DTensors, and their mean by PyTorch's own operations."""
    axes: dict[str, Axes] = {"predictions": (0,), "clip": (0,), "token_ids": (0,)}
    tensors = {"predictions": predictions, "clip": clip, "token_ids": token_ids}
    errors = on_shards(pixel_loss, axes, ((0,),), **tensors, **settings, padded=padded, reduction="none")
    if reduction == "none":
        return errors
    if weights is None and not padded:
        return errors.sum() / errors.numel()
    weights = _weigh(token_ids, weights, padded)
    return (errors * weights).sum() / weights.sum()


def _check(
    predictions: Tensor,
    clip: Tensor,
    token_ids: Tensor,
    order: str,
    patch: list[int],
    tubelet: int,
    normalise: str,
    weights: Tensor | None,
    reduction: str,
) -> None:
    """Check shapes and names."""
    if normalise not in ("none", "channel", "token"):
        raise ValueError(f"normalise = {normalise!r}; give none, channel or token")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction = {reduction!r}; give mean or none")
    channels, *sizes = (clip.shape[order.index(axis)] for axis in "CTHW")
    for name, size, step in zip("THW", sizes, (tubelet, *patch), strict=True):
        if step < 1 or size % step or size == 0:
            raise ValueError(f"clip has {name} = {size}, which is not a positive multiple of {step}")
    check_ids("token_ids", token_ids, clip.shape[0], sets=True)
    wanted = [*token_ids.shape, channels * tubelet * patch[0] * patch[1]]
    if list(predictions.shape) != wanted:
        raise ValueError(f"predictions have shape {list(predictions.shape)}; give {wanted}")
    if token_ids.numel() == 0 and reduction == "mean":
        raise ValueError(f"token_ids are empty, {list(token_ids.shape)}: a mean over no rows is undefined")
    if weights is not None and (reduction == "none" or weights.shape != token_ids.shape):
        raise ValueError(
            f"weights {list(weights.shape)} with reduction = {reduction!r}; "
            f"give {list(token_ids.shape)}, and only with reduction = 'mean'"
        )


def _colours(
    clip: Tensor, order: str, scale: Sequence[float] | None, shift: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Scale and shift of each channel."""
    channels = clip.shape[order.index("C")]
    scale = [1 / 255 if clip.dtype == torch.uint8 else 1.0] * channels if scale is None else scale
    shift = [0.0] * channels if shift is None else shift
    for name, numbers in (("scale", scale), ("shift", shift)):
        if not hasattr(numbers, "__len__"):
            raise TypeError(f"{name} = {numbers!r}; give {channels} numbers, one per channel")
    if len(scale) != channels or len(shift) != channels:
        raise ValueError(f"scale = {scale} and shift = {shift}; give {channels} numbers each, one per channel")
    return [float(x) for x in scale], [float(x) for x in shift]


def _num_tokens(clip: Tensor, order: str, patch: list[int], tubelet: int) -> int:
    frames, height, width = (clip.shape[order.index(axis)] for axis in "THW")
    return frames // tubelet * (height // patch[0]) * (width // patch[1])


ORDER = 7
"""Place of the clip's order of axes among the settings."""


def _prepare(
    predictions: Tensor,
    clip: Tensor,
    token_ids: Tensor,
    patch: list[int],
    tubelet: int,
    normalise: str,
    eps: float,
    eps_in_root: bool,
    scale: list[float],
    shift: list[float],
    order: str,
    padded: bool,
    mean: bool,
    backward: bool = False,
) -> Plan:
    grid_height, grid_width = (clip.shape[order.index(axis)] // size for axis, size in zip("HW", patch, strict=True))
    strides = (clip.stride(order.index(axis)) for axis in "BTHWC")
    numbers = (
        token_ids.shape[1], len(token_ids) // max(1, len(clip)), grid_height, grid_width, *predictions.stride()[:2],
        *strides, eps, 1 / token_ids.numel() if mean else 1.0,
    )  # fmt: skip
    settings = {
        "NORMALISE": normalise,
        "EPS_IN_ROOT": eps_in_root,
        "BACKWARD": backward,
        "PADDED": padded,
        "MEAN": mean,
        "ALIGN": math.gcd(8, *predictions.stride()[:2]),
        "SCALES": tuple(scale),
        "SHIFTS": tuple(shift),
        "CHANNELS": len(scale),
        "PATCH_HEIGHT": patch[0],
        "PATCH_WIDTH": patch[1],
        "TUBELET": tubelet,
        **config(len(scale) * tubelet * patch[0] * patch[1]),
    }
    outputs = ((predictions.shape, predictions.dtype) if backward else (token_ids.shape, torch.float32),)
    return Plan(_kernel, (token_ids.numel(),), numbers, settings, outputs)


def _launch(
    plan: Plan,
    predictions: Tensor,
    clip: Tensor,
    token_ids: Tensor,
    patch: list[int],
    tubelet: int,
    normalise: str,
    eps: float,
    eps_in_root: bool,
    scale: list[float],
    shift: list[float],
    order: str,
    padded: bool,
    mean: bool,
) -> Tensor:
    """Mean squared error of each row, float32 [R,M], or the mean of all."""
    (errors,) = plan.allocate(predictions.device)
    plan.launch((predictions, clip, token_ids), (errors, None))
    return errors.mean() if mean else errors


def _prepare_gradient(predictions: Tensor, clip: Tensor, token_ids: Tensor, factors: Tensor, *settings: Any) -> Plan:
    return _prepare(*(predictions, clip, token_ids, *settings, True))


def _launch_gradient(
    plan: Plan,
    predictions: Tensor,
    clip: Tensor,
    token_ids: Tensor,
    factors: Tensor,
    patch: list[int],
    tubelet: int,
    normalise: str,
    eps: float,
    eps_in_root: bool,
    scale: list[float],
    shift: list[float],
    order: str,
    padded: bool,
    mean: bool,
) -> Tensor:
    """Gradient of `predictions`; `factors` are the gradients of the rows' errors [R,M], or of their mean.

    The pixels are read again, which moves fewer bytes than saved differences would.
    """
    (grad,) = plan.allocate(predictions.device)
    plan.launch((predictions, clip, token_ids, factors), (grad,))
    return grad


def config(features: int) -> dict[str, int]:
    """A program holds a whole row, which its statistics need, in registers: eight values per thread."""
    block = next_power_of_2(features)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _differentiate(ctx, grad_errors):
    predictions, clip, token_ids = ctx.saved_tensors
    grad = _gradient(predictions, clip, token_ids, grad_errors, *ctx.settings)
    return grad, *(None,) * 12


def _differentiate_again(ctx, grad_errors):
    predictions, clip, token_ids = ctx.saved_tensors

    def run(predictions):
        return reference.pixel_errors(predictions, clip, token_ids, *ctx.settings)

    return *differentiate_reference(run, (predictions,), grad_errors), *(None,) * 12


_gradient = KernelOp(
    "pixel_errors_backward",
    _prepare_gradient,
    _launch_gradient,
    lambda predictions, *_: torch.empty_like(predictions, memory_format=torch.contiguous_format),
    strided={"predictions": last_contiguous, "clip": as_is},
)
_errors = KernelOp(
    "pixel_errors",
    _prepare,
    _launch,
    lambda predictions, clip, token_ids, *settings: predictions.new_empty(
        () if settings[-1] else token_ids.shape, dtype=torch.float32
    ),
    _save,
    _differentiate,
    _differentiate_again,
    strided={"predictions": last_contiguous, "clip": as_is},
)


if triton is not None:

    @triton.jit
    def _kernel(
        x_ptr,  # predictions [R, M, F]
        clip_ptr,
        ids_ptr,  # [R, M]
        row_ptr,  # [R, M]: errors, written; or their gradients, read, with MEAN that of their mean
        dx_ptr,  # [R, M, F], contiguous
        kept,
        masks,  # R / B
        grid_height,
        grid_width,
        x_b,
        x_m,
        stride_b,
        stride_t,
        stride_h,
        stride_w,
        stride_c,
        eps,
        share,  # of a row in the result
        NORMALISE: tl.constexpr,
        EPS_IN_ROOT: tl.constexpr,
        BACKWARD: tl.constexpr,
        PADDED: tl.constexpr,
        MEAN: tl.constexpr,
        ALIGN: tl.constexpr,  # every row of predictions begins at a multiple of ALIGN numbers
        SCALES: tl.constexpr,
        SHIFTS: tl.constexpr,
        CHANNELS: tl.constexpr,
        PATCH_HEIGHT: tl.constexpr,
        PATCH_WIDTH: tl.constexpr,
        TUBELET: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        PIXELS: tl.constexpr = TUBELET * PATCH_HEIGHT * PATCH_WIDTH
        FEATURES: tl.constexpr = PIXELS * CHANNELS
        row = tl.program_id(0)
        row_set = row // kept
        sample = (row_set // masks).to(tl.int64)
        token = tl.load(ids_ptr + row).to(tl.int32)
        frame = token // (grid_height * grid_width) * TUBELET
        top = token // grid_width % grid_height * PATCH_HEIGHT
        left = token % grid_width * PATCH_WIDTH

        column = tl.arange(0, BLOCK)
        written = column < FEATURES
        inside = written
        if PADDED:
            inside = written & (tl.zeros((BLOCK,), tl.int32) + token >= 0)
        channel = column % CHANNELS
        pixel = column // CHANNELS
        time = frame + pixel // (PATCH_HEIGHT * PATCH_WIDTH)
        offset = (
            sample * stride_b
            + time.to(tl.int64) * stride_t
            + (top + pixel // PATCH_WIDTH % PATCH_HEIGHT).to(tl.int64) * stride_h
            + (left + pixel % PATCH_WIDTH).to(tl.int64) * stride_w
            + channel.to(tl.int64) * stride_c
        )
        target = tl.load(clip_ptr + offset, mask=inside, other=0)
        target = tl.where(inside, normalised(target, channel, SCALES, SHIFTS, CHANNELS), 0.0)
        if NORMALISE == "token":
            target = tl.where(inside, target - tl.sum(target) / FEATURES, 0.0)
            variance = tl.sum(target * target) / (FEATURES - 1)
            target = target / (tl.sqrt(variance + eps) if EPS_IN_ROOT else tl.sqrt(variance) + eps)
        if NORMALISE == "channel":
            target = tl.where(inside, target - _channel_sums(target, channel, CHANNELS) / PIXELS, 0.0)
            variance = _channel_sums(target * target, channel, CHANNELS) / (PIXELS - 1)
            target = target / (tl.sqrt(variance + eps) if EPS_IN_ROOT else tl.sqrt(variance) + eps)
        place = (row % kept).to(tl.int64)
        start = tl.multiple_of(row_set.to(tl.int64) * x_b + place * x_m, ALIGN)
        x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, x - target, 0.0)
        if BACKWARD:
            factor = tl.load(row_ptr + (0 if MEAN else row)).to(tl.float32) * (2.0 / FEATURES) * share
            to = row.to(tl.int64) * FEATURES + column
            tl.store(dx_ptr + to, (difference * factor).to(dx_ptr.dtype.element_ty), mask=written)
        else:
            tl.store(row_ptr + row, tl.sum(difference * difference) / FEATURES)

    @triton.jit
    def _channel_sums(x, channel, CHANNELS: tl.constexpr):
        """In the place of each value the sum over its channel. Four channels share a reduction."""
        sums = tl.zeros_like(x)
        for first in tl.static_range(0, CHANNELS, 4):
            a, b, c, d = four_sums(
                tl.where(channel == first, x, 0.0),
                tl.where(channel == first + 1, x, 0.0),
                tl.where(channel == first + 2, x, 0.0),
                tl.where(channel == first + 3, x, 0.0),
                0,
            )
            sums = tl.where(channel == first, a, sums)
            sums = tl.where(channel == first + 1, b, sums)
            sums = tl.where(channel == first + 2, c, sums)
            sums = tl.where(channel == first + 3, d, sums)
        return sums

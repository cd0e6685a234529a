"""Definitions of the ops in plain PyTorch. Tests compare every faster version with these.

These functions do not check arguments; the public functions of the same names do. Arithmetic is float32, or float64 for
float64 inputs, also under autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

Op = TypeVar("Op", bound=Callable)


def _outside_autocast(op: Op) -> Op:
    """Run `op` with autocast off, because autocast would turn its float32 arithmetic into bf16."""

    @functools.wraps(op)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if first.is_meta or not torch.is_autocast_enabled(first.device.type):  # entering the block costs 4 us
            return op(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return op(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def _wide(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


_TO_CHANNELS_LAST = {"BTHWC": (0, 1, 2, 3, 4), "BTCHW": (0, 1, 3, 4, 2), "BCTHW": (0, 2, 3, 4, 1)}
# From (sample, row, channel, time, y, x): the order of features in a row is that of the clip's memory.
_FEATURES = {"BTHWC": (0, 1, 3, 4, 5, 2), "BTCHW": (0, 1, 3, 2, 4, 5), "BCTHW": (0, 1, 2, 3, 4, 5)}


@_outside_autocast
def gather_patches(
    clip: Shaped[Tensor, "b ..."],
    patch_size: int | tuple[int, int],
    tubelet_size: int,
    token_ids: Int[Tensor, "r m"] | None,
    halo: int | tuple[int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
    layout: str | None = None,
    padded: bool = False,
) -> Float[Tensor, "r m f"]:
    """Windows of a 5-D clip as rows, in the clip's order of axes; see `umt_kernels.gather_patches`."""
    if layout is None:
        layout = "BTHWC" if clip.dtype == torch.uint8 else "BCTHW"
    halos, sizes = ((x, x) if isinstance(x, int) else x for x in (halo, patch_size))
    pixels = clip.permute(_TO_CHANNELS_LAST[layout])
    batch, _, *lengths, _ = pixels.shape
    for axis, length, around in zip((2, 3), lengths, halos, strict=True):
        if around:  # replicate the border by clamped indices, which also works on uint8
            index = torch.arange(-around, length + around, device=clip.device).clamp(0, length - 1)
            pixels = pixels.index_select(axis, index)
    for axis, size, around in zip((2, 3), sizes, halos, strict=True):
        pixels = pixels.unfold(axis, size + 2 * around, size)
    # A view: [B, T/t, h, w, C, window, window, t]. Only the chosen windows are read.
    windows = pixels.unfold(1, tubelet_size, tubelet_size)
    if token_ids is None:
        rows = windows.flatten(1, 3)
    else:
        grid_height, grid_width = windows.shape[2:4]
        ids = token_ids.long().clamp_min(0) if padded else token_ids.long()
        sample = torch.arange(len(ids), device=clip.device)[:, None] // max(1, len(ids) // max(1, batch))
        frame = ids // (grid_height * grid_width)
        rows = windows[sample, frame, ids // grid_width % grid_height, ids % grid_width]
    rows = rows.permute(0, 1, 2, 5, 3, 4)  # [R, M, C, t, window, window]
    if mean is not None and std is not None:
        rows = _wide(rows)
        top = 255 if clip.dtype == torch.uint8 else 1
        # Channel by channel with Python numbers: constants in a tensor need a copy to the device, and the host waits.
        channels = zip(rows.unbind(2), mean, std, strict=True)
        rows = torch.stack([pixels * (1 / (top * s)) - m / s for pixels, m, s in channels], dim=2)
    rows = rows.permute(_FEATURES[layout]).flatten(2).to(dtype)
    return rows.masked_fill((token_ids < 0)[..., None], 0) if padded and token_ids is not None else rows


def sample_visible(
    scores: Tensor,
    num_visible: int,
    generator: torch.Generator | None,
    counts: Int[Tensor, " r"] | None = None,
) -> Int[Tensor, "r n"]:
    """Exponential race: patch j arrives at time e_j / score_j; the first n to arrive are the draw.

    The order of arrival equals successive draws without replacement, so the distribution is that of torch.multinomial.
    Arrivals are compared as logarithms, so that no score overflows.
    """
    # Not empty_like: with the strides of scores, the same seed would give other draws.
    waits = torch.empty(scores.shape, dtype=torch.float32, device=scores.device).exponential_(generator=generator)
    waits = waits.clamp_min(torch.finfo(torch.float32).tiny).double()
    scores = scores.detach().double()
    largest = torch.finfo(torch.float64).max
    # Patches with score 0 arrive after all others, in the order of their waits.
    early = torch.where(scores > 0, scores.clamp_max(largest).log() - waits.log(), -1e6 * (1 + waits))
    if counts is None:
        return early.topk(num_visible, dim=-1, sorted=False).indices.sort(dim=-1).values.int()
    patches = scores.shape[1]
    places = torch.arange(num_visible, device=scores.device)
    drawn = early.topk(num_visible, dim=-1).indices.masked_fill(places >= counts[:, None], patches)
    drawn = drawn.sort(dim=-1).values
    return drawn.masked_fill(drawn == patches, -1).int()


@_outside_autocast
def cls_scores(q: Float[Tensor, "r h d"], k: Float[Tensor, "r h l d"], prefix: int = 1) -> Tensor:
    dtype = torch.promote_types(_wide(q).dtype, k.dtype)
    q, k = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype)
    # Compiled: a sum of products, which is fused with the cast. A matmul would write the keys in float32 first.
    logits = (q[:, :, None] * k).sum(-1) if torch.compiler.is_compiling() else torch.einsum("rhd,rhld->rhl", q, k)
    return logits.softmax(dim=-1).mean(dim=1)[:, prefix:]


def _choose(x: Shaped[Tensor, "*k b l d"], ids: Int[Tensor, "r m"], padded: bool) -> Shaped[Tensor, "*k r m d"]:
    """Rows of each sample; sets r/b i .. r/b (i + 1) - 1 belong to sample i. With `padded`, id -1 gives zeros."""
    per_sample = (ids[..., None] if len(ids) == x.shape[-3] else ids.reshape(x.shape[-3], -1, 1)).long()
    chosen = x.gather(-2, (per_sample.clamp_min(0) if padded else per_sample).expand(*x.shape[:-2], -1, x.shape[-1]))
    if padded:
        chosen = chosen.masked_fill(per_sample < 0, 0)
    return chosen.reshape(*x.shape[:-3], *ids.shape, x.shape[-1])


@_outside_autocast
def gather_layer_norm(
    x: Float[Tensor, "*k b l d"],
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    eps: float,
    row_ids: Int[Tensor, "r m"] | None,
    position: Tensor | None,
    position_ids: Int[Tensor, "r m"] | None,
    dtype: torch.dtype | None = None,
    padded: bool = False,
    rms: bool = False,
) -> Float[Tensor, "*k r m d"]:
    rows = _wide(x if row_ids is None else _choose(x, row_ids, padded))
    width = rows.shape[-1:]
    weight, bias = (p if p is None else p.to(rows.dtype) for p in (weight, bias))
    if rms:
        y = F.rms_norm(rows, width, weight, eps)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(rows, width, weight, bias, eps)
    if position is not None:
        assert position_ids is not None
        ids = position_ids.long()
        shift = position[ids.clamp_min(0) if padded else ids].to(y.dtype)
        y = y + (shift.masked_fill((ids < 0)[..., None], 0) if padded else shift)
    if padded and row_ids is not None:
        y = y.masked_fill((row_ids < 0)[..., None], 0)
    return y.to(x.dtype if dtype is None else dtype)


def cosine_alignment_loss(
    predictions: Float[Tensor, "*k r m c"],
    targets: Float[Tensor, "*k b n c"],
    target_ids: Int[Tensor, "r m"] | None,
    weight: Float[Tensor, "*k c"] | None,
    bias: Float[Tensor, "*k c"] | None,
    eps: float,
) -> Float[Tensor, " "]:
    floor = 1e-4 if predictions.dtype == torch.float16 else 1e-12
    return alignment_rows(predictions, targets, target_ids, weight, bias, 0, eps, 1.0, floor).mean()


@_outside_autocast
def alignment_rows(
    predictions: Float[Tensor, "*k r m c"],
    targets: Float[Tensor, "*k b n c"],
    target_ids: Int[Tensor, "r m"] | None,
    weight: Float[Tensor, "*k c"] | None,
    bias: Float[Tensor, "*k c"] | None,
    kind: int,
    eps: float,
    beta: float,
    floor: float,
    padded: bool = False,
) -> Float[Tensor, "*k r m"]:
    """Loss of every row: 2 - 2 cos (kind 0), or the columns' mean L1 (1), smooth L1 (2) or squared (3) distance."""
    y, t = _wide(predictions), _wide(targets)
    if padded and target_ids is not None:  # what lies in a row of nothing may be NaN
        y = y.masked_fill((target_ids < 0)[..., None], 0)
    if weight is not None and bias is not None:
        y = F.layer_norm(y, y.shape[-1:], eps=eps)
        y = y * weight.to(y.dtype)[..., None, None, :] + bias.to(y.dtype)[..., None, None, :]
    if target_ids is not None:
        t = _choose(t, target_ids, padded)
    rows = _distances(y, t, kind, beta, floor)
    return rows.masked_fill(target_ids < 0, 0) if padded and target_ids is not None else rows


def _distances(y: Tensor, t: Tensor, kind: int, beta: float, floor: float) -> Tensor:
    """`alignment_rows` of chosen, normalised rows."""
    if kind == 1:
        return (y - t).abs().mean(-1)
    if kind == 2:
        return F.smooth_l1_loss(y, t.to(y.dtype), reduction="none", beta=beta).mean(-1)
    if kind == 3:
        return (y - t).square().mean(-1)
    # The norm of a row without a direction is replaced before the division, otherwise its gradient would be 0 * inf.
    square = y.square().sum(-1, keepdim=True)
    short = square <= floor**2
    y = (y / square.masked_fill(short, 1).sqrt()).masked_fill(short, 0)
    return 2 - 2 * (y * F.normalize(t, dim=-1)).sum(-1)


def reduce_rows(rows: Float[Tensor, "*k r m"], weights: Float[Tensor, ...] | None, reduction: str) -> Tensor:
    """`none`: rows times weights; `sum`: their sum; `mean`: their sum divided by the sum of the weights."""
    if weights is not None:
        weights = weights.to(rows.dtype).expand(rows.shape)
        rows = rows * weights
    if reduction == "none":
        return rows
    if reduction == "sum" or weights is None:
        return rows.sum() if reduction == "sum" else rows.mean()
    return rows.sum() / weights.sum()


@_outside_autocast
def add_layer_norm(
    residual: Float[Tensor, "b l d"],
    branch: Float[Tensor, "b m d"],
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    branch_bias: Float[Tensor, " d"] | None,
    scale: Float[Tensor, " b"] | None,
    row_ids: Int[Tensor, "b m"] | None,
    position: Tensor | None,
    position_ids: Int[Tensor, "b m"] | None,
    eps: float,
    out_dtype: torch.dtype,
    rms: bool,
    post_norm: bool,
    factor: float = 1.0,
) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m d"]]:
    rows = residual
    if row_ids is not None:
        rows = residual.gather(1, row_ids.long()[..., None].expand(-1, -1, residual.shape[-1]))
    wide = functools.reduce(torch.promote_types, (residual.dtype, branch.dtype, torch.float32))
    if branch_bias is not None:
        branch = branch.to(wide) + branch_bias
    if scale is not None:
        branch = branch.to(wide) * scale[:, None, None]
    if post_norm or factor != 1 or rows.dtype != branch.dtype:
        rows = rows.to(wide)  # else the sum is in half precision, which is rounded once too
    x = torch.add(rows, branch, alpha=factor)
    if not post_norm:
        x = x.to(residual.dtype)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    plain = not (differentiated or rms or position is not None)
    if plain and x.device.type == "cpu" and x.dtype == out_dtype == torch.bfloat16:
        # The same without float32 copies of the rows, which a CPU would write to memory. Its gradients are coarser.
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    weight, bias = (None if parameter is None else parameter.to(wide) for parameter in (weight, bias))
    if rms:
        y = F.rms_norm(x.to(wide), x.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    if position is not None:
        assert position_ids is not None
        y = y + position[position_ids.long()].to(y.dtype)
    return (y.to(residual.dtype) if post_norm else x), y.to(out_dtype)


def pixel_targets(
    clip: Shaped[Tensor, "b ..."],
    token_ids: Int[Tensor, "r m"],
    patch_size: int | Sequence[int],
    tubelet: int,
    normalise: str,
    eps: float,
    eps_in_root: bool,
    scale: Sequence[float],
    shift: Sequence[float],
    order: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "r m f"]:
    """Targets of `pixel_loss`: pixels in the order (time, row, column, channel), normalised per token.

    The targets of an id of -1 have no meaning.
    """
    if order is None:
        order = "BTHWC" if clip.dtype == torch.uint8 else "BCTHW"
    rows_of, columns_of = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    pixels = clip.permute(_TO_CHANNELS_LAST[order])  # [B, T, H, W, C]
    cubes = pixels.unfold(1, tubelet, tubelet).unfold(2, rows_of, rows_of)
    cubes = cubes.unfold(3, columns_of, columns_of)  # a view [B, t, h, w, C, u, p, q]
    height, width = cubes.shape[2:4]
    ids = token_ids.long().clamp_min(0)
    sample = torch.arange(len(ids), device=clip.device)[:, None] // max(1, len(ids) // max(1, len(clip)))
    rows = cubes[sample, ids // (height * width), ids // width % height, ids % width]  # [R, M, C, u, p, q]
    channels = zip(rows.to(dtype).unbind(2), scale, shift, strict=True)
    rows = torch.stack([x * a + b for x, a, b in channels], dim=-1).flatten(2, 4)  # [R, M, u * p * q, C]
    if normalise != "none":
        over = 2 if normalise == "channel" else (2, 3)
        variance = rows.var(over, unbiased=True, keepdim=True)
        rows = rows - rows.mean(over, keepdim=True)
        rows = rows / ((variance + eps).sqrt() if eps_in_root else variance.sqrt() + eps)
    return rows.flatten(2)


@_outside_autocast
def pixel_errors(
    predictions: Float[Tensor, "r m f"],
    clip: Shaped[Tensor, "b ..."],
    token_ids: Int[Tensor, "r m"],
    patch_size: int | Sequence[int],
    tubelet: int,
    normalise: str,
    eps: float,
    eps_in_root: bool,
    scale: Sequence[float],
    shift: Sequence[float],
    order: str | None = None,
    padded: bool = False,
    mean: bool = False,
) -> Tensor:
    wide = _wide(predictions)
    targets = pixel_targets(
        clip, token_ids, patch_size, tubelet, normalise, eps, eps_in_root, scale, shift, order, wide.dtype
    )
    difference = wide - targets
    if padded:
        difference = difference.masked_fill((token_ids < 0)[..., None], 0)
    errors = difference.square().mean(-1)
    return errors.mean() if mean else errors


QUICK = 1.702
"""The factor of QuickGELU."""


@_outside_autocast
def linear(
    x: Float[Tensor, "... k"],
    weight: Tensor,
    bias: Float[Tensor, " n"] | None,
    activation: str | None,
    residual: Float[Tensor, "... n"] | None,
) -> Float[Tensor, "... n"]:
    """The result has the dtype of x. This uses PyTorch's own matmul, so it is also the default."""
    y = activated(F.linear(x, weight, None if bias is None else bias.to(x.dtype)), activation)
    return y if residual is None else (residual + y).to(residual.dtype)


def activated(x: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu":
        return F.gelu(x)
    return x if activation is None else x * torch.sigmoid(QUICK * x)


@_outside_autocast
def mlp(
    x: Float[Tensor, "... d"],
    fc1_weight: Tensor,
    fc1_bias: Float[Tensor, " h"] | None,
    fc2_weight: Tensor,
    fc2_bias: Float[Tensor, " n"] | None,
    activation: str,
    residual: Float[Tensor, "... n"] | None,
) -> Float[Tensor, "... n"]:
    hidden = linear(x, fc1_weight, fc1_bias, activation, None)
    return linear(hidden, fc2_weight, fc2_bias, None, residual)


def _in_eight_bits(x: Float[Tensor, "... k"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 x divided by its scale and rounded, and the scale, from the last dimension's largest magnitude."""
    largest = 127.0 if dtype == torch.int8 else 448.0
    scale = x.abs().amax(-1).clamp(min=1e-12) / largest
    x = x / scale[..., None]
    return (torch.floor(x + 0.5) if dtype == torch.int8 else x).to(dtype), scale


@_outside_autocast
def quantize_rows(
    x: Float[Tensor, "... k"],
    branch: Float[Tensor, "... k"] | None,
    weight: Float[Tensor, " k"] | None,
    bias: Float[Tensor, " k"] | None,
    eps: float,
    dtype: torch.dtype,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = x if branch is None else (x.float() + branch.float()).to(x.dtype)
    wide = total.float()
    if norm:
        assert weight is not None
        assert bias is not None
        wide = F.layer_norm(wide, wide.shape[-1:], weight.float(), bias.float(), eps)
    values, scale = _in_eight_bits(wide, dtype)
    return total, values, scale.flatten()


@_outside_autocast
def linear_8bit(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Float[Tensor, " n"],
    bias: Float[Tensor, " n"] | None,
    activation: str | None,
    out_dtype: torch.dtype,
    group: int,
) -> tuple[Tensor, Tensor]:
    wide = x.float()
    if x_scale.dim() == 2:
        wide = wide * x_scale.T.repeat_interleave(group, 1)[:, : x.shape[1]]
    y = wide @ weight.float().T * weight_scale
    if x_scale.dim() == 1:
        y = y * x_scale[:, None]
    y = activated(y if bias is None else y + bias.float(), activation)
    if out_dtype not in (torch.int8, torch.float8_e4m3fn):
        return y.to(out_dtype), x_scale
    n = y.shape[1]
    padded = F.pad(y, (0, -n % group)).unflatten(1, (-1, group))
    values, scale = _in_eight_bits(padded, out_dtype)
    return values.flatten(1)[:, :n].contiguous(), scale.T.contiguous()

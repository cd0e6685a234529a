"""The ops in plain PyTorch: their definition, and what every faster version is compared with.

Nothing here checks its arguments; the public functions of the same names do. Arithmetic is float32, or float64
for float64 inputs, whatever autocast says.
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
    """Run `op` with autocast off, where there is any: it would turn the float32 arithmetic below into bf16."""

    @functools.wraps(op)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if first.is_meta:
            return op(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return op(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def _wide(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@_outside_autocast
def gather_patches(
    clip: Shaped[Tensor, "b ..."],
    patch_size: int,
    tubelet_size: int,
    token_ids: Int[Tensor, "b m"] | None,
    halo: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
) -> Float[Tensor, "b m f"]:
    """Windows of the clip in the order of its memory; see `umt_kernels.gather_patches`."""
    pixels = clip if clip.dtype == torch.uint8 else clip.permute(0, 2, 3, 4, 1)  # [B,T,H,W,3]
    batch, _, height, width, _ = pixels.shape
    if halo:  # replicate the border by clamped indices, which also works on uint8
        for axis, size in ((2, height), (3, width)):
            index = torch.arange(-halo, size + halo, device=clip.device).clamp(0, size - 1)
            pixels = pixels.index_select(axis, index)
    window = patch_size + 2 * halo
    # A view: [B, T/t, h, w, 3, window, window, t]. Only the windows that are asked for are read.
    windows = pixels.unfold(2, window, patch_size).unfold(3, window, patch_size).unfold(1, tubelet_size, tubelet_size)
    if token_ids is None:
        rows = windows.flatten(1, 3)
    else:
        grid_height, grid_width = windows.shape[2:4]
        ids = token_ids.long()
        sample = torch.arange(batch, device=clip.device)[:, None]
        frame = ids // (grid_height * grid_width)
        rows = windows[sample, frame, ids // grid_width % grid_height, ids % grid_width]
    rows = rows.permute(0, 1, 2, 5, 3, 4)  # [B, M, 3, t, window, window]
    if clip.dtype == torch.uint8:
        # Channel by channel with Python numbers: constants in a tensor would be a copy that stops the host.
        channels = zip(rows.float().unbind(2), mean, std, strict=True)
        rows = torch.stack([pixels * (1 / (255 * s)) - m / s for pixels, m, s in channels], dim=-1)
    return rows.flatten(2).to(dtype)


def sample_visible(
    scores: Float[Tensor, "r p"], num_visible: int, generator: torch.Generator | None
) -> Int[Tensor, "r n"]:
    """Exponential race: patch j arrives at time e_j / score_j; the first n to arrive are the draw.

    The order of arrival is that of successive draws without replacement, hence the law of torch.multinomial.
    """
    # Not empty_like: in the layout of scores, the same seed would draw otherwise.
    waits = torch.empty(scores.shape, dtype=torch.float32, device=scores.device).exponential_(generator=generator)
    scores = scores.float()
    speed = torch.where(scores > 0, scores / waits, -waits)  # score 0: after all others, uniformly
    drawn = speed.topk(num_visible, dim=-1, sorted=False).indices
    return drawn.sort(dim=-1).values.int()


@_outside_autocast
def cls_scores(q: Float[Tensor, "r h d"], k: Float[Tensor, "r h l d"]) -> Float[Tensor, "r p"]:
    dtype = torch.promote_types(_wide(q).dtype, k.dtype)
    q, k = q.to(dtype), k.to(dtype)
    logits = torch.einsum("rhd,rhld->rhl", q * q.shape[-1] ** -0.5, k)
    return logits.softmax(dim=-1).mean(dim=1)[:, 1:]


@_outside_autocast
def gather_layer_norm(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    row_ids: Int[Tensor, "b m"] | None,
    position: Float[Tensor, "n d"] | None,
    position_ids: Int[Tensor, "b m"] | None,
) -> Float[Tensor, "b m d"]:
    rows = x if row_ids is None else x.gather(1, row_ids.long()[..., None].expand(-1, -1, x.shape[-1]))
    rows = _wide(rows)
    y = F.layer_norm(rows, (x.shape[-1],), weight.to(rows.dtype), bias.to(rows.dtype), eps)
    if position is not None:
        assert position_ids is not None
        y = y + position[position_ids.long()].to(y.dtype)
    return y.to(x.dtype)


@_outside_autocast
def cosine_alignment_loss(
    predictions: Float[Tensor, "k b m c"],
    targets: Float[Tensor, "k b n c"],
    target_ids: Int[Tensor, "b m"] | None,
    weight: Float[Tensor, "k c"] | None,
    bias: Float[Tensor, "k c"] | None,
    eps: float,
) -> Float[Tensor, " "]:
    y, t = _wide(predictions), _wide(targets)
    if weight is not None and bias is not None:
        y = F.layer_norm(y, y.shape[-1:], eps=eps) * weight.to(y.dtype)[:, None, None] + bias.to(y.dtype)[:, None, None]
    if target_ids is not None:
        t = t.gather(2, target_ids.long()[None, ..., None].expand(len(t), -1, -1, t.shape[-1]))
    cosine = (F.normalize(y, dim=-1) * F.normalize(t, dim=-1)).sum(dim=-1)
    return (2 - 2 * cosine).mean()


@_outside_autocast
def add_layer_norm(
    residual: Float[Tensor, "b l d"],
    branch: Float[Tensor, "b m d"],
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    eps: float,
    branch_bias: Float[Tensor, " d"] | None,
    scale: Float[Tensor, " b"] | None,
    row_ids: Int[Tensor, "b m"] | None,
    position: Float[Tensor, "n d"] | None,
    position_ids: Int[Tensor, "b m"] | None,
    out_dtype: torch.dtype,
    rms: bool,
    post_norm: bool,
) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m d"]]:
    rows = residual
    if row_ids is not None:
        rows = residual.gather(1, row_ids.long()[..., None].expand(-1, -1, residual.shape[-1]))
    wide = functools.reduce(torch.promote_types, (residual.dtype, branch.dtype, torch.float32))
    if branch_bias is not None:
        branch = branch.to(wide) + branch_bias
    if scale is not None:
        branch = branch.to(wide) * scale[:, None, None]
    x = rows.to(wide) + branch
    if not post_norm:
        x = x.to(residual.dtype)
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
    token_ids: Int[Tensor, "b m"],
    patch_size: int,
    tubelet_size: int,
    normalise: str,
    eps: float,
    eps_in_root: bool,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b m f"]:
    """What `pixel_loss` compares with: pixels in the order (time, row, column, colour), normalised per token."""
    pixels = clip if clip.dtype == torch.uint8 else clip.permute(0, 2, 3, 4, 1)  # [B, T, H, W, 3]
    cubes = pixels.unfold(1, tubelet_size, tubelet_size).unfold(2, patch_size, patch_size)
    cubes = cubes.unfold(3, patch_size, patch_size)  # a view [B, t, h, w, 3, u, p, p]
    height, width = cubes.shape[2:4]
    ids = token_ids.long()
    sample = torch.arange(len(clip), device=clip.device)[:, None]
    rows = cubes[sample, ids // (height * width), ids // width % height, ids % width]  # [B, M, 3, u, p, p]
    channels = zip(rows.to(dtype).unbind(2), scale, shift, strict=True)
    rows = torch.stack([x * a + b for x, a, b in channels], dim=-1).flatten(2, 4)  # [B, M, u * p * p, 3]
    if normalise != "none":
        over = 2 if normalise == "channel" else (2, 3)
        variance = rows.var(over, unbiased=True, keepdim=True)
        rows = rows - rows.mean(over, keepdim=True)
        rows = rows / ((variance + eps).sqrt() if eps_in_root else variance.sqrt() + eps)
    return rows.flatten(2)


@_outside_autocast
def pixel_errors(
    predictions: Float[Tensor, "b m f"],
    clip: Shaped[Tensor, "b ..."],
    token_ids: Int[Tensor, "b m"],
    patch_size: int,
    tubelet_size: int,
    normalise: str,
    eps: float,
    eps_in_root: bool,
    scale: Sequence[float],
    shift: Sequence[float],
) -> Float[Tensor, "b m"]:
    wide = _wide(predictions)
    targets = pixel_targets(
        clip, token_ids, patch_size, tubelet_size, normalise, eps, eps_in_root, scale, shift, wide.dtype
    )
    return (wide - targets).square().mean(-1)


QUICK = 1.702
"""The factor of QuickGELU."""


@_outside_autocast
def linear(
    x: Float[Tensor, "... k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None,
    activation: str | None,
    residual: Float[Tensor, "... n"] | None,
) -> Float[Tensor, "... n"]:
    """In the dtype of x, as PyTorch's own layers; it leaves PyTorch its kernels, so it is also what runs by default."""
    y = activated(F.linear(x, weight, None if bias is None else bias.to(x.dtype)), activation)
    return y if residual is None else (residual + y).to(residual.dtype)


def activated(x: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu":
        return F.gelu(x)
    return x if activation is None else x * torch.sigmoid(QUICK * x)


@_outside_autocast
def mlp(
    x: Float[Tensor, "... d"],
    fc1_weight: Float[Tensor, "h d"],
    fc1_bias: Float[Tensor, " h"] | None,
    fc2_weight: Float[Tensor, "n h"],
    fc2_bias: Float[Tensor, " n"] | None,
    activation: str,
    residual: Float[Tensor, "... n"] | None,
) -> Float[Tensor, "... n"]:
    hidden = linear(x, fc1_weight, fc1_bias, activation, None)
    return linear(hidden, fc2_weight, fc2_bias, None, residual)

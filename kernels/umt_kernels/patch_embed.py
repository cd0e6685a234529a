"""patch_embed: a vision transformer's patch embedding, for chosen tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from umt_kernels.checks import check_floats, check_id_values, check_tensors
from umt_kernels.dispatch import call_key
from umt_kernels.gather_patches import Layout, as_matrix, as_pair, as_video, checked_patches, planned_patches
from umt_kernels.launch import PLANS
from umt_kernels.linear import compute_dtype
from umt_kernels.sharding import Axes, is_distributed, on_shards

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


def patch_embed(
    clip: Shaped[Tensor, "b ..."],
    weight: Float[Tensor, "d c ..."],
    bias: Float[Tensor, " d"] | None,
    patch_size: int | tuple[int, int],
    *,
    token_ids: Int[Tensor, "r m"] | None = None,
    position: Float[Tensor, "n d"] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: Layout | None = None,
    padded: bool = False,
) -> Float[Tensor, "r m d"]:
    """The Conv3d of stride (t, *patch_size) at the tokens `token_ids` (all if None), plus their positions.

    clip      a video or an image, normalised as `gather_patches` says; it gets no gradient.
    weight    the Conv3d's [d, c, t, kh, kw] or Conv2d's [d, c, kh, kw]. If its kernel is larger than patch_size,
              windows overlap and the border is replicated.
    position  table of all tokens' positions, added to the kept tokens.
    padded    ids may be -1, which gives a row of zeros.

    token_ids, mean, std and layout are those of `gather_patches`. Runs one gather and one GEMM, in autocast's dtype if
    it is on, else in that of `weight`. Raises ValueError for shapes or devices that do not fit, TypeError for a dtype.
    """
    dtype = compute_dtype(weight) if isinstance(weight, Tensor) else torch.float32
    tensors = (clip, weight, bias, token_ids, position)
    key = call_key("patch_embed", tensors, (patch_size, mean, std, layout, padded, dtype))
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is not None:
        order = plan.inputs[0]
        rows = planned_patches(plan, clip, token_ids)
    else:
        if is_distributed(*tensors):
            axes: dict[str, Axes] = {"clip": (0,), "token_ids": (0,), "weight": None, "bias": None, "position": None}
            return on_shards(
                patch_embed, axes, ((0,),), clip=clip, weight=weight, bias=bias, patch_size=patch_size,
                token_ids=token_ids, position=position, mean=mean, std=std, layout=layout, padded=padded,
            )  # fmt: skip
        check_tensors(clip=clip, weight=weight, bias=bias, token_ids=token_ids, position=position)
        check_floats(weight=weight, bias=bias, position=position)
        order, patch, halo = _check_sizes(clip, weight, bias, patch_size, layout)
        tubelet = weight.shape[2] if weight.dim() == 5 else 1
        if position is not None:  # before a plan is kept, with which a second call would not look again
            _check_position(position, weight)
        rows = checked_patches(clip, patch, tubelet, token_ids, halo, mean, std, dtype, layout, padded, key)
    embedded = F.linear(rows, as_matrix(weight, order), bias if bias is None or bias.dtype == dtype else bias.to(dtype))
    if position is not None and token_ids is None:
        if len(position) != rows.shape[1]:
            raise ValueError(f"position has {len(position)} rows, but a clip has {rows.shape[1]} tokens")
        embedded = embedded + position
    elif position is not None and token_ids is not None:
        check_id_values("token_ids", token_ids, len(position), "position has {} rows", padded=padded)
        embedded = embedded + position[(token_ids.clamp_min(0) if padded else token_ids).long()]
    if padded and token_ids is not None:
        embedded = embedded.masked_fill((token_ids < 0)[..., None], 0)
    return embedded


def _check_sizes(
    clip: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int | tuple[int, int], layout: str | None
) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """Order of the video's axes, patch and halo. Raises ValueError where the convolution does not fit the clip."""
    video, order = as_video(clip, layout)
    channels = video.shape[order.index("C")]
    if weight.dim() not in (4, 5) or weight.shape[1] != channels:
        raise ValueError(
            f"weight has shape {list(weight.shape)}; give [d, {channels}, t, k, k] or [d, {channels}, k, k]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; give [{weight.shape[0]}]")
    patch, window = as_pair("patch_size", patch_size), weight.shape[-2:]
    halo = [(outer - inner) // 2 for outer, inner in zip(window, patch, strict=True)]  # Dynamo lacks divmod here
    for outer, inner, around in zip(window, patch, halo, strict=True):
        if around < 0 or inner + 2 * around != outer:
            raise ValueError(f"weight is {outer} px wide and patch_size = {inner}; give it 0, 2, 4... more")
    return order, (patch[0], patch[1]), (halo[0], halo[1])


def _check_position(position: Tensor, weight: Tensor) -> None:
    if position.dim() != 2 or position.shape[1] != weight.shape[0]:
        raise ValueError(f"position has shape {list(position.shape)}; give [tokens, {weight.shape[0]}]")

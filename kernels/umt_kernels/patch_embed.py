"""patch_embed: a vision transformer's patch embedding, for the asked-for tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from umt_kernels.checks import check_floats, check_id_values, check_tensors
from umt_kernels.gather_patches import Layout, _pair, as_video, gather_patches, weight_matrix
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
    weight    the Conv3d's [d, c, t, kh, kw] or Conv2d's [d, c, kh, kw]; where its kernel is larger than patch_size,
              windows overlap and the border is replicated.
    position  table of every token's position, added to the tokens kept.
    padded    ids may be -1, which gives a row of zeros.

    token_ids, mean, std and layout are those of `gather_patches`. One gather and one GEMM, in autocast's dtype if that
    is on and else in that of `weight`. Raises ValueError for shapes or devices that do not fit, TypeError for a dtype.
    """
    if is_distributed(clip, weight, bias, token_ids, position):
        axes: dict[str, Axes] = {"clip": (0,), "token_ids": (0,), "weight": None, "bias": None, "position": None}
        return on_shards(
            patch_embed, axes, ((0,),), clip=clip, weight=weight, bias=bias, patch_size=patch_size, token_ids=token_ids,
            position=position, mean=mean, std=std, layout=layout, padded=padded,
        )  # fmt: skip
    check_tensors(clip=clip, weight=weight, bias=bias, token_ids=token_ids, position=position)
    check_floats(weight=weight, bias=bias, position=position)
    video, order = as_video(clip, layout)
    if weight.dim() not in (4, 5) or weight.shape[1] != video.shape[order.index("C")]:
        channels = video.shape[order.index("C")]
        raise ValueError(
            f"weight has shape {list(weight.shape)}; give [d, {channels}, t, k, k] or [d, {channels}, k, k]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; give [{weight.shape[0]}]")
    patch, window = _pair("patch_size", patch_size), weight.shape[-2:]
    halo = [(outer - inner) // 2 for outer, inner in zip(window, patch, strict=True)]  # Dynamo has no divmod for these
    for outer, inner, around in zip(window, patch, halo, strict=True):
        if around < 0 or inner + 2 * around != outer:
            raise ValueError(f"weight is {outer} px wide and patch_size = {inner}; give it 0, 2, 4... more")
    device = clip.device.type
    # Autocast leaves float64 alone, and knows nothing of the meta device.
    autocast = weight.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    rows = gather_patches(
        clip, (patch[0], patch[1]), weight.shape[2] if weight.dim() == 5 else 1, token_ids=token_ids,
        halo=(halo[0], halo[1]), mean=mean, std=std, dtype=dtype, layout=layout, padded=padded,
    )  # fmt: skip
    embedded = F.linear(rows, weight_matrix(weight, clip, layout), None if bias is None else bias.to(dtype))
    if position is not None:
        if position.dim() != 2 or position.shape[1] != weight.shape[0]:
            raise ValueError(f"position has shape {list(position.shape)}; give [tokens, {weight.shape[0]}]")
        if token_ids is None:
            if len(position) != rows.shape[1]:
                raise ValueError(f"position has {len(position)} rows, but a clip has {rows.shape[1]} tokens")
            embedded = embedded + position
        else:
            check_id_values("token_ids", token_ids, len(position), "position has {} rows", padded=padded)
            embedded = embedded + position[(token_ids.clamp_min(0) if padded else token_ids).long()]
    if padded and token_ids is not None:
        embedded = embedded.masked_fill((token_ids < 0)[..., None], 0)
    return embedded

"""patch_embed: a video ViT's patch embedding, for the asked-for tokens only.

Two ways are built. `patch_embed` gathers the pixels into rows and leaves the GEMM to cuBLAS: the rows cost one write
and one read. `implicit_patch_embed` reads the pixels inside a Triton GEMM and adds bias and position before the only
write: no rows, but a slower GEMM that reads the pixels again for every tile of output channels. Which is faster on
which GPU is not measured yet, so nothing takes the second by itself; the kernel benchmarks time both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from umt_kernels.backend import on_its_device, triton
from umt_kernels.checks import check_floats, check_ids, check_tensors
from umt_kernels.gather_patches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    config,
    gather_patches,
    readable,
    weight_matrix,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

if triton is not None:
    import triton.language as tl

    from umt_kernels.gather_patches import normalised


def patch_embed(
    clip: Shaped[Tensor, "b ..."],
    weight: Float[Tensor, "d 3 t k k"],
    bias: Float[Tensor, " d"] | None,
    patch_size: int,
    *,
    token_ids: Int[Tensor, "b m"] | None = None,
    position: Float[Tensor, "n d"] | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Tensor, "b m d"]:
    """The Conv3d of stride (t, patch_size, patch_size) at the tokens `token_ids` (all if None), plus their positions.

    clip      uint8 [B,T,H,W,3], normalised here, or normalised float [B,3,T,H,W]; it gets no gradient.
    weight    the Conv3d's; where its kernel is wider than patch_size, windows overlap and the border is replicated.
    position  table of every token's position, added to the tokens kept; it gets no gradient.

    One gather and one GEMM, in autocast's dtype if that is on and else in that of `weight`. Raises ValueError for
    shapes or devices that do not fit, TypeError for a dtype that does not.
    """
    check_tensors(clip=clip, weight=weight, bias=bias, token_ids=token_ids, position=position)
    check_floats(weight=weight, bias=bias, position=position)
    if weight.dim() != 5 or weight.shape[1] != 3 or weight.shape[3] != weight.shape[4]:
        raise ValueError(f"weight has shape {list(weight.shape)}; give [d, 3, t, k, k]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; give [{weight.shape[0]}]")
    halo = (weight.shape[-1] - patch_size) // 2  # no divmod: torch.compile knows none of symbolic sizes
    if halo < 0 or patch_size + 2 * halo != weight.shape[-1]:
        raise ValueError(f"weight is {weight.shape[-1]} px wide and patch_size = {patch_size}; give it 0, 2, 4... more")
    device = clip.device.type
    # Autocast leaves float64 alone, and knows nothing of the meta device.
    autocast = weight.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    rows = gather_patches(
        clip, patch_size, weight.shape[2], token_ids=token_ids, halo=halo, mean=mean, std=std, dtype=dtype
    )
    embedded = F.linear(rows, weight_matrix(weight, clip), None if bias is None else bias.to(dtype))
    if position is None:
        return embedded
    if position.dim() != 2 or position.shape[1] != weight.shape[0]:
        raise ValueError(f"position has shape {list(position.shape)}; give [tokens, {weight.shape[0]}]")
    if token_ids is None:
        if len(position) != rows.shape[1]:
            raise ValueError(f"position has {len(position)} rows, but a clip has {rows.shape[1]} tokens")
        return embedded + position.detach()
    check_ids("token_ids", token_ids, clip.shape[0], len(position), "position has {} rows")
    return embedded + position.detach()[token_ids.long()]


@on_its_device
def implicit_patch_embed(
    clip: Shaped[Tensor, "b ..."],
    weight: Float[Tensor, "d 3 t k k"],
    bias: Float[Tensor, " d"],
    patch_size: int,
    token_ids: Int[Tensor, "b m"],
    position: Float[Tensor, "n d"],
    dtype: torch.dtype,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Tensor, "b m d"]:
    """`patch_embed` without its row buffer, forward only: products in `dtype`, sums, bias and position in float32.

    Takes what `patch_embed` has checked, on a device that runs Triton. Returns float32.
    """
    matrix = weight_matrix(weight, clip).to(dtype).contiguous()
    batch, kept, channels = clip.shape[0], token_ids.shape[1], weight.shape[0]
    halo = (weight.shape[-1] - patch_size) // 2
    out = clip.new_empty(batch, kept, channels, dtype=torch.float32)
    clip, geometry = readable(clip, patch_size, mean, std)
    settings = implicit_config(patch_size, weight.shape[2], halo, clip.dtype == torch.uint8, dtype)
    grid = (triton.cdiv(batch * kept, settings["TOKENS"]), triton.cdiv(channels, settings["CHANNELS"]))
    _implicit_kernel[grid](
        clip,
        token_ids.contiguous(),
        matrix,
        bias,
        position.contiguous(),
        out,
        batch * kept,
        kept,
        channels,
        matrix.shape[1],
        *geometry,
        **settings,
    )
    return out


def implicit_config(
    patch_size: int, tubelet_size: int, halo: int, bytes_in: bool, dtype: torch.dtype
) -> dict[str, int]:
    """Tiles that fit in registers: float32 products are not done by the matrix units and need more of them."""
    shared = config(patch_size, tubelet_size, halo, bytes_in)
    kept = ("UINT8", "PATCH", "TUBELET", "HALO", "COLUMNS")
    return {
        **{key: shared[key] for key in kept},
        "TOKENS": 64,
        "CHANNELS": 64 if dtype == torch.float32 else 128,
        "FEATURES": 32,
        "num_warps": 8,
    }


if triton is not None:

    @triton.jit
    def _implicit_kernel(
        clip_ptr,
        ids_ptr,  # [B, M]
        matrix_ptr,  # [D, F]
        bias_ptr,  # [D]
        position_ptr,  # [N, D]
        out_ptr,  # [B, M, D]
        rows,  # B * M
        kept,
        channels,
        features,
        grid_height,
        grid_width,
        height,
        width,
        stride_b,
        stride_c,
        stride_t,
        stride_h,
        scale_r,
        scale_g,
        scale_b,
        shift_r,
        shift_g,
        shift_b,
        UINT8: tl.constexpr,
        PATCH: tl.constexpr,
        TUBELET: tl.constexpr,
        HALO: tl.constexpr,
        COLUMNS: tl.constexpr,
        TOKENS: tl.constexpr,
        CHANNELS: tl.constexpr,
        FEATURES: tl.constexpr,
    ):
        WINDOW: tl.constexpr = PATCH + 2 * HALO
        row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        here = row < rows
        out_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        valid = out_channel < channels
        place = tl.load(ids_ptr + row, mask=here, other=0).to(tl.int32)
        frame = place // (grid_height * grid_width) * TUBELET
        y0 = place // grid_width % grid_height * PATCH - HALO
        x0 = place % grid_width * PATCH - HALO
        start = (row // kept) * stride_b
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for first in range(0, features, FEATURES):
            feature = first + tl.arange(0, FEATURES)
            within = feature < features
            mask = here[:, None] & within[None, :]
            line = feature // COLUMNS
            column = feature % COLUMNS
            y = y0[:, None] + (line % WINDOW)[None, :]
            t = frame[:, None] + (line // WINDOW % TUBELET)[None, :]
            pixel = column // 3 if UINT8 else column
            x = x0[:, None] + pixel[None, :]
            if HALO > 0:
                y = tl.minimum(tl.maximum(y, 0), height - 1)
                x = tl.minimum(tl.maximum(x, 0), width - 1)
            offset = start[:, None] + t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_h
            if UINT8:
                channel = column % 3
                values = tl.load(clip_ptr + offset + x * 3 + channel[None, :], mask=mask, other=0)
                values = normalised(values, channel, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b)
            else:
                offset += (line // (TUBELET * WINDOW)).to(tl.int64)[None, :] * stride_c
                values = tl.load(clip_ptr + offset + x, mask=mask, other=0.0).to(tl.float32)
            matrix = tl.load(
                matrix_ptr + out_channel.to(tl.int64)[None, :] * features + feature[:, None],
                mask=valid[None, :] & within[:, None],
                other=0.0,
            )
            total = tl.dot(values.to(matrix.dtype), matrix, total, input_precision="ieee")
        total += tl.load(bias_ptr + out_channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        mask = here[:, None] & valid[None, :]
        position = place.to(tl.int64)[:, None] * channels + out_channel[None, :]
        total += tl.load(position_ptr + position, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row[:, None] * channels + out_channel[None, :], total, mask=mask)

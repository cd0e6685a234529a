"""patch_embed as one Triton kernel that reads the pixels inside its GEMM, for comparison with gather + cuBLAS.

It writes no rows and adds bias and position before its only write. But its GEMM is slower and reads the pixels again
for every tile of output channels: by the compiler's report, 7 times the minimum of bytes at UMT-L. It joins umt_kernels
only if a measurement shows it faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD, weight_matrix
from umt_kernels.gather_patches import default_layout, geometry, normalisation, normalised, readable
from umt_kernels.launch import Plan

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


def implicit_patch_embed(
    clip: Shaped[Tensor, "b ..."],
    weight: Float[Tensor, "d 3 t k k"],
    bias: Float[Tensor, " d"],
    patch_size: int,
    token_ids: Int[Tensor, "b m"],
    position: Float[Tensor, "n d"],
    dtype: torch.dtype,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float[Tensor, "b m d"]:
    """`umt_kernels.patch_embed`, forward only: products in `dtype`, sums, bias and position in float32.

    Arguments are those of `patch_embed`, already checked, on a device that runs Triton; a float clip is already
    normalised. Returns float32.
    """
    matrix = weight_matrix(weight, clip).to(dtype).contiguous()
    batch, kept, channels = clip.shape[0], token_ids.shape[1], weight.shape[0]
    halo = (weight.shape[-1] - patch_size) // 2
    out = clip.new_empty(batch, kept, channels, dtype=torch.float32)
    layout = default_layout(clip)
    clip = readable(clip, layout)
    settings = config(patch_size, weight.shape[2], halo, clip.dtype == torch.uint8, dtype)
    grid = (triton.cdiv(batch * kept, settings["TOKENS"]), triton.cdiv(channels, settings["CHANNELS"]))
    constants = normalisation(clip, mean, std)
    numbers = (batch * kept, kept, channels, matrix.shape[1], *geometry(clip, layout, [patch_size, patch_size]))
    constants = {name: constants[name] for name in ("SCALES", "SHIFTS")}
    Plan(_kernel, grid, numbers, {**constants, **settings}).launch(
        (clip, token_ids.contiguous(), matrix, bias, position.contiguous(), out)
    )
    return out


def config(patch_size: int, tubelet_size: int, halo: int, bytes_in: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes that fit in registers; float32 products need more, because the matrix units cannot compute them."""
    return {
        "UINT8": bytes_in,
        "PATCH": patch_size,
        "TUBELET": tubelet_size,
        "HALO": halo,
        "COLUMNS": (3 if bytes_in else 1) * (patch_size + 2 * halo),
        "TOKENS": 64,
        "CHANNELS": 64 if dtype == torch.float32 else 128,
        "FEATURES": 32,
        "num_warps": 8,
    }


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
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
    SCALES: tl.constexpr,
    SHIFTS: tl.constexpr,
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
            values = normalised(values, channel[None, :], SCALES, SHIFTS, 3)
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

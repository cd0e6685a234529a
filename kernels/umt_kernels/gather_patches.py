"""gather_patches: the pixels of the asked-for tokens, normalised, as rows ready for one GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import KERNEL_DTYPES, next_power_of_2, on_its_device, runs_triton, triton
from umt_kernels.checks import check_ids, check_ints, check_tensors

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

if triton is not None:
    import triton.language as tl

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def gather_patches(
    clip: Shaped[Tensor, "b ..."],
    patch_size: int,
    tubelet_size: int = 1,
    *,
    token_ids: Int[Tensor, "b m"] | None = None,
    halo: int = 0,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b m f"]:
    """Rows of pixels of the tokens `token_ids` (all tokens if None), one row per token.

    clip       uint8 [B,T,H,W,3], normalised here with `mean` and `std`; or float [B,3,T,H,W], taken as normalised.
    token_ids  index of each token in the flattened (t, h, w) grid, int32 or int64.
    halo       pixels added on each side of a patch, the clip's border replicated: windows then overlap.

    Returns [B, M, 3 * tubelet * (patch + 2 halo)^2] in `dtype`, in the order in which the clip lies in memory:
    (time, row, column, channel) of a uint8 clip, (channel, time, row, column) of a float clip. `weight_matrix` puts a
    Conv3d's weight into the same order. The clip gets no gradient.

    Raises TypeError for a dtype that does not fit, ValueError for a size that patches do not divide, an id out of
    range, tensors on two devices, or `mean` and `std` that are not three numbers, of `std` positive ones.
    """
    check_tensors(clip=clip, token_ids=token_ids)
    check_ints(patch_size=patch_size, tubelet_size=tubelet_size, halo=halo)
    if clip.dim() != 5:
        raise ValueError(f"clip has shape {list(clip.shape)}; give uint8 [B,T,H,W,3] or float [B,3,T,H,W]")
    if clip.dtype == torch.uint8:
        frames, height, width, channels = clip.shape[1:]
    elif clip.is_floating_point():
        channels, frames, height, width = clip.shape[1:]
    else:
        raise TypeError(f"clip has dtype {clip.dtype}; give uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W]")
    if channels != 3:
        layout = "uint8 [B,T,H,W,3]" if clip.dtype == torch.uint8 else "float [B,3,T,H,W]"
        raise ValueError(f"clip has shape {list(clip.shape)}, {channels} channels; a {clip.dtype} clip is {layout}")
    for name, size, step in (("T", frames, tubelet_size), ("H", height, patch_size), ("W", width, patch_size)):
        if step < 1 or size % step or size == 0:
            raise ValueError(f"clip has {name} = {size}, which is not a positive multiple of {step}")
    if halo < 0:
        raise ValueError(f"halo = {halo}; it must be 0 or more")
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise ValueError(
            f"mean = {mean} and std = {std}; give three numbers each, one per channel, of std positive ones"
        )
    if not dtype.is_floating_point:
        raise TypeError(f"dtype = {dtype}; rows are floats")
    if token_ids is not None:
        tokens = (frames // tubelet_size) * (height // patch_size) * (width // patch_size)
        check_ids("token_ids", token_ids, clip.shape[0], tokens, "a clip has {} tokens")
    clip = clip.detach()
    if not runs_triton(clip) or dtype not in KERNEL_DTYPES:
        return reference.gather_patches(clip, patch_size, tubelet_size, token_ids, halo, mean, std, dtype)
    return _forward(clip, patch_size, tubelet_size, token_ids, halo, list(mean), list(std), dtype)


def weight_matrix(weight: Float[Tensor, "d 3 t k k"], clip: Shaped[Tensor, "b ..."]) -> Float[Tensor, "d f"]:
    """A Conv3d's weight as the matrix [D, F] that goes with `gather_patches(clip, ...)`: rows @ matrix.T embeds."""
    return (weight.permute(0, 2, 3, 4, 1) if clip.dtype == torch.uint8 else weight).flatten(1)


@torch.library.custom_op("umt_kernels::gather_patches", mutates_args=())
@on_its_device
def _forward(
    clip: Tensor,
    patch_size: int,
    tubelet_size: int,
    token_ids: Tensor | None,
    halo: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    rows = _empty_rows(clip, patch_size, tubelet_size, token_ids, halo, mean, std, dtype)
    if rows.numel() == 0:
        return rows
    settings = config(patch_size, tubelet_size, halo, clip.dtype == torch.uint8)
    lines = rows.shape[0] * rows.shape[1] * settings["LINES_PER_TOKEN"]
    clip, geometry = readable(clip, patch_size, mean, std)
    _kernel[(triton.cdiv(lines, settings["LINES"]),)](
        clip,
        None if token_ids is None else token_ids.contiguous(),
        rows,
        lines,
        rows.shape[1],
        *geometry,
        GATHER=token_ids is not None,
        **settings,
    )
    return rows


@_forward.register_fake
def _empty_rows(clip, patch_size, tubelet_size, token_ids, halo, mean, std, dtype):
    frames, height, width = clip.shape[1:4] if clip.dtype == torch.uint8 else clip.shape[2:]
    tokens = frames // tubelet_size * (height // patch_size) * (width // patch_size)
    kept = tokens if token_ids is None else token_ids.shape[1]
    return clip.new_empty(clip.shape[0], kept, 3 * tubelet_size * (patch_size + 2 * halo) ** 2, dtype=dtype)


def readable(clip: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, tuple]:
    """The clip with the pixels of a line side by side, and what a kernel needs to find and normalise them.

    That is: height and width of the grid and of a frame; strides of sample, channel, time and line; and for each
    channel a scale and a shift, which take a byte to its normalised value.
    """
    bytes_in = clip.dtype == torch.uint8
    if clip.stride()[3:] != (3, 1) if bytes_in else clip.stride(4) != 1:
        clip = clip.contiguous()
    height, width = clip.shape[2:4] if bytes_in else clip.shape[3:]
    strides = (clip.stride(0), 0, *clip.stride()[1:3]) if bytes_in else clip.stride()[:4]
    scales = (1 / (255 * s) for s in std)
    shifts = (-m / s for m, s in zip(mean, std, strict=True))
    return clip, (height // patch_size, width // patch_size, height, width, *strides, *scales, *shifts)


def config(patch_size: int, tubelet_size: int, halo: int, bytes_in: bool) -> dict[str, int]:
    """A line is what a window reads from one row of the frame: all channels of a uint8 clip, one of a float clip."""
    window = patch_size + 2 * halo
    columns = 3 * window if bytes_in else window
    block = next_power_of_2(columns)
    tile = 1024 if halo or patch_size % 16 else 4096  # narrow loads each need an address: fewer of them per thread
    return {
        "UINT8": bytes_in,
        "PATCH": patch_size,
        "TUBELET": tubelet_size,
        "HALO": halo,
        "COLUMNS": columns,
        "LINES_PER_TOKEN": tubelet_size * window * (1 if bytes_in else 3),
        "LINES": max(1, tile // block),
        "BLOCK": block,
        "num_warps": 4,
    }


if triton is not None:

    @triton.jit
    def normalised(values, channel, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b):
        """Bytes [rows, columns], each column of one channel."""
        scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
        shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
        return values.to(tl.float32) * scale[None, :] + shift[None, :]

    @triton.jit
    def _kernel(
        clip_ptr,
        ids_ptr,  # [B, M]
        rows_ptr,  # [B, M, LINES_PER_TOKEN * COLUMNS]
        lines,
        kept,
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
        GATHER: tl.constexpr,
        UINT8: tl.constexpr,
        PATCH: tl.constexpr,
        TUBELET: tl.constexpr,
        HALO: tl.constexpr,
        COLUMNS: tl.constexpr,
        LINES_PER_TOKEN: tl.constexpr,
        LINES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        WINDOW: tl.constexpr = PATCH + 2 * HALO
        line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
        column = tl.arange(0, BLOCK)
        here = line < lines
        mask = here[:, None] & (column < COLUMNS)[None, :]
        token = line // LINES_PER_TOKEN
        within = (line % LINES_PER_TOKEN).to(tl.int32)
        sample = token // kept
        if GATHER:
            place = tl.load(ids_ptr + token, mask=here, other=0).to(tl.int32)
        else:
            place = (token % kept).to(tl.int32)
        frame = place // (grid_height * grid_width) * TUBELET + within // WINDOW % TUBELET
        y = place // grid_width % grid_height * PATCH + within % WINDOW - HALO
        x = place % grid_width * PATCH
        if HALO > 0:
            y = tl.minimum(tl.maximum(y, 0), height - 1)
        start = sample * stride_b + frame.to(tl.int64) * stride_t + y.to(tl.int64) * stride_h
        if UINT8:
            if HALO > 0:
                pixel = tl.minimum(tl.maximum(x[:, None] + (column // 3 - HALO)[None, :], 0), width - 1)
                offset = start[:, None] + pixel * 3 + (column % 3)[None, :]
            else:
                offset = start[:, None] + x[:, None] * 3 + column[None, :]
            values = tl.load(clip_ptr + offset, mask=mask, other=0)
            values = normalised(values, column % 3, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b)
        else:
            start += (within // (TUBELET * WINDOW)).to(tl.int64) * stride_c
            if HALO > 0:
                pixel = tl.minimum(tl.maximum(x[:, None] + (column - HALO)[None, :], 0), width - 1)
                offset = start[:, None] + pixel
            else:
                offset = start[:, None] + x[:, None] + column[None, :]
            values = tl.load(clip_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        to = line[:, None] * COLUMNS + column[None, :]
        tl.store(rows_ptr + to, values.to(rows_ptr.dtype.element_ty), mask=mask)

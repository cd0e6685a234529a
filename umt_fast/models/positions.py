"""Fixed positions and their resizing, and the bicubic resize that a patch embedding can include."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def sinusoid_positions(tokens: int, width: int) -> Float[Tensor, "tokens width"]:
    """Angle pos / 10000^(2 (j // 2) / width), its sine on even j and cosine on odd j (arXiv 1706.03762, 3.5)."""
    column = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def resize_positions(
    table: Float[Tensor, "m d"], frames: int, new_frames: int, new_grid: int, *, time_first: bool = False
) -> Float[Tensor, "n d"]:
    """Resize a table of `frames` square grids to `new_frames` grids of side `new_grid`.

    The resize is bicubic in space and linear in time. `time_first` changes only the rounding. Raises ValueError if the
    rows are not `frames` square grids.
    """
    grid = math.isqrt(len(table) // frames)
    if frames * grid**2 != len(table):
        raise ValueError(f"{len(table)} positions are not {frames} square grids")
    if time_first:
        table = _resize_time(table, frames, new_frames)
        frames = new_frames
    if grid != new_grid:
        grids = table.view(frames, grid, grid, -1).permute(0, 3, 1, 2)
        grids = F.interpolate(grids, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
        table = grids.permute(0, 2, 3, 1).flatten(0, 2)
    return _resize_time(table, frames, new_frames)


def _resize_time(table: Tensor, frames: int, new_frames: int) -> Tensor:
    if frames == new_frames:
        return table
    places = table.view(frames, -1, table.shape[1]).permute(1, 2, 0)
    places = F.interpolate(places, size=new_frames, mode="linear", align_corners=False)
    return places.permute(2, 0, 1).flatten(0, 1)


def video_positions(
    frames: int, patches: int, width: int, table_frames: int | None = None
) -> Float[Tensor, "tokens width"]:
    """Positions of a clip of `frames` x `patches` tokens.

    With `table_frames` the table is made for that many frames and interpolated linearly in time, patch by patch, as
    stage 2's ckpt_num_frame does (corners not aligned); it is never interpolated in space.
    """
    if table_frames is None or table_frames == frames:
        return sinusoid_positions(frames * patches, width)
    return _resize_time(sinusoid_positions(table_frames * patches, width), table_frames, frames)


def bicubic_window(source: int, target: int) -> tuple[Float[Tensor, "target window"], int]:
    """One-dimensional bicubic resize of one patch: from `source` pixels, and a halo on each side, to `target` pixels.

    A resize by target / source repeats every `source` pixels, so each patch of the resized frame is this matrix times
    one window of the frame with replicated borders. Returns the float64 matrix, of `source + 2 halo` columns, and the
    halo. The weights are those of `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, the resize
    of the published code.
    """
    repeats = 5  # the middle patch does not see the borders: the kernel reaches at most two pixels out
    impulses = torch.eye(repeats * source, dtype=torch.float64)[:, None, :, None]
    size = (repeats * target, 1)
    response = F.interpolate(impulses, size=size, mode="bicubic", align_corners=False)[:, 0, :, 0]
    middle = response[:, 2 * target : 3 * target].T  # [target, repeats * source]
    used = middle.abs().amax(0).nonzero().flatten()
    first, last = int(used[0]), int(used[-1])
    halo = max(2 * source - first, last - (3 * source - 1), 0)
    return middle[:, 2 * source - halo : 3 * source + halo].contiguous(), halo

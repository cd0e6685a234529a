"""Masking rules that depend on the clip: functions from scores or maps to ascending visible ids `[B, G, n]`.

Rules without public code follow their papers and say so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@functools.lru_cache(maxsize=32)
def numbers_on(device: torch.device, *numbers: int) -> Int[Tensor, " n"]:
    """A tensor of constants, cached: a step that is recorded as a CUDA graph must not copy from the host."""
    return torch.tensor(numbers, device=device)


def highest(scores: Float[Tensor, "b t p"], num_visible: int) -> Int[Tensor, "b t n"]:
    """The `num_visible` patches of each frame with the highest scores. Raises ValueError unless 1 <= n <= P."""
    if not 1 <= num_visible <= scores.shape[-1]:
        raise ValueError(f"num_visible = {num_visible}, but a frame has {scores.shape[-1]} patches")
    return scores.topk(num_visible, dim=-1).indices.sort(dim=-1).values


def lowest(
    scores: Float[Tensor, "b t p"], num_visible: int, generator: torch.Generator | None = None
) -> Int[Tensor, "b t n"]:
    """The `num_visible` patches of each frame with the lowest scores. Equal scores are ordered at random, so that a
    frame without motion prefers no place. Raises ValueError unless 1 <= n <= P."""
    order = torch.rand(scores.shape, device=scores.device, generator=generator).argsort(-1)
    ranks = scores.gather(-1, order).argsort(dim=-1, stable=True)
    if not 1 <= num_visible <= scores.shape[-1]:
        raise ValueError(f"num_visible = {num_visible}, but a frame has {scores.shape[-1]} patches")
    return order.gather(-1, ranks[..., :num_visible]).sort(dim=-1).values


def redundancy_removing(
    tokens: Float[Tensor, "b n d"],
    frames: int,
    noise: Float[Tensor, "b c"],
    candidate_ratio: float = 0.7,
    ratio: float = 0.9,
) -> tuple[Int[Tensor, "b 1 v"], Int[Tensor, "b m"]]:
    """EVEREST (arXiv 2211.10636): only tokens that differ from the previous frame are visible or decoded.

    tokens  embedded patches without positions.
    noise   uniform, one value for each of the c = int((1 - candidate_ratio) n) candidates.
    Returns the visible ids and the ids to decode, both ascending; together they are the c most different tokens.
    Raises ValueError for noise of another shape.
    """
    _batch, count, _ = tokens.shape
    by_frame = tokens.detach().float().unflatten(1, (frames, -1))
    change = (by_frame[:, :-1] - by_frame[:, 1:]).norm(dim=-1)
    importance = torch.cat((change[:, :1], change), dim=1).flatten(1)  # the first frame has the change to the second
    candidates = importance.topk(int((1 - candidate_ratio) * count), dim=1).indices
    if noise.shape != candidates.shape:
        raise ValueError(f"noise has shape {list(noise.shape)}; give {list(candidates.shape)}")
    shuffled = candidates.gather(1, noise.argsort(dim=1))
    num_visible = int((1 - ratio) * count)
    visible, decoded = shuffled[:, :num_visible], shuffled[:, num_visible:]
    return visible.sort(dim=1).values[:, None], decoded.sort(dim=1).values


def gaussian_map(centres: Int[Tensor, "b k"], height: int, width: int, patch_size: int) -> Float[Tensor, "b 1 hp wp"]:
    """MGMAE's initial map (arXiv 2308.10794): Gaussian bumps, one patch wide, at the patches `centres`; maximum 1."""
    rows = torch.arange(height * patch_size, device=centres.device)
    columns = torch.arange(width * patch_size, device=centres.device)
    y = centres // width * patch_size + patch_size // 2
    x = centres % width * patch_size + patch_size // 2
    bump_y = torch.exp(-(((rows - y[..., None]) / patch_size) ** 2))
    bump_x = torch.exp(-(((columns - x[..., None]) / patch_size) ** 2))
    whole = (bump_y[..., :, None] * bump_x[..., None, :]).amax(1, keepdim=True)
    return whole / whole.amax((2, 3), keepdim=True)


def _warp(image: Float[Tensor, "b 1 h w"], flow: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 1 h w"]:
    height, width = image.shape[2:]
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, device=image.device, dtype=flow.dtype),
        torch.linspace(-1, 1, width, device=image.device, dtype=flow.dtype),
        indexing="ij",
    )
    grid = torch.stack((x + flow[:, 0] / (width / 2), y + flow[:, 1] / (height / 2)), dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def flow_scores(
    start: Float[Tensor, "b 1 h w"],
    flows: Mapping[tuple[int, int], Float[Tensor, "b 2 h w"]],
    frames: int,
    patch_size: int,
    tubelet_size: int,
) -> Float[Tensor, "b t p"]:
    """Scores of MGMAE (arXiv 2308.10794): a map of the middle frame, carried to the others by optical flow.

    start  map of frame `frames // 2`, from `gaussian_map`.
    flows  flow in pixels, x first, by its pair of frames: (f + 1, f) before the middle frame, although the map is
           warped backwards there, as published, and (f, f - 1) after it.

    Where a warped map is exactly 0, the value of `start` is used. Use `highest` to select the visible patches.
    """
    middle = frames // 2
    maps = {middle: start}
    for frame in range(middle - 1, -1, -1):
        maps[frame] = _carried(start, maps[frame + 1], flows[frame + 1, frame])
    for frame in range(middle + 1, frames):
        maps[frame] = _carried(start, maps[frame - 1], flows[frame, frame - 1])
    stacked = torch.stack([maps[frame] for frame in range(frames)], dim=2)  # [B, 1, T, H, W]
    cube = (tubelet_size, patch_size, patch_size)
    pooled = F.avg_pool3d(stacked, cube) * (tubelet_size * patch_size**2)
    return pooled[:, 0].flatten(2)


def _carried(start: Tensor, before: Tensor, flow: Tensor) -> Tensor:
    warped = _warp(before, flow)
    return torch.where(warped == 0, start, warped)


def regions_shown(
    regions: Int[Tensor, "b t h w"], order: Sequence[int], patch_size: int, least_share: float = 0.1
) -> Bool[Tensor, "b t p"]:
    """The patches that MARLIN (arXiv 2211.06627) shows, before `draw_marked` reduces them to a fixed number.

    regions  a label per pixel of the first frame of every tubelet, from a parsing map or mask video.
    order    labels in the order in which they are shown; MARLIN: background, skin, then parts of the face at random.

    A frame without any of the labels is shown whole.
    """
    batch, frames, height, width = regions.shape
    patches = (height // patch_size) * (width // patch_size)
    shown = torch.zeros(batch, frames, patches, dtype=torch.bool, device=regions.device)
    for label in order:
        touched = F.max_pool2d((regions == label).float().flatten(0, 1)[:, None], patch_size)
        needed = shown.float().mean(-1, keepdim=True) < least_share
        shown |= needed & (touched.view(batch, frames, patches) > 0)
    return shown | ~shown.any(-1, keepdim=True)


def draw_marked(
    marks: Float[Tensor, "b t p"], num_visible: int, generator: torch.Generator | None = None
) -> Int[Tensor, "b 1 n"]:
    """Draw `num_visible` random tokens of the clip; tokens marked 1 are drawn before tokens marked 0."""
    noise = torch.rand(marks.flatten(1).shape, device=marks.device, generator=generator)
    first = (noise + marks.flatten(1)).topk(num_visible, dim=1).indices
    return first.sort(dim=1).values[:, None]

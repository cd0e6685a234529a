"""What a validation or test view shows of a frame: resized as the published evaluation does, then a square of it.

The published code resizes with OpenCV. `resize_bilinear` computes the same integers without it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8

_WEIGHT_BITS = 11
"""OpenCV's fixed-point weights: parts of 2048."""


class Box(NamedTuple):
    """Part of a frame, pixels."""

    top: int
    left: int
    height: int
    width: int


def resized_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width after the short side became `short_side`; the long one is rounded down."""
    if height <= width:
        return short_side, width if height == short_side else int(short_side * width / height)
    return height if width == short_side else int(short_side * height / width), short_side


def centre_box(height: int, width: int, side: int) -> Box:
    """The validation view of a resized frame. Raises ValueError where the frame is smaller."""
    _check_side(height, width, side)
    return Box(round((height - side) / 2), round((width - side) / 2), side, side)


def crop_boxes(height: int, width: int, side: int, crops: int) -> list[Box]:
    """`crops` squares spread along the longer side of a resized frame whose short side is `side`; one is the middle."""
    _check_side(height, width, side)
    if crops < 1:
        raise ValueError(f"crops = {crops}: give 1 or more")
    slack = max(height, width) - side
    starts = [int(k * (slack / (crops - 1))) for k in range(crops)] if crops > 1 else [int(slack / 2)]
    if height >= width:
        return [Box(start, 0, side, side) for start in starts]
    return [Box(0, start, side, side) for start in starts]


def _check_side(height: int, width: int, side: int) -> None:
    if side < 1 or min(height, width) < side:
        raise ValueError(f"a view of {side} x {side} pixels does not fit a frame of {width} x {height}")


def resize_bilinear(
    frames: UInt8[np.ndarray, "... h w c"], height: int, width: int, box: Box | None = None
) -> UInt8[np.ndarray, "... i j c"]:
    """Resize bilinearly without antialiasing, to the same bytes as OpenCV's INTER_LINEAR on uint8.

    `box`: compute that part of the resized frames alone. Enlarging was not compared with OpenCV.
    """
    old_height, old_width = frames.shape[-3:-1]
    top, left, rows, columns = box or Box(0, 0, height, width)
    if (old_height, old_width) == (height, width):
        return frames[..., top : top + rows, left : left + columns, :]
    i0, i1, a0, a1 = (part[left : left + columns] for part in _taps(old_width, width))
    j0, j1, b0, b1 = (part[top : top + rows] for part in _taps(old_height, height))
    used, place = np.unique(np.concatenate((j0, j1)), return_inverse=True)
    lines = frames[..., used, :, :].astype(np.int32)  # only the rows that the result depends on
    lines = lines[..., i0, :] * a0[:, None] + lines[..., i1, :] * a1[:, None]
    lines >>= 4
    above, below = lines[..., place[:rows], :, :], lines[..., place[rows:], :, :]
    mixed = ((above * b0[:, None, None]) >> 16) + ((below * b1[:, None, None]) >> 16) + 2
    return (mixed >> 2).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _taps(old: int, new: int) -> tuple[Int[np.ndarray, " n"], ...]:
    """The two source places of each new pixel, and their weights in parts of 2048; float32, as OpenCV."""
    scale = old / new
    place = ((np.arange(new) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    weight = place - first.astype(np.float32)
    weight[(first < 0) | (first >= old - 1)] = 0
    first = first.clip(0, old - 1)
    one = np.float32(1 << _WEIGHT_BITS)
    right, left = np.rint(weight * one).astype(np.int32), np.rint((np.float32(1) - weight) * one).astype(np.int32)
    return first, (first + 1).clip(0, old - 1), left, right

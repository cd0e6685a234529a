"""Validation and test views of a frame: a resize as in the published evaluation, then square crops.

The published code resizes with OpenCV. `resize_bilinear` computes the same integers without OpenCV.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8

_WEIGHT_BITS = 11
"""OpenCV's weights are fixed-point numbers, in units of 1 / 2048."""


class Box(NamedTuple):
    """Part of a frame, pixels."""

    top: int
    left: int
    height: int
    width: int


def resized_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width after a resize of the short side to `short_side`; the long side is rounded down."""
    if height <= width:
        return short_side, width if height == short_side else int(short_side * width / height)
    return height if width == short_side else int(short_side * height / width), short_side


def centre_box(height: int, width: int, side: int) -> Box:
    """The validation view of a resized frame. Raises ValueError if the frame is smaller."""
    _check_side(height, width, side)
    return Box(round((height - side) / 2), round((width - side) / 2), side, side)


def crop_boxes(height: int, width: int, side: int, crops: int) -> list[Box]:
    """`crops` squares spread along the longer side of a resized frame whose short side is `side`; 1: the middle one."""
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

    `box`: compute only this part of the resized frames. Enlarging was not compared with OpenCV.
    """
    old_height, old_width, channels = frames.shape[-3:]
    top, left, rows, columns = box or Box(0, 0, height, width)
    if (old_height, old_width) == (height, width):
        return frames[..., top : top + rows, left : left + columns, :]
    i0, i1, a0, a1 = (part[left * channels : (left + columns) * channels] for part in _taps(old_width, width, channels))
    j0, j1, b0, b1 = (part[top : top + rows] for part in _taps(old_height, height))
    first, last = int(j0[0]), int(j1[-1]) + 1  # only the rows that the result depends on
    lines = frames[..., first:last, :, :].reshape(*frames.shape[:-3], last - first, old_width * channels)
    mixed = _weighted(lines, i0, i1, a0, a1)
    mixed >>= 4
    above, below = (mixed.take(j - first, axis=-2) for j in (j0, j1))
    above *= b0[:, None]
    above >>= 16
    below *= b1[:, None]
    below >>= 16
    above += below
    above += 2
    above >>= 2
    return above.astype(np.uint8).reshape(*frames.shape[:-3], rows, columns, channels)


def _weighted(
    values: UInt8[np.ndarray, "... n"], i: np.ndarray, j: np.ndarray, a: np.ndarray, b: np.ndarray
) -> Int[np.ndarray, "... m"]:
    """values[i] * a + values[j] * b in int32, in place: after decoding this takes most of a test's time."""
    left, right = values.take(i, axis=-1).astype(np.int32), values.take(j, axis=-1).astype(np.int32)
    left *= a
    right *= b
    left += right
    return left


@functools.lru_cache(maxsize=64)
def _taps(old: int, new: int, channels: int = 1) -> tuple[Int[np.ndarray, " n"], ...]:
    """Indices of the two source values of each new value, and their weights in units of 1 / 2048; float32, as OpenCV.

    Indices count values, not pixels: a pixel is `channels` neighbouring values.
    """
    scale = old / new
    place = ((np.arange(new) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    weight = place - first.astype(np.float32)
    weight[(first < 0) | (first >= old - 1)] = 0
    first = first.clip(0, old - 1)
    one = np.float32(1 << _WEIGHT_BITS)
    right, left = np.rint(weight * one).astype(np.int32), np.rint((np.float32(1) - weight) * one).astype(np.int32)
    places = [pixel[:, None] * channels + np.arange(channels) for pixel in (first, (first + 1).clip(0, old - 1))]
    return places[0].ravel(), places[1].ravel(), left.repeat(channels), right.repeat(channels)

"""Multi-scale crop at fixed positions and flip: drawn once for a clip, the same for all its frames."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from umt_fast.data.index import BadVideo

# The 13 corners, in quarters of the slack (x, y): corners and centre, edge middles, quarter points.
POSITIONS = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)


@dataclass(frozen=True)
class View:
    """The part of a video that a clip shows, in pixels of the frame, and whether it is mirrored."""

    x: int
    y: int
    width: int
    height: int
    flip: bool


def draw_view(
    frame_width: int, frame_height: int, side: int, scales: tuple[float, ...], flip: float, rng: np.random.Generator
) -> View:
    """Draw a crop as TSN and UMT do (arXiv 1608.00859, section 3.2).

    Sides are the short side of the frame times each scale, one within 3 px of `side` becoming `side`; width and
    height are drawn together from those whose ranks differ by at most one. A crop never leaves the frame.
    """
    pairs = _crop_sizes(min(frame_width, frame_height), side, scales)
    width, height = pairs[rng.integers(len(pairs))]
    width, height = max(min(width, frame_width), 1), max(min(height, frame_height), 1)
    column, row = POSITIONS[rng.integers(len(POSITIONS))]
    x = column * ((frame_width - width) // 4)
    y = row * ((frame_height - height) // 4)
    return View(x, y, width, height, bool(rng.random() < flip))


@functools.lru_cache(maxsize=256)
def _crop_sizes(base: int, side: int, scales: tuple[float, ...]) -> list[tuple[int, int]]:
    """Widths and heights to draw from."""
    sizes = [int(base * scale) for scale in scales]
    sizes = [side if abs(size - side) < 3 else size for size in sizes]
    return [(w, h) for i, h in enumerate(sizes) for j, w in enumerate(sizes) if abs(i - j) <= 1]


class Clip(Protocol):
    """A clip in the making."""

    def add(self, places: list[int], frame: np.ndarray) -> None:
        """A frame, uint8 [H,W,3], and its places in the clip."""

    def finish(self) -> None:
        """All frames are there: write the clip."""


class Cut:
    """A clip in the making: the view of each frame, cut out as frames come and resized once all are there.

    That is faster than frame by frame, and than keeping the frames: they would not fit a core's cache.
    """

    def __init__(self, view: View, out: np.ndarray) -> None:
        """`out`: where the clip is wanted, uint8 [T,side,side,3]."""
        self.view = view
        self.out = out
        self._parts = np.empty((len(out), view.height, view.width, 3), np.uint8)
        self._odd: list[tuple[int, np.ndarray]] = []

    def add(self, places: list[int], frame: np.ndarray) -> None:
        """A frame, uint8 [H,W,3], and its places in the clip. Raises BadVideo where it shows nothing of the view."""
        view = self.view
        part = frame[view.y : view.y + view.height, view.x : view.x + view.width]
        for place in places:
            if part.shape == self._parts.shape[1:]:
                self._parts[place] = part
            elif part.size:  # the video has changed its size
                self._odd.append((place, part.copy()))
            else:
                raise BadVideo(f"its frames shrink to {frame.shape[1]} x {frame.shape[0]}, of which the crop has none")

    def finish(self) -> None:
        """Write the clip, resized bilinearly with antialiasing.

        By torch, whose 8-bit kernel takes a quarter of Pillow's time and gives its numbers, to 1 of 255.
        """
        _resize(self._parts, self.view.flip, self.out)
        for place, part in self._odd:
            _resize(part[None], self.view.flip, self.out[place : place + 1])


def _resize(parts: np.ndarray, flip: bool, out: np.ndarray) -> None:
    clip = torch.from_numpy(parts).permute(0, 3, 1, 2)  # channels last: torch has a kernel for that
    if flip:  # by torch: numpy's goes byte by byte
        clip = clip.flip(-1)
    resized = torch.from_numpy(out).permute(0, 3, 1, 2)
    if clip.shape == resized.shape:
        resized.copy_(clip)
    else:  # what F.interpolate calls, which can't write to where its result is wanted
        torch.ops.aten._upsample_bilinear2d_aa.out(clip, out.shape[1:3], False, None, None, out=resized)

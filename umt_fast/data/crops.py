"""Multi-scale crop at fixed positions and flip, drawn once for a clip and applied to all its frames."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from umt_fast.data.torch_private import resize_antialiased
from umt_fast.data.video import BadVideo

if TYPE_CHECKING:
    from jaxtyping import UInt8

# Top left corners of the 13 crops, in quarters of the free space (x, y): corners and centre, edges, quarter points.
POSITIONS = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)


@dataclass(frozen=True)
class View:
    """Crop of a clip, in pixels of the frame, and whether it is mirrored."""

    x: int
    y: int
    width: int
    height: int
    flip: bool


def draw_view(
    frame_width: int, frame_height: int, side: int, scales: tuple[float, ...], flip: float, rng: np.random.Generator
) -> View:
    """Draw a crop as TSN and UMT do (arXiv 1608.00859, section 3.2).

    Possible sides are the short side of the frame times each scale; a side within 3 px of `side` becomes `side`. Width
    and height are drawn as a pair of sides whose ranks differ by at most one. A crop never leaves the frame.
    """
    pairs = _crop_sizes(min(frame_width, frame_height), side, scales)
    width, height = pairs[rng.integers(len(pairs))]
    width, height = max(min(width, frame_width), 1), max(min(height, frame_height), 1)
    column, row = POSITIONS[rng.integers(len(POSITIONS))]
    x = column * ((frame_width - width) // 4)
    y = row * ((frame_height - height) // 4)
    return View(x, y, width, height, bool(rng.random() < flip))


def draw_area_view(
    frame_width: int, frame_height: int, area: tuple[float, float], flip: float, rng: np.random.Generator
) -> View:
    """Draw a random resized crop (arXiv 1409.4842): area in `area` times the frame's, aspect ratio in 3/4..4/3.

    After ten draws that do not fit, returns the largest centred crop of an allowed ratio.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        pixels = rng.uniform(*area) * frame_width * frame_height
        ratio = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        width, height = round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)
        if 0 < width <= frame_width and 0 < height <= frame_height:
            x = int(rng.integers(frame_width - width + 1))
            y = int(rng.integers(frame_height - height + 1))
            return View(x, y, width, height, bool(rng.random() < flip))
    width = min(frame_width, max(round(frame_height * high), 1))
    height = min(frame_height, max(round(frame_width / low), 1))
    x, y = (frame_width - width) // 2, (frame_height - height) // 2
    return View(x, y, width, height, bool(rng.random() < flip))


@functools.lru_cache(maxsize=256)
def _crop_sizes(base: int, side: int, scales: tuple[float, ...]) -> list[tuple[int, int]]:
    """The (width, height) pairs to draw from."""
    sizes = [int(base * scale) for scale in scales]
    sizes = [side if abs(size - side) < 3 else size for size in sizes]
    return [(w, h) for i, h in enumerate(sizes) for j, w in enumerate(sizes) if abs(i - j) <= 1]


class Clip(Protocol):
    """A clip being made."""

    def add(self, places: list[int], frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """Add a frame at its positions in the clip. Raises BadVideo if the clip cannot use it."""
        ...

    def finish(self) -> None:
        """Write the clip, once all frames are added."""
        ...


class Crop:
    """One clip being made: each frame is cropped when it is decoded, and all crops are resized at the end.

    This is faster than resizing frame by frame, and than keeping whole frames, which do not fit a core's cache.
    """

    def __init__(self, view: View, out: UInt8[np.ndarray, "t side side 3"]) -> None:
        """`out`: where to write the clip."""
        self.view = view
        self.out = out
        self._parts = np.empty((len(out), view.height, view.width, 3), np.uint8)
        self._odd: list[tuple[int, np.ndarray]] = []
        """Crops of another size, with their positions."""

    def add(self, places: list[int], frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """Add a frame at its positions in the clip. Raises BadVideo if the view lies outside the frame."""
        view = self.view
        part = frame[view.y : view.y + view.height, view.x : view.x + view.width]
        for place in places:
            if part.shape == self._parts.shape[1:]:
                self._parts[place] = part
            elif part.size:  # the video has changed its size
                self._odd.append((place, part.copy()))
            else:
                raise BadVideo(f"its frames shrink to {frame.shape[1]} x {frame.shape[0]}, outside of the crop")

    def finish(self) -> None:
        """Write the clip, resized bilinearly with antialiasing.

        torch's 8-bit kernel is four times as fast as Pillow's and gives the same values within 1 of 255.
        """
        _resize(self._parts, self.view.flip, self.out)
        for place, part in self._odd:
            _resize(part[None], self.view.flip, self.out[place : place + 1])


def _resize(parts: UInt8[np.ndarray, "t h w 3"], flip: bool, out: UInt8[np.ndarray, "t side side 3"]) -> None:
    clip = torch.from_numpy(parts).permute(0, 3, 1, 2)  # channels last, for which torch has a kernel
    if flip:  # by torch: numpy flips byte by byte
        clip = clip.flip(-1)
    resized = torch.from_numpy(out).permute(0, 3, 1, 2)
    if clip.shape == resized.shape:
        resized.copy_(clip)
    else:
        resize_antialiased(clip, resized)

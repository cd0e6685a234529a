"""Clips and pictures for stage 2: frames by intervals; random resized crops in training, whole frames in tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast.data.crops import View
from umt_fast.data.sampling import Timeline, interval_frames, middle_frames

if TYPE_CHECKING:
    from jaxtyping import UInt8

SCALE = (0.5, 1.0)
"""Area of a training crop, as a share of the frame."""
ASPECT = (3 / 4, 4 / 3)
TRIES = 10
"""Attempts to draw a crop that fits, as in RandomResizedCrop."""


@dataclass(frozen=True)
class IntervalSampling:
    """A `FrameSampling` of stage 2."""

    frames: int
    training: bool = False
    last: bool = False
    """Whether training may draw the last frame of an interval; the published code does not."""
    max_seconds: float | None = None
    """Sample only from this many seconds at the beginning of a video (DiDeMo: 30)."""

    def __call__(self, timeline: Timeline, rng: np.random.Generator) -> Sequence[int]:
        total = timeline.num_frames
        if self.max_seconds is not None and total / timeline.fps > self.max_seconds:
            total = max(int(self.max_seconds * timeline.fps), 1)
        return (
            interval_frames(total, self.frames, rng, self.last) if self.training else middle_frames(total, self.frames)
        )


@dataclass(frozen=True)
class PairTransform:
    """A `ViewTransform`: random resized crop and flip in training, otherwise the whole frame squeezed into a square.

    The resize is bicubic and, as published, not antialiased by default: torchvision 0.13 did not antialias tensors.
    """

    frames: int
    side: int
    training: bool = False
    antialias: bool = False
    flip: float = 0.5

    clips = 1
    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.frames, self.side, self.side, 3

    def draw_view(self, width: int, height: int, rng: np.random.Generator) -> View:
        """Draw the crop of frames of this size."""
        if not self.training:
            return View(0, 0, width, height, flip=False)
        top, left, rows, columns = draw_crop(height, width, rng)
        return View(left, top, columns, rows, bool(rng.random() < self.flip))

    def resize(self, parts: UInt8[Tensor, "t h w 3"], flip: bool) -> UInt8[Tensor, "t s s 3"]:
        """Make the clip from cropped frames, on any device."""
        return _resize(parts.flip(2) if flip else parts, self.side, self.antialias)

    def __call__(self, frames: list[UInt8[np.ndarray, "h w 3"]], out: np.ndarray, rng: np.random.Generator) -> None:
        height, width = frames[0].shape[:2]
        view = self.draw_view(width, height, rng)
        top, left, rows, columns = view.y, view.x, view.height, view.width
        for place, frame in enumerate(frames):
            if frame.shape[:2] != (height, width):  # the video changes its size: crop the same part of the picture
                y, x = frame.shape[0] / height, frame.shape[1] / width
                part = frame[
                    int(top * y) : math.ceil((top + rows) * y), int(left * x) : math.ceil((left + columns) * x)
                ]
            else:
                part = frame[top : top + rows, left : left + columns]
            out[0, place] = resize_bicubic(part[:, ::-1] if view.flip else part, self.side, self.antialias)


def resize_bicubic(frame: UInt8[np.ndarray, "h w 3"], side: int, antialias: bool) -> UInt8[np.ndarray, "s s 3"]:
    """Resize to a square by torch in float32 and round, as torchvision resizes a uint8 tensor."""
    return _resize(torch.from_numpy(np.ascontiguousarray(frame))[None], side, antialias)[0].numpy()


def _resize(frames: UInt8[Tensor, "t h w 3"], side: int, antialias: bool) -> UInt8[Tensor, "t s s 3"]:
    if frames.shape[1:3] == (side, side):
        return frames
    pixels = frames.permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias)
    return resized.permute(0, 2, 3, 1).clamp_(0, 255).round_().to(torch.uint8)


def draw_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop, distributed as torchvision's RandomResizedCrop."""
    for _ in range(TRIES):
        area = height * width * rng.uniform(*SCALE)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            return int(top), int(left), rows, columns
    columns, rows = width, height
    if width / height < ASPECT[0]:
        rows = round(width / ASPECT[0])
    elif width / height > ASPECT[1]:
        columns = round(height * ASPECT[1])
    return (height - rows) // 2, (width - columns) // 2, rows, columns

"""Pairs of views of one video, for objectives that predict one view from the other or match them.

`PairStream` gives clips uint8 [2,T,side,side,3], so a batch is [B,2,T,side,side,3], with a record of the frames and
crops of each pair. As in every stream, a visit depends only on the seed and its number: a run can resume at any clip.

    stream = PairStream(videos, config, frames=1, side=224, seed=0, pairing=SIAM_MAE)
    for batch in open_loader(stream, device, batches=100, batch_size=64):
        first, second = batch.clip.unbind(1)
        drawn = [pair for video in batch.videos for pair in video.drawn]  # a DrawnPair for each of the B clips
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from umt_fast.config import ConfigError
from umt_fast.data.clips import ClipStream
from umt_fast.data.crops import Clip, Crop, View, draw_area_view
from umt_fast.data.sampling import Timeline
from umt_fast.data.video import Video

if TYPE_CHECKING:
    from jaxtyping import UInt8


@dataclass(frozen=True)
class Pairing:
    """How the two views of a pair are related."""

    views: Literal["shared", "independent", "nested"] = "shared"
    """shared: one crop and flip for both views; independent: one for each; nested: the second crops the first."""
    gap: tuple[int, int] = (0, 0)
    """Least and largest number of frames from the first view to the second; (0, 0): the same frames."""
    step: int = 1
    """A view has every step-th frame of the video."""
    area: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest area of a crop, as a share of the frame."""
    inner_area: tuple[float, float] = (0.3, 0.6)
    """Smallest and largest area of a nested second view, as a share of the first view."""
    flip: float = 0.5

    def __post_init__(self) -> None:
        if self.views not in ("shared", "independent", "nested"):
            raise ConfigError(f"pairing.views = {self.views!r}: give shared, independent or nested")
        if not 0 <= self.gap[0] <= self.gap[1]:
            raise ConfigError(f"pairing.gap = {self.gap}: must ascend from 0")
        if self.step < 1:
            raise ConfigError(f"pairing.step = {self.step}: must be an integer >= 1")
        for name in ("area", "inner_area"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ConfigError(f"pairing.{name} = {(low, high)}: must ascend in (0, 1]")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"pairing.flip = {self.flip}: must be in [0, 1]")


SIAM_MAE = Pairing("shared", gap=(4, 48))
"""Two frames with one crop (SiamMAE, arXiv 2305.14344)."""
CROP_MAE = Pairing("nested", area=(0.1, 1.0))
"""A frame and a crop of it, each mirrored or not (CropMAE, arXiv 2403.17823)."""


class DrawnPair(NamedTuple):
    """Frames and crops of a pair."""

    frames: tuple[tuple[int, ...], tuple[int, ...]]
    """Frame ids of both views."""
    views: tuple[View, View]
    """Crops of both views."""


@dataclass
class PairStream(ClipStream):
    """A stream of pairs. The `config.crops_per_clip` pairs of a visit share their frames and have different crops."""

    pairing: Pairing = field(default_factory=Pairing)

    @property
    def needs_frames(self) -> bool:
        return True

    @property
    def clips_shape(self) -> tuple[int, ...]:
        return self.clips_per_visit, 2, self.frames, self.side, self.side, 3

    def draw_frames(self, timeline: Timeline, rng: np.random.Generator) -> list[int]:
        """Frames of the first view, then of the second."""
        first, second = draw_frame_pair(timeline.num_frames, self.frames, self.pairing, rng)
        return first + second

    def choose_frames(self, video: Video, timeline: Timeline, rng: np.random.Generator) -> Sequence[int]:
        indices = super().choose_frames(video, timeline, rng)
        self._frame_ids = tuple(indices[: self.frames]), tuple(indices[self.frames :])
        return indices

    def begin_clips(self, width: int, height: int, rng: np.random.Generator, out: np.ndarray) -> Sequence[Clip]:
        pairs = [draw_view_pair(width, height, self.pairing, rng) for _ in range(self.clips_per_visit)]
        self.drawn = [DrawnPair(self._frame_ids, views) for views in pairs]
        return [
            _ViewOfPair(Crop(view, clip), second * self.frames)
            for views, clips in zip(pairs, out, strict=True)
            for second, (view, clip) in enumerate(zip(views, clips, strict=True))
        ]


class _ViewOfPair:
    """One view of a pair: the visit's frames from position `first` on."""

    def __init__(self, crop: Crop, first: int) -> None:
        self._crop, self._first = crop, first

    def add(self, places: list[int], frame: UInt8[np.ndarray, "h w 3"]) -> None:
        own = [place - self._first for place in places if 0 <= place - self._first < len(self._crop.out)]
        if own:
            self._crop.add(own, frame)

    def finish(self) -> None:
        self._crop.finish()


def draw_frame_pair(total: int, frames: int, pairing: Pairing, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Frame ids of both views in a video of `total` frames.

    The gap is drawn uniformly from the gaps that fit the video, then the start from those where both views fit. A video
    too short for the smallest gap, or for a view, repeats its last frame.
    """
    span = (frames - 1) * pairing.step
    least, most = pairing.gap
    gap = int(rng.integers(least, max(min(most, total - 1 - span), least) + 1))
    start = int(rng.integers(max(total - span - gap, 1)))
    first = [min(start + index * pairing.step, total - 1) for index in range(frames)]
    return first, [min(index + gap, total - 1) for index in first]


def draw_view_pair(width: int, height: int, pairing: Pairing, rng: np.random.Generator) -> tuple[View, View]:
    """The crops of both views in frames of `width` x `height` pixels."""
    first = draw_area_view(width, height, pairing.area, pairing.flip, rng)
    if pairing.views == "shared":
        return first, first
    if pairing.views == "independent":
        return first, draw_area_view(width, height, pairing.area, pairing.flip, rng)
    inner = draw_area_view(first.width, first.height, pairing.inner_area, pairing.flip, rng)
    return first, View(first.x + inner.x, first.y + inner.y, inner.width, inner.height, inner.flip)

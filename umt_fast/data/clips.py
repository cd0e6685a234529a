"""Which clips a run sees, in what order: the same whatever decodes them, on whatever number of ranks and workers.

A run visits videos one after another. Visit number v belongs to epoch v // n of a list of n videos, each epoch in its
own random order, and gives `crops_per_clip` clips: the same frames, cropped and flipped anew (the published
num_sample). So clip number i of a run is always the same clip, and a run is resumed at its clip.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.crops import Clip, Cut, View, draw_view
from umt_fast.data.index import VideoList
from umt_fast.data.sampling import epoch_order, sample_rng, segment_frames

REPLACEMENTS = 20
"""Other videos tried in the place of one that cannot be read."""


@dataclass
class ClipStream:
    """Every choice made for a visit is a function of (seed, v) alone."""

    videos: VideoList
    config: DataConfig
    frames: int
    """Per clip."""
    side: int
    """Of a clip, pixels."""
    seed: int

    def __post_init__(self) -> None:
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def clips_shape(self) -> tuple[int, int, int, int, int]:
        """Of the clips of one visit: [R,T,H,W,3]."""
        return self.config.crops_per_clip, self.frames, self.side, self.side, 3

    def attempts(self, visit: int) -> Iterator[tuple[int, np.random.Generator]]:
        """The video's place in the list and the source of what is drawn for it; then those tried in its place."""
        epoch, place = divmod(visit, len(self.videos))
        first = index = int(self._epoch_order(epoch)[place])
        for attempt in range(1 + REPLACEMENTS):
            rng = sample_rng(self.seed, epoch, first, attempt)
            if attempt:
                index = int(rng.integers(len(self.videos)))
            yield index, rng

    def row_of(self, visit: int, failed: int) -> int:
        """The place in the list of the video that a visit reads after `failed` others could not be."""
        return next(itertools.islice(self.attempts(visit), failed, None))[0]

    def draw_frames(self, count: int, rng: np.random.Generator) -> list[int]:
        """Indices of a clip's frames in a video of `count`. Drawn before the views."""
        return segment_frames(count, self.frames, rng)

    def draw_views(self, width: int, height: int, rng: np.random.Generator) -> list[View]:
        """What each of the visit's clips shows of frames of this size."""
        scales, flip = self.config.crop_scales, self.config.flip
        return [draw_view(width, height, self.side, scales, flip, rng) for _ in range(self.config.crops_per_clip)]

    def begin_clips(self, width: int, height: int, rng: np.random.Generator, out: np.ndarray) -> list[Clip]:
        """The visit's clips, which will be written to `out` [R,T,H,W,3]; they get frames of this size one by one."""
        return [Cut(view, clip) for view, clip in zip(self.draw_views(width, height, rng), out, strict=True)]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, len(self.videos)))
        return self._order[1]

"""Test views of a list's videos: each video is decoded once for all its views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from umt_fast.config import DataConfig, FrameRule, LabelledDataConfig, TestConfig, VitConfig
from umt_fast.data.clips import ClipStream
from umt_fast.data.index import VideoList
from umt_fast.data.sampling import Timeline, test_frames, validation_frames
from umt_fast.data.views import centre_box, crop_boxes, resize_bilinear, resized_size

if TYPE_CHECKING:
    from jaxtyping import UInt8


@dataclass(frozen=True)
class Views:
    """The clips of a video in a test: `segments` views in time, each with `crops` crops (UMT's fine-tuning).

    View number = time view * crops + crop. `sample` is the frame sampling of a `ClipStream`, the object its transform.
    """

    frames: int
    """Frames per clip."""
    side: int
    """Height and width of a clip; the short side of the frame is resized to it."""
    rule: FrameRule = "sparse"
    rate: float = 1
    """A `dense` clip has every rate-th frame of the video."""
    fps: float | None = None
    """Frames per second of a `dense` clip, instead of `rate`."""
    segments: int = 1
    crops: int = 1
    validation: bool = False
    """The single view of validation; its frames and its crop are rounded differently from those of a test."""

    @classmethod
    def of(cls, sizes: VitConfig, data: LabelledDataConfig, test: TestConfig, validation: bool = False) -> Views:
        """The views of the given settings."""
        return cls(
            sizes.frames, sizes.image_size, data.rule, data.rate, data.fps, test.segments, test.crops, validation
        )

    @property
    def clips(self) -> int:
        """Number of views per video."""
        return 1 if self.validation else self.segments * self.crops

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one view."""
        return self.frames, self.side, self.side, 3

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def sample(self, timeline: Timeline, rng: np.random.Generator | None = None) -> list[int]:
        """Frame ids of all time views of a video, view after view."""
        total, rate = timeline.num_frames, self.rate if self.fps is None else timeline.fps / self.fps
        if self.validation:
            return validation_frames(total, self.frames, self.rule, rate)
        views = range(self.segments)
        return [i for view in views for i in test_frames(total, self.frames, self.rule, self.segments, view, rate)]

    def __call__(
        self,
        frames: list[UInt8[np.ndarray, "h w 3"]],
        out: UInt8[np.ndarray, "v t s s 3"],
        rng: np.random.Generator | None = None,
    ) -> None:
        """Crop the frames of `sample` to all views, as the published test does."""
        crops = 1 if self.validation else self.crops
        made: dict[int, int] = {}  # a frame in several views is resized once
        for place, frame in enumerate(frames):
            time, index = divmod(place, self.frames)
            views = out[time * crops : (time + 1) * crops, index]
            before = made.setdefault(id(frame), place)
            if before != place:
                time, index = divmod(before, self.frames)
                views[:] = out[time * crops : (time + 1) * crops, index]
                continue
            height, width = resized_size(frame.shape[0], frame.shape[1], self.side)
            if self.validation:
                views[0] = resize_bilinear(frame, height, width, centre_box(height, width, self.side))
                continue
            boxes = crop_boxes(height, width, self.side, crops)
            if crops == 1:
                views[0] = resize_bilinear(frame, height, width, boxes[0])
                continue
            whole = resize_bilinear(frame, height, width)
            for view, box in zip(views, boxes, strict=True):
                view[:] = whole[box.top : box.top + box.height, box.left : box.left + box.width]


def view_stream(videos: VideoList, views: Views, config: DataConfig) -> ClipStream:
    """All views of each video, in the order of the list, once; unreadable videos are left out."""
    return ClipStream(
        videos,
        config,
        views.frames,
        views.side,
        seed=0,
        sampling=views.sample,
        transform=views,
        shuffle=False,
        replace=False,
    )

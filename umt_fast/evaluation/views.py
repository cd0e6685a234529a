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
    """Which clips of a video a test looks at: `segments` in time, each cut into `crops` (UMT's fine-tuning).

    View number = time view * crops + crop. It is both the frame sampling and the transform of a `ClipStream`.
    """

    frames: int
    """Per clip."""
    side: int
    """Height and width of a clip; the short side of the frame is resized to it."""
    rule: FrameRule = "sparse"
    rate: float = 1
    """Frames of the video per frame of a `dense` clip."""
    fps: float | None = None
    """Frames of a `dense` clip per second, in place of `rate`."""
    segments: int = 1
    crops: int = 1
    validation: bool = False
    """The one view of validation: its frames and its centre are rounded in a way of their own."""

    @classmethod
    def of(cls, sizes: VitConfig, data: LabelledDataConfig, test: TestConfig, validation: bool = False) -> Views:
        """The views that settings ask for."""
        return cls(
            sizes.frames, sizes.image_size, data.rule, data.rate, data.fps, test.segments, test.crops, validation
        )

    @property
    def clips(self) -> int:
        """Views of a video."""
        return 1 if self.validation else self.segments * self.crops

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one view."""
        return self.frames, self.side, self.side, 3

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def sample(self, timeline: Timeline, rng: np.random.Generator | None = None) -> list[int]:
        """Frames of all time views of a video, one view behind the other."""
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
        """Cut the frames that `sample` asked for into all views, as the published test does."""
        crops = 1 if self.validation else self.crops
        made: dict[int, int] = {}  # a frame that several views share is resized once
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
    """A list's videos in its order, once, each as all its views; one that cannot be read is left out."""
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

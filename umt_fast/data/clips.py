"""The clips of a run and their order, which do not depend on the decoder or the number of ranks and workers.

A run visits one video after another. With a list of n videos, visit v belongs to epoch v // n, and each epoch has its
own random order. A visit gives several clips of the same frames, each cropped and flipped anew (the published
num_sample). Therefore clip i of a run is always the same clip, and a run can resume at any clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from umt_fast.config import DataConfig, FileDecoder
from umt_fast.data.crops import Clip, Crop, View, draw_area_view, draw_view
from umt_fast.data.index import VideoList
from umt_fast.data.sampling import (
    FrameSampling,
    StrideSampling,
    Timeline,
    epoch_order,
    frames_at_rate,
    sample_rng,
    segment_frames,
    spread_frames,
)
from umt_fast.data.video import Limits, Video

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from torch import Tensor

    from umt_fast.data.decode.motion_vectors import MotionMaps

REPLACEMENTS = 20
"""Number of other videos to try when a video is unreadable."""


class ClipTransform(Protocol):
    """Makes the clips of a visit from its frames, in a worker process: an augmentation, or the views of a test."""

    @property
    def clips(self) -> int:
        """Number of clips per visit."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one clip."""

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the clips, e.g. `np.dtype(np.float32)`."""

    def __call__(self, frames: list[UInt8[np.ndarray, "h w 3"]], out: np.ndarray, rng: np.random.Generator) -> None:
        """Write the clips to `out`, `[clips, *shape]`. `frames` are RGB, in the order of the frame sampling. They may
        differ in size. A frame that is sampled twice is the same array twice, so frames must not be written to."""


@runtime_checkable
class ViewTransform(ClipTransform, Protocol):
    """A transform that crops all frames to one view and resizes it; DALI can do the decoding and cropping."""

    def draw_view(self, width: int, height: int, rng: np.random.Generator) -> View:
        """Draw the crop of frames of this size."""

    def resize(self, parts: UInt8[Tensor, "t h w 3"], flip: bool) -> UInt8[Tensor, "t s s 3"]:
        """Make the clip from cropped frames, on any device."""


@dataclass
class ClipStream:
    """The clips of a run. Every random choice for visit v is a function of (seed, v) alone."""

    videos: VideoList
    config: DataConfig
    frames: int
    """Frames of a clip."""
    side: int
    """Height and width of a clip, pixels."""
    seed: int
    sampling: FrameSampling | None = None
    """Frame sampling of a visit; None: by `config`, by default one frame from each of `frames` equal parts (TSN)."""
    transform: ClipTransform | None = None
    """Makes the clips; None: `config.crops_per_clip` crops with flips, uint8 [T,side,side,3]."""
    shuffle: bool = True
    """False: every epoch follows the order of the list, as in an evaluation."""
    replace: bool = True
    """Whether another video replaces an unreadable one. False: its clips are missing from the batch."""
    motion: MotionMaps | None = field(default=None, init=False)
    """Decoders store the motion vectors of the visit's frames here; None: the stream does not use them."""
    drawn: Any = field(default=None, init=False)
    """Record of the random choices for the last visit, in streams that publish them; `Batch.videos` has it."""

    def __post_init__(self) -> None:
        self.videos.limits = Limits.of(self.config)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self.file_decoder: FileDecoder = self.config.file_decoder
        # Checked once per stream: a check against a protocol takes 1% of the time of decoding a clip.
        self._cuts_views = self.transform if isinstance(self.transform, ViewTransform) else None

    @property
    def needs_frames(self) -> bool:
        """Whether its clips need whole frames, as `file_decoder` gives them; decoders with a loader only cut views."""
        return self.transform is not None and self._cuts_views is None

    @property
    def clips_per_visit(self) -> int:
        return self.config.crops_per_clip if self.transform is None else self.transform.clips

    @property
    def clips_shape(self) -> tuple[int, ...]:
        """Shape of the clips of one visit: [R,T,H,W,3], or what the transform makes."""
        shape = (self.frames, self.side, self.side, 3) if self.transform is None else self.transform.shape
        return self.clips_per_visit, *shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8) if self.transform is None else self.transform.dtype

    def attempts(self, visit: int) -> Iterator[tuple[int, np.random.Generator]]:
        """Row of the visit's video and its random generator; then the same for each replacement to try."""
        epoch, place = divmod(visit, len(self.videos))
        first = index = int(self._epoch_order(epoch)[place]) if self.shuffle else place
        for attempt in range(1 + (REPLACEMENTS if self.replace else 0)):
            rng = sample_rng(self.seed, epoch, first, attempt)
            if attempt:
                index = int(rng.integers(len(self.videos)))
            yield index, rng

    def choose_frames(self, video: Video, timeline: Timeline, rng: np.random.Generator) -> Sequence[int]:
        """Indices of a visit's frames, within the part of the video that the list names. Raises BadVideo if this part
        has no frame."""
        if video.part is None:
            return self.draw_frames(timeline, rng)
        first, last = video.part.bounds(timeline)
        return [first + index for index in self.draw_frames(timeline.between(first, last), rng)]

    def draw_frames(self, timeline: Timeline, rng: np.random.Generator) -> Sequence[int]:
        """Indices of a visit's frames. They are drawn before the views."""
        if self.sampling is not None:
            return self.sampling(timeline, rng)
        if self.config.frame_step is not None:
            return StrideSampling(self.frames, self.config.frame_step)(timeline, rng)
        if self.config.frame_rate is not None:
            return frames_at_rate(timeline, self.frames, self.config.frame_rate, rng)
        if self.config.clip_seconds is not None:
            return spread_frames(timeline, self.frames, self.config.clip_seconds, rng)
        return segment_frames(timeline.num_frames, self.frames, rng)

    def draw_views(self, width: int, height: int, rng: np.random.Generator) -> list[View]:
        """The crop of each of the visit's clips, from frames of this size."""
        if self._cuts_views is not None:
            return [self._cuts_views.draw_view(width, height, rng)]
        scales, flip, area = self.config.crop_scales, self.config.flip, self.config.crop_area
        if area is not None:
            return [draw_area_view(width, height, area, flip, rng) for _ in range(self.config.crops_per_clip)]
        return [draw_view(width, height, self.side, scales, flip, rng) for _ in range(self.config.crops_per_clip)]

    def begin_clips(self, width: int, height: int, rng: np.random.Generator, out: np.ndarray) -> Sequence[Clip]:
        """The visit's clips: the caller adds the frames, of this size, one by one; `finish` writes to `out` [R,...]."""
        if self.transform is not None:
            return [_TransformedClips(self.transform, rng, out)]
        return [Crop(view, clip) for view, clip in zip(self.draw_views(width, height, rng), out, strict=True)]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, len(self.videos)))
        return self._order[1]


class _TransformedClips:
    """All clips of a visit; the frames are kept until the last one is decoded."""

    def __init__(self, transform: ClipTransform, rng: np.random.Generator, out: np.ndarray) -> None:
        self._transform, self._rng, self._out = transform, rng, out
        self._frames: dict[int, np.ndarray] = {}

    def add(self, places: list[int], frame: np.ndarray) -> None:
        self._frames.update(dict.fromkeys(places, frame))

    def finish(self) -> None:
        self._transform([self._frames[place] for place in range(len(self._frames))], self._out, self._rng)

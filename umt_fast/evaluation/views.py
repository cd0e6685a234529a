"""Test views of a list's videos: each video is decoded once for all its views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from umt_fast.config import DataConfig
from umt_fast.data.decode import by_index
from umt_fast.data.index import BadVideo, Video, VideoList
from umt_fast.data.loader import Prepared, empty_for_parent
from umt_fast.data.sampling import FrameRule, test_frames, validation_frames
from umt_fast.data.views import centre_box, crop_boxes, resize_bilinear, resized_size

if TYPE_CHECKING:
    from jaxtyping import UInt8


@dataclass(frozen=True)
class Views:
    """Which clips of a video a test looks at: `segments` in time, each cut into `crops`."""

    frames: int
    """Per clip."""
    side: int
    """Of a clip; the short side of the frame is resized to it."""
    rule: FrameRule = "sparse"
    rate: float = 1
    """Frames of the video per frame of a `dense` clip."""
    segments: int = 1
    crops: int = 1
    validation: bool = False
    """The one view of validation: its frames and its centre are rounded in a way of their own."""

    @property
    def count(self) -> int:
        """Views of a video; view number = time view * crops + crop."""
        return 1 if self.validation else self.segments * self.crops

    def frame_ids(self, total: int) -> list[int]:
        """Frames of all time views of a video of `total` frames, one view behind the other."""
        if self.validation:
            return validation_frames(total, self.frames, self.rule, self.rate)
        views = range(self.segments)
        return [i for view in views for i in test_frames(total, self.frames, self.rule, self.segments, view, self.rate)]


def read_views(video: Video, views: Views, out: UInt8[np.ndarray, "v t s s 3"]) -> None:
    """Write all views of a video to `out`, as the published test cuts them. Raises BadVideo."""
    crops = 1 if views.validation else views.crops
    for places, frame in by_index.iterate_frames(video, views.frame_ids):
        height, width = resized_size(frame.shape[0], frame.shape[1], views.side)
        if views.validation:
            boxes = [centre_box(height, width, views.side)]
        else:
            boxes = crop_boxes(height, width, views.side, crops)
        whole = resize_bilinear(frame, height, width) if crops > 1 else None
        for crop, box in enumerate(boxes):
            if whole is None:
                part = resize_bilinear(frame, height, width, box)
            else:
                part = whole[box.top : box.top + box.height, box.left : box.left + box.width]
            for place in places:
                time, index = divmod(place, views.frames)
                out[time * crops + crop, index] = part


@dataclass
class ViewBatch:
    """All views of some videos; those of a video that could not be read are zeros."""

    clips: UInt8[Tensor, "n v t s s 3"]
    rows: list[int]
    """The place in the list of each video that was read."""
    places: list[int]
    """Their places in `clips`."""
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    """Row, name and reason of each video that could not be read."""

    def pin_memory(self) -> ViewBatch:
        self.clips = self.clips.pin_memory()
        return self


class ViewDataset(Dataset[ViewBatch]):
    """Groups of a list's videos by their rows. Rows beyond the list are left out, so that every group has one size."""

    def __init__(self, videos: VideoList, views: Views) -> None:
        self.videos = videos
        self.views = views

    def __getitem__(self, rows: list[int]) -> ViewBatch:
        views = self.views
        clips = empty_for_parent((len(rows), views.count, views.frames, views.side, views.side, 3))
        batch = ViewBatch(clips, [], [])
        for place, (row, out) in enumerate(zip(rows, clips.numpy(), strict=True)):
            out[:] = 0
            if row >= len(self.videos):
                continue
            name = f"row {row + 1} of the list"
            try:
                video = self.videos[row]
                name = video.name
                read_views(video, views, out)
            except (BadVideo, OSError) as error:
                batch.bad.append((row, name, str(error)))
                out[:] = 0
            except Exception as error:  # a decoder's own surprise must not end the test
                batch.bad.append((row, name, f"{type(error).__name__}: {error}"))
                out[:] = 0
            else:
                batch.rows.append(row)
                batch.places.append(place)
        return batch


def iterate_views(
    videos: VideoList,
    views: Views,
    config: DataConfig,
    group: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterator[ViewBatch]:
    """Batches of `group` videos of one rank, decoded by `config.workers` processes.

    The groups are the same for every number of ranks, which take turns: no video is lost or read twice.
    """
    groups = -(-len(videos) // group)
    prepared = Prepared(
        ViewDataset(videos, views),
        replace(config, crops_per_clip=1),
        start=0,
        batches=len(range(rank, groups, world_size)),
        batch_size=group,
        rank=rank,
        world_size=world_size,
        pin_memory=pin_memory,
    )
    try:
        yield from prepared
    finally:
        prepared.close()

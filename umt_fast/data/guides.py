"""Clips with a fourth channel that guides the mask: the codec's motion, or the labels of a mask video.

The channel is cropped, resized and flipped with the pixels, so it reaches the objective inside the clip.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from umt_fast.config import ConfigError
from umt_fast.data.clips import ClipStream
from umt_fast.data.crops import Clip, Crop, View
from umt_fast.data.decode import IMAGE_SUFFIXES, read_frames
from umt_fast.data.index import suffix_of
from umt_fast.data.manifest import VIDEO_SUFFIXES
from umt_fast.data.sampling import Timeline
from umt_fast.data.video import BadVideo, Video
from umt_fast.files import expand_home

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from torch import Tensor

Guide = Literal["motion", "regions"]
GUIDES: tuple[Guide, ...] = get_args(Guide)
MOTION_SCALE = 4
"""The channel's value for one pixel of motion: codecs count quarter pixels. It saturates near 64 pixels."""


@dataclass
class GuidedStream(ClipStream):
    """Clips uint8 [T,side,side,4]: red, green, blue, and a guide.

    motion   length of the motion vectors, one value per patch of `grid` x `grid` (`umt_fast.data.motion`). The decoder
             returns them with the frames.
    regions  grey values of the mask file in `folder` with the video's name and any suffix: one picture, or a video
             with the same number of frames. Its frames may be smaller. Raises ConfigError if there is no such folder.
    """

    guide: Guide = "motion"
    grid: int = 14
    folder: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide == "regions" and not expand_home(self.folder).is_dir():
            raise ConfigError(f"mask.regions = {self.folder}: no such folder")
        self._visit: tuple[Video, list[int]] | None = None
        if self.guide == "motion":
            from umt_fast.data.decode.motion_vectors import MotionMaps  # imports PyAV

            self.motion = MotionMaps()
            self.file_decoder = "pyav"  # it exports motion vectors

    @property
    def needs_frames(self) -> bool:
        return True

    @property
    def clips_shape(self) -> tuple[int, ...]:
        return self.clips_per_visit, self.frames, self.side, self.side, 4

    def choose_frames(self, video: Video, timeline: Timeline, rng: np.random.Generator) -> Sequence[int]:
        indices = list(super().choose_frames(video, timeline, rng))
        self._visit = video, indices
        if self.motion is not None:
            self.motion.clear()
        return indices

    def begin_clips(self, width: int, height: int, rng: np.random.Generator, out: np.ndarray) -> Sequence[Clip]:
        assert self._visit is not None
        video, indices = self._visit
        guide = self._motion(indices) if self.guide == "motion" else self._regions(video, indices, width, height)
        views = self.draw_views(width, height, rng)
        return [_GuidedClip(view, clip, guide) for view, clip in zip(views, out, strict=True)]

    def _motion(self, indices: list[int]) -> Callable[[View], np.ndarray]:
        from umt_fast.data.motion import pool  # imports PyAV

        assert self.motion is not None
        maps = self.motion

        def guide(view: View) -> np.ndarray:
            return motion_channel(torch.stack([pool(maps.get(index), self.grid, view) for index in indices]), self.side)

        return guide

    def _regions(self, video: Video, indices: list[int], width: int, height: int) -> Callable[[View], np.ndarray]:
        source = Video(str(find_mask(self.folder, video)), limits=video.limits)
        frames = read_frames(source, lambda total: [0] * len(indices) if total == 1 else _within(indices, total))
        labels = np.stack([frame[..., 0] for frame in frames])
        return lambda view: cut_labels(labels, view, width, height, self.side)


class _GuidedClip:
    """A clip whose guide is computed after all frames are added."""

    def __init__(self, view: View, out: UInt8[np.ndarray, "t s s 4"], guide: Callable[[View], np.ndarray]) -> None:
        self._out, self._guide = out, guide
        self._pixels = np.empty((*out.shape[:3], 3), np.uint8)
        self._crop = Crop(view, self._pixels)

    def add(self, places: list[int], frame: UInt8[np.ndarray, "h w 3"]) -> None:
        self._crop.add(places, frame)

    def finish(self) -> None:
        self._crop.finish()
        self._out[..., :3] = self._pixels
        self._out[..., 3] = self._guide(self._crop.view)


def motion_channel(motion: Float[Tensor, "t p"], side: int) -> UInt8[np.ndarray, "t s s"]:
    """Motion of patches, in pixels, as a channel of a clip: times `MOTION_SCALE`, rounded, at most 255."""
    grid = round(motion.shape[1] ** 0.5)
    values = (motion * MOTION_SCALE).round().clamp(0, 255).to(torch.uint8).view(-1, grid, grid).numpy()
    return values.repeat(side // grid, 1).repeat(side // grid, 2)


def find_mask(folder: str, video: Video) -> Path:
    """The file of `folder` that has the video's name up to the suffix. Raises BadVideo."""
    name = Path(video.member or video.path).stem
    found = [
        path
        for path in sorted(glob.glob(f"{glob.escape(str(expand_home(folder) / name))}.*"))
        if suffix_of(path) in VIDEO_SUFFIXES | IMAGE_SUFFIXES  # a caption or label may lie beside it
    ]
    if not found:
        raise BadVideo(f"no mask video {name}.* in --mask.regions {folder}")
    return Path(found[0])


def _within(indices: list[int], total: int) -> list[int]:
    if max(indices) >= total:
        raise BadVideo(f"its mask video has {total} frames, but frame {max(indices)} is needed")
    return indices


def cut_labels(
    labels: UInt8[np.ndarray, "t h w"], view: View, width: int, height: int, side: int
) -> UInt8[np.ndarray, "t s s"]:
    """Crop label frames to a view of `width` x `height` frames, by nearest neighbour: labels must not be mixed."""
    centre = (np.arange(side) + 0.5) / side
    rows = ((view.y + centre * view.height) * labels.shape[1] / height).astype(int)
    columns = ((view.x + centre * view.width) * labels.shape[2] / width).astype(int)
    cut = labels[:, rows.clip(max=labels.shape[1] - 1)][:, :, columns.clip(max=labels.shape[2] - 1)]
    return cut[:, :, ::-1] if view.flip else cut

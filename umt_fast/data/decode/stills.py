"""Picture files as videos of one frame, and folders of pictures as videos."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from umt_fast.data.decode import IMAGE_SUFFIXES
from umt_fast.data.decode.time_limit import current_limit
from umt_fast.data.index import suffix_of
from umt_fast.data.sampling import Timeline
from umt_fast.data.storage import CannotReach, read_video
from umt_fast.data.video import BadVideo, Limits, Video

if TYPE_CHECKING:
    from jaxtyping import UInt8


_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
"""Allowed formats. Others are refused with any suffix: Pillow would run Ghostscript on EPS."""


class Still:
    """A picture, as a `Reader`."""

    def __init__(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        self.timeline = Timeline([0], lambda: 1.0)
        self._frame = frame

    def read(self, indices: list[int]) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
        for index in indices:
            yield index, self._frame


@contextlib.contextmanager
def opened(video: Video, content: bytes | None = None) -> Iterator[Still]:
    """Decode a picture as RGB. Raises BadVideo if the file is missing, damaged or not a picture."""
    try:
        data = read_video(video) if content is None else content
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > video.limits.max_pixels:
                raise ValueError(f"{width} x {height}, more than --data.max-pixels {video.limits.max_pixels}")
            pixels: Image.Image = picture
            if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white
                pixels = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            frame = np.array(pixels.convert("RGB"))
    except (OSError, SyntaxError, ValueError, CannotReach, Image.DecompressionBombError) as error:
        raise BadVideo(f"not a picture: {error}") from None
    yield Still(frame)


class FrameFolder:
    """A folder of pictures, one per frame, as a `Reader`; they are ordered by the numbers in their names."""

    def __init__(self, pictures: list[str], limits: Limits) -> None:
        self._limits = limits
        self.timeline = Timeline(range(len(pictures)), lambda: 1 / _FOLDER_FPS)
        self._pictures = pictures

    def read(self, indices: list[int]) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
        for index in indices:
            try:
                current_limit().check()
                with opened(Video(self._pictures[index], limits=self._limits)) as still:
                    yield from ((index, frame) for _, frame in still.read([0]))
            except BadVideo as error:
                raise BadVideo(f"frame {index}, {os.path.basename(self._pictures[index])}: {error}") from None


_FOLDER_FPS = 25
"""Assumed frames per second of a folder of frames."""


@contextlib.contextmanager
def opened_folder(video: Video, content: bytes | None = None) -> Iterator[FrameFolder]:
    """List the pictures of a folder. Raises BadVideo if there are none."""
    if video.refused:
        raise BadVideo(video.refused)
    try:
        names = [
            name for name in os.listdir(video.path) if suffix_of(name) in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    except OSError as error:
        raise BadVideo(error.strerror or str(error)) from None
    if not names:
        raise BadVideo(f"a directory without a picture; looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    names.sort(key=lambda name: ([int(number) for number in re.findall("[0-9]+", name)], name))
    yield FrameFolder([os.path.join(video.path, name) for name in names], video.limits)

"""Picture files as videos of one frame."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from umt_fast.data.index import BadVideo, Video
from umt_fast.data.sampling import Timeline
from umt_fast.data.storage import CannotReach, read_video

if TYPE_CHECKING:
    from jaxtyping import UInt8


_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
"""Others are refused whatever the name says: Pillow runs Ghostscript on EPS."""


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
    """Decode a picture as RGB. Raises BadVideo for a file that is missing or not a picture that Pillow reads whole."""
    try:
        data = read_video(video) if content is None else content
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > video.limits.max_pixels:
                raise ValueError(f"{width} x {height}, more than --data.max-pixels {video.limits.max_pixels}")
            frame = np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, CannotReach, Image.DecompressionBombError) as error:
        raise BadVideo(f"not a picture: {error}") from None
    yield Still(frame)

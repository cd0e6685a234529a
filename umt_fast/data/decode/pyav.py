"""The decoder `pyav`: FFmpeg on the CPU, with the packets' places from the index where it has them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from umt_fast.data.decode import by_index, container
from umt_fast.data.video import Video

if TYPE_CHECKING:
    from umt_fast.data.decode import Reader
    from umt_fast.data.decode.motion_vectors import MotionMaps


def opened(
    video: Video, content: bytes | None, square_pixels: bool, motion: MotionMaps | None
) -> contextlib.AbstractContextManager[Reader]:
    """A reader of a video file. Arguments and errors are those of `decode.open_video`."""
    if by_index.can_read(video):
        return by_index.opened(video, content, motion)
    return container.opened(video, content, square_pixels, motion)

"""The front door of decoding: frames of any video by index.

`umt_fast.data.decode.choice` says which decoder a run uses. A decoder of files is a module of its name here, with a
function `opened` as in `pyav`. `stills` reads pictures and folders of pictures for every decoder.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from umt_fast.config import FileDecoder
from umt_fast.data.sampling import Timeline
from umt_fast.data.video import Facts, Video

if TYPE_CHECKING:
    from jaxtyping import UInt8

    from umt_fast.data.decode.motion_vectors import MotionMaps

IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".webp"))
"""Suffixes of picture files; a picture is a video of one frame."""


class Reader(Protocol):
    """An open video."""

    @property
    def timeline(self) -> Timeline: ...

    def read(self, indices: list[int]) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
        """The frames at ascending `indices`, one by one, RGB and upright. Raises BadVideo."""
        ...


Opener = Callable[[Video, "bytes | None", bool, "MotionMaps | None"], contextlib.AbstractContextManager[Reader]]
"""(video, content, square_pixels, motion), as of `open_video` -> a reader."""


@contextlib.contextmanager
def open_video(
    video: Video,
    content: bytes | None = None,
    square_pixels: bool = False,
    motion: MotionMaps | None = None,
    decoder: FileDecoder = "pyav",
) -> Iterator[Reader]:
    """Open a video, a picture or a folder of frames, to read frames by index.

    `content`: the file's bytes, where the caller has them. `square_pixels`: scale frames with other pixels to the width
    at which players show them; a copy of `prepare` stays as it was made. `motion`: where to put the motion vectors of
    the frames that are read. `decoder`: what opens files other than pictures.

    For each requested frame only the frames from the key frame before it are decoded.

    Raises BadVideo for a file that is missing, empty, truncated or not a video, that does not decode at a requested
    frame, or that differs from its index.
    """
    reading: contextlib.AbstractContextManager[Reader]
    if posixpath.splitext(video.member or video.path)[1].lower() in IMAGE_SUFFIXES:
        from umt_fast.data.decode import stills  # needs Pillow

        reading = stills.opened(video, content)
    elif video.facts is None and content is None and not video.remote and _is_folder(video):
        from umt_fast.data.decode import stills

        reading = stills.opened_folder(video, content)
    else:
        reading = opener_of(decoder)(video, content, square_pixels, motion)
    try:
        with reading as reader:
            yield reader
    finally:
        if motion is not None:
            gc.collect(0)  # a frame and its side data, once read, are a reference cycle


def _is_folder(video: Video) -> bool:
    return video.offset is None and os.path.isdir(video.path)


@functools.cache
def opener_of(decoder: FileDecoder) -> Opener:
    """The function of a decoder of files; its module is imported when it is first used."""
    return importlib.import_module(f"{__name__}.{decoder}").opened


def read_places(reader: Reader, indices: Sequence[int]) -> Iterator[tuple[list[int], UInt8[np.ndarray, "h w 3"]]]:
    """The frames at `indices` (in any order, repeats allowed) as they are decoded, each with its positions in
    `indices`."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    for index, frame in reader.read(sorted(places)):
        yield places[index], frame


def read_frames(
    video: Video, choose: Callable[[int], Sequence[int]], content: bytes | None = None
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Frames of a video. `choose` gets the number of frames and returns the indices, from 0, in any order, repeats
    allowed; a repeated index gives the same array. Raises BadVideo as `open_video` does."""
    with open_video(video, content) as reader:
        indices = choose(reader.timeline.num_frames)
        found = {place: frame for places, frame in read_places(reader, indices) for place in places}
    return [found[place] for place in range(len(found))]


def probe(video: Video, content: bytes | None = None) -> Facts:
    """Index entry of a video. Lists its packets and decodes its first frame. Raises BadVideo."""
    from umt_fast.data.decode import container

    return container.probe(video, content)

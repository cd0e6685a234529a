"""The front door of decoding: frames of any video by index, and which decoder a run uses."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from umt_fast.config import Decoder
from umt_fast.data.decode import nvdec
from umt_fast.data.sampling import Timeline
from umt_fast.data.video import Facts, Video
from umt_fast.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import UInt8

    from umt_fast.data.decode.motion_vectors import MotionMaps

IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".webp"))
"""Suffixes of picture files, which count as videos of one frame."""
INSTALL = "pip install 'umt-fast[dali]' (for CUDA 12: pip install nvidia-dali-cuda120)"


class Reader(Protocol):
    """An open video."""

    @property
    def timeline(self) -> Timeline: ...

    def read(self, indices: list[int]) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
        """The frames at ascending `indices`, one by one, RGB and upright. Raises BadVideo."""
        ...


@contextlib.contextmanager
def open_video(
    video: Video, content: bytes | None = None, square_pixels: bool = False, motion: MotionMaps | None = None
) -> Iterator[Reader]:
    """Open a video, a picture or a folder of frames, to read frames by index.

    `content`: the file's bytes, where the caller has them. `square_pixels`: scale frames with other pixels to the width
    at which players show them; a copy of `prepare` stays as it was made. `motion`: where to put the motion vectors of
    the frames that are read.

    Only what is needed is decoded: from the key frame before each wanted frame to that frame.

    Raises BadVideo for a file that is missing, empty, truncated, not a video, does not decode at a wanted frame, or
    is not the one that the index describes.
    """
    if posixpath.splitext(video.member or video.path)[1].lower() in IMAGE_SUFFIXES:
        from umt_fast.data.decode import stills  # needs Pillow

        with stills.opened(video, content) as still:
            yield still
        return
    from umt_fast.data.decode import by_index, container  # they import PyAV, which only decoding needs

    reading: contextlib.AbstractContextManager[Reader]
    if by_index.can_read(video):
        reading = by_index.opened(video, content, motion)
    elif content is None and not video.remote and video.offset is None and os.path.isdir(video.path):
        from umt_fast.data.decode import stills

        reading = stills.opened_folder(video, content)
    else:
        reading = container.opened(video, content, square_pixels, motion)
    try:
        with reading as reader:
            yield reader
    finally:
        if motion is not None:
            gc.collect(0)  # frames whose side data was read refer to it, and it to them


def read_places(reader: Reader, indices: Sequence[int]) -> Iterator[tuple[list[int], UInt8[np.ndarray, "h w 3"]]]:
    """The frames at `indices`, in any order and with repeats, as they are decoded, each with its
    positions in `indices`."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    for index, frame in reader.read(sorted(places)):
        yield places[index], frame


def read_frames(
    video: Video, choose: Callable[[int], Sequence[int]], content: bytes | None = None
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Frames of a video. `choose` gets the number of frames and returns the wanted indices, from 0, in any order and
    with repeats; an index asked for twice is the same array. Raises BadVideo as `open_video`."""
    with open_video(video, content) as reader:
        indices = choose(reader.timeline.num_frames)
        found = {place: frame for places, frame in read_places(reader, indices) for place in places}
    return [found[place] for place in range(len(found))]


def probe(video: Video, content: bytes | None = None) -> Facts:
    """Index entry of a video. Lists its packets and decodes its first frame. Raises BadVideo."""
    from umt_fast.data.decode import container

    return container.probe(video, content)


class MissingDali(RunError):
    """DALI was asked for and is not installed."""


@dataclass(frozen=True)
class Choice:
    """A decoder, and why."""

    dali: bool
    engines: dict[str, nvdec.Limits] | None
    """What NVDEC supports; None on the CPU."""
    text: str
    """For the lines at the start of a run."""


def choose_decoder(wanted: Decoder, device: torch.device) -> Choice:
    """`auto` is DALI where it is installed and the device has NVDEC. Raises MissingDali."""
    if wanted == "pyav":
        return Choice(False, None, "pyav")
    installed = has_dali()
    if not installed and wanted == "dali":
        raise MissingDali(f"--data.decoder dali, but DALI is not installed: {INSTALL}")
    try:
        engines = nvdec.limits(device)
    except nvdec.NoEngine as error:
        if wanted == "dali":
            return Choice(True, None, f"dali on the CPU ({error}): VP8, VP9 and MJPEG; the rest pyav")
        return Choice(False, None, "pyav" if device.type == "cpu" else f"pyav ({error})")
    count = nvdec.count_engines(engines)
    if not installed:
        return Choice(False, None, f"pyav (the GPU has {count} NVDEC, but DALI is not installed: {INSTALL})")
    return Choice(True, engines, f"dali on {count} NVDEC ({', '.join(engines)}; the rest pyav)")


def has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):  # no package `nvidia`; blocked in sys.modules
        return False

"""Decoded frames as RGB arrays."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np

from umt_fast.data.decode.motion_vectors import MotionMaps
from umt_fast.data.decode.orientation import UPRIGHT, Orientation, orientation_of

if TYPE_CHECKING:
    from jaxtyping import UInt8

ONE_THREAD = 1
"""Threads of `VideoReformatter.reformat`: waking one per core costs ten times the conversion of a small frame."""


class RgbConverter:
    """Converts the frames of one video to uint8 RGB [H,W,3], upright.

    It keeps FFmpeg's converter, and the display matrix of the first frame. Indexed videos are not mirrored, so their
    rotation shows whether the matrix must be read.
    """

    def __init__(self, indexed: bool, aspect: Fraction = Fraction(1), motion: MotionMaps | None = None) -> None:
        """`aspect`: of a pixel, to which frames are widened. `motion`: where to put the frames' motion vectors."""
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._orientation: Orientation | None = None
        self._indexed = indexed
        self._aspect = None if aspect == 1 else aspect
        self._motion = motion
        self.read_side_data = False

    def orientation(self, frame: av.VideoFrame) -> Orientation:
        if self._orientation is None:
            self.read_side_data = not self._indexed or frame.rotation != 0
            self._orientation = orientation_of(frame) if self.read_side_data else UPRIGHT
        return self._orientation

    def __call__(self, frame: av.VideoFrame, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Frame number `index` of the video."""
        orientation = self._orientation or self.orientation(frame)
        if self._motion is not None:
            self._motion.add(index, frame, orientation)
        upright = orientation is UPRIGHT
        turned = frame if upright else orientation.rotate(frame)
        width = None if self._aspect is None else max(round(frame.width * self._aspect), 1)
        rgb = self._reformatter.reformat(turned, width, format="rgb24", threads=ONE_THREAD)
        (plane,) = rgb.planes  # to_ndarray would copy a plane with padded lines
        shape, strides = (rgb.height, rgb.width, 3), (plane.line_size, 3, 1)
        pixels = np.ndarray(shape, np.uint8, memoryview(plane), strides=strides)
        return pixels if upright else orientation.apply(pixels)

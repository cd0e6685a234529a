"""Rotation and flips that a file prescribes for display, applied as FFmpeg's autorotate does."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type

if TYPE_CHECKING:
    from jaxtyping import Shaped


@dataclass(frozen=True)
class Orientation:
    """Rotation of a picture: first by the angle, then the transposition, then the flips."""

    transpose: bool = False
    flip_rows: bool = False
    """Upside down."""
    flip_columns: bool = False
    """Left to right."""
    degrees: float = 0.0
    """Clockwise angle of a display matrix that is not a multiple of 90 degrees. The picture keeps its size."""

    def apply(self, picture: Shaped[np.ndarray, "h w *channels"]) -> Shaped[np.ndarray, "i j *channels"]:
        """A view of the picture, transposed and flipped. If `degrees` is not 0, call `rotate` first."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        if self.flip_rows:
            picture = picture[::-1]
        return picture[:, ::-1] if self.flip_columns else picture

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the turned picture."""
        return (height, width) if self.transpose else (width, height)

    def rotate(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame rotated by `degrees`, with black corners."""
        if not self.degrees:
            return frame
        graph = Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
        )
        nodes = (source, graph.add("rotate", f"{self.degrees:f}*PI/180"), graph.add("buffersink"))
        graph.link_nodes(*nodes).configure()
        graph.push(frame)
        turned = graph.pull()
        assert isinstance(turned, av.VideoFrame)
        return turned


UPRIGHT = Orientation()


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """The orientation from the display matrix of a decoded frame.

    PyAV's side data and the frame are a reference cycle, so only a garbage collection frees the frame.
    """
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]  # PyAV names its keys str
    return UPRIGHT if matrix is None else from_matrix(bytes(matrix))


@functools.lru_cache(maxsize=64)
def from_matrix(matrix: bytes) -> Orientation:
    """Orientation from FFmpeg's AV_FRAME_DATA_DISPLAYMATRIX, nine 32-bit integers, as `ffmpeg -autorotate` reads it."""
    a, b, _, c, d = np.frombuffer(matrix[:20], "=i4").tolist()
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:
        return UPRIGHT
    theta = float(round(math.degrees(math.atan2(b / down, a / across)))) % 360  # clockwise
    if abs(theta - 90) < 1:
        return Orientation(transpose=True, flip_columns=c <= 0)
    if abs(theta - 180) < 1:
        return Orientation(flip_columns=a < 0, flip_rows=d < 0)
    if abs(theta - 270) < 1:
        return Orientation(transpose=True, flip_rows=True, flip_columns=c < 0)
    if min(theta, 360 - theta) < 1:
        return Orientation(flip_rows=d < 0)
    return Orientation(degrees=theta)

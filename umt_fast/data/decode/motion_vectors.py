"""Motion vectors, which FFmpeg's decoders export with the decoded frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import av
import numpy as np

from umt_fast.data.decode.orientation import Orientation

if TYPE_CHECKING:
    from jaxtyping import Float32

CELL = 4
"""Side of H.264's smallest motion block, pixels."""
EXPORT = {"flags2": "+export_mvs"}
"""The decoder's option that exports motion vectors."""


class MotionMaps(dict[int, "Float32[np.ndarray, 'h w']"]):
    """`motion_map`s by frame index. A reader adds the maps of the frames that it reads.

    Pictures have no map. Frames of codecs whose vectors FFmpeg does not export have maps of zeros.
    """

    def add(self, index: int, frame: av.VideoFrame, orientation: Orientation) -> None:
        self[index] = orientation.apply(motion_map(frame))


def motion_map(frame: av.VideoFrame) -> Float32[np.ndarray, "h w"]:
    """Length of the motion vector, in pixels, at each cell of CELL x CELL pixels of a decoded frame.

    A block with several reference frames counts with the mean, an intra-coded block with 0.
    """
    rows, columns = -(-frame.height // CELL), -(-frame.width // CELL)
    data = frame.side_data.get("MOTION_VECTORS")
    if data is None:
        return np.zeros((rows, columns), np.float32)
    vectors = data.to_ndarray()
    lengths = np.hypot(vectors["motion_x"], vectors["motion_y"]) / np.maximum(vectors["motion_scale"], 1)
    heights, widths = vectors["h"].astype(np.int64), vectors["w"].astype(np.int64)
    tops = np.maximum(vectors["dst_y"] - heights // 2, 0) // CELL
    lefts = np.maximum(vectors["dst_x"] - widths // 2, 0) // CELL
    total, count = np.zeros((2, rows * columns))
    for height, width in set(zip(heights.tolist(), widths.tolist(), strict=True)):
        block = (heights == height) & (widths == width)
        down, right = np.indices((max(height // CELL, 1), max(width // CELL, 1))).reshape(2, -1)
        row, column = tops[block, None] + down, lefts[block, None] + right
        inside = (row < rows) & (column < columns)
        cells = (row * columns + column)[inside]
        weights = np.broadcast_to(lengths[block, None], row.shape)[inside]
        total += np.bincount(cells, weights, rows * columns)
        count += np.bincount(cells, minlength=rows * columns)
    return (total / np.maximum(count, 1)).astype(np.float32).reshape(rows, columns)

"""Motion of a clip's patches from the codec's own motion vectors, which FFmpeg hands out with the decoded frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast.data.crops import View
from umt_fast.data.decode import container
from umt_fast.data.video import BadVideo, Video

if TYPE_CHECKING:
    from jaxtyping import Float

CELL = 4
"""Pixels along a side of the finest block that H.264 moves."""


def read_motion(
    video: Video,
    frame_ids: Sequence[int],
    grid: int,
    view: View | None = None,
    content: bytes | None = None,
) -> Float[Tensor, "t p"]:
    """Mean length of the motion vectors in each patch of the frames `frame_ids`, in pixels, p = grid^2.

    view  the part of the frame that the clip shows; None: all of it.

    Key frames and intra-coded blocks have no vectors and count as 0, and so does every frame of a codec whose vectors
    FFmpeg does not export (it does for H.264, MPEG-1, 2 and 4). Raises BadVideo.
    """
    maps = read_motion_maps(video, frame_ids, content)
    return torch.stack([pool(maps[index], grid, view) for index in frame_ids])


def read_motion_maps(
    video: Video, frame_ids: Sequence[int], content: bytes | None = None
) -> dict[int, Float[Tensor, "h w"]]:
    """`motion_map` of each of the frames, by their ids, in a pass over the file up to the last one. Raises BadVideo."""
    wanted = set(frame_ids)
    found: dict[int, Tensor] = {}
    for index, frame in enumerate(container.each_frame(video, content, {"flags2": "+export_mvs"})):
        if index in wanted:
            found[index] = motion_map(frame)
            if len(found) == len(wanted):
                break
    missing = sorted(wanted - found.keys())
    if missing:
        raise BadVideo(f"no frame {missing[0]}")
    return found


def motion_map(frame: av.VideoFrame) -> Float[Tensor, "h w"]:
    """Length of the motion vector at every cell of CELL x CELL pixels of a decoded frame, upright, in pixels."""
    rows, columns = -(-frame.height // CELL), -(-frame.width // CELL)
    total, vectors = np.zeros((rows, columns), np.float32), np.zeros((rows, columns), np.float32)
    data = frame.side_data.get("MOTION_VECTORS")
    for vector in data.to_ndarray() if data is not None else ():
        top = max(int(vector["dst_y"]) - int(vector["h"]) // 2, 0) // CELL
        left = max(int(vector["dst_x"]) - int(vector["w"]) // 2, 0) // CELL
        block = np.s_[top : top + max(int(vector["h"]) // CELL, 1), left : left + max(int(vector["w"]) // CELL, 1)]
        scale = max(int(vector["motion_scale"]), 1)
        total[block] += np.hypot(float(vector["motion_x"]), float(vector["motion_y"])) / scale
        vectors[block] += 1  # two where a block is predicted from both sides
    lengths = total / np.maximum(vectors, 1)
    return torch.from_numpy(np.rot90(lengths, frame.rotation // 90).copy())


def pool(lengths: Float[Tensor, "h w"], grid: int, view: View | None = None) -> Float[Tensor, " p"]:
    """Mean over each patch of the part `view`, mirrored if the view is."""
    if view is not None:
        top, left = view.y // CELL, view.x // CELL
        lengths = lengths[top : max(-(-(view.y + view.height) // CELL), top + 1)]
        lengths = lengths[:, left : max(-(-(view.x + view.width) // CELL), left + 1)]
        if view.flip:
            lengths = lengths.flip(1)
    return F.interpolate(lengths[None, None], (grid, grid), mode="area").flatten()

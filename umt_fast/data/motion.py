"""Motion of a clip's patches from the codec's own motion vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from umt_fast.data.crops import View
from umt_fast.data.decode import open_video
from umt_fast.data.decode.motion_vectors import CELL, MotionMaps
from umt_fast.data.video import BadVideo, Video

if TYPE_CHECKING:
    from jaxtyping import Float, Float32


def read_motion(
    video: Video,
    frame_ids: Sequence[int],
    grid: int,
    view: View | None = None,
    content: bytes | None = None,
) -> Float[torch.Tensor, "t p"]:
    """Mean length of the motion vectors in each patch of the frames `frame_ids`, in pixels, p = grid^2.

    view  crop of the clip; None: the whole frame.

    Key frames and intra-coded blocks have no vectors and count as 0. So does every frame of a codec whose vectors
    FFmpeg does not export; it exports those of H.264, MPEG-1, 2 and 4. Raises BadVideo.
    """
    maps = MotionMaps()
    with open_video(video, content, motion=maps) as reader:
        total = reader.timeline.num_frames
        missing = [index for index in frame_ids if not 0 <= index < total]
        if missing:
            raise BadVideo(f"no frame {missing[0]}")
        for _ in reader.read(sorted(set(frame_ids))):
            pass
    return torch.stack([pool(maps.get(index), grid, view) for index in frame_ids])


def pool(lengths: Float32[np.ndarray, "h w"] | None, grid: int, view: View | None = None) -> Float[torch.Tensor, " p"]:
    """Mean of a motion map over each patch of the crop `view`, mirrored if the view is; 0 without a map."""
    if lengths is None:
        return torch.zeros(grid * grid)
    if view is not None:
        top, left = view.y // CELL, view.x // CELL
        lengths = lengths[top : max(-(-(view.y + view.height) // CELL), top + 1)]
        lengths = lengths[:, left : max(-(-(view.x + view.width) // CELL), left + 1)]
        if view.flip:
            lengths = lengths[:, ::-1]
    part = torch.from_numpy(np.ascontiguousarray(lengths))
    return F.interpolate(part[None, None], (grid, grid), mode="area").flatten()

"""Motion of patches from codec vectors."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from umt_fast.data.crops import View
from umt_fast.data.motion import pool, read_motion
from umt_fast.data.video import BadVideo, Video


def write_moving_square(path: Path, codec: str) -> Path:
    """A still, textured ground, and a textured square that moves 4 px a frame through the upper left quarter."""
    rng = np.random.default_rng(0)
    ground = rng.integers(60, 120, (128, 128, 3), dtype=np.uint8)
    square = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=Fraction(25), options={"bf": "0"})
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 100
        stream.codec_context.thread_count = 1
        for number in range(8):
            picture = ground.copy()
            picture[16:40, 4 + 4 * number : 28 + 4 * number] = square
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_motion_lies_where_things_move(tmp_path, codec):
    video = Video(str(write_moving_square(tmp_path / "a.mp4", codec)))
    motion = read_motion(video, [0, 3, 5], 4)
    assert motion.shape == (3, 16)
    assert (motion[0] == 0).all()  # a key frame
    by_place = motion[1:].view(2, 4, 4)
    moving = by_place[:, :2, :2].amax((1, 2))
    assert (moving > 0.5).all()
    assert (by_place[:, 2:, 2:] < 0.1 * moving[:, None, None]).all()
    mirrored = read_motion(video, [3], 4, View(0, 0, 128, 128, flip=True)).view(4, 4)
    assert torch.allclose(mirrored, by_place[0].flip(1))
    still = read_motion(video, [3], 2, View(64, 64, 64, 64, flip=False))
    assert (still < 0.1 * moving[0]).all()


def test_codecs_without_vectors_count_as_still(tmp_path, write_video):
    video = Video(str(write_video(tmp_path / "a.mkv", "libvpx-vp9", frames=4)))
    assert (read_motion(video, [0, 3], 2) == 0).all()


def test_a_frame_that_is_not_there_is_named(tmp_path, write_video):
    video = Video(str(write_video(tmp_path / "a.mp4", frames=4)))
    with pytest.raises(BadVideo, match="no frame 4"):
        read_motion(video, [1, 4], 2)


def test_pooling_averages_patches():
    lengths = torch.arange(16.0).view(4, 4)
    assert pool(lengths, 2).tolist() == [2.5, 4.5, 10.5, 12.5]

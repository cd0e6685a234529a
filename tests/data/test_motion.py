"""Motion of patches from codec vectors."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from umt_fast.data.crops import View
from umt_fast.data.decode import by_index, open_video
from umt_fast.data.decode.motion_vectors import CELL, MotionMaps, motion_map
from umt_fast.data.manifest import read_manifest
from umt_fast.data.motion import pool, read_motion
from umt_fast.data.prepare import Recipe, Settings, prepare
from umt_fast.data.video import BadVideo, Video


def write_moving_square(path: Path, codec: str) -> Path:
    """A still textured background, and a textured square that moves 4 px per frame in the upper left quarter."""
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


def test_a_missing_frame_is_named(tmp_path, write_video):
    video = Video(str(write_video(tmp_path / "a.mp4", frames=4)))
    with pytest.raises(BadVideo, match="no frame 4"):
        read_motion(video, [1, 4], 2)


def test_pooling_averages_patches():
    lengths = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert pool(lengths, 2).tolist() == [2.5, 4.5, 10.5, 12.5]


def plain_map(frame: av.VideoFrame) -> np.ndarray:
    """`motion_map`, vector by vector."""
    total, count = np.zeros((2, -(-frame.height // CELL), -(-frame.width // CELL)))
    data = frame.side_data.get("MOTION_VECTORS")
    for vector in data.to_ndarray() if data is not None else ():
        top = max(int(vector["dst_y"]) - int(vector["h"]) // 2, 0) // CELL
        left = max(int(vector["dst_x"]) - int(vector["w"]) // 2, 0) // CELL
        block = np.s_[top : top + int(vector["h"]) // CELL, left : left + int(vector["w"]) // CELL]
        total[block] += np.hypot(float(vector["motion_x"]), float(vector["motion_y"])) / int(vector["motion_scale"])
        count[block] += 1
    return total / np.maximum(count, 1)


def decoded_with_vectors(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as file:
        file.streams.video[0].codec_context.options = {"flags2": "+export_mvs"}
        return list(file.decode(video=0))


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "3"}])
def test_a_map_is_the_mean_of_the_vectors_of_each_cell(tmp_path, write_video, options):
    path = write_video(tmp_path / "a.mp4", frames=10, size=(100, 68), options=options)
    lengths = []
    for frame in decoded_with_vectors(path):
        assert np.abs(motion_map(frame) - plain_map(frame)).max() < 1e-5
        lengths.append(motion_map(frame).max())
    assert sum(length > 1 for length in lengths) > 4


def test_a_copy_has_the_vectors_of_its_own_frames(tmp_path, write_video):
    """The copy is read by its index, without a demuxer."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", frames=12, size=(96, 64))
    prepare(Settings(str(tmp_path / "videos"), str(tmp_path / "copies"), Recipe(gop=6, short_side=64), workers=1))
    (copy,) = read_manifest(str(tmp_path / "copies"))
    assert by_index.can_read(copy)
    maps = [plain_map(frame) for frame in decoded_with_vectors(copy.path)]
    found = MotionMaps()
    with open_video(copy, motion=found) as reader:
        list(reader.read([2, 5, 9]))
    assert sorted(found) == [2, 5, 9]
    for index, lengths in found.items():
        assert np.abs(lengths - maps[index]).max() < 1e-5
    assert max(lengths.max() for lengths in found.values()) > 1


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV writes no rotation")
def test_maps_are_turned_as_the_frames_are(tmp_path, write_video):
    found = {}
    for rotation in (0, 90):
        path = write_video(tmp_path / f"{rotation}.mp4", frames=6, size=(96, 64), rotation=rotation)
        maps = MotionMaps()
        with open_video(Video(str(path)), motion=maps) as reader:
            ((_, frame),) = reader.read([4])
        assert (CELL * maps[4].shape[0], CELL * maps[4].shape[1]) == frame.shape[:2]
        found[rotation] = maps[4]
    assert any(np.array_equal(found[90], np.rot90(found[0], turns)) for turns in (1, 3))
    assert found[0].any()

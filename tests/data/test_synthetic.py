from __future__ import annotations

import colorsys
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from umt_fast.data import manifest, synthetic


def read_manifest(source: str) -> list[str]:
    return [video.path for video in manifest.read_manifest(source)]


@pytest.fixture(scope="module")
def small_videos(tmp_path_factory):
    """Lists of the first two videos of a seed, by seed and a name for the copy."""
    made: dict[tuple[int, str], Path] = {}

    def get(seed: int, copy: str = "a") -> list[str]:
        if (seed, copy) not in made:
            made[seed, copy] = synthetic.write_videos(tmp_path_factory.mktemp("small"), count=2, seed=seed)
        return read_manifest(str(made[seed, copy]))

    return get


def test_list(demo_videos):
    lines = demo_videos.read_text().splitlines()
    assert demo_videos.name == "train.csv"
    assert [int(line.rsplit(",", 1)[1]) for line in lines] == list(range(8))
    paths = read_manifest(str(demo_videos))
    assert len(set(paths)) == 8
    assert {Path(path).parent for path in paths} == {demo_videos.parent}
    assert all(Path(path).is_file() for path in paths)


def test_folder_and_list_name_the_same_files(demo_videos):
    assert sorted(read_manifest(str(demo_videos))) == read_manifest(str(demo_videos.parent))


def test_codecs(demo_videos):
    """H.264 and VP9 alternate, with several key frames for seeking."""
    codecs = {".mp4": "h264", ".webm": "vp9"}
    paths = read_manifest(str(demo_videos))
    assert [Path(path).suffix for path in paths] == [".mp4", ".webm"] * 4
    for path in paths:
        with av.open(path) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.codec.id == av.Codec(codecs[Path(path).suffix], "r").id
            assert (stream.width, stream.height) == (synthetic.WIDTH, synthetic.HEIGHT)
            keys = [packet.is_keyframe for packet in container.demux(stream) if packet.size]
        assert len(keys) == synthetic.FRAMES
        assert sum(keys) >= 3


def test_labels_are_motion_and_shape(demo_videos):
    for line in demo_videos.read_text().splitlines():
        path, label = line.rsplit(",", 1)
        _number, motion, shape = Path(path).stem.split("_")
        assert synthetic.MOTIONS.index(motion) * 4 + synthetic.SHAPES.index(shape) == int(label)


def test_descriptions_are_of_what_is_shown(small_videos, decode_all):
    for number, path in enumerate(small_videos(1)):
        motion, shape, hue = synthetic.describe(number, 1)
        assert Path(path).stem.split("_")[1:] == [motion, shape]
        frame = np.asarray(decode_all(path)[0])
        vivid = frame[(frame.max(-1) > 200) & (frame.min(-1) < 110)].mean(0) / 255
        named = colorsys.hsv_to_rgb(synthetic.HUES.index(hue) / len(synthetic.HUES), 0.8, 1.0)
        assert np.abs(vivid - named).max() < 0.6


def test_same_seed_same_pictures(small_videos, decode_all):
    for one, other in zip(small_videos(0, "a"), small_videos(0, "b"), strict=True):
        assert one != other
        assert np.array_equal(decode_all(one), decode_all(other))


def test_other_seed_other_pictures(small_videos, decode_all):
    for one, other in zip(small_videos(0), small_videos(1), strict=True):
        difference = np.asarray(decode_all(one), dtype=float) - np.asarray(decode_all(other), dtype=float)
        assert np.abs(difference).mean() > 10


def test_a_video_does_not_depend_on_their_number(small_videos, demo_videos, decode_all):
    for one, other in zip(small_videos(0), read_manifest(str(demo_videos)), strict=False):
        assert np.array_equal(decode_all(one), decode_all(other))


def test_shapes_move(demo_videos, decode_all):
    """The background is still, so differences above the codec's noise come from shapes."""
    for path in read_manifest(str(demo_videos)):
        frames = np.asarray(decode_all(path), dtype=np.int16)
        assert frames.shape == (synthetic.FRAMES, synthetic.HEIGHT, synthetic.WIDTH, 3)
        moved = (np.abs(frames[12:] - frames[:-12]).max(-1) > 40).mean(axis=(1, 2))
        assert moved.min() > 0.002, path
        assert moved.max() < 0.6, path


def test_command_line(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "videos"
    monkeypatch.setattr(sys, "argv", ["synthetic", str(folder), "--count", "1", "--seed", "3"])
    synthetic.main()
    assert str(folder / "train.csv") in capsys.readouterr().out
    (path,) = read_manifest(str(folder / "train.csv"))
    assert Path(path).is_file()

"""Folders prepared by commit fe9cadc, one complete and one killed midway, are read and continued bit for bit."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest

from umt_fast.config import DataConfig
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import open_video, read_frames
from umt_fast.data.manifest import read_manifest
from umt_fast.data.prepare import Settings, prepare
from umt_fast.data.prepare.encode import Recipe
from umt_fast.data.prepare.verify import verify

STORED = Path(__file__).parents[2] / "golden" / "prepared" / "fe9cadc.tar.gz"


@pytest.fixture
def stored(tmp_path, monkeypatch) -> dict:
    """Clips that this commit drew from its folders; the folders are in the working directory."""
    with tarfile.open(STORED) as tar:
        tar.extractall(tmp_path)  # a file of ours; `filter` came to Python with 3.11.4
    monkeypatch.chdir(tmp_path)
    for settings in tmp_path.glob("*/.prepare/settings.json"):
        settings.write_text(settings.read_text().replace("@ROOT@", str(tmp_path)))
    return json.loads((tmp_path / "visits.json").read_text())


@pytest.mark.parametrize("folder", ["files", "shards"])
def test_the_same_clips_are_drawn(stored, folder):
    videos = read_manifest(folder)
    stream = ClipStream(videos, DataConfig(crops_per_clip=2), 4, 16, seed=3)
    for visit, then in enumerate(stored[folder]):
        row, rng = next(stream.attempts(visit))
        video = videos[row]
        with open_video(video) as reader:
            frames = list(stream.draw_frames(reader.timeline, rng))
        assert (row, video.name, frames) == (then["row"], then["name"], then["frames"])
        views = stream.draw_views(video.facts.width, video.facts.height, rng)
        assert [[view.x, view.y, view.width, view.height, view.flip] for view in views] == then["views"]
        pixels = b"".join(
            np.ascontiguousarray(frame).tobytes() for frame in read_frames(video, lambda _, frames=frames: frames)
        )
        assert hashlib.sha256(pixels).hexdigest() == then["pixels"]


def _tree(folder: str) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("folder", "per_shard"), [("files", None), ("shards", 2)])
def test_a_killed_preparation_goes_on(stored, folder, per_shard):
    killed = f"{folder}_killed"
    settings = Settings("source/list.csv", killed, Recipe("h264", 16), "source", per_shard, workers=1)
    report = prepare(settings)
    assert (report.copies, report.fresh) == (3, 1)
    made, expected = _tree(killed), _tree(folder)
    if av.__version__ != stored["av"]:  # another encoder may give other bytes for the third video
        kept = {"a.mp4", "b.mp4", "shard-000000.tar", ".prepare/settings.json"}
        assert made.keys() == expected.keys()
        made, expected = ({name: tree[name] for name in kept & tree.keys()} for tree in (made, expected))
    assert made == expected
    assert verify(killed, workers=1).problems == []


@pytest.mark.parametrize(("folder", "per_shard"), [("files", None), ("shards", 2)])
def test_a_whole_folder_is_left_as_it_is(stored, folder, per_shard):
    before = _tree(folder)
    report = prepare(Settings("source/list.csv", folder, Recipe("h264", 16), "source", per_shard, workers=1))
    assert (report.copies, report.fresh) == (3, 0)
    assert _tree(folder) == before

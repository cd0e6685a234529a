from __future__ import annotations

import json

import pytest
import torch

from benchmarks import input_pipeline
from benchmarks.input_pipeline import Files, soaked
from umt_fast.data.index import VideoList
from umt_fast.data.manifest import read_manifest
from umt_fast.data.pyav import probe


@pytest.fixture
def short(monkeypatch):
    """Originals of one second, with two key frames."""
    monkeypatch.setattr(input_pipeline, "SECONDS", 1)
    monkeypatch.setattr(input_pipeline, "GOP", 15)
    monkeypatch.setattr(input_pipeline, "has_dali", lambda: False)


def test_originals_are_what_they_are_called(short, demo_videos, tmp_path):
    source = read_manifest(str(demo_videos))[0]
    input_pipeline.make_originals(VideoList.of_paths([source.path]), tmp_path)
    facts = probe(read_manifest(str(tmp_path))[0])
    assert (facts.frames, facts.width, facts.height, facts.fps, facts.codec) == (30, 340, 256, 30, "h264")
    assert len(facts.keys) == 2


def test_the_report(short, demo_videos, tmp_path, capsys):
    options = ["--seconds", "0.1", "--rounds", "2", "--batch", "2", "--workers", "1", "--step", "none"]
    listed = tmp_path / "list.txt"
    listed.write_text("".join(line + "\n" for line in demo_videos.read_text().split("\n")[:2]))
    input_pipeline.main([str(listed), "--out", str(tmp_path / "out"), *options])
    found = json.loads((tmp_path / "out" / "input_pipeline.json").read_text())
    kinds = ["original", "h264 gop 8", "h264 gop 4", "h264 gop 1"]
    assert [(row["files"], row["decoder"]) for row in found["rows"]] == [
        (k, d) for k in kinds for d in ("bare", "pyav")
    ]
    for row in found["rows"]:
        assert len(row["rounds"]) == 2
        assert min(row["rounds"]) > 0
        assert row["memory_mb"] > 10
    assert "| h264 gop 1 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "input_pipeline.png").read_bytes().startswith(b"\x89PNG")
    assert "| original | 1.00x | pyav | 1 |" in (tmp_path / "out" / "input_pipeline.md").read_text()


def test_the_memory_is_watched(short, demo_videos, tmp_path, capsys):
    options = ["--soak", "20", "--workers", "1", "--batch", "2", "--as-they-are"]
    input_pipeline.main([str(demo_videos), *options])
    assert "pyav, h264 gop 1, 20 clips, MB: after a tenth" in capsys.readouterr().out


def test_the_memory_of_dali_is_watched_on_what_it_decodes(monkeypatch):
    monkeypatch.setattr(input_pipeline, "has_dali", lambda: True)
    kept = [Files("", codec, gop, VideoList([]), 0) for codec, gop in (("h264", 1), ("h264", 4), ("mjpeg", 1))]
    on = {name: [soaked(one, torch.device(name)) for one in kept] for name in ("cpu", "cuda")}
    assert on == {"cpu": [["pyav"], [], ["dali"]], "cuda": [["pyav", "dali"], [], []]}

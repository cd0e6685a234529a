from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.input_pipeline import __main__ as input_pipeline
from benchmarks.input_pipeline import contenders, files, report
from benchmarks.input_pipeline.__main__ import plan_rows, soaked
from benchmarks.input_pipeline.files import Files, read_files
from umt_fast.data.decode import probe, read_frames
from umt_fast.data.decode.nvdec import Limits
from umt_fast.data.index import VideoList
from umt_fast.data.manifest import read_manifest
from umt_fast.data.prepare.encode import Recipe, write_copy
from umt_fast.data.video import Facts


@pytest.fixture
def short(monkeypatch):
    """Originals of one second, with two key frames."""
    monkeypatch.setattr(files, "SECONDS", 1)
    monkeypatch.setattr(files, "GOP", 15)
    monkeypatch.setattr(input_pipeline, "has_dali", lambda: False)


@pytest.fixture
def two_videos(demo_videos, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("".join(line + "\n" for line in demo_videos.read_text().split("\n")[:2]))
    return str(listed)


@pytest.fixture
def copy(demo_videos, tmp_path):
    """Writes a copy of a demo video into `tmp_path`."""
    source = read_manifest(str(demo_videos))[0]

    def write(name: str, recipe: Recipe) -> Facts:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        return write_copy(source, str(tmp_path / name), recipe)[0]

    return write


def test_originals_are_what_they_are_called(short, demo_videos, tmp_path):
    source = read_manifest(str(demo_videos))[0]
    files.make_originals(VideoList.of_paths([source.path]), tmp_path)
    facts = probe(read_manifest(str(tmp_path))[0])
    assert (facts.frames, facts.width, facts.height, facts.fps, facts.codec) == (30, 340, 256, 30, "h264")
    assert len(facts.keys) == 2


def test_files_are_called_what_is_in_them(copy, tmp_path):
    count = copy("a.mp4", Recipe("h264", gop=4)).frames
    copy("b.mp4", Recipe("vp9", gop=8))
    found = read_files("original", tmp_path)
    assert found.codec == "h264 and vp9"
    assert found.gop == 2 * count / (-(-count // 4) + -(-count // 8))
    assert [video.facts.frames for video in found.known] == [count, count]
    (tmp_path / "c.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match=r"c\.mp4: not readable as video.*leave it out"):
        read_files("original", tmp_path)


def test_the_bare_loop_gives_the_frames_of_the_loader(copy, tmp_path):
    """And with a crop, a resized part of each frame."""
    count = copy("a.mp4", Recipe("h264", gop=8)).frames
    (video,) = read_files("original", tmp_path).known
    indices = [0, 3, 9, 17, 18, 19, 20, count - 1]
    found: list[np.ndarray] = []
    contenders.decode_bare(video, indices, found.append)
    for one, two in zip(found, read_frames(video, lambda _count: indices), strict=True):
        assert np.array_equal(one, two)
    crop = contenders.Crop(np.random.default_rng(0))
    for picture in found:
        crop(picture)
    assert next(crop.places, None) is None
    assert np.corrcoef([crop.clip[0].mean(-1).ravel(), crop.clip[1].mean(-1).ravel()])[0, 1] < 0.999
    assert abs(crop.clip.mean() - np.mean(found)) < 30


def test_a_bare_loop_that_fails_ends_the_benchmark(copy, tmp_path, monkeypatch):
    copy("a.mp4", Recipe("h264"))
    files = read_files("copies", tmp_path)
    monkeypatch.setattr(contenders, "decode_bare", lambda *_: 1 / 0)
    with pytest.raises(SystemExit, match="a bare loop over copies ended before its time"):
        contenders.measure_bare(files, 2, 0.1, crop=False)


def test_unusable_arguments_end_with_a_one_line_error(tmp_path):
    with pytest.raises(SystemExit, match=r"error: cannot read the list .*none: No such file"):
        input_pipeline.main([str(tmp_path / "none")])
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match=r"error: .*a\.mp4"):
        input_pipeline.main([str(tmp_path), "--out", str(tmp_path / "a.mp4")])
    with pytest.raises(SystemExit, match=r"error: .*a\.mp4: not readable as video.*leave it out of VIDEOS"):
        input_pipeline.main([str(tmp_path)])
    (tmp_path / "list.txt").write_text("https://localhost/a.mp4\n")
    with pytest.raises(SystemExit, match=r"error: https://localhost/a\.mp4 is not a local file of its own"):
        input_pipeline.main([str(tmp_path / "list.txt"), "--as-they-are"])


def test_the_report(short, two_videos, tmp_path, capsys):
    options = ["--seconds", "0.1", "--rounds", "2", "--batch", "2", "--workers", "1", "--step-rate", "1e9"]
    input_pipeline.main([two_videos, "--out", str(tmp_path / "out"), *options])
    found = json.loads((tmp_path / "out" / "input_pipeline.json").read_text())
    kinds = {"original": 15, "h264 gop 8": 30 / 4, "h264 gop 4": 30 / 8, "h264 gop 1": 1}
    assert {name: stored["gop"] for name, stored in found["files"].items()} == kinds
    assert {stored["codec"] for stored in found["files"].values()} == {"h264"}
    decoders = ("bare", "bare + crop", "pyav")
    assert [(row["files"], row["decoder"]) for row in found["rows"]] == [(k, d) for k in kinds for d in decoders]
    for row in found["rows"]:
        assert len(row["rounds"]) == 2
        assert min(row["rounds"]) > 0
        assert row["memory_mb"] > 10
    assert found["facts"]["step"] == "as given"
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("| h264 gop 1 | h264 | 1 |") and "pyav" in line]
    assert line.endswith("| 100.0 |")
    assert (tmp_path / "out" / "input_pipeline.png").read_bytes().startswith(b"\x89PNG")
    assert "| original | h264 | 15 | 1.00x | pyav | 1 | - |" in (tmp_path / "out" / "input_pipeline.md").read_text()


def test_a_table_of_several_pipelines():
    row = {"files": "original", "workers": 4, "pipelines": None, "memory_mb": 1.0, "gpu_memory_mb": None}
    row |= {"nvdec_percent": None, "said": []}
    rows = [
        {**row, "decoder": "bare", "clips_per_second": 30.0},
        {**row, "decoder": "bare + crop", "clips_per_second": 20.0},
        {**row, "decoder": "dali", "pipelines": 7, "clips_per_second": 40.0, "said": ["vp9: PyAV decodes"]},
    ]
    files = {"original": {"codec": "h264", "gop": 250.0, "bytes": 2.0}}
    content = {"facts": {"step_clips_per_second": 50}, "frames": 8, "files": files, "rows": rows}
    lines = report.table(content).splitlines()
    assert lines[3].endswith("| 20.0 | 160 | 1.00 | 1.50 | 1.00 | 1 | - | - | - |")
    assert lines[4].startswith("| original | h264 | 250 | 1.00x | dali | 4 | 7 | 40.0 | 320 | 1.00 | 0.75 | 0.50 |")
    assert lines[4].endswith("| 20.0 |")
    assert lines[-1] == "- original, dali: vp9: PyAV decodes"


def test_the_rate_of_a_step_is_that_of_the_fastest_exact_rung(tmp_path):
    path = tmp_path / "step_time.json"
    rungs = [("baseline", "m", 2.0), ("+ CUDA graph", "m", 4.0), ("+ fp8 teacher", "m", 5.0), ("x", "m", None)]
    results = [{"model": m, "batch": 64, "rung": name, "clips_per_second": rate} for name, m, rate in rungs]
    path.write_text(json.dumps({"results": results}))
    assert report.read_step(path, "m") == (4.0, f"m, batch 64, + CUDA graph ({path})")
    with pytest.raises(SystemExit, match="no measured exact rung of other; choose another --step-model"):
        report.read_step(path, "other")
    path.write_text("[]")
    with pytest.raises(SystemExit, match=r"is not a step_time\.json"):
        report.read_step(path, "m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--soak", "7", "--batch", "8"], "--soak 7 is less than one batch of 8"),
        (["--soak", "0"], "--soak 0: must be above 0"),
        (["--step-rate", "0"], "--step-rate 0: must be above 0"),
        (["--workers", "1", "0"], "--workers 0: must be above 0"),
        (["--rounds", "few"], "argument --rounds: invalid int value: 'few'"),
        (["--seconds", "nan"], "--seconds nan: must be above 0"),
        (["--step-rate", "1", "--step-from", "x"], "not allowed with"),
    ],
)
def test_refusals(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        input_pipeline.main(["videos", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_memory_is_watched(short, two_videos, capsys):
    options = ["--soak", "20", "--workers", "1", "--batch", "2", "--as-they-are"]
    input_pipeline.main([two_videos, *options])
    assert "pyav, h264 gop 1, 20 clips, MB: after a tenth" in capsys.readouterr().out


def _files(codec: str, gop: float, known: list | None = None) -> Files:
    return Files(f"{codec} gop {gop}", codec, gop, VideoList.of_paths([]), known or [], 0)


def test_the_memory_of_dali_is_watched_on_what_it_decodes(monkeypatch):
    monkeypatch.setattr(input_pipeline, "has_dali", lambda: True)
    kept = [_files(codec, gop) for codec, gop in (("h264", 1), ("h264", 4), ("mjpeg", 1))]
    on = {name: [soaked(one, torch.device(name)) for one in kept] for name in ("cpu", "cuda")}
    assert on == {"cpu": [["pyav"], [], ["dali"]], "cuda": [["pyav", "dali"], [], []]}


def test_dali_has_rows_of_what_it_decodes(monkeypatch, copy, tmp_path):
    """On a GPU the pipelines are swept, on the CPU the processes."""
    monkeypatch.setattr(input_pipeline, "has_dali", lambda: True)
    files = []
    for codec in ("h264", "vp9", "mjpeg"):
        copy(f"{codec}/a.mp4", Recipe(codec))
        files.append(read_files(codec, tmp_path / codec))
    limits = Limits(engines=7, width=(16, 4096), height=(16, 4096), macroblocks=1 << 20)

    def dali(pipelines, engines):
        rows = plan_rows(files, [1, 16], pipelines, engines)
        return [(row.files, row.workers, row.pipelines) for row in rows if row.decoder == "dali"]

    assert dali(None, {"h264": limits}) == [("h264", 16, 1), ("h264", 16, 7)]
    assert dali([2, 3], {"h264": limits}) == [("h264", 16, 2), ("h264", 16, 3)]
    assert dali(None, None) == [("vp9", 1, None), ("vp9", 16, None), ("mjpeg", 1, None), ("mjpeg", 16, None)]

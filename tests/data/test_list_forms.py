"""Lists, folders and shards as they occur in practice."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umt_fast.config import DataConfig
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import open_video, read_frames
from umt_fast.data.index import BadIndex, VideoList, write_index
from umt_fast.data.loader import ClipDataset
from umt_fast.data.manifest import ManifestError, check_files, expand_shards, read_manifest
from umt_fast.data.mapped_list import read_mapped, write_mapped
from umt_fast.data.prepare import Settings, prepare
from umt_fast.data.prepare.__main__ import main
from umt_fast.data.prepare.encode import Recipe
from umt_fast.data.sampling import Timeline, frames_at_rate
from umt_fast.data.video import BadVideo, Part, Video


@pytest.fixture
def listing(tmp_path):
    def write(content: str | bytes, name: str = "list.csv") -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / name)

    return write


def _read(source: str, prefix: str = "p") -> list[tuple]:
    return [(video.path, video.label, video.part, video.caption) for video in read_manifest(source, prefix)]


@pytest.mark.parametrize(
    ("line", "path", "label", "part"),
    [
        ('"v/com,ma.mp4",3', "v/com,ma.mp4", 3, None),
        ('"v/a ""b"".mp4"', 'v/a "b".mp4', None, None),
        ("v/plain.mp4 0 -1", "v/plain.mp4", None, None),
        ("v/num 7.mp4 0 -1", "v/num 7.mp4", None, None),
        ("v/plain.mp4 8 16", "v/plain.mp4", None, Part(first=8, count=16)),
        ("v/plain.mp4,8,16", "v/plain.mp4", None, Part(first=8, count=16)),
        ("v/plain.mp4;8;16", "v/plain.mp4", None, Part(first=8, count=16)),
        ('"v/a b.mp4" 8 16', "v/a b.mp4", None, Part(first=8, count=16)),
        ("v/plain.mp4,3.0", "v/plain.mp4", 3, None),
        ("v/plain.mp4;3", "v/plain.mp4", 3, None),
        ("v/plain.mp4\t3", "v/plain.mp4", 3, None),
        ("v/num 7.mp4 3", "v/num 7.mp4", 3, None),
        ('"v/a;b.mp4";3', "v/a;b.mp4", 3, None),
        ('"v/a, b.mp4",x,3', "v/a, b.mp4", 3, None),
        ('"v/a"b.mp4', '"v/a"b.mp4', None, None),
        ("v/plain.mp4,3\r", "v/plain.mp4", 3, None),
        ("v/plain.mp4,", "v/plain.mp4", None, None),
        ("v/plain.mp4,playing guitar", "v/plain.mp4", None, None),
        ("v/plain.mp4;run", "v/plain.mp4", None, None),
        ("v/pl,ain.mp4\trun, far", "v/pl,ain.mp4", None, None),
        ("v/a.mp4,b.mp4", "v/a.mp4,b.mp4", None, None),
        ("v/plain.mp4,²", "v/plain.mp4,²", None, None),
        ("v/plain.mp4,--5", "v/plain.mp4,--5", None, None),
        ("v/plain.mp4," + "9" * 5000, "v/plain.mp4," + "9" * 5000, None, None),
        ("https://h/a.mp4?sig=ok&x=1,2,3", "https://h/a.mp4?sig=ok&x=1,2,3", None, None),
        ("https://h/a.mp4?sig=ok,abc", "https://h/a.mp4?sig=ok,abc", None, None),
        ("https://h/a.mp4?sig=ok,3", "https://h/a.mp4?sig=ok", 3, None),
        ("https://h/a.mp4?sig=1,2,3 4", "https://h/a.mp4?sig=1,2,3", 4, None),
    ],
)
def test_lines(listing, line, path, label, part):
    ((found, *rest),) = _read(listing(f"{line}\n"))
    assert found == (path if "://" in path else f"p/{path}")
    assert rest == [label, part, None]


def test_comments_empty_lines_and_windows_line_ends(listing):
    content = "# path,label\r\n\r\nv/a.mp4,3\r\n#v/b.mp4,4\r\n  \t\r\n./#c.mp4 5\r\n"
    assert _read(listing(content)) == [("p/v/a.mp4", 3, None, None), ("p/./#c.mp4", 5, None, None)]


def test_line_ends_of_old_macs(listing):
    assert _read(listing("v/a.mp4,3\rv/b.mp4,4\r")) == [("p/v/a.mp4", 3, None, None), ("p/v/b.mp4", 4, None, None)]


@pytest.mark.parametrize("filling", [" ", ",", '"', "a.mp4,"])
@pytest.mark.parametrize("begin", ["", '"', "path,label\n"])
def test_a_line_of_a_megabyte_is_read_or_refused_at_once(listing, begin, filling):
    begun = time.process_time()
    with contextlib.suppress(BadIndex, ManifestError):
        assert len(read_manifest(listing(f"{begin}a{filling * (1 << 20)}b\rc\n"))[-1].path) > 1 << 20
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_lists_of_other_encodings(listing, encoding):
    assert _read(listing("v/ü.mp4,3\n".encode(encoding))) == [("p/v/ü.mp4", 3, None, None)]


def test_tables_with_a_header(listing):
    pandas = ",path,label\n0,v/a.mp4,3\n1,v/b,c.mp4,4\n"
    assert _read(listing(pandas)) == [("p/v/a.mp4", 3, None, None), ("p/v/b,c.mp4", 4, None, None)]
    times = 'video,start,end,caption\na.mp4,1.5,4,"a, b"\nb.mp4,,,c\n'
    first, second = _read(listing(times))
    assert first == ("p/a.mp4", None, Part(start=1.5, end=4.0), "a, b")
    assert second == ("p/b.mp4", None, None, "c")
    tabs = "caption\tPath\nx\ta,1.mp4\n"
    assert _read(listing(tabs)) == [("p/a,1.mp4", None, None, "x")]
    quoted = '"path";"label"\r\n"v/a;b.mp4";"3"\r\nv/c.mp4;guitar\r\n'
    assert _read(listing(quoted)) == [("p/v/a;b.mp4", 3, None, None), ("p/v/c.mp4", None, None, None)]
    frames = _read(listing("# VideoMAE V2\npath,start,total\na.mp4,8,16\nb.mp4,0,-1\n"))
    assert [part for _, _, part, _ in frames] == [Part(first=8, count=16), None]
    with pytest.raises(BadIndex, match="row 1 "):
        read_manifest(listing("path,start\na.mp4,x\n"))[0]
    with pytest.raises(ManifestError, match="a header and no line"):
        read_manifest(listing("path,label\n"))


def test_json_lists(listing):
    entries = [{"video": "a.mp4", "caption": "x", "start": 1}, {"video": "b.mp4", "label": 2}]
    assert _read(listing(json.dumps(entries), "list.json")) == [
        ("p/a.mp4", None, Part(start=1.0), "x"),
        ("p/b.mp4", 2, None, None),
    ]
    assert _read(listing('[{"path": "a.mp4", "label": "run", "start": 8, "total": 9}]', "list.json")) == [
        ("p/a.mp4", None, Part(first=8, count=9), None)
    ]
    for wrong in (
        '[{"path": "a", "start": "x"}]',
        "{}",
        "[]",
        "[1]",
        "nothing",
        '[{"name": 1}]',
        '[{"video": "a"}, {"label": 1}]',
        "[" * 100_000,
    ):
        with pytest.raises(ManifestError, match=r"list\.json"):
            read_manifest(listing(wrong, "list.json"))


@pytest.mark.parametrize("line", ["v/a.mp4;3", "v/a.mp4,playing guitar", "frames 60 3", "x y z"])
def test_a_list_in_another_form_is_refused_with_its_first_line(listing, tmp_path, line):
    source = listing(f"{line}\n" * 30)
    with pytest.raises(ManifestError) as caught:
        check_files(read_manifest(source, "pre"), source, "pre")
    for part in ("first 20 files", source, f"'pre/{line[:6]}", "'pre'", "`path,label`"):
        assert part in str(caught.value)
    (tmp_path / "real.mp4").touch()
    mixed = listing(f"{line}\n" * 10 + str(tmp_path / "real.mp4") + "\n", "mixed.csv")
    check_files(read_manifest(mixed), mixed)
    with pytest.raises(ManifestError, match="none of the first"):
        prepare(Settings(source, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# Folders.


def test_a_folder_search_finds_what_ffmpeg_reads_and_says_what_it_left_out(tmp_path, capsys):
    kinds = "m2ts mxf asf f4v m2v mpe qt divx gif MP4 mp4".split()  # noqa: SIM905
    for kind in kinds:
        (tmp_path / f"x.{kind}").touch()
    (tmp_path / ".hidden").mkdir()
    for other in ("a.txt", "b.TXT", "README", "._x.mp4", ".hidden/y.mp4", ".z.mp4", "c.srt"):
        (tmp_path / other).touch()
    found = read_manifest(str(tmp_path))
    assert [Path(video.path).name for video in found] == sorted(f"x.{kind}" for kind in kinds)
    message = capsys.readouterr().err
    assert "left out 6 files of other kinds: " in message
    for part in ("2 .txt", "2 hidden", "1 .srt", "1 without a suffix"):
        assert part in message
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.srt").touch()
    with pytest.raises(ManifestError, match=r"holds no video, but 1 \.srt: looked for .*\.mp4"):
        read_manifest(str(tmp_path / "only"))


def test_a_pattern_of_files(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.txt"):
        (tmp_path / name).touch()
    assert [Path(video.path).name for video in read_manifest(f"{tmp_path}/*")] == ["a.mp4", "b.mp4"]
    with pytest.raises(ManifestError, match="no video matches the pattern"):
        read_manifest(f"{tmp_path}/*.mkv")


# Shards.


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_labels_and_captions_belong_to_the_key_up_to_the_first_dot(tmp_path):
    members = {
        "002.video.mp4": b"v",
        "002.cls": b"3\n",
        "d.1/003.mp4": b"v",
        "d.1/003.json": b'{"label": 5, "caption": "x"}',
        "004.mp4": b"v",
        "004.json": b'{"label": 5}',
        "004.cls": b"6",
        "004.txt": b"y\n",
        "005.mp4": b"v",
        "005.cls": "²".encode(),
        "005.json": b"[" * 100_000,
    }
    videos = read_manifest(str(_tar(tmp_path / "s.tar", members)))
    assert [(video.label, video.caption) for video in videos] == [(3, None), (5, "x"), (6, "y"), (None, None)]


def test_the_patterns_of_webdataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        _tar(Path(f"s{number}.tar"), {f"{number}.mp4": b"v"})
    for pattern, expected in {
        "s{0,2}.tar": "02",
        "s{0..1}.tar": "01",
        "s*.tar": "012",
        "s?.tar": "012",
        "s2.tar::s0.tar": "20",
        "s{0,1}.tar::s2.tar": "012",
    }.items():
        assert [video.member[0] for video in read_manifest(pattern)] == list(expected)
    assert list(expand_shards("a{0,{1,2}}.tar")) == ["a0.tar", "a1.tar", "a2.tar"]  # as a shell does, each once
    huge = f"a{{0..{'9' * 5000}}}.tar"
    assert list(expand_shards(huge)) == [huge]
    assert list(expand_shards("{a,b}-{08..09}.tar")) == ["a-08.tar", "a-09.tar", "b-08.tar", "b-09.tar"]
    with pytest.raises(ManifestError, match="no shard matches"):
        read_manifest("t*.tar")
    for source in ("s.tar.gz", "s.tgz", "pipe:cat s0.tar"):
        with pytest.raises(ManifestError, match=r"Unpack it, and give its name or a pattern: shard-\{000000"):
            read_manifest(source)


# URLs.


def test_the_kind_of_a_url_is_that_of_its_path(tmp_path, monkeypatch):
    served = {
        "https://h/list.csv?sig=ok": b"https://h/a.mp4?sig=ok 4\n",
        "https://h/d/index.jsonl?sig=a/b.csv": write_index([{"path": "c d.mp4"}]),
    }
    monkeypatch.setattr("umt_fast.data.manifest.read", lambda url, timeout, max_bytes: served[url])
    asked: list[str] = []
    monkeypatch.setattr("umt_fast.data.manifest.list_shard", lambda url, *_: asked.append(url) or [{"path": "m.mp4"}])
    assert _read("https://h/list.csv?sig=ok") == [("https://h/a.mp4?sig=ok", 4, None, None)]
    assert _read("https://h/d?sig=a/b.csv") == [("https://h/d/c%20d.mp4", None, None, None)]
    read_manifest("https://h/s-{0..1}.tar?X-Amz-Signature=1.2")
    assert asked == [f"https://h/s-{number}.tar?X-Amz-Signature=1.2" for number in range(2)]


# Parts of videos, and other clips than one frame from each of equal parts.


def test_a_part_in_seconds_or_frames():
    timeline = Timeline([0, 1, 2, 4, 8], lambda: 0.1)
    assert Part(start=0.1, end=0.4).bounds(timeline) == (1, 3)
    assert Part(start=0.15).bounds(timeline) == (2, 5)
    assert Part(first=2).bounds(timeline) == (2, 5)
    assert Part(first=1, count=2).bounds(timeline) == (1, 3)
    assert Part(first=3, count=9).bounds(timeline) == (3, 5)
    for empty, named in (
        (Part(start=0.9), "0.9 s to the end"),
        (Part(first=5), "all frames from number 5 on"),
        (Part(start=0.3, end=0.35), "0.3 s to 0.35 s"),
        (Part(count=0), "0 frames from number 0 on"),
    ):
        with pytest.raises(BadVideo, match=rf"no frame of it lies in the part that the list names \({named}\)"):
            empty.bounds(timeline)


@pytest.mark.parametrize("row", [{"start": -1}, {"start": "x"}, {"first": 1.5}, {"count": -1}, {"end": float("nan")}])
def test_an_impossible_part_is_a_bad_row(row):
    with pytest.raises(BadIndex):
        VideoList.of_rows([{"path": "a.mp4", **row}])[0]


def test_clips_stay_in_their_part_and_copies_keep_it(write_video, tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=40, fps=10)
    listed = tmp_path / "list.csv"
    listed.write_text(f"path,start,end,label\n{path},1.0,2.0,1\n{path},3.0,,2\n")
    ranges = {0: (10, 20), 1: (30, 40)}
    copied = prepare(Settings(str(listed), str(tmp_path / "out"), Recipe("h264", 32), workers=1))
    assert copied.copies == 1
    for videos in (read_manifest(str(listed)), read_manifest(str(tmp_path / "out"))):
        stream = ClipStream(videos, DataConfig(), 4, 32, seed=0)
        for row, (first, last) in ranges.items():
            with open_video(videos[row]) as reader:
                for seed in range(20):
                    rng = np.random.default_rng(seed)
                    frames = stream.choose_frames(videos[row], reader.timeline, rng)
                    assert len(frames) == 4
                    assert first <= min(frames) <= max(frames) < last
        assert ClipDataset(stream)[[0, 1, 2, 3]].labels.sum() == 6
    outside = VideoList.of_rows([{"path": str(path), "start": 99.0}])
    bad = ClipDataset(ClipStream(outside, DataConfig(), 4, 32, 0, replace=False))[[0]].bad
    assert "no frame of it lies in the part" in bad[0][1]


def test_clips_at_a_rate():
    rng = np.random.default_rng(0)
    steady = Timeline(range(300), lambda: 1 / 30)
    for rate, step in ((10, 3), (30, 1), (60, 0.5)):
        clips = np.array([frames_at_rate(steady, 8, rate, rng) for _ in range(200)])
        assert np.abs(np.diff(clips) - step).max() < 1
        assert clips.min() >= 0
        assert clips.max() > 290
    uneven = Timeline([0, 1, 10, 11, 12, 20, 30], lambda: 0.1)
    for _ in range(50):
        frames = frames_at_rate(uneven, 3, 1.0, rng)
        seconds = uneven.seconds[frames]
        assert all(0 <= after - before <= 2.0 for before, after in itertools.pairwise(seconds))
    assert frames_at_rate(Timeline([0], lambda: 1.0), 3, 1.0, rng) == [0, 0, 0]


@pytest.mark.parametrize(("settings", "steps"), [({"frame_step": 3}, {3}), ({"frame_rate": 5.0}, {3})])
def test_settings_choose_stride_or_rate(write_video, tmp_path, settings, steps):
    videos = VideoList.of_paths([str(write_video(tmp_path / "a.mp4", frames=40, fps=15))])
    stream = ClipStream(videos, DataConfig(**settings), 4, 32, seed=0)
    with open_video(videos[0]) as reader:
        frames = stream.choose_frames(videos[0], reader.timeline, np.random.default_rng(0))
    assert set(np.diff(frames).tolist()) == steps


# Folders of frames.


def _frames(folder: Path, count: int) -> list[np.ndarray]:
    folder.mkdir(parents=True)
    pictures = [np.full((24, 32, 3), number, np.uint8) for number in range(count)]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"img_{number + 1}.png")
    (folder / "notes.txt").touch()
    return pictures


def test_a_folder_of_frames_is_a_video(tmp_path, listing):
    pictures = _frames(tmp_path / "f/a", 12)
    frames = read_frames(Video(str(tmp_path / "f/a")), range)
    assert all(np.array_equal(*pair) for pair in zip(frames, pictures, strict=True))
    (video,) = read_manifest(listing("f/a 12 3\n"), str(tmp_path))
    assert (video.label, video.part) == (3, Part(count=12))
    (video,) = read_manifest(listing("f/a 4 8\n"), str(tmp_path))
    assert (video.label, video.part) == (None, Part(first=4, count=8))
    (video,) = read_manifest(listing("f/a 0 -1\n"), str(tmp_path))
    assert (video.label, video.part) == (None, None)
    batch = ClipDataset(ClipStream(read_manifest(listing("f/a,7\n"), str(tmp_path)), DataConfig(), 4, 16, 0))[[0, 1]]
    assert batch.labels.tolist() == [7, 7]
    assert batch.bad == []
    (tmp_path / "f/a/img_3.png").write_bytes(b"no picture")
    with pytest.raises(BadVideo, match=r"frame 2, img_3\.png: "):
        read_frames(Video(str(tmp_path / "f/a")), range)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadVideo, match="a directory without a picture"):
        read_frames(Video(str(tmp_path / "empty")), range)


# Long lists.


@pytest.fixture(scope="module")
def million(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("million") / "list.csv"
    path.write_text("".join(f"kinetics/train/class_{i % 400}/video_{i:07d}.mp4,{i % 400}\n" for i in range(1_000_000)))
    return path


def test_a_million_lines_open_at_once(million, tmp_path):
    begun = time.process_time()
    videos = read_manifest(str(million), "/data")
    assert time.process_time() - begun < 1.0  # 3.4 s where each line was parsed
    assert len(videos) == 1_000_000
    assert (videos[765_432].path, videos[765_432].label) == ("/data/kinetics/train/class_232/video_0765432.mp4", 232)
    assert videos[-1].label == 399


def test_a_list_that_is_mapped_into_memory(million, tmp_path):
    part = tmp_path / "list.csv"
    part.write_bytes(
        b"".join(million.read_bytes().splitlines(keepends=True)[:50_000]) + b"kinetics/train/x.mp4 7\n" * 2
    )
    videos = read_manifest(str(part), "/data")
    target = str(tmp_path / "all.videos")
    assert write_mapped(videos, target) == 50_002
    begun = time.process_time()
    mapped = read_manifest(target)
    assert time.process_time() - begun < 0.05
    for row in (0, 1, 49_999, -1):
        assert mapped[row] == videos[row]
    assert mapped.count_distinct() == videos.count_distinct() == 50_001
    assert not mapped.may_be_remote
    assert mapped.digest() == read_mapped(target).digest()
    assert sorted(os.listdir(tmp_path)) == ["all.videos", "list.csv"]
    content = Path(target).read_bytes()
    for damage in (content[:-1], content + b"x", content[:100], b"", b"x" + content[1:]):
        Path(target).write_bytes(damage)
        with pytest.raises(BadIndex, match=r"all\.videos"):
            read_manifest(target)


def test_the_command_writes_a_mapped_list(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.csv").write_text("a.mp4,3\n")
    target = str(tmp_path / "l.videos")
    main(["--list", str(tmp_path / "list.csv"), target, "--prefix", str(tmp_path)])
    assert f"--data.train {target}" in capsys.readouterr().out
    (video,) = read_manifest(target)
    assert (video.path, video.label) == (str(tmp_path / "a.mp4"), 3)
    with pytest.raises(SystemExit):
        main(["--list", str(tmp_path / "list.csv"), str(tmp_path / "out")])
    assert "a name that ends in .videos" in capsys.readouterr().err


def test_whole_numbers_of_json_may_have_a_point(tmp_path):
    (tmp_path / "a.json").write_text('[{"path": "a.mp4", "label": 3.0}, {"path": "b.mp4", "label": null}]')
    assert [video.label for video in read_manifest(str(tmp_path / "a.json"))] == [3, None]

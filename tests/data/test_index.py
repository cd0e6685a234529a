from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from umt_fast.data.decode import probe, read_frames
from umt_fast.data.index import FORMAT, BadIndex, VideoList, describe, parse_index, write_index
from umt_fast.data.manifest import read_manifest
from umt_fast.data.video import BadVideo, Facts, Packets


def _facts(times: list[int], keys: list[int]) -> Facts:
    return Facts(64, 48, 29.97, "h264", np.array(times), np.array(keys))


@pytest.mark.parametrize(
    ("times", "keys"),
    [
        ([0], [0]),
        ([7, 8], [7]),
        (list(range(0, 5120, 512)), [0, 2048, 4096]),
        ([0, 33, 67, 100, 133, 400, 401, 402], [0, 100, 400]),  # variable frame rate
        ([-512, 0, 512, 2**40], [-512, 0, 512, 2**40]),
    ],
)
def test_facts_survive_writing_and_reading(times, keys):
    row = {"path": "a.mp4", "bytes": 9, **describe(_facts(times, keys)), "label": 3, "caption": "zwei Möwen"}
    (video,) = parse_index(write_index([row]), "/data/index.jsonl")
    assert video.path == video.name == "/data/a.mp4"
    assert (video.size, video.offset, video.label, video.caption) == (9, None, 3, "zwei Möwen")
    assert video.facts is not None
    assert video.facts.times.tolist() == times
    assert video.facts.keys.tolist() == keys
    assert (video.facts.frames, video.facts.width, video.facts.height) == (len(times), 64, 48)
    assert (video.facts.fps, video.facts.codec) == (29.97, "h264")


def test_packets_survive_writing_and_reading():
    where = Packets(sizes=712, first=2017, setup=bytes(range(256)))
    row = {"path": "a.mp4", **describe(replace(_facts([0, 1], [0]), packets=where))}
    (video,) = parse_index(write_index([row]), "/data/index.jsonl")
    assert video.facts is not None
    assert video.facts.packets == where


def test_a_long_regular_video_takes_few_bytes():
    row = describe(_facts(list(range(0, 512 * 3000, 512)), list(range(0, 512 * 3000, 2048))))
    assert len(json.dumps(row)) < 200


@pytest.mark.parametrize("base", ["/data", "https://host/data", "s3://bucket/data"])
def test_paths_start_at_the_index(base):
    rows = [
        {"path": "a/b.mp4"},
        {"path": "k.mp4", "shard": "s-0.tar", "offset": 512, "bytes": 7},
        {"path": "/elsewhere/c.mp4"},
        {"path": "gs://other/d.mp4"},
    ]
    videos = parse_index(write_index(rows), f"{base}/index.jsonl")
    assert [video.path for video in videos][:2] == [f"{base}/a/b.mp4", f"{base}/s-0.tar"]
    assert videos[1].name == f"{base}/s-0.tar/k.mp4"
    assert (videos[1].offset, videos[1].size) == (512, 7)
    assert videos[3].path == "gs://other/d.mp4"
    assert videos[3].remote
    if base == "/data":
        assert videos[2].path == "/elsewhere/c.mp4"
        assert not videos[2].remote


IMPOSSIBLE = (-1, 1.5, 1 << 62, 1 << 64, -(10**30), None, "7", [], True, float("nan"), float("inf"))


@pytest.mark.parametrize("number", IMPOSSIBLE)
@pytest.mark.parametrize("key", ["sizes", "first", "bytes", "offset", "width", "height"])
def test_a_row_with_an_impossible_number_is_refused(key, number):
    """At once, not by a later error of reading."""
    row = {"path": "a", "bytes": 9, "offset": 0, **describe(replace(_facts([0, 1], [0]), packets=Packets(1, 2, b"")))}
    (row["packets"] if key in row["packets"] else row)[key] = number
    if number is None and key in ("bytes", "offset"):  # not known
        assert VideoList.of_rows([row])[0].facts
        return
    with pytest.raises(BadIndex, match=f"{key} ="):
        VideoList.of_rows([row])[0]


def test_a_setup_that_is_not_base64_is_refused():
    row = {"path": "a", **describe(_facts([0], [0])), "packets": {"sizes": 1, "first": 2, "setup": "!!!!"}}
    with pytest.raises(BadIndex, match="base64"):
        VideoList.of_rows([row])[0]


@pytest.mark.parametrize("number", [*IMPOSSIBLE, 0])
@pytest.mark.parametrize(
    "runs",
    [
        lambda n: {"times": [n, [1, 3]] if n not in (-1, 0) else []},
        lambda n: {"times": [0, [n, 3]]},
        lambda n: {"times": [0, [n, 1], [1, 2]]},
        lambda n: {"times": [0, [1, n]], "frames": n + 1 if isinstance(n, int) else n},
        lambda n: {"times": [0, [1, n], [2, 1]], "frames": n + 2 if isinstance(n, int) else n},
        lambda n: {"keys": [[n, 1]]},
        lambda n: {"keys": [[1, n]]},
        lambda n: {"keys": [[1, n], [2, 1]]},
    ],
)
def test_a_row_with_impossible_times_is_refused(runs, number):
    """Before memory is allocated for them."""
    row = {"path": "a", **describe(_facts([0, 1, 2, 3], [0])), **runs(number)}
    with pytest.raises(BadIndex):
        VideoList.of_rows([row])[0]


def test_a_list_of_videos_is_a_sequence():
    names = ["a.mp4", "b, c.mp4", "\udcff.mp4", "a.mp4", "Möwe.mp4"]
    videos = VideoList.of_paths(names)
    assert len(videos) == 5
    assert [video.path for video in videos] == names
    assert videos[-1].path == names[-1]
    assert [video.path for video in videos[1:3]] == names[1:3]
    assert videos.count_distinct() == 4
    with pytest.raises(IndexError):
        videos[5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with"),
        (b"a.mp4,3\n", "does not begin with"),
        (json.dumps({**FORMAT, "version": 2}).encode() + b"\n{}", "does not begin with"),
        (write_index([]), "lists no video"),
        (write_index([{"path": "a"}, {"path": "b"}])[:-5], "line 3"),
        (write_index([{"shard": "a"}, {"path": "b"}]), "line 2"),
        (write_index([{"path": "a", **describe(_facts([0, 1], [0])), "frames": 3}]), "times of 2 frames"),
        (write_index([{"path": "a", **describe(_facts([0], [0])), "packets": {"sizes": 1, "first": 2}}]), "'setup'"),
    ],
)
def test_files_that_are_not_an_index_are_refused(content, message):
    with pytest.raises(BadIndex, match=r"/data/index\.jsonl") as caught:
        parse_index(content, "/data/index.jsonl")
    assert message in str(caught.value)


def test_an_index_with_too_many_frames_is_refused():
    """Its times would use all memory of the machine."""
    row = {"path": "a", **describe(_facts([0], [0])), "times": [0, [1, 1 << 24]], "frames": (1 << 24) + 1}
    with pytest.raises(BadIndex, match="16777217 frames"):
        VideoList.of_rows([row])[0]


@pytest.fixture
def indexed(tmp_path, write_video):
    """A folder with one video and its index."""
    path = write_video(tmp_path / "a.mp4", frames=40, gop=4, options={"bf": "0"})
    (video,) = VideoList.of_paths([str(path)])
    row = {"path": "a.mp4", "bytes": path.stat().st_size, **describe(probe(video))}
    (tmp_path / "index.jsonl").write_bytes(write_index([row]))
    return tmp_path


@pytest.mark.parametrize("name", ["", "index.jsonl"])
def test_an_indexed_video_gives_the_same_frames(indexed, decode_all, monkeypatch, name):
    (video,) = read_manifest(str(indexed / name))
    expected = decode_all(indexed / "a.mp4")
    monkeypatch.setattr("umt_fast.data.decode.container.Reader._list_packets", None)  # would cost a pass over the file
    for indices in ([0], [39], [5, 6, 7], [38, 3, 3, 20]):
        frames = read_frames(video, lambda count, indices=indices: indices if count == 40 else [])
        assert all(np.array_equal(frame, expected[index]) for frame, index in zip(frames, indices, strict=True))
        assert len(frames) == len(indices)


def test_a_file_that_is_not_the_indexed_one_is_a_bad_video(indexed, write_video):
    (video,) = read_manifest(str(indexed))
    path = indexed / "a.mp4"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BadVideo, match=r"but the index says \d+: it has changed since"):
        read_frames(video, lambda count: [0])


def test_probe_recognises_plain_files(tmp_path, write_video):
    (plain, turned) = VideoList.of_paths(
        [
            str(write_video(tmp_path / "plain.mp4", frames=12, size=(64, 48))),
            str(write_video(tmp_path / "turned.mp4", frames=12, size=(64, 48), rotation=90)),
        ]
    )
    facts = probe(plain)
    assert (facts.width, facts.height, facts.frames, facts.codec, facts.plain) == (64, 48, 12, "h264", True)
    facts = probe(turned)
    assert (facts.width, facts.height, facts.plain) == (48, 64, False)

"""Training copies, read by the packet offsets of their index."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from umt_fast.data.decode import by_index, probe, read_frames
from umt_fast.data.decode.by_index import find_packets
from umt_fast.data.prepare.encode import CODECS, Recipe, write_copy
from umt_fast.data.video import BadVideo, Facts, Packets, Video

FRAMES = 30
KINDS = [(codec, gop) for codec in CODECS for gop in (1, 4) if gop == 1 or codec != "mjpeg"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory, write_video):
    """Copies of one video by codec and GOP, with their rows of the index."""
    folder = tmp_path_factory.mktemp("copies")
    source = Video(str(write_video(folder / "source.mkv", frames=FRAMES, size=(96, 80), options={"bf": "3"})))
    made: dict[tuple[str, int], Video] = {}

    def copy(codec: str, gop: int) -> Video:
        if (codec, gop) not in made:
            path = folder / f"{codec}-{gop}.mp4"
            facts, _seconds = write_copy(source, str(path), Recipe(codec, gop=gop))
            made[codec, gop] = Video(str(path), size=path.stat().st_size, facts=facts)
        return made[codec, gop]

    return copy


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("SVT_LOG", "1")


def _where(video: Video) -> Packets:
    assert video.facts is not None
    assert video.facts.packets is not None
    return video.facts.packets


@pytest.mark.parametrize(("codec", "gop"), KINDS)
@pytest.mark.parametrize("held", ["file", "bytes", "shard"])
def test_frames_are_those_of_the_container(copies, tmp_path, codec, gop, held, decode_all, monkeypatch):
    video = copies(codec, gop)
    expected = decode_all(video.path)
    content = None
    if held == "bytes":
        content = Path(video.path).read_bytes()
        video = replace(video, path="memory://gone.mp4")
    elif held == "shard":
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            tar.add(video.path, "b.mp4")
            tar.add(video.path, "a.mp4")
        with tarfile.open(tmp_path / "shard.tar") as tar:
            offset = tar.getmember("a.mp4").offset_data
        video = replace(video, path=str(tmp_path / "shard.tar"), member="a.mp4", offset=offset)
    monkeypatch.setattr("av.open", None)
    for indices in ([0], [FRAMES - 1], list(range(FRAMES)), [3, 4, 5, 21], [17, 2, 2, 9], [1, 3, 6]):
        frames = read_frames(video, lambda count, indices=indices: indices if count == FRAMES else [], content)
        assert len(frames) == len(indices)
        assert all(np.array_equal(frame, expected[index]) for frame, index in zip(frames, indices, strict=True))


def test_only_what_a_frame_needs_is_read_and_decoded(copies, monkeypatch):
    video = copies("h264", 4)
    read, decoded = [], []
    pread, packet = by_index.os.pread, by_index._packet
    monkeypatch.setattr(by_index.os, "pread", lambda file, count, at: read.append(count) or pread(file, count, at))
    monkeypatch.setattr(by_index, "_packet", lambda content: decoded.append(len(content)) or packet(content))
    read_frames(video, lambda count: [5, 6, 17])
    assert len(decoded) == 5  # 4, 5 and 6; 16 and 17
    assert read == [4 * FRAMES, decoded[0] + decoded[1], decoded[2], decoded[3] + decoded[4]]


def test_a_video_without_known_packets_is_left_to_the_demuxer(copies, decode_all):
    video = copies("h264", 4)
    expected = decode_all(video.path)[11]
    for facts in (None, replace(video.facts, packets=None)):
        (frame,) = read_frames(replace(video, facts=facts), lambda count: [11])
        assert np.array_equal(frame, expected)


def _without_packets(video: Video) -> Video:
    assert video.facts is not None
    return replace(video, facts=replace(video.facts, packets=None))


def _facts(path: Path) -> tuple[Video, Facts]:
    video = Video(str(path))
    return video, probe(video)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("b-frames.mp4", {"bf": "2"}),
        ("no-table.mkv", {"bf": "0"}),
        ("annex-b.ts", {"bf": "0"}),
    ],
)
def test_other_files_are_left_to_the_demuxer(write_video, tmp_path, name, options):
    assert find_packets(*_facts(write_video(tmp_path / name, frames=12, options=options))) is None


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV writes no rotation")
def test_turned_frames_are_left_to_the_demuxer(write_video, tmp_path):
    """The rotation is in the container."""
    source = write_video(tmp_path / "source.mp4", frames=12, options={"bf": "0"}, rotation=90)
    found = []
    for keeps in (False, True):
        path = tmp_path / f"{keeps}.mp4"
        with av.open(str(source)) as before, av.open(str(path), "w", options={"movflags": "+faststart"}) as after:
            stream = after.add_stream_from_template(before.streams.video[0])
            if keeps:
                stream.set_display_rotation(90)
            for packet in before.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    after.mux(packet)
        with av.open(str(path)) as container:
            turned = bool(next(container.decode(video=0)).rotation)
        found.append((turned, find_packets(*_facts(path)) is not None))
    assert (True, False) in found
    assert (True, True) not in found


def test_packets_with_something_between_them_are_left_to_the_demuxer(write_video, tmp_path):
    path = write_video(tmp_path / "sound.mp4", frames=60, options={"bf": "0"}, audio_seconds=4)
    assert find_packets(*_facts(path)) is None


def test_frames_in_a_file_whose_table_comes_last_are_left_to_the_demuxer(write_video, tmp_path):
    assert find_packets(*_facts(write_video(tmp_path / "end.mp4", frames=12, options={"bf": "0"}))) is None


def test_a_single_frame(write_video, tmp_path):
    """MP4 stores no table for a single size."""
    source = write_video(tmp_path / "source.mkv", frames=1)
    facts, _seconds = write_copy(Video(str(source)), str(tmp_path / "a.mp4"), Recipe("mjpeg"))
    assert len(read_frames(Video(str(tmp_path / "a.mp4"), facts=facts), lambda count: [count - 1])) == 1


def test_a_file_of_another_size_is_a_bad_video(copies, tmp_path):
    video = copies("h264", 1)
    (tmp_path / "a.mp4").write_bytes(Path(video.path).read_bytes()[:-1])
    with pytest.raises(BadVideo, match="but the index says"):
        read_frames(replace(video, path=str(tmp_path / "a.mp4")), lambda count: [0])


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b"", "empty file")])
def test_a_missing_or_empty_file_is_a_bad_video(copies, tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(BadVideo, match=message):
        read_frames(replace(copies("h264", 1), path=str(tmp_path / "a.mp4")), lambda count: [0])


@pytest.mark.parametrize("number", [0, 0xFFFFFFFF, 0x00010000])
def test_a_table_of_other_sizes_is_a_bad_video(copies, number):
    """For example when another file of the same length has replaced the video."""
    video = copies("h264", 4)
    content = bytearray(Path(video.path).read_bytes())
    begin = _where(video).sizes
    content[begin : begin + 4 * FRAMES] = number.to_bytes(4, "big") * FRAMES
    with pytest.raises(BadVideo, match=r"it has changed since it was indexed|does not decode|not readable as video"):
        read_frames(video, lambda count: [0, 20], bytes(content))


def test_a_table_beyond_a_file_of_unknown_size_is_a_bad_video(copies, tmp_path):
    """It is refused before memory is allocated for its packets."""
    video = replace(copies("h264", 4), size=None, path=str(tmp_path / "a.mp4"))
    content = bytearray(Path(copies("h264", 4).path).read_bytes())
    begin = _where(video).sizes
    content[begin + 4 * 20 : begin + 4 * FRAMES] = b"\xff\xff\xff\xff" * (FRAMES - 20)
    (tmp_path / "a.mp4").write_bytes(content)
    for held in (None, bytes(content)):
        with pytest.raises(BadVideo, match="its frames would end after its"):
            read_frames(video, lambda count: [0, count - 1], held)


def test_nothing_is_read_from_before_a_video(copies, tmp_path):
    video = copies("h264", 4)
    content = Path(video.path).read_bytes()
    (tmp_path / "two").write_bytes(content * 2)
    second = replace(video, path=str(tmp_path / "two"), offset=len(content))
    where = _where(video)
    before = Packets(where.sizes - len(content), where.first - len(content), where.setup)
    for held in (None, content):
        with pytest.raises(BadVideo, match="there are no bytes -"):
            read_frames(replace(second, facts=replace(video.facts, packets=before)), lambda count: [0], held)


@pytest.mark.parametrize("where", [{"sizes": 10**9}, {"first": 10**9}, {"sizes": -5}, {"setup": b"\x01rubbish"}])
def test_an_index_that_is_wrong_is_a_bad_video(copies, where):
    video = copies("h264", 4)
    wrong = replace(video, facts=replace(video.facts, packets=replace(_where(video), **where)))
    for content in (None, Path(video.path).read_bytes()):
        with pytest.raises(BadVideo):
            read_frames(wrong, lambda count: [0, 20], content)


def test_a_codec_without_its_decoder_is_left_to_the_demuxer(copies, decode_all, monkeypatch):
    video = copies("h264", 4)
    monkeypatch.setattr(by_index, "_open_decoder", None)
    for codec in ("pcm_s16le", "libx264", ""):  # no copy has these codecs
        (frame,) = read_frames(replace(video, facts=replace(video.facts, codec=codec)), lambda count: [11])
        assert np.array_equal(frame, decode_all(video.path)[11])
    monkeypatch.setattr("av.codecs_available", av.codecs_available - {"h264"})
    (frame,) = read_frames(video, lambda count: [11])
    assert np.array_equal(frame, decode_all(video.path)[11])
    assert find_packets(video, video.facts) is None


@pytest.mark.parametrize(("codec", "gop"), KINDS)
def test_damage_reads_as_it_does_by_the_container(copies, codec, gop):
    """Decoders read beyond the end of a damaged packet; the bytes there must be the same too."""
    video = copies(codec, gop)
    whole = Path(video.path).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(5):
            at = int(rng.integers(_where(video).first, len(content)))
            part = content[at : at + int(rng.integers(1, 200))]
            content[at : at + len(part)] = rng.bytes(len(part))
        indices = sorted(rng.choice(FRAMES, 8, replace=False).tolist())
        found: list[list[np.ndarray] | None] = []
        for opened in (video, _without_packets(video)):
            try:
                found.append(read_frames(opened, lambda count, indices=indices: indices, bytes(content)))
            except BadVideo:
                found.append(None)
        one, other = found
        assert (one is None) == (other is None)
        assert one is None or all(np.array_equal(*pair) for pair in zip(one, other or [], strict=True))


def test_no_file_stays_open(copies, tmp_path):
    video = copies("h264", 4)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        read_frames(video, lambda count: [0, count - 1])
        with pytest.raises(BadVideo):
            read_frames(replace(video, facts=replace(video.facts, packets=Packets(1, 2, b""))), lambda count: [0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before

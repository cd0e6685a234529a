"""Files as they occur in practice: covers, several streams, rotation, cut streams, streams without a container."""

from __future__ import annotations

import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from umt_fast.config import DataConfig
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import open_video, probe, read_frames
from umt_fast.data.decode.excerpt import cut_excerpt
from umt_fast.data.decode.orientation import Orientation, from_matrix
from umt_fast.data.index import VideoList
from umt_fast.data.loader import ClipDataset
from umt_fast.data.prepare.encode import Recipe, write_copy
from umt_fast.data.video import BadVideo, Video

FFMPEG = shutil.which("ffmpeg")


@pytest.mark.parametrize("before", [2, 12, 40])
def test_a_transport_stream_over_the_end_of_its_clock(tmp_path, before):
    """Its times have 33 bits, so they restart at 0 every 26.5 hours; the muxer adds 1.4 seconds."""
    tick, path = Fraction(1, 90_000), tmp_path / "a.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"bf": "2"})
        stream.width = stream.height = 32
        stream.pix_fmt, stream.time_base = "yuv420p", tick
        stream.codec_context.gop_size, stream.codec_context.time_base = 6, tick
        for number in range(24):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 2**33 - 126_000 + (number - before) * 3750, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(expected) == 24
    assert all(map(np.array_equal, _all(path), expected))
    for index in (0, 3, 13, 23):
        (frame,) = read_frames(Video(str(path)), lambda count, index=index: [index])
        assert np.array_equal(frame, expected[index])
    excerpt = cut_excerpt(Video(str(path)), lambda timeline: [1, 20])
    assert excerpt is not None
    assert len(excerpt.frames) == 2


def test_grey_of_16_bits_is_not_white(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    (frame,) = read_frames(Video(str(tmp_path / "a.png")), lambda count: [0])
    assert np.array_equal(frame, np.repeat((ramp >> 8)[..., None], 3, axis=2))


def _all(path: Path) -> list[np.ndarray]:
    return read_frames(Video(str(path)), range)


def _mux(target: Path, *sources: tuple[Path, Disposition | None], suffix: str | None = None) -> Path:
    """The first streams of some files in one, with their dispositions."""
    with av.open(str(target), "w", format=suffix) as writer:
        opened = [av.open(str(path)) for path, _ in sources]
        streams = [writer.add_stream_from_template(one.streams[0]) for one in opened]
        for stream, (_, disposition) in zip(streams, sources, strict=True):
            if disposition is not None:
                stream.disposition = disposition
        for one, stream in zip(opened, streams, strict=True):
            for packet in one.demux(one.streams[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    writer.mux(packet)
            one.close()
    return target


def _cover_first(path: Path) -> Path:
    """Move the user data of an mp4, which holds its cover, before its tracks: the cover becomes stream 0."""
    data = path.read_bytes()
    moov = data.index(b"moov") - 4
    size = int.from_bytes(data[moov : moov + 4], "big")
    boxes, place = [], moov + 8
    while place < moov + size:
        length = int.from_bytes(data[place : place + 4], "big")
        boxes.append(data[place : place + length])
        place += length
    boxes.sort(key=lambda box: box[4:8] == b"trak")
    path.write_bytes(data[: moov + 8] + b"".join(boxes) + data[moov + size :])
    return path


@pytest.fixture
def cover(write_video, tmp_path) -> Path:
    return write_video(tmp_path / "cover.mkv", "mjpeg", frames=1, size=(320, 320), pixels="yuvj420p")


# 16. The stream.


def test_a_cover_picture_is_not_the_video(write_video, cover, tmp_path):
    good_video = write_video(tmp_path / "good.mp4", frames=20)
    path = _cover_first(_mux(tmp_path / "both.mp4", (good_video, None), (cover, Disposition.attached_pic)))
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic
    assert [frame.shape for frame in _all(path)] == [(48, 64, 3)] * 20
    assert all(np.array_equal(*pair) for pair in zip(_all(path), _all(good_video), strict=True))
    assert probe(Video(str(path))).frames == 20
    facts, _seconds = write_copy(Video(str(path)), str(tmp_path / "copy.mp4"), Recipe("h264", 32))
    assert facts.frames == 20


def test_a_song_with_a_cover_is_a_bad_video(write_audio, cover, tmp_path):
    song = write_audio(tmp_path / "song.m4a", 2.0)
    path = _mux(tmp_path / "song.mp4", (song, None), (cover, Disposition.attached_pic))
    for read in (_all, lambda path: probe(Video(str(path)))):
        with pytest.raises(BadVideo, match="no video but a cover picture"):
            read(path)


def test_the_default_of_several_video_streams_is_read(write_video, tmp_path):
    videos = [write_video(tmp_path / f"{n}.mp4", frames=10 + n, size=(64, 32 + 16 * n), seed=n) for n in range(3)]
    for chosen in range(3):
        flags = [Disposition.default if number == chosen else Disposition(0) for number in range(3)]
        path = _mux(tmp_path / f"of{chosen}.mkv", *zip(videos, flags, strict=True))
        assert [frame.shape for frame in _all(path)] == [(32 + 16 * chosen, 64, 3)] * (10 + chosen)


# 17. Display matrices.


def _with_matrix(path: Path, target: Path, degrees: float, mirrored: bool) -> Path:
    a, b = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = [a, b, 0, -b, a, 0] if not mirrored else [-a, b, 0, b, a, 0]
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2, version 0
    data[start : start + 36] = struct.pack(">9i", *(round(65536 * value) for value in matrix), 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


@pytest.mark.skipif(FFMPEG is None, reason="there is no ffmpeg to compare with")
@pytest.mark.parametrize("degrees", [0, 90, 180, 270, 30, 355])
@pytest.mark.parametrize("mirrored", [False, True])
def test_pictures_are_turned_as_ffmpeg_turns_them(write_video, tmp_path, degrees, mirrored):
    source = write_video(tmp_path / "source.mp4", frames=3, size=(64, 48), pixels="yuv444p")
    path = _with_matrix(source, tmp_path / "turned.mp4", degrees, mirrored)
    command = [str(FFMPEG), "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    shown = subprocess.run(command, capture_output=True, check=True).stdout
    found = np.stack(_all(path))
    difference = np.abs(found.astype(int).ravel() - np.frombuffer(shown, np.uint8))
    assert np.percentile(difference, 99) <= 2  # another version of FFmpeg may round otherwise


@pytest.mark.parametrize(("degrees", "mirrored"), [(90, True), (270, True), (0, True), (180, True), (30, False)])
def test_a_copy_is_turned_like_its_source(write_video, tmp_path, degrees, mirrored):
    source = write_video(tmp_path / "source.mp4", frames=6, size=(64, 48))
    path = _with_matrix(source, tmp_path / "turned.mp4", degrees, mirrored)
    assert not probe(Video(str(path))).plain
    facts, _seconds = write_copy(Video(str(path)), str(tmp_path / "copy.mp4"), Recipe("h264", 64, 1, 5))
    copied, shown = np.stack(_all(tmp_path / "copy.mp4")), np.stack(_all(path))
    assert copied.shape == shown.shape == (6, facts.height, facts.width, 3)
    assert 10 * np.log10(255**2 / np.square(copied.astype(float) - shown).mean()) > 26


def test_a_matrix_without_a_scale_turns_nothing():
    assert from_matrix(bytes(36)) == Orientation()


# 18. Transport streams that begin inside a group of pictures.

CUT = {
    "h264": ("libx264", {"x264-params": "open-gop=1:bframes=3:scenecut=0"}),
    "mpeg2": ("mpeg2video", {"bf": "2"}),
    "hevc": ("libx265", {"x265-params": "log-level=none:bframes=3:open-gop=1:keyint=12:min-keyint=12:scenecut=0"}),
    "intra refresh": ("libx264", {"x264-params": "intra-refresh=1:keyint=20"}),
}


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("share", [0.2, 0.3])
def test_a_transport_stream_that_was_cut_begins_at_its_first_whole_frame(
    write_video, decode_all, tmp_path, kind, share
):
    codec, options = CUT[kind]
    whole = write_video(tmp_path / "whole.ts", codec, size=(160, 128), options=options).read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(whole[: 3 * 188] + whole[int(len(whole) // 188 * share) * 188 :])
    expected = decode_all(path)
    assert 0 < len(expected) < 60
    found = _all(path)
    assert len(found) == len(expected)
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    last = len(expected) - 1
    one, other = read_frames(Video(str(path)), lambda count: [last, 1])
    assert np.array_equal(one, expected[last])
    assert np.array_equal(other, expected[1])
    facts, _seconds = write_copy(Video(str(path)), str(tmp_path / "copy.mp4"), Recipe("h264", 64))
    assert facts.frames == len(expected)


# 20. Files that were cut off, and streams without times.


@pytest.mark.parametrize(("name", "codec"), [("a.ogv", "libtheora"), ("a.gif", "gif"), ("a.ogg", "libvpx")])
def test_a_cut_off_ogg_or_gif_is_a_bad_video(write_video, tmp_path, name, codec):
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    path = write_video(tmp_path / name, codec, frames=30, pixels=pixels)
    content = path.read_bytes()
    assert len(_all(path)) == 30
    tar = tmp_path / "in.tar"
    tar.write_bytes(b"x" * 512 + content + b"y" * 512)
    shard = Video(str(tar), "a", 512, len(content))
    assert len(read_frames(shard, range)) == 30
    for share in (0.4, 0.8):
        kept = int(len(content) * share)
        path.write_bytes(content[:kept])
        tar.write_bytes(b"x" * 512 + content[:kept] + b"y" * 512)
        for video, held in (
            (Video(str(path)), None),
            (Video("s3://a", size=kept), content[:kept]),
            (Video(str(tar), "a", 512, kept), None),
        ):
            with pytest.raises(BadVideo, match="truncated: "):
                read_frames(video, range, held)


@pytest.mark.parametrize(("suffix", "codec"), [(".h264", "libx264"), (".m2v", "mpeg2video"), (".mjpeg", "mjpeg")])
def test_a_stream_without_a_container_can_be_copied(write_video, tmp_path, suffix, codec):
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / f"raw{suffix}", codec, frames=20, pixels=pixels, options={"bf": "0"})
    assert probe(Video(str(path))).frames == len(_all(path)) == 20
    facts, _seconds = write_copy(Video(str(path)), str(tmp_path / "copy.mp4"), Recipe("h264", 32))
    assert facts.frames == 20


# 21. Non-square pixels.


@pytest.fixture
def anamorphic(write_video, tmp_path) -> Path:
    """A video with pixels 4/3 as wide as high, rotated by 90 degrees."""
    plain = write_video(tmp_path / "plain.mp4", frames=6, size=(48, 48), options={"bf": "0"})
    path = tmp_path / "wide.mp4"
    with av.open(str(plain)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        stream.sample_aspect_ratio = Fraction(4, 3)
        for packet in reader.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                writer.mux(packet)
    return path


@pytest.mark.parametrize("degrees", [0, 90])
def test_non_square_pixels_are_widened_on_request(anamorphic, tmp_path, degrees):
    path = _with_matrix(anamorphic, tmp_path / "turned.mp4", degrees, False)
    wide, stored = ((64, 48, 3) if degrees else (48, 64, 3)), (48, 48, 3)
    for square, shape in ((False, stored), (True, wide)):
        with open_video(Video(str(path)), square_pixels=square) as reader:
            frames = [frame for _, frame in reader.read([0, 5])]
        assert [frame.shape for frame in frames] == [shape] * 2
        facts, _seconds = write_copy(
            Video(str(path)), str(tmp_path / "copy.mp4"), Recipe("h264", 64, square_pixels=square)
        )
        assert (facts.height, facts.width, 3) == shape
        (copied,) = read_frames(Video(str(tmp_path / "copy.mp4")), lambda count: [5])
        assert np.corrcoef(copied.ravel(), frames[1].ravel())[0, 1] > 0.9
    batch = ClipDataset(ClipStream(VideoList.of_paths([str(path)]), DataConfig(square_pixels=True), 2, 32, 0))[[0]]
    assert batch.bad == []

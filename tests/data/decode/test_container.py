from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest

from umt_fast.data.decode import container, read_frames
from umt_fast.data.decode.demux import decode
from umt_fast.data.video import BadVideo, Video

X265 = "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0:log-level=none:pools=none"
OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:scenecut=0"}
ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "4", "b": "200k"}
UNEVEN = np.cumsum(np.random.default_rng(0).integers(1, 9, 60)).tolist()

KINDS: dict[str, tuple[str, dict]] = {
    "h264.mp4": ("libx264", {"options": {"bf": "3"}}),
    "h264.mkv": ("libx264", {"options": {"bf": "3"}}),
    "h264.mov": ("libx264", {"options": {"bf": "3"}}),
    "h264.flv": ("libx264", {"options": {"bf": "3"}}),
    "h264.ts": ("libx264", {"options": {"bf": "3"}}),
    "h264.avi": ("libx264", {"options": {"bf": "3"}}),  # has no presentation times
    "h264_no_b.avi": ("libx264", {"options": {"bf": "0"}}),
    "h264_open_gop.mp4": ("libx264", {"options": OPEN_GOP}),
    "h264_intra_refresh.mp4": ("libx264", {"options": {"intra-refresh": "1"}, "size": (160, 96)}),
    "h264_all_intra.mp4": ("libx264", {"gop": 1}),
    "h264_one_gop.mp4": ("libx264", {"gop": 250, "options": {"scenecut": "0"}}),
    "h264_uneven.mp4": ("libx264", {"times": UNEVEN}),
    "h264_uneven.mkv": ("libx264", {"times": UNEVEN}),
    "h264_late.mp4": ("libx264", {"times": [150 + number for number in range(60)]}),
    "h264_late.mkv": ("libx264", {"times": [150 + number for number in range(60)]}),
    "h264_1fps.mkv": ("libx264", {"fps": 1, "frames": 5}),
    "h264_one_frame.mp4": ("libx264", {"frames": 1}),
    "h264_one_frame.mkv": ("libx264", {"frames": 1}),
    "h264_odd_size.mp4": ("libx264", {"size": (50, 38)}),
    "h264_long_audio.mp4": ("libx264", {"frames": 20, "audio_seconds": 4}),
    "h264_long_audio.mkv": ("libx264", {"frames": 20, "audio_seconds": 4}),
    "h264_long_audio.ts": ("libx264", {"frames": 20, "audio_seconds": 4}),
    "hevc_open_gop.mp4": ("libx265", {"options": {"x265-params": X265}}),
    "hevc_open_gop.mkv": ("libx265", {"options": {"x265-params": X265}}),
    "av1.mkv": ("libsvtav1", {"options": {"preset": "12"}}),
    "vp8_alt_ref.webm": ("libvpx", {"options": ALT_REF}),
    "vp9_alt_ref.webm": ("libvpx-vp9", {"options": ALT_REF}),
    "vp8_1fps.webm": ("libvpx", {"fps": 1, "frames": 5}),
    "mjpeg.avi": ("mjpeg", {"pixels": "yuvj420p"}),
    "mjpeg_uneven.avi": ("mjpeg", {"pixels": "yuvj420p", "times": UNEVEN}),
    "mpeg4.mp4": ("mpeg4", {"options": {"bf": "2"}}),
    "mpeg4.avi": ("mpeg4", {"options": {"bf": "2"}}),
    "mpeg4_no_b.avi": ("mpeg4", {}),
    "mpeg4_uneven.avi": ("mpeg4", {"times": UNEVEN}),
    "mpeg4.3gp": ("mpeg4", {}),
    "mpeg2.ts": ("mpeg2video", {"options": {"bf": "2"}, "fps": 25}),
    "mpeg2.mpg": ("mpeg2video", {"options": {"bf": "2"}, "fps": 25}),
    "wmv2.wmv": ("wmv2", {}),
}


@dataclass
class Sample:
    path: Path
    frames: list[np.ndarray]
    """All frames, decoded in one pass from the start."""


@pytest.fixture(scope="module")
def sample(tmp_path_factory, write_video, decode_all) -> Callable[[str], Sample]:
    folder = tmp_path_factory.mktemp("kinds")
    made: dict[str, Sample] = {}

    def get(kind: str) -> Sample:
        if kind not in made:
            codec, settings = KINDS[kind]
            path = write_video(folder / kind, codec, **settings)
            made[kind] = Sample(path, decode_all(path))
        return made[kind]

    return get


def _read(path: Path | str, indices: list[int]) -> list[np.ndarray]:
    return read_frames(Video(str(path)), lambda _count: indices)


def _check(path: Path, frames: list[np.ndarray]) -> None:
    """`read_frames` gives the frames of one pass over the file, for each frame alone and for many at once."""
    counts = []

    def choose(indices: list[int]) -> Callable[[int], list[int]]:
        return lambda count: counts.append(count) or indices  # type: ignore[func-returns-value]

    rng = np.random.default_rng(0)
    draws = [[index] for index in range(len(frames))]
    draws += [rng.integers(len(frames), size=8).tolist() for _ in range(20)]  # in no order, with repeats
    draws += [list(range(len(frames))), list(range(len(frames)))[::-1]]
    for indices in draws:
        got = read_frames(Video(str(path)), choose(indices))
        assert len(got) == len(indices)
        for index, frame in zip(indices, got, strict=True):
            assert frame.dtype == np.uint8
            assert np.array_equal(frame, frames[index]), f"frame {index} of {indices}"
    assert set(counts) == {len(frames)}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_one_pass(sample, kind):
    made = sample(kind)
    assert len(made.frames) == KINDS[kind][1].get("frames", 60)
    # Otherwise reading a neighbouring frame instead would not fail the test.
    assert all((one != next_one).any() for one, next_one in zip(made.frames, made.frames[1:], strict=False))
    _check(made.path, made.frames)


def test_a_repeated_index_is_one_array(sample):
    first, other, again = _read(sample("h264.mp4").path, [40, 3, 40])
    assert first is again
    assert other is not first


def _as_it_is(_number: int, packet: av.Packet) -> av.Packet:
    return packet


def _remux(
    source: Path,
    target: Path,
    edit: Callable[[int, av.Packet], av.Packet] = _as_it_is,
    options: dict[str, str] | None = None,
) -> Path:
    """Copy the video packets, without decoding, each passed through `edit`."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options=options or {}) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        number = 0
        for packet in reader.demux(stream):
            if packet.size:
                packet = edit(number, packet)
                packet.stream = copy
                writer.mux(packet)
                number += 1
    return target


@pytest.mark.parametrize("kind", ["h264.mp4", "h264.mov", "mpeg4.mp4", "hevc_open_gop.mp4"])
@pytest.mark.parametrize("cut", [2, 5, 8])
def test_cut_within_a_gop_without_encoding(sample, decode_all, tmp_path, kind, cut):
    """An edit list hides the frames before the cut, the key frame among them."""
    with av.open(str(sample(kind).path)) as container:
        stream = container.streams.video[0]
        step = round(1 / (stream.average_rate * stream.time_base))

    def earlier(_number: int, packet: av.Packet) -> av.Packet:
        packet.pts -= cut * step
        packet.dts -= cut * step
        return packet

    path = _remux(sample(kind).path, tmp_path / f"cut{Path(kind).suffix}", earlier)
    frames = decode_all(path)
    assert len(frames) == 60 - cut
    assert np.array_equal(frames[0], sample(kind).frames[cut])
    _check(path, frames)


@pytest.mark.parametrize(("first", "count"), [(0, 30), (20, 40), (24, 36), (20, 15)])
def test_trimmed_by_an_edit_list(sample, decode_all, tmp_path, first, count):
    """Phones and editors trim a file in this way: all frames stay in it, some are not displayed."""
    data = bytearray(sample("h264.mp4").path.read_bytes())
    entry = data.index(b"elst") + 12  # version, flags, number of entries; then duration and start
    duration, start = struct.unpack(">Ii", data[entry : entry + 8])
    assert duration == 4000  # milliseconds
    data[entry : entry + 8] = struct.pack(">Ii", count * 1000 // 15, start + first * 1024)
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(data)
    frames = decode_all(path)
    assert abs(len(frames) - count) <= 1
    assert np.array_equal(frames[0], sample("h264.mp4").frames[first])
    _check(path, frames)


@pytest.mark.parametrize("shared_time", [False, True])
def test_vp8_frames_that_are_not_shown(sample, decode_all, tmp_path, shared_time):
    """Two-pass VP8 has hidden alternate reference frames in separate packets; they are not frames of the video."""
    hidden = (10, 20, 33)
    times: dict[int, int] = {}

    def hide(number: int, packet: av.Packet) -> av.Packet:
        times[number] = packet.pts
        if number not in hidden:
            return packet
        data = bytearray(bytes(packet))
        assert data[0] & 1  # an inter frame
        data[0] &= ~0x10  # RFC 6386, 9.1: show_frame
        copy = av.Packet(bytes(data))
        copy.time_base, copy.duration = packet.time_base, packet.duration
        copy.pts = copy.dts = times[number - 1] if shared_time else packet.pts
        return copy

    path = _remux(sample("vp8_alt_ref.webm").path, tmp_path / "hidden.webm", hide)
    frames = decode_all(path)
    assert len(frames) == 57
    _check(path, frames)


@pytest.mark.parametrize("movflags", ["faststart", "frag_keyframe", "frag_keyframe+empty_moov"])
def test_mp4_layouts(sample, tmp_path, movflags):
    path = _remux(sample("h264.mp4").path, tmp_path / "layout.mp4", options={"movflags": movflags})
    _check(path, sample("h264.mp4").frames)


# Only what is needed is decoded.


@pytest.fixture
def count_decoded(monkeypatch) -> Callable[[Path, list[int]], int]:
    def count(path: Path, indices: list[int]) -> int:
        decoded: list[int | None] = []

        def counted(*of):
            for frame in decode(*of):
                decoded.append(frame.pts)
                yield frame

        with monkeypatch.context() as patch:
            patch.setattr(container, "decode", counted)
            _read(path, indices)
        assert len(decoded) >= len(set(indices))  # otherwise this no longer counts all decoded frames
        return len(decoded)

    return count


SEEKABLE = [
    "h264.mp4",
    "h264.mkv",
    "h264.mov",
    "hevc_open_gop.mp4",
    "vp8_alt_ref.webm",
    "vp9_alt_ref.webm",
    "mpeg4.mp4",
]


@pytest.mark.parametrize("kind", SEEKABLE)
@pytest.mark.parametrize("index", [0, 11, 30, 50, 59])
def test_one_frame_costs_one_gop(sample, count_decoded, kind, index):
    assert count_decoded(sample(kind).path, [index]) <= 13


@pytest.mark.parametrize("kind", SEEKABLE)
def test_frames_of_one_gop_are_decoded_once(sample, count_decoded, kind):
    assert count_decoded(sample(kind).path, [45, 41, 43, 41, 38]) <= 13


@pytest.mark.parametrize("kind", SEEKABLE)
def test_gops_between_are_skipped(sample, count_decoded, kind):
    assert count_decoded(sample(kind).path, [57, 2]) <= 26


def test_all_intra_decodes_the_wanted_frames(sample, count_decoded):
    assert count_decoded(sample("h264_all_intra.mp4").path, [59, 3, 30]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_costs_at_most_two_passes(sample, count_decoded, kind):
    """A file with poor seeking is not read from its start again for each wanted frame."""
    made = sample(kind)
    count = len(made.frames)
    wanted = [count * segment // 8 for segment in range(8)]
    assert count_decoded(made.path, wanted) <= 2 * count


def test_only_wanted_frames_are_converted(sample, monkeypatch):
    converted = []
    to_rgb = container.RgbConverter.__call__

    def convert(converter, frame, index):
        converted.append(frame.pts)
        return to_rgb(converter, frame, index)

    monkeypatch.setattr(container.RgbConverter, "__call__", convert)
    _read(sample("h264.mp4").path, [50, 3, 50, 20])
    assert len(converted) == 3


# Rotation.


def _turned(path: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write `matrix` into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2, version 0
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    "matrix",
    [
        *((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)),
        *((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)),
    ],
    ids=[
        "upright",
        "90 clockwise",
        "180",
        "90 counter-clockwise",
        "mirrored",
        "upside down",
        "swapped",
        "anti-swapped",
    ],
)
def test_rotation_by_the_track_header(sample, decode_all, tmp_path, matrix):
    """ISO/IEC 14496-12, 6.2.2: a pixel at (p, q) is displayed at (a p + c q, b p + d q), y downwards."""
    path = _turned(sample("h264.mp4").path, tmp_path / "turned.mp4", matrix)
    stored = decode_all(path)[20]
    a, b, c, d = matrix
    y, x = np.mgrid[: stored.shape[0], : stored.shape[1]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    expected = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), dtype=np.uint8)
    expected[to_y, to_x] = stored
    (shown,) = _read(path, [20])
    assert shown.shape == ((64, 48, 3) if a == 0 else (48, 64, 3))
    assert np.array_equal(shown, expected)


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV writes no rotation")
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_rotation_by_the_display_matrix(write_video, decode_all, tmp_path, suffix, degrees):
    path = write_video(tmp_path / f"turned{suffix}", frames=20, rotation=degrees)
    (shown,) = _read(path, [15])
    assert np.array_equal(shown, np.rot90(decode_all(path)[15], degrees // 90))  # counter-clockwise


# Files that give no clip.


def test_missing_file(tmp_path):
    with pytest.raises(BadVideo, match="No such file"):
        _read(tmp_path / "none.mp4", [0])


def test_impossible_name():
    with pytest.raises(BadVideo):
        _read("a\0b.mp4", [0])


def test_empty_file(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(BadVideo, match="empty"):
        _read(tmp_path / "empty.mp4", [0])


def test_folder(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(BadVideo, match="directory"):
        _read(tmp_path / "folder.mp4", [0])


@pytest.mark.parametrize("data", [b"no video at all\n" * 100, b"\0" * 5000, bytes(range(256)) * 20, b"x"])
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm", ".ts", ""])
def test_something_else(tmp_path, data, suffix):
    path = tmp_path / f"other{suffix}"
    path.write_bytes(data)
    with pytest.raises(BadVideo, match=r"\w"):
        _read(path, [0])


@pytest.mark.parametrize("name", ["sound.mp4", "sound.mkv", "sound.m4a"])
def test_audio_only(tmp_path, write_audio, name):
    with pytest.raises(BadVideo, match="no video"):
        _read(write_audio(tmp_path / name, 1.0), [0])


@pytest.mark.parametrize(
    ("kind", "mark"),
    [("h264.mp4", b"avc1"), ("vp9_alt_ref.webm", b"V_VP9"), ("mpeg4.avi", b"FMP4")],
)
def test_unknown_codec(sample, tmp_path, kind, mark):
    data = sample(kind).path.read_bytes()
    assert mark in data
    path = tmp_path / kind
    path.write_bytes(data.replace(mark, b"QQQQQ"[: len(mark)]))
    with pytest.raises(BadVideo, match=r"\w"):
        _read(path, [0])


@pytest.mark.parametrize(
    "kind",
    [
        *("h264.mp4", "h264.mkv", "h264.avi", "hevc_open_gop.mkv", "av1.mkv", "mpeg4.avi", "mjpeg.avi"),
        *("vp8_alt_ref.webm", "vp9_alt_ref.webm", "h264_long_audio.mkv"),
    ],
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6])
def test_truncated(sample, tmp_path, kind, share):
    data = sample(kind).path.read_bytes()
    path = tmp_path / kind
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BadVideo, match=r"truncated|Invalid data|End of file|Input/output|no frames|no video") as caught:
        _read(path, [0])
    if share == 0.6 and kind != "h264.mp4":  # there the index is gone with the end
        assert "truncated" in str(caught.value)


def test_truncated_behind_its_index(sample, tmp_path):
    path = _remux(sample("h264.mp4").path, tmp_path / "first.mp4", options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(BadVideo, match="truncated"):
        _read(path, [0])


def _packet_spans(path: Path) -> list[tuple[int, int]]:
    """Place and size of each packet in the file."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("kind", ["h264.mp4", "hevc_open_gop.mp4", "mpeg4.mp4", "vp9_alt_ref.webm"])
def test_damage_stays_in_its_gop(sample, tmp_path, kind):
    """Key frames come every 12 frames; the packets of the third GOP are overwritten with noise."""
    made = sample(kind)
    data = bytearray(made.path.read_bytes())
    rng = np.random.default_rng(0)
    for place, size in _packet_spans(made.path)[26:34]:
        data[place + 8 : place + size] = rng.bytes(size - 8)
    path = tmp_path / kind
    path.write_bytes(data)
    for index in (0, 5, 11, 17, 50, 59):
        (frame,) = _read(path, [index])
        assert np.array_equal(frame, made.frames[index])
    for index in range(24, 36):
        with contextlib.suppress(BadVideo):
            (frame,) = _read(path, [index])
            assert frame.shape == made.frames[0].shape


def _damaged(data: bytes, number: int, rng: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 600))
    kind = number % 5
    if kind == 0:  # single bytes
        for _ in range(rng.integers(1, 9)):
            damaged[rng.integers(len(data))] = rng.integers(256)
    elif kind == 1:  # a piece is noise
        length = len(damaged[start : start + length])
        damaged[start : start + length] = rng.bytes(length)
    elif kind == 2:  # a piece is missing
        del damaged[start : start + length]
    elif kind == 3:  # single bits of the header
        for _ in range(20):
            damaged[rng.integers(1500)] ^= 1 << rng.integers(8)
    else:  # single bits of the end, where mp4 has its index
        for _ in range(4):
            damaged[-int(rng.integers(1, 2500))] ^= 1 << rng.integers(8)
    return bytes(damaged)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["h264.mp4", "vp9_alt_ref.webm", "h264.avi", "h264.ts"])
def test_any_damage_reads_or_is_a_bad_video(sample, tmp_path, kind):
    data = sample(kind).path.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / kind
    reasons = []
    for number in range(200):
        path.write_bytes(_damaged(data, number, rng))
        try:
            frames = read_frames(Video(str(path)), lambda count: rng.integers(count, size=4).tolist())
        except BadVideo as error:
            reasons.append(str(error))
        except Exception as error:
            raise AssertionError(f"damage {number}: {type(error).__name__}: {error}") from error
        else:
            assert all(frame.ndim == 3 and frame.dtype == np.uint8 for frame in frames)
    assert all(reasons)
    assert 0 < len(reasons) < 200  # otherwise the damage is too small or too large for this test


def test_no_file_stays_open(sample, tmp_path):
    """A run opens millions of files, some of them bad."""
    fds = Path("/proc/self/fd")
    if not fds.is_dir():
        pytest.skip("no /proc")
    bad = tmp_path / "cut.mkv"
    data = sample("h264.mkv").path.read_bytes()
    bad.write_bytes(data[: len(data) // 2])

    def read() -> None:
        for kind in ("h264.mp4", "h264.avi", "vp9_alt_ref.webm"):
            _read(sample(kind).path, [3, 50])
        with pytest.raises(BadVideo):
            _read(bad, [0])

    read()
    before = len(list(fds.iterdir()))
    for _ in range(5):
        read()
    assert len(list(fds.iterdir())) <= before

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from umt_fast.config import ConfigError
from umt_fast.data.decode import probe, read_frames
from umt_fast.data.prepare import encode
from umt_fast.data.prepare.encode import CODECS, BadCopy, Recipe, copy_size, write_copy
from umt_fast.data.video import BadVideo, Facts, Video

UNEVEN = np.cumsum(np.random.default_rng(0).integers(1, 9, 20)).tolist()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("SVT_LOG", "1")


def _read_all(path: Path) -> np.ndarray:
    return np.stack(read_frames(Video(str(path)), range))


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


def _copy(source: Path, recipe: Recipe, target: Path | None = None) -> tuple[Path, Facts]:
    target = target or source.with_suffix(".copy.mp4")
    facts, _seconds = write_copy(Video(str(source)), str(target), recipe)
    return target, facts


def _write_smooth(path: Path, pixels: str, matrix: int, full_range: bool, side: int = 256, frames: int = 5) -> Path:
    """Gradients in all three channels, which 4:2:0 changes little; nearly lossless, with colour tags."""
    x, y = np.meshgrid(np.linspace(0, 255, side), np.linspace(0, 255, side))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"crf": "1", "bf": "0"})
        stream.width = stream.height = side
        stream.pix_fmt = pixels
        stream.codec_context.color_range = 2 if full_range else 1
        stream.codec_context.colorspace = matrix
        for number in range(frames):
            picture = np.stack([x, y, np.full_like(x, 50 * number)], -1).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=pixels, dst_colorspace=1 if matrix == 1 else 5, dst_color_range=2 if full_range else 1
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, write_video):
    """A video with frames at uneven times, B-frames, one key frame and sound."""
    folder = tmp_path_factory.mktemp("uneven")
    return write_video(
        folder / "uneven.mkv", frames=20, size=(96, 80), gop=250, times=UNEVEN, audio_seconds=2, options={"bf": "3"}
    )


@pytest.mark.parametrize(
    ("codec", "gop"), [(codec, gop) for codec in CODECS for gop in (1, 3, 4) if gop == 1 or codec != "mjpeg"]
)
def test_a_copy_has_the_frames_at_their_times_and_the_key_frames_asked_for(uneven, tmp_path, codec, gop):
    path, facts = _copy(uneven, Recipe(codec, gop=gop, quality=5 if codec == "mjpeg" else 16), tmp_path / "copy.mp4")
    source = probe(Video(str(uneven)))
    assert facts.codec == codec
    assert facts.plain
    assert (facts.width, facts.height) == (96, 80)
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        seconds = np.array([float(packet.pts * stream.time_base) for packet in packets])
        end = float(stream.duration * stream.time_base)
        container.seek(0)
        kinds = [frame.pict_type for frame in container.decode(stream)]
    assert [packet.is_keyframe for packet in packets] == [number % gop == 0 for number in range(20)]
    assert all(packet.pts == packet.dts for packet in packets)
    assert av.video.frame.PictureType.B not in kinds
    # Matroska's clock ticks in milliseconds
    assert np.allclose(seconds, (source.times - source.times[0]) / 1000, atol=1e-9)
    assert end == pytest.approx(seconds[-1] + np.median(np.diff(seconds)), abs=0.002)
    assert _psnr(_read_all(path), _read_all(uneven)) > 24  # blocks of random colour are hard to code


def test_a_random_frame_needs_no_other_gop(uneven, tmp_path):
    """GOPs are closed: each decodes to the same frames when the others are noise."""
    path, _facts = _copy(uneven, Recipe("h264", gop=4), tmp_path / "copy.mp4")
    before, data = _read_all(path), bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for number, (place, size) in enumerate(spans):
        if not 8 <= number < 12:
            data[place + 5 : place + size] = bytes(size - 5)
    path.write_bytes(data)
    after = read_frames(Video(str(path)), lambda _count: [8, 9, 10, 11])
    assert np.array_equal(np.stack(after), before[8:12])


@pytest.mark.parametrize("codec", CODECS)
def test_same_bytes_every_time(uneven, tmp_path, codec):
    digests = {
        hashlib.sha256(_copy(uneven, Recipe(codec), tmp_path / f"{number}.mp4")[0].read_bytes()).hexdigest()
        for number in range(3)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("codec", ["h264", "mjpeg"])
@pytest.mark.parametrize(
    ("pixels", "matrix", "full_range"),
    [
        ("yuv420p", 6, False),
        ("yuv420p", 2, False),
        ("yuv420p", 1, False),
        ("yuvj420p", 1, True),
        ("yuvj420p", 5, True),
        ("yuv420p10le", 1, False),
        ("yuv444p", 6, False),
    ],
)
def test_colours_stay(tmp_path, codec, pixels, matrix, full_range):
    source = _write_smooth(tmp_path / "source.mp4", pixels, matrix, full_range)
    path, _facts = _copy(source, Recipe(codec, quality=2 if codec == "mjpeg" else 5))
    before, after = _read_all(source).astype(float), _read_all(path)
    assert _psnr(before, after) > 36
    assert np.abs((before - after).mean((0, 1, 2))).max() < 2  # a wrong matrix: 3 and more; a wrong range: 10
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert frame.format.name == ("yuvj420p" if codec == "mjpeg" else "yuv420p")
        assert frame.color_range == (2 if codec == "mjpeg" else 1)
        assert frame.colorspace in (5, 6)  # both BT.601


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV writes no rotation")
@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_a_rotated_video_is_stored_upright(write_video, tmp_path, degrees):
    source = write_video(tmp_path / "turned.mp4", frames=6, size=(96, 64), rotation=degrees)
    path, facts = _copy(source, Recipe("h264", short_side=48, quality=5))
    assert (facts.width, facts.height) == ((72, 48) if degrees == 180 else (48, 72))
    before = [
        Image.fromarray(frame).resize((facts.width, facts.height), Image.Resampling.BICUBIC)
        for frame in _read_all(source)
    ]
    assert _psnr(np.stack([np.asarray(image) for image in before]), _read_all(path)) > 24
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation == 0


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((1920, 1080), 256, (456, 256)),
        ((1080, 1920), 256, (256, 456)),
        ((340, 256), 256, (340, 256)),
        ((320, 180), 256, (320, 180)),
        ((51, 39), 256, (50, 38)),
        ((4000, 257), 256, (3984, 256)),
        ((1, 9), 256, (2, 8)),
    ],
)
def test_size(size, short_side, expected):
    assert copy_size(*size, short_side) == expected


def test_frames_are_resized_smoothly(tmp_path):
    source = _write_smooth(tmp_path / "source.mp4", "yuv444p", 6, False, side=150)
    path, facts = _copy(source, Recipe("h264", short_side=64, quality=5))
    assert (facts.width, facts.height) == (64, 64)
    before = np.stack([np.asarray(Image.fromarray(frame).resize((64, 64))) for frame in _read_all(source)])
    assert _psnr(before, _read_all(path)) > 34


def test_a_file_without_times_gets_even_ones(write_video, tmp_path):
    source = write_video(tmp_path / "b.avi", frames=10, fps=10, options={"bf": "3"})
    assert not len(probe(Video(str(source))).keys)
    path, _facts = _copy(source, Recipe("h264", quality=5))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert [packet.pts * stream.time_base for packet in container.demux(stream) if packet.size] == [
            Fraction(number, 10) for number in range(10)
        ]
    assert _psnr(_read_all(source), _read_all(path)) > 24


@pytest.mark.parametrize("frames", [1, 2])
def test_short_videos(write_video, tmp_path, frames):
    source = write_video(tmp_path / "short.mp4", frames=frames, fps=1)
    _path, facts = _copy(source, Recipe())
    assert facts.frames == frames
    assert write_copy(Video(str(source)), str(tmp_path / "again.mp4"), Recipe())[1] == pytest.approx(frames)


def test_damage_in_the_middle_is_a_bad_video(write_video, tmp_path):
    source = write_video(tmp_path / "source.mp4", "mpeg4", frames=40)
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for place, size in spans[18:22]:
        data[place : place + size] = np.random.default_rng(0).bytes(size)
    source.write_bytes(data)
    with pytest.raises(BadVideo, match=r"frame \d+ of 40 does not decode|not readable"):
        _copy(source, Recipe())


def test_an_encoder_that_does_otherwise_is_noticed(uneven, tmp_path, monkeypatch):
    monkeypatch.setitem(CODECS, "h264", encode.Codec("libx264", (22, 19), {"x264-params": "keyint=7:scenecut=0"}))
    with pytest.raises(BadCopy, match="key frames"):
        _copy(uneven, Recipe("h264", gop=4), tmp_path / "copy.mp4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "theora"}, "there are h264, hevc"),
        ({"short_side": 255}, "even"),
        ({"short_side": 8}, "from 16"),
        ({"gop": 9}, "1 to 8"),
        ({"codec": "mjpeg", "gop": 4}, "every frame of mjpeg"),
        ({"quality": 0}, "1 to 51"),
    ],
)
def test_impossible_recipes_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**settings)

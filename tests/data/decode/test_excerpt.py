"""Excerpts: the part of a video that the wanted frames need, as a separate file."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from umt_fast.data.decode import bitstream as vp9
from umt_fast.data.decode import probe, read_frames
from umt_fast.data.decode.excerpt import Excerpt, cut_excerpt
from umt_fast.data.index import VideoList
from umt_fast.data.video import BadVideo, Video

X265 = "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0:log-level=none:pools=none"
ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "4", "b": "200k"}
UNEVEN = np.cumsum(np.random.default_rng(0).integers(1, 9, 60)).tolist()

KINDS: dict[str, tuple[str, dict]] = {
    "h264.mp4": ("libx264", {"options": {"bf": "3"}}),
    "h264.mkv": ("libx264", {"options": {"bf": "3"}}),
    "h264.ts": ("libx264", {"options": {"bf": "3"}}),
    "h264_no_b.avi": ("libx264", {"options": {"bf": "0"}}),
    "h264_uneven.mp4": ("libx264", {"times": UNEVEN}),
    "h264_late.mkv": ("libx264", {"times": [150 + number for number in range(60)]}),
    "h264_one_gop.mp4": ("libx264", {"gop": 250, "options": {"scenecut": "0"}}),
    "h264_sound.mkv": ("libx264", {"audio_seconds": 4}),
    "hevc_open_gop.mp4": ("libx265", {"options": {"x265-params": X265}}),
    "av1.mkv": ("libsvtav1", {"options": {"preset": "12"}}),
    "vp8_alt_ref.webm": ("libvpx", {"options": ALT_REF, "gop": 60}),
    "vp9_alt_ref.webm": ("libvpx-vp9", {"options": ALT_REF, "gop": 60}),
    "vp9_444.mp4": ("libvpx-vp9", {"pixels": "yuv444p"}),
    "vp9_one_frame.webm": ("libvpx-vp9", {"frames": 1}),
    "mjpeg.avi": ("mjpeg", {"pixels": "yuvj420p"}),
    "mpeg4.mp4": ("mpeg4", {"options": {"bf": "2"}}),
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory, write_video) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("kinds")

    def get(kind: str) -> Path:
        codec, settings = KINDS[kind]
        return folder / kind if (folder / kind).exists() else write_video(folder / kind, codec, **settings)

    return get


def _video(path: Path | str) -> Video:
    return VideoList.of_paths([str(path)])[0]


def _decode(excerpt: Excerpt) -> list[np.ndarray | None]:
    """The frame of each packet, in order of presentation."""
    with av.open(io.BytesIO(excerpt.content)) as container:
        times = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
    with av.open(io.BytesIO(excerpt.content)) as container:
        frames = {frame.pts: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}
    return [frames.get(time) for time in times]


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_excerpts_have_the_wanted_frames(sample, kind, indexed):
    video = _video(sample(kind))
    facts = probe(video)
    if indexed:
        video = dataclasses.replace(video, facts=facts)
    rng = np.random.default_rng(0)
    draws = [rng.integers(facts.frames, size=4).tolist() for _ in range(6)]
    draws += [[0], [facts.frames - 1], list(range(facts.frames))[::-1]]
    for indices in draws:
        excerpt = cut_excerpt(video, lambda count, indices=indices: indices)
        frames = _decode(excerpt)
        assert all(frame is not None for frame in frames)  # DALI assigns NVDEC's frames to packets by their order
        assert (excerpt.width, excerpt.height) == (facts.width, facts.height)
        wanted = read_frames(video, lambda count, indices=indices: indices)
        for number, frame in zip(excerpt.frames, wanted, strict=True):
            assert np.array_equal(frames[number], frame), indices


@pytest.mark.parametrize("kind", ["h264.mp4", "vp9_444.mp4", "mjpeg.avi"])
def test_excerpts_hold_only_the_needed_groups(sample, kind):
    excerpt = cut_excerpt(_video(sample(kind)), lambda count: [2, 50])  # key frames are 12 apart
    with av.open(io.BytesIO(excerpt.content)) as container:
        packets = sum(1 for packet in container.demux(video=0) if packet.size)
        assert [stream.type for stream in container.streams] == ["video"]
    assert 2 <= packets <= (2 if kind == "mjpeg.avi" else 3 + 3 + 3 + 3)  # with references of B-frames


def test_excerpts_are_cut_from_bytes_too(sample):
    path = sample("vp9_alt_ref.webm")
    one = cut_excerpt(_video(path), lambda count: [3, 40])
    assert cut_excerpt(_video("s3://bucket/a.webm"), lambda count: [3, 40], path.read_bytes()) == one


def test_no_excerpt_of_videos_with_an_edit_list_or_rotation(write_video, tmp_path):
    never = pytest.fail
    cut = write_video(tmp_path / "cut.mp4", frames=20, times=list(range(-5, 15)))
    assert cut_excerpt(_video(cut), lambda count: never("drawn")) is None
    if hasattr(av.VideoStream, "set_display_rotation"):
        turned = write_video(tmp_path / "turned.mp4", frames=5, rotation=90)
        assert cut_excerpt(_video(turned), lambda count: never("drawn")) is None


def test_no_excerpt_from_an_open_gop_of_h264(write_video, tmp_path):
    """An open GOP begins with a picture that does not reset the decoder; in an excerpt its next frames are lost."""
    path = write_video(tmp_path / "open.mp4", options={"x264-params": "open-gop=1:bframes=3:scenecut=0"})
    assert cut_excerpt(_video(path), lambda count: [2, 50]) is None
    assert cut_excerpt(_video(path), lambda count: [2, 5]) is not None


def test_a_missing_video(tmp_path):
    with pytest.raises(BadVideo, match="No such file"):
        cut_excerpt(_video(tmp_path / "none.mp4"), lambda count: [0])


# Frames of another size than the header's: FFmpeg and PyAV follow, DALI writes past its memory.


def _join(first: Path, second: Path, target: Path) -> Path:
    """The packets of `first` and then those of `second`, under the header of `first`."""
    with av.open(str(target), "w") as writer:
        place, copy = 0, None
        for path in (first, second):
            with av.open(str(path)) as reader:
                stream = reader.streams.video[0]
                copy = copy or writer.add_stream_from_template(stream)
                for packet in reader.demux(stream):
                    if packet.size:
                        packet.pts = packet.dts = place * 67
                        packet.stream = copy
                        writer.mux(packet)
                        place += 1
    return target


@pytest.mark.parametrize(
    ("codec", "suffix", "settings"),
    [
        ("libvpx-vp9", ".webm", {}),
        ("libvpx", ".webm", {}),
        ("mjpeg", ".mkv", {"pixels": "yuvj420p"}),
    ],
)
@pytest.mark.parametrize("size", [(96, 64), (32, 32), (64, 64)])
def test_no_excerpt_of_frames_that_change_in_size(write_video, tmp_path, codec, suffix, settings, size):
    first, second = (
        write_video(tmp_path / f"{number}{suffix}", codec, frames=10, size=one, **settings)
        for number, one in enumerate(((64, 48), size))
    )
    video = _video(_join(first, second, tmp_path / f"joined{suffix}"))
    assert cut_excerpt(video, lambda count: [2, 15]) is None
    assert cut_excerpt(video, lambda count: [2, 5]) is not None


def test_no_excerpt_of_a_pixel_format_that_changes(write_video, tmp_path):
    first, second = (
        write_video(tmp_path / f"{pixels}.webm", "libvpx-vp9", frames=10, pixels=pixels)
        for pixels in ("yuv420p", "yuv444p")
    )
    video = _video(_join(first, second, tmp_path / "joined.webm"))
    assert cut_excerpt(video, lambda count: [2, 15]) is None


@pytest.mark.parametrize("kind", ["vp9_alt_ref.webm", "vp9_444.mp4"])
def test_vp9_headers_name_the_size(sample, kind):
    with av.open(str(sample(kind))) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    found = [list(vp9.read_formats(packet)) for packet in packets]
    assert all(one[:2] == (64, 48) for formats in found for one in formats)
    assert [number for number, formats in enumerate(found) if formats][:2] == ([0] if "alt_ref" in kind else [0, 12])
    (width, height, form), *_ = found[0]
    assert (width, height) == (64, 48)
    assert form == ((1, 0, 0) if "444" in kind else (0, 0))


def test_vp9_superframes(sample):
    """Hidden frames share a packet with a displayed one; an index at its end has the sizes (annex B)."""
    with av.open(str(sample("vp9_444.mp4"))) as container:
        one, other = [bytes(packet) for packet in container.demux(video=0) if packet.size][:2]
    mark = bytes((0b110_01_001,))
    index = mark + len(one).to_bytes(2, "little") + len(other).to_bytes(2, "little") + mark
    assert list(vp9._split(one + other + index)) == [one, other]
    assert list(vp9.read_formats(other + one + mark + index[3:5] + index[1:3] + mark)) == list(vp9.read_formats(one))


@pytest.mark.parametrize("packet", [b"", b"\x00", b"\x12" * 30, b"\x82" + b"\xff" * 20])
def test_packets_that_are_not_vp9_are_refused(packet):
    with pytest.raises(ValueError, match="VP9"):
        list(vp9.read_formats(packet))

"""DALI's loader against PyAV's: the same videos, frames, crops and replacements. On the CPU, where DALI decodes VP8,
VP9 and MJPEG in the same pipeline as NVDEC on a GPU."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed: make test-dali")

from umt_fast.config import DataConfig
from umt_fast.data import dali_loader as dali
from umt_fast.data import open_loader, synthetic
from umt_fast.data.batch import Batch
from umt_fast.data.clips import ClipStream
from umt_fast.data.crops import Crop, View
from umt_fast.data.dali_loader import BatchPlan, BatchPlanDataset, DaliLoader, DaliSupport
from umt_fast.data.decode import nvdec, probe
from umt_fast.data.decode.choice import choose_decoder
from umt_fast.data.decode.container import Storage
from umt_fast.data.decode.dali import DecodeFailed, DecodingPipeline, VisitRequest, to_rgb
from umt_fast.data.index import VideoList, describe
from umt_fast.data.loader import ClipLoader, NothingReadable
from umt_fast.data.pairs import IntervalSampling, PairTransform

CPU = torch.device("cpu")
FRAMES, SIDE = 4, 32
LUMA = torch.tensor((0.299, 0.587, 0.114))

pytestmark = pytest.mark.timeout(120)

ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "4", "b": "200k"}
UNEVEN = np.cumsum(np.random.default_rng(0).integers(1, 9, 60)).tolist()
LATE = [150 + number for number in range(60)]
MJPEG = {"pixels": "yuvj420p"}

KINDS: dict[str, tuple[str, dict]] = {
    "vp8.webm": ("libvpx", {}),
    "vp8.avi": ("libvpx", {}),
    "vp8_alt_ref.webm": ("libvpx", {"options": ALT_REF, "gop": 60}),
    "vp8_uneven.mkv": ("libvpx", {"times": UNEVEN}),
    "vp9.webm": ("libvpx-vp9", {}),
    "vp9.mp4": ("libvpx-vp9", {}),
    "vp9_alt_ref.webm": ("libvpx-vp9", {"options": ALT_REF, "gop": 60}),
    "vp9_alt_ref.mp4": ("libvpx-vp9", {"options": ALT_REF, "gop": 60}),
    "vp9_uneven.mkv": ("libvpx-vp9", {"times": UNEVEN}),
    "vp9_late.mkv": ("libvpx-vp9", {"times": LATE}),
    "vp9_all_intra.mp4": ("libvpx-vp9", {"gop": 1}),
    "vp9_one_gop.webm": ("libvpx-vp9", {"gop": 250}),
    "vp9_one_frame.webm": ("libvpx-vp9", {"frames": 1}),
    "vp9_odd_size.webm": ("libvpx-vp9", {"size": (49, 37)}),
    "vp9_444.webm": ("libvpx-vp9", {"pixels": "yuv444p"}),
    "mjpeg.avi": ("mjpeg", MJPEG),
    "mjpeg.mov": ("mjpeg", MJPEG),
    "mjpeg_uneven.mkv": ("mjpeg", {**MJPEG, "times": UNEVEN}),
    "mjpeg_422.avi": ("mjpeg", {"pixels": "yuvj422p"}),
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory, write_video) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("kinds")

    def get(kind: str) -> Path:
        codec, settings = KINDS[kind]
        path = folder / kind
        return path if path.exists() else write_video(path, codec, **{"size": (48, 48), **settings})

    return get


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, write_video) -> list[str]:
    """Videos for DALI and for PyAV, of several sizes."""
    folder = tmp_path_factory.mktemp("mixed")
    codecs = [("libvpx-vp9", ".webm", {}), ("libx264", ".mp4", {}), ("mjpeg", ".avi", MJPEG), ("libvpx", ".mkv", {})]
    paths = []
    for number in range(8):
        codec, suffix, settings = codecs[number % 4]
        size = ((48, 36), (36, 48), (64, 64))[number % 3]
        path = folder / f"{number}{suffix}"
        paths.append(str(write_video(path, codec, frames=14 + number, size=size, seed=number, **settings)))
    return paths


@pytest.fixture(scope="module")
def vp9(tmp_path_factory) -> list[str]:
    """The demo's VP9 files: their moving shapes have edges and smooth parts, like real videos."""
    folder = tmp_path_factory.mktemp("vp9")
    synthetic.write_videos(folder, 8)
    return sorted(map(str, folder.glob("*.webm")))


def _stream(videos: list[str] | VideoList, frames: int = FRAMES, side: int = SIDE, **config) -> ClipStream:
    videos = videos if isinstance(videos, VideoList) else VideoList.of_paths(videos)
    return ClipStream(videos, DataConfig(**{"workers": 0, **config}), frames, side, 0)


def _by_pyav(stream: ClipStream, *, batches: int, batch_size: int, start: int = 0, **ranks: int) -> list[Batch]:
    with ClipLoader(stream, start=start, batches=batches, batch_size=batch_size, **ranks) as loader:
        return list(loader)


def _by_dali(stream: ClipStream, *, batches: int, batch_size: int, start: int = 0, **options) -> list[Batch]:
    options.setdefault("say", lambda text: None)
    with DaliLoader(stream, CPU, None, start=start, batches=batches, batch_size=batch_size, **options) as loader:
        return list(loader)


def _bad(batches: list[Batch]) -> list[tuple[str, str]]:
    return [bad for batch in batches for bad in batch.bad]


def _assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert [batch.paths for batch in one] == [batch.paths for batch in other]
    assert all(torch.equal(a.clip, b.clip) for a, b in zip(one, other, strict=True))
    assert _bad(one) == _bad(other)


def _luma_errors(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mean difference of each frame's brightness, in levels of 255."""
    return ((one.float() - other.float()) @ LUMA).abs().mean(dim=(-2, -1))


def _assert_alike(made: list[Batch], expected: list[Batch], luma: float = 2.0) -> None:
    """The same videos; PyAV's clips are equal bit for bit, DALI's except for the colour conversion."""
    assert [batch.paths for batch in made] == [batch.paths for batch in expected]
    assert _bad(made) == _bad(expected)
    for one, other in zip(made, expected, strict=True):
        assert one.clip.shape == other.clip.shape
        assert one.clip.dtype == torch.uint8
        assert one.clip.is_contiguous()
        assert _luma_errors(one.clip, other.clip).max() < luma


# Frames: those of PyAV.


def _whole(path: Path, frames: list[int], side: int = 48) -> torch.Tensor:
    """Frames of a square video of this side, which DALI need not resize: uint8 [T,side,side,3]."""
    content = np.fromfile(path, np.uint8)
    order = VisitRequest(0, "", content, frames, [View(0, 0, side, side, False)], bt709=False)
    return DecodingPipeline(_stream([], side=side), CPU, 1, 1).decode(order)[0]


def _planes(frame: av.VideoFrame) -> list[np.ndarray]:
    return [
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].astype(float)
        for plane in frame.planes
    ]


def _enlarge(plane: np.ndarray, axis: int) -> np.ndarray:
    """Double the length by linear interpolation, with chroma samples centred as in MPEG-1 and JPEG."""
    before = np.concatenate((plane.take([0], axis), plane.take(range(plane.shape[axis] - 1), axis)), axis)
    after = np.concatenate((plane.take(range(1, plane.shape[axis]), axis), plane.take([-1], axis)), axis)
    pairs = np.stack((0.25 * before + 0.75 * plane, 0.75 * plane + 0.25 * after), axis + 1)
    shape = list(plane.shape)
    shape[axis] *= 2
    return pairs.reshape(shape)


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """RGB from PyAV's decoded planes by ITU-R BT.601 with interpolated chroma, as DALI converts them."""
    luma, *chroma = _planes(frame)
    for number, plane in enumerate(chroma):
        for axis in (0, 1):
            if plane.shape[axis] < luma.shape[axis]:
                plane = _enlarge(plane, axis)
        chroma[number] = plane - 128
    if not frame.format.name.startswith("yuvj"):
        luma = (luma - 16) * 255 / 219
        chroma = [plane * 255 / 224 for plane in chroma]
    blue, red = chroma
    planes = np.stack((luma, blue, red), axis=-1)
    return (planes @ to_rgb(0.299, 0.114).T).clip(0, 255)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "odd" not in kind])
def test_every_frame_is_the_one_that_pyav_decodes(sample, kind):
    """Within 1 of 255, as the decoded planes are the same. In order, alone, backwards and with repeats."""
    path = sample(kind)
    with av.open(str(path)) as container:
        expected = np.stack([_rgb(frame) for frame in container.decode(video=0)])
    assert len(expected) == KINDS[kind][1].get("frames", 60)
    assert len(np.unique(expected, axis=0)) == len(expected)  # otherwise a neighbouring frame would pass
    rng = np.random.default_rng(0)
    draws = [list(range(len(expected))), list(range(len(expected)))[::-1]]
    draws += [rng.integers(len(expected), size=8).tolist() for _ in range(4)]
    draws += [[int(index)] for index in rng.integers(len(expected), size=4)]
    for frames in draws:
        error = np.abs(_whole(path, frames).numpy() - expected[frames])
        assert error.max() <= 1.01, f"frame {frames[error.max((1, 2, 3)).argmax()]} of {frames}"


@pytest.mark.parametrize("kind", ["vp9_444.webm", "vp9_odd_size.webm"])
def test_where_ffmpeg_converts_exactly_too_the_pictures_are_equal(sample, decode_all, kind):
    """FFmpeg uses its fast conversion only for 4:2:0 of even size."""
    path = sample(kind)
    frames = np.stack(decode_all(path))
    height, width = frames.shape[1:3]
    stream = _stream([], side=height)
    order = VisitRequest(0, "", np.fromfile(path, np.uint8), [0, 59], [View(0, 0, height, height, False)], bt709=False)
    made = DecodingPipeline(stream, CPU, 1, 1).decode(order)[0].numpy()
    assert np.array_equal(made, frames[[0, 59], :, : min(width, height)])


def _write_colours(path: Path, codec: str, matrix: int, full_range: bool) -> Path:
    """A video with colour tags in its stream."""
    y, x = np.mgrid[:64, :64]
    picture = np.stack((60 + 2 * x, 200 - 2 * y, 60 + x + y), axis=-1).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=15, options={"crf": "4", "b": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full_range else 1
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, number, 0), format="rgb24").reformat(format="yuv420p")
            frame.colorspace, frame.color_range = matrix, stream.codec_context.color_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(("codec", "matrix"), [("libvpx-vp9", 5), ("libvpx-vp9", 1), ("libvpx", 1)])
def test_colours(tmp_path, codec, matrix, full_range):
    """BT.601, BT.709 and, in VP8, BT.709 that the decoder ignores; DALI itself reads all as BT.601."""
    path = _write_colours(tmp_path / "colours.mkv", codec, matrix, full_range)
    stream = _stream([str(path)], frames=2, side=64, crop_scales=(1.0,), flip=0.0)
    (expected,), (made,) = (by(stream, batches=1, batch_size=2) for by in (_by_pyav, _by_dali))
    inner = [batch.clip[:, :, 8:-8, 8:-8].float() for batch in (expected, made)]
    assert (inner[0] - inner[1]).abs().mean() < 2
    (order,) = BatchPlanDataset(stream, DaliSupport())[[0]].requests_with_content()
    assert order.bt709 == (codec == "libvpx-vp9" and matrix == 1)
    if order.bt709:  # the test needs the matrix
        order.bt709 = False
        unmended = DecodingPipeline(stream, CPU, 1, 1).decode(order)[:, :, 8:-8, 8:-8].float()
        assert (inner[0][:1] - unmended).abs().mean() > 3


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "view", [(0, 0, 48, 48), (0, 0, 31, 48), (7, 5, 40, 33), (20, 12, 24, 24), (8, 8, 32, 32), (40, 40, 8, 5)]
)
def test_crop_resize_and_flip_are_those_of_a_cut(sample, decode_all, view, flip):
    """Within 1 of 255 (from 4:4:4, decoded exactly), except in the outermost rows and columns of downscaled clips."""
    path = sample("vp9_444.webm")
    shown = View(*view, flip)
    order = VisitRequest(0, "", np.fromfile(path, np.uint8), [3, 40], [shown], bt709=False)
    made = DecodingPipeline(_stream([]), CPU, 1, 1).decode(order)[0].numpy().astype(int)
    frames = decode_all(path)
    expected = np.empty((2, SIDE, SIDE, 3), np.uint8)
    cut = Crop(shown, expected)
    cut.add([0], frames[3])
    cut.add([1], frames[40])
    cut.finish()
    error = np.abs(made - expected)
    assert error[:, 1:-1, 1:-1].max() <= 2  # each rounds
    assert error.max() <= 18
    assert error.mean() < 0.5


# Batches: those of the PyAV loader.


@pytest.mark.parametrize("crops", [1, 2])
def test_batches_are_those_of_pyav(mixed, crops):
    stream = _stream(mixed, crops_per_clip=crops)
    expected = _by_pyav(stream, batches=6, batch_size=6)
    made = _by_dali(stream, batches=6, batch_size=6)
    _assert_alike(made, expected)
    equal = {path.suffix: [] for path in map(Path, mixed)}
    for one, other in zip(made, expected, strict=True):
        for place, path in enumerate(one.paths):
            clips = slice(place * crops, (place + 1) * crops)
            equal[Path(path).suffix].append(torch.equal(one.clip[clips], other.clip[clips]))
    assert all(equal[".mp4"])  # PyAV decodes H.264 in both
    assert not any(chain(equal[".webm"], equal[".avi"], equal[".mkv"]))  # otherwise DALI decoded nothing


def test_neighbouring_frames_would_show(mixed):
    """The tolerance of `_assert_alike` is smaller than the difference between neighbouring frames."""
    (batch,) = _by_pyav(_stream(mixed, frames=12), batches=1, batch_size=8)
    assert _luma_errors(batch.clip[:, 1:], batch.clip[:, :-1]).min() > 2.5


def test_videos_differ_by_less_than_two(vp9):
    """The mean difference of a frame at 224 px, in brightness and colours, in levels of 255; see docs/data.md."""
    stream = _stream(vp9, side=224)
    pairs = zip(_by_dali(stream, batches=2, batch_size=8), _by_pyav(stream, batches=2, batch_size=8), strict=True)
    for made, expected in pairs:
        assert _luma_errors(made.clip, expected.clip).max() < 1.6
        assert (made.clip.float() - expected.clip.float()).abs().mean(dim=(2, 3, 4)).max() < 2.2


@pytest.mark.parametrize(
    "settings",
    [{"pipelines": 3}, {"pipelines": 2, "pipeline_visits": 1}, {"pipeline_visits": 2}, {"workers": 2, "pipelines": 2}],
)
def test_pipelines_and_workers_change_nothing(mixed, settings):
    alone = _by_dali(_stream(mixed), batches=5, batch_size=3)
    _assert_same(_by_dali(_stream(mixed, **settings), batches=5, batch_size=3), alone)


def test_ranks_share_out_one_stream(mixed):
    together = _by_dali(_stream(mixed), batches=3, batch_size=4, start=4)
    ranks = [_by_dali(_stream(mixed), batches=3, batch_size=2, start=4, rank=rank, world_size=2) for rank in range(2)]
    for number, batch in enumerate(together):
        assert torch.equal(torch.cat([batches[number].clip for batches in ranks]), batch.clip)


def test_a_later_start_skips_clips(mixed):
    clips = torch.cat([batch.clip for batch in _by_dali(_stream(mixed), batches=12, batch_size=1)])
    later = _by_dali(_stream(mixed, pipelines=2), batches=2, batch_size=3, start=5)
    assert torch.equal(torch.cat([batch.clip for batch in later]), clips[5:11])


def test_short_videos(tmp_path, write_video):
    path = write_video(tmp_path / "short.webm", "libvpx-vp9", frames=3, size=(SIDE, SIDE))
    stream = _stream([str(path)], frames=8, crop_scales=(1.0,), flip=0.0)
    (batch,) = _by_dali(stream, batches=1, batch_size=1)
    assert (batch.clip[0] == batch.clip[0, :1]).all()
    _assert_alike([batch], _by_pyav(stream, batches=1, batch_size=1))


def test_shards(mixed, tmp_path):
    """Videos in a tar file, found by an index, and by offset only."""
    rows = []
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for path in mixed:
            tar.add(path, Path(path).name)
    with tarfile.open(tmp_path / "s.tar") as tar:
        for number, member in enumerate(tar):
            row = {"path": member.name, "shard": "s.tar", "offset": member.offset_data, "bytes": member.size}
            (video,) = VideoList.of_paths([mixed[number]])
            rows.append(row | (describe(probe(video)) if number % 2 else {}))
    in_shards = _by_dali(_stream(VideoList.of_rows(rows, str(tmp_path))), batches=4, batch_size=4)
    files = _by_dali(_stream(mixed), batches=4, batch_size=4)
    assert all(torch.equal(one.clip, other.clip) for one, other in zip(in_shards, files, strict=True))
    assert [len(batch.paths) for batch in in_shards] == [4] * 4


def test_codecs_left_to_pyav_are_reported_once(mixed):
    said: list[str] = []
    _by_dali(
        _stream([path for path in mixed if path.endswith((".webm", ".mp4"))]), batches=6, batch_size=4, say=said.append
    )
    assert len(said) == 1
    assert "2 x h264" in said[0]
    said.clear()
    _by_dali(_stream([path for path in mixed if not path.endswith(".mp4")]), batches=6, batch_size=4, say=said.append)
    assert said == []


def test_turned_and_cut_videos_and_hidden_frames_go_to_pyav(tmp_path, write_video, decode_all):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV writes no rotation")
    turned = write_video(tmp_path / "turned.mp4", "libvpx-vp9", frames=9, size=(64, 48), rotation=90)
    cut = write_video(tmp_path / "cut.mp4", "libvpx-vp9", frames=20, times=list(range(-5, 15)))
    hidden = _hide_frames(write_video(tmp_path / "all.webm", "libvpx", frames=20, gop=30), tmp_path / "hidden.webm")
    assert (len(decode_all(cut)), len(decode_all(hidden))) == (15, 18)
    said: list[str] = []
    stream = _stream([str(turned), str(cut), str(hidden)])
    made = _by_dali(stream, batches=2, batch_size=3, say=said.append)
    _assert_same(made, _by_pyav(stream, batches=2, batch_size=3))
    assert len(said) == 1
    assert f"2 x vp9 {dali.NOT_PLAIN}" in said[0]
    assert f"1 x vp8 {dali.NOT_PLAIN}" in said[0]


def test_a_video_that_changes_in_size_goes_to_pyav(tmp_path, write_video):
    """DALI 2.4.0 writes past its memory there. Draws made before the change of size is found must not be lost."""
    sizes = ((64, 48), (96, 64))
    parts = [write_video(tmp_path / f"{n}.webm", "libvpx-vp9", frames=8, size=sizes[n]) for n in range(2)]
    with av.open(str(tmp_path / "joined.webm"), "w") as writer:
        place, copy = 0, None
        for path in parts:
            with av.open(str(path)) as reader:
                copy = copy or writer.add_stream_from_template(reader.streams.video[0])
                for packet in reader.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = 67 * place
                        packet.stream = copy
                        writer.mux(packet)
                        place += 1
    stream = _stream([str(tmp_path / "joined.webm")])
    _assert_same(*(by(stream, batches=2, batch_size=3) for by in (_by_dali, _by_pyav)))


def _hide_frames(source: Path, target: Path) -> Path:
    """Mark two VP8 inter frames as not shown (RFC 6386, section 9.1)."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for number, packet in enumerate(reader.demux(stream)):
            if not packet.size:
                continue
            if number in (6, 13):
                data = bytearray(bytes(packet))
                data[0] &= ~0x10
                hidden = av.Packet(bytes(data))
                hidden.time_base, hidden.pts, hidden.dts = packet.time_base, packet.pts, packet.dts
                packet = hidden
            packet.stream = copy
            writer.mux(packet)
    return target


# Videos that cannot be read.


def _damage_a_gop(path: Path, target: Path) -> Path:
    """Noise in the packets from 26 on, the third GOP of 12 frames."""
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    with av.open(str(path)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for place, size in spans[26:34]:
        data[place + 8 : place + size] = rng.bytes(size - 8)
    target.write_bytes(data)
    return target


@pytest.fixture
def bad_videos(tmp_path, write_audio, sample) -> list[str]:
    """One video of each unreadable or partly unreadable kind."""
    webm = sample("vp9.webm").read_bytes()
    contents = {
        "empty.webm": b"",
        "junk.webm": b"no video" * 100,
        "zeros.mp4": bytes(5000),
        "header.webm": webm[:400],
        "half.webm": webm[: len(webm) // 2],
        "half.avi": sample("mjpeg.avi").read_bytes()[:20000],
        "unknown.webm": webm.replace(b"V_VP9", b"V_QQQ"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in (*contents, "missing.webm")]
    paths.append(str(write_audio(tmp_path / "sound.mkv", 1.0)))
    paths += [str(_damage_a_gop(sample(kind), tmp_path / kind)) for kind in ("vp9.webm", "vp8.webm")]
    (tmp_path / "folder.webm").mkdir()
    return [*paths, str(tmp_path / "folder.webm"), "a\0b.webm"]


def test_bad_videos_are_replaced_and_reported_as_with_pyav(mixed, bad_videos):
    stream = _stream([*mixed, *bad_videos], pipelines=2)
    visits = 2 * len(stream.videos)
    expected = _by_pyav(stream, batches=visits // 6, batch_size=6)
    made = _by_dali(stream, batches=visits // 6, batch_size=6)
    reported = {name for name, _ in _bad(expected)}
    assert set(bad_videos) - {name for name in bad_videos if Path(name).name in KINDS} <= reported
    assert [batch.paths for batch in made] == [batch.paths for batch in expected]
    assert _bad(made) == _bad(expected)
    for one, other in zip(made, expected, strict=True):
        whole = [place for place, path in enumerate(one.paths) if Path(path).name not in KINDS]
        assert _luma_errors(one.clip[whole], other.clip[whole]).max() < 2


def test_a_video_of_an_index_that_has_changed_is_bad(mixed, tmp_path):
    row = describe(probe(VideoList.of_paths(mixed)[0])) | {"path": mixed[0], "bytes": 99}
    stream = _stream(VideoList.of_rows([row, {"path": mixed[2]}]))
    made, expected = (by(stream, batches=2, batch_size=1) for by in (_by_dali, _by_pyav))
    _assert_alike(made, expected)
    assert "the index says 99" in _bad(made)[0][1]


def test_where_dali_fails_pyav_decides(sample, mixed, tmp_path, monkeypatch):
    """A file with packets that cannot be decoded stops a pipeline; the other videos of its group are kept."""
    damaged = str(_damage_a_gop(sample("vp9.webm"), tmp_path / "damaged.webm"))
    stream = _stream([*mixed, damaged], pipelines=2)
    failures = []
    finish = DecodingPipeline.finish

    def count(pipeline: DecodingPipeline) -> torch.Tensor:
        try:
            return finish(pipeline)
        except DecodeFailed as error:
            failures.append(str(error))
            raise

    monkeypatch.setattr(DecodingPipeline, "finish", count)
    made = _by_dali(stream, batches=9, batch_size=9)
    _assert_alike(made, _by_pyav(stream, batches=9, batch_size=9))
    assert len(failures) >= 2  # in its group, and alone
    assert {name for name, _ in _bad(made)} == {damaged}


def test_videos_that_only_dali_cannot_read_stay_in_the_batch(mixed, monkeypatch):
    monkeypatch.setattr(DecodingPipeline, "finish", lambda pipeline: _fail(pipeline))
    stream = _stream(mixed)
    _assert_same(_by_dali(stream, batches=2, batch_size=4), _by_pyav(stream, batches=2, batch_size=4))


def _fail(pipeline: DecodingPipeline) -> torch.Tensor:
    pipeline.close()
    raise DecodeFailed("no")


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable(tmp_path, workers):
    (tmp_path / "broken.webm").write_bytes(b"no video" * 100)
    stream = _stream([str(tmp_path / "broken.webm"), str(tmp_path / "missing.webm")], workers=workers)
    with pytest.raises(NothingReadable, match="21 videos in a row"):
        _by_dali(stream, batches=2, batch_size=2)


def test_a_codec_with_other_frames_is_left_to_pyav(mixed, monkeypatch):
    """A run on a GPU compares the first videos; here the comparison runs on the CPU, once with a fault."""
    with DaliLoader(_stream(mixed), CPU, None, start=0, batches=1, batch_size=1, say=print) as loader:
        assert loader._find_wrong(DaliSupport(), range(8)) == frozenset()
        decode = DecodingPipeline.decode

        def late(pipeline: DecodingPipeline, order: VisitRequest) -> torch.Tensor:
            if order.codec == "vp9":
                order.frames = [max(index - 1, 0) for index in order.frames]
            return decode(pipeline, order)

        monkeypatch.setattr(DecodingPipeline, "decode", late)
        assert loader._find_wrong(DaliSupport(), range(8)) == {"vp9"}
    takes = DaliSupport(distrusted=frozenset(("vp9",)))
    assert "other frames" in takes.why_not(_stored("vp9"))


# Which decoder gets which video.


def _stored(codec: str, pixels: str = "yuv420p", matrix: int = 2, size: tuple[int, int] = (64, 48)) -> Storage:
    return Storage(codec, pixels, matrix, *size)


def test_formats_that_dali_decodes_on_the_cpu():
    takes = DaliSupport()
    assert takes.why_not(_stored("vp9")) is None
    assert takes.why_not(_stored("vp9", size=(49, 37))) is None
    assert takes.why_not(_stored("h264")) == "h264"
    assert takes.why_not(_stored("vp9", "yuv420p10le")) == "vp9 in yuv420p10le"
    assert takes.why_not(_stored("vp9", matrix=9)) == "vp9 in colour space 9"
    assert takes.why_not(_stored("mjpeg", "yuvj422p", 9)) is None


def test_formats_that_dali_decodes_on_a_gpu():
    takes = DaliSupport({"h264": nvdec.Limits(7, (48, 4096), (16, 4096), 65536)})
    assert takes.why_not(_stored("h264", matrix=1)) is None
    assert takes.why_not(_stored("vp9")) == "vp9"
    assert takes.why_not(_stored("h264", "yuv422p")) == "h264 in yuv422p"
    assert takes.why_not(_stored("h264", "yuv420p10le")) == "h264 in yuv420p10le"
    assert takes.why_not(_stored("h264", size=(4096, 4096))) is None
    for size in ((47, 48), (46, 48), (48, 14), (48, 47), (4098, 64)):
        assert "size" in (takes.why_not(_stored("h264", size=size)) or "")
    narrow = DaliSupport({"h264": nvdec.Limits(1, (48, 4096), (16, 4096), 8160)})
    assert narrow.why_not(_stored("h264", size=(1920, 1088))) is None
    assert narrow.why_not(_stored("h264", size=(1920, 1090))) is not None


def test_the_choice_without_a_gpu():
    assert choose_decoder("auto", CPU).text == "pyav"
    choice = choose_decoder("dali", CPU)
    assert choice.name == "dali"
    assert choice.engines is None
    assert "dali on the CPU" in choice.text


# Memory, threads and processes.


def _resident() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_is_flat(mixed):
    """Over 800 clips after the first 200. MEMORY_CLIPS=10000 takes half a minute more."""
    clips = int(os.environ.get("MEMORY_CLIPS", "1000"))
    stream = _stream(mixed, pipelines=2)
    sizes = []
    with DaliLoader(stream, CPU, None, start=0, batches=clips // 4, batch_size=4, say=print) as loader:
        for number, _ in enumerate(loader, 1):
            if number % 50 == 0:
                sizes.append(_resident())
    assert max(sizes[1:]) < 1.05 * sizes[0], sizes


HOLES = """
import ctypes, sys
import torch
from umt_fast.config import DataConfig
from umt_fast.data.dali_loader import DaliLoader
from umt_fast.data.index import VideoList
from umt_fast.data.clips import ClipStream

stream = ClipStream(VideoList.of_paths(sys.argv[1:]), DataConfig(workers=0), 8, 64, 0)
with DaliLoader(stream, torch.device("cpu"), None, start=0, batches=10, batch_size=8) as loader:
    for _ in loader:
        pass
heap = type("Heap", (ctypes.Structure,), {"_fields_": [(f"field{n}", ctypes.c_size_t) for n in range(10)]})
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = heap
print(libc.mallinfo2().field8)  # bytes that are free and stay with the process
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 tells")
def test_large_buffers_leave_no_holes(write_video, tmp_path):
    """10 batches leave gaps of 5 MB, or of 30 to 100 MB if DALI gets all its memory from malloc."""
    path = write_video(tmp_path / "a.avi", "mjpeg", size=(320, 240), frames=16, **MJPEG)
    command = [sys.executable, "-c", HOLES, str(path)]
    finished = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    assert int(finished.stdout) < 10 << 20


def test_a_batch_outlives_the_next_and_the_loader(mixed):
    """A batch is in DALI's memory, which is kept as long as the tensor lives."""
    stream = _stream([path for path in mixed if not path.endswith(".mp4")])
    with DaliLoader(stream, CPU, None, start=0, batches=6, batch_size=3) as loader:
        first = next(loader)
        kept = first.clip.clone()
        places = {batch.clip.data_ptr() for batch in loader}
    gc.collect()
    assert torch.equal(first.clip, kept)
    assert first.clip.data_ptr() not in places


def test_a_whole_batch_is_handed_over_without_a_copy(mixed, monkeypatch):
    stream = _stream([path for path in mixed if not path.endswith(".mp4")])
    made = []
    finish = DecodingPipeline.finish
    monkeypatch.setattr(DecodingPipeline, "finish", lambda pipeline: made.append(finish(pipeline)) or made[-1])
    for batch in _by_dali(stream, batches=3, batch_size=3):
        assert batch.clip.data_ptr() == made.pop(0).data_ptr()


def _threads() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("taken", [0, 1, 6])
def test_closing_leaves_no_process_and_no_thread(mixed, taken):
    _by_dali(_stream(mixed, pipelines=2), batches=2, batch_size=2)  # what DALI and torch start once stays
    threads = _threads()
    loader = DaliLoader(
        _stream(mixed, workers=2, pipelines=2), CPU, None, start=0, batches=6, batch_size=2, say=lambda text: None
    )
    for _ in range(taken):
        next(loader)
    loader.close()
    loader.close()  # once more does no harm
    with pytest.raises(StopIteration):
        next(loader)
    gc.collect()
    assert not multiprocessing.active_children()
    deadline = time.monotonic() + 30
    while _threads() > threads and time.monotonic() < deadline:  # they end when they are next scheduled
        time.sleep(0.05)
    assert _threads() <= threads


def test_random_states_are_left_alone(mixed):
    """Masks of a run come from torch's generator, so a new loader in a resumed run must not change its state."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    _by_dali(_stream(mixed), batches=2, batch_size=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_the_end(mixed):
    assert _by_dali(_stream(mixed), batches=0, batch_size=2) == []


def test_a_plan_holds_each_visit_once(mixed):
    plan: BatchPlan = BatchPlanDataset(_stream(mixed, crops_per_clip=3), DaliSupport())[list(range(8))]
    orders = plan.requests_with_content()
    assert sorted([order.place for order in orders] + plan.places) == list(range(8))
    assert plan.reasons == {"h264": 2}
    assert all(len(order.views) == 3 for order in orders)
    for order in orders:
        assert bytes(order.content[:4]) == b"\x1a\x45\xdf\xa3"  # Matroska, each from its beginning


# Stage 2: views that torch resizes bicubically, and pictures among the videos.


def _pairs(paths: list[str], training: bool, antialias: bool = False, replace: bool = True, **config) -> ClipStream:
    return ClipStream(
        VideoList.of_paths(paths),
        DataConfig(**{"workers": 0, **config}),
        FRAMES,
        SIDE,
        0,
        sampling=IntervalSampling(FRAMES, training),
        transform=PairTransform(FRAMES, SIDE, training, antialias),
        shuffle=training,
        replace=replace,
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("antialias", [True, False])
def test_views_of_stage_2_are_those_of_pyav(mixed, training, antialias):
    """Random resized crops and flips, or whole frames; torch resizes them, so only chroma differs."""
    stream = _pairs(mixed, training, antialias)
    expected, made = (by(stream, batches=3, batch_size=5) for by in (_by_pyav, _by_dali))
    _assert_alike(made, expected)
    decoded = [not torch.equal(a.clip, b.clip) for a, b in zip(made, expected, strict=True)]
    assert all(decoded)  # else DALI had no part in it


def test_views_of_exact_frames_are_equal(sample, decode_all):
    """From 4:4:4, which both decode exactly."""
    stream = _pairs([str(sample("vp9_444.webm"))] * 2, training=True)
    expected, made = (by(stream, batches=4, batch_size=2) for by in (_by_pyav, _by_dali))
    _assert_same(made, expected)
    flipped = {BatchPlanDataset(stream, DaliSupport())[[v]].requests[0].views[0].flip for v in range(8)}
    assert flipped == {False, True}


def test_pictures_among_videos_are_left_to_pillow(vp9, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.jpg")
    said: list[str] = []
    stream = _pairs([*vp9[:3], str(tmp_path / "picture.jpg")], training=True)
    made = _by_dali(stream, batches=2, batch_size=4, say=said.append)
    _assert_alike(made, _by_pyav(stream, batches=2, batch_size=4))
    assert "1 x pictures" in said[0]


def test_a_test_leaves_out_what_cannot_be_read(vp9, tmp_path):
    """In the workers, and where DALI itself fails."""
    damaged = tmp_path / "damaged.webm"
    content = bytearray(Path(vp9[0]).read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    damaged.write_bytes(content)
    stream = _pairs([vp9[0], "gone.webm", vp9[1], str(damaged), vp9[2]], training=False, replace=False)
    expected, made = (by(stream, batches=2, batch_size=3, end=5) for by in (_by_pyav, _by_dali))
    assert [batch.rows for batch in made] == [batch.rows for batch in expected]
    assert [path for path, _ in _bad(made)] == [path for path, _ in _bad(expected)]
    for one, other in zip(made, expected, strict=True):
        assert one.clip.shape == other.clip.shape
        assert _luma_errors(one.clip, other.clip).max() < 2


def test_open_loader_gives_stage_2_to_dali(vp9):
    stream = _pairs(vp9, training=True, decoder="dali")
    with open_loader(stream, CPU, lambda text: None, start=0, batches=1, batch_size=2) as loader:
        assert isinstance(loader, DaliLoader)

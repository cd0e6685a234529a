"""Small real video files, written with PyAV."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

WriteVideo = Callable[..., Path]


def _pictures(count: int, width: int, height: int, seed: int) -> list[np.ndarray]:
    """Shifting coloured blocks under a moving bar; neighbouring frames always differ."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    ground = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
    pictures = []
    for number in range(count):
        picture = np.roll(ground, 3 * number, axis=1)
        left = 5 * number % width
        picture[:, left : left + 6] = 40 * number % 256
        pictures.append(picture)
    return pictures


def _write_video(
    path: Path,
    codec: str = "libx264",
    *,
    frames: int = 60,
    size: tuple[int, int] = (64, 48),
    fps: int = 15,
    gop: int = 12,
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    times: list[int] | None = None,
    audio_seconds: float = 0,
    rotation: int = 0,
    seed: int = 0,
) -> Path:
    """Write and return `path`; `times` are presentation times in frames, `options` the encoder's own."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    width, height = size
    options = dict(options or {})
    if codec == "libx264":
        options["mbtree"] = "0"  # mbtree's vector code gives other bits in each run
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = gop
        if rotation:
            stream.set_display_rotation(rotation)
        audio = container.add_stream("aac", rate=16000) if audio_seconds else None
        for number, picture in enumerate(_pictures(frames, width, height, seed)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts = times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            _write_silence(container, audio, audio_seconds)
    return path


def _write_silence(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    for number in range(int(seconds * 16000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        frame.pts = 1024 * number
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _decode_all(path: Path | str) -> list[np.ndarray]:
    """Every frame of a file, from the first to the last, without seeking."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="session")
def write_video() -> WriteVideo:
    return _write_video


@pytest.fixture
def dead_workers_noticed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting DataLoader checks for dead workers every 5 seconds; here five times a second."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


@pytest.fixture(scope="session")
def write_audio() -> Callable[[Path, float], Path]:
    def write(path: Path, seconds: float) -> Path:
        with av.open(str(path), "w") as container:
            _write_silence(container, container.add_stream("aac", rate=16000), seconds)
        return path

    return write


@pytest.fixture(scope="session")
def decode_all() -> Callable[[Path | str], list[np.ndarray]]:
    return _decode_all

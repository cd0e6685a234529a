"""DALI's loader on a GPU: its frames equal PyAV's, and it does not overwrite memory that training still reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from umt_fast.config import DataConfig
from umt_fast.data.batch import Batch
from umt_fast.data.clips import ClipStream
from umt_fast.data.dali_loader import DaliLoader
from umt_fast.data.decode import nvdec
from umt_fast.data.index import VideoList
from umt_fast.data.loader import ClipLoader

DEVICE = torch.device("cuda", 0)
LUMA = torch.tensor((0.299, 0.587, 0.114))
FRAMES, SIDE = 8, 112
X265 = "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0:log-level=none:pools=none"
ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "4", "b": "200k"}
UNEVEN = np.cumsum(np.random.default_rng(0).integers(1, 9, 60)).tolist()

KINDS: dict[str, tuple[str, dict]] = {
    "h264.mp4": ("libx264", {"options": {"bf": "3"}}),
    "h264_uneven.mkv": ("libx264", {"times": UNEVEN}),
    "h264_all_intra.mp4": ("libx264", {"gop": 1}),
    "h264_one_gop.mp4": ("libx264", {"gop": 250, "options": {"scenecut": "0"}}),
    "hevc_open_gop.mp4": ("libx265", {"options": {"x265-params": X265}}),
    "av1.mkv": ("libsvtav1", {"options": {"preset": "8"}}),
    "vp8.webm": ("libvpx", {}),
    "vp9_alt_ref.webm": ("libvpx-vp9", {"options": ALT_REF, "gop": 60}),
    "mpeg4.mp4": ("mpeg4", {"options": {"bf": "2"}}),
}


def _engines() -> dict[str, nvdec.Limits]:
    try:
        return nvdec.limits(DEVICE)
    except (nvdec.NoEngine, RuntimeError):
        return {}


ENGINES = _engines() if torch.cuda.is_available() else {}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not ENGINES, reason="no GPU with NVDEC"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_video) -> list[str]:
    folder = tmp_path_factory.mktemp("gpu")
    return [
        str(write_video(folder / f"{number}.mp4", "libx264", frames=60, size=(340, 256), gop=4, seed=number))
        for number in range(8)
    ]


def _stream(videos: list[str], **config) -> ClipStream:
    return ClipStream(VideoList.of_paths(videos), DataConfig(**{"workers": 2, **config}), FRAMES, SIDE, 0)


def _loader(stream: ClipStream, *, batches: int, batch_size: int, said: list[str] | None = None) -> DaliLoader:
    say = (lambda text: None) if said is None else said.append
    return DaliLoader(stream, DEVICE, ENGINES, start=0, batches=batches, batch_size=batch_size, say=say)


def _by_pyav(stream: ClipStream, *, batches: int, batch_size: int) -> list[Batch]:
    with ClipLoader(stream, start=0, batches=batches, batch_size=batch_size) as loader:
        return list(loader)


def _luma_errors(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return ((one.cpu().float() - other.cpu().float()) @ LUMA).abs().mean(dim=(-2, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_pyav(tmp_path, write_video, kind):
    """The loader reports a codec whose frames differ and leaves it to PyAV; here that is a failure."""
    codec, settings = KINDS[kind]
    path = str(write_video(tmp_path / kind, codec, **{"size": (192, 144), **settings}))
    said: list[str] = []
    stream = _stream([path])
    with _loader(stream, batches=4, batch_size=4, said=said) as loader:
        made = list(loader)
    if kind.split("_")[0].split(".")[0] not in ENGINES:
        assert said
        return
    assert said == []
    for one, other in zip(made, _by_pyav(stream, batches=4, batch_size=4), strict=True):
        assert one.clip.is_cuda
        assert one.paths == other.paths
        assert _luma_errors(one.clip, other.clip).max() < 2


def test_pipelines_change_nothing(videos):
    alone = list(_loader(_stream(videos, pipelines=1), batches=6, batch_size=4))
    for settings in ({}, {"pipelines": 3, "pipeline_visits": 2}):
        for one, other in zip(_loader(_stream(videos, **settings), batches=6, batch_size=4), alone, strict=True):
            assert torch.equal(one.clip, other.clip)


def test_a_damaged_video_is_replaced(videos, tmp_path):
    data = bytearray(Path(videos[0]).read_bytes())
    data[len(data) // 4 : len(data) // 2] = np.random.default_rng(0).bytes(len(data) // 2 - len(data) // 4)
    (tmp_path / "damaged.mp4").write_bytes(data)
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    stream = _stream([*videos, str(tmp_path / "damaged.mp4"), str(tmp_path / "half.mp4")])
    with _loader(stream, batches=10, batch_size=4) as loader:
        assert sum(len(batch.clip) for batch in loader) == 40


def test_memory_is_not_reused_while_training_reads_it(videos):
    """The training stream is slow: Python drops each clip long before the GPU sums it."""
    stream = _stream(videos, pipelines=2)
    expected = [batch.clip.long().sum().item() for batch in _loader(stream, batches=24, batch_size=8)]
    training = torch.cuda.Stream(DEVICE)
    sums = []
    with torch.cuda.stream(training), _loader(stream, batches=24, batch_size=8) as loader:
        for batch in loader:
            torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s
            sums.append(batch.clip.long().sum())
            del batch
    training.synchronize()
    assert [value.item() for value in sums] == expected


def test_memory_is_flat(videos):
    stream = _stream(videos, pipelines=2)
    used = []
    with _loader(stream, batches=120, batch_size=8) as loader:
        for number, _ in enumerate(loader, 1):
            if number % 20 == 0:
                free, total = torch.cuda.mem_get_info(DEVICE)
                used.append(total - free)
    assert max(used[2:]) <= 1.05 * used[1], used

"""Fixtures for several test files."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from golden import read_recorded
from torch import Tensor

from umt_fast import ClassifierConfig, ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test uses the network

_cache = tempfile.TemporaryDirectory(prefix="umt-fast-tests-")  # tests neither read nor write the user's cache
os.environ["UMT_FAST_CACHE"] = _cache.name

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
READ_VIDEOS = (
    TESTS / "data",
    TESTS / "benchmarks" / "input_pipeline",
    TESTS / "evaluation" / "test_classification.py",
    TESTS / "evaluation" / "test_extract.py",
)


def has_pyav() -> bool:
    try:
        return importlib.util.find_spec("av") is not None
    except ValueError:  # blocked in sys.modules
        return False


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Skip files that import PyAV if it is missing, as on a machine that tests only the models."""
    return True if collection_path in READ_VIDEOS and not has_pyav() else None


def pytest_report_header() -> list[str]:
    left_out = ", ".join(path.relative_to(TESTS.parent).as_posix() for path in READ_VIDEOS)
    return [] if has_pyav() else [f"PyAV is missing (pip install av), so these are left out: {left_out}"]


@dataclass
class Golden:
    """A recorded case of the published implementation: models with the recorded weights, and the recorded tensors."""

    student: VideoStudent
    teacher: ClipTeacher
    tensors: dict[str, Tensor]
    config: dict

    def visible(self, mask: Tensor) -> Tensor:
        """The recorded mask, True where hidden, as ids [B,T,n]."""
        frames = self.config["frames"] // self.config["tubelet"]
        shown = (~mask).view(len(mask), frames, -1)
        assert len(set(shown.sum(-1).flatten().tolist())) == 1
        return shown.nonzero()[:, 2].view(*shown.shape[:2], -1)


def load_golden(name: str) -> Golden:
    metadata, tensors = read_recorded(GOLDEN / f"{name}.safetensors")
    config = json.loads(metadata["config"])
    student = VideoStudent(
        StudentConfig(
            image_size=config["img"],
            patch_size=config["patch"],
            tubelet_size=config["tubelet"],
            frames=config["frames"],
            width=config["dim"],
            depth=config["depth"],
            heads=config["heads"],
            align_layers=config["K"],
            target_width=config["t_out"],
        )
    )
    teacher = ClipTeacher(
        TeacherConfig(
            image_size=config["t_img"],
            patch_size=config["t_patch"],
            tubelet_size=config["tubelet"],
            input_size=config["img"],
            width=config["t_dim"],
            depth=config["t_depth"],
            heads=config["t_heads"],
            target_width=config["t_out"],
            align_layers=config["K"],
        )
    )

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    checkpoint.load_umt_student(student, part("student."))
    checkpoint.load_clip_teacher(teacher, part("teacher."))
    return Golden(student, teacher, tensors, config)


@pytest.fixture
def golden_case():
    return load_golden


@dataclass
class Recorded:
    """Tensors from the published code, and its settings."""

    config: dict
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="session")
def recorded():
    """Reads `golden/finetune/NAME.safetensors`."""

    def read(name: str) -> Recorded:
        metadata, tensors = read_recorded(GOLDEN / "finetune" / f"{name}.safetensors")
        return Recorded(json.loads(metadata["config"]), tensors)

    return read


@pytest.fixture(scope="session")
def classifier_config():
    """Converts the settings of a recorded classifier to ClassifierConfig."""

    def convert(settings: dict) -> ClassifierConfig:
        return ClassifierConfig(
            image_size=settings["img_size"],
            patch_size=settings["patch_size"],
            tubelet_size=settings["tubelet_size"],
            frames=settings["all_frames"],
            width=settings["embed_dim"],
            depth=settings["depth"],
            heads=settings["num_heads"],
            num_classes=settings["num_classes"],
            pool="mean" if settings["use_mean_pooling"] else "first",
            learnable_positions=settings["use_learnable_pos_emb"],
        )

    return convert


@pytest.fixture(scope="session")
def recorded_sampling() -> dict:
    """Frames, crop boxes, list order and schedules of the published code."""
    return json.loads((GOLDEN / "finetune" / "golden_sampling.json").read_text())


@pytest.fixture(scope="session")
def demo_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of eight small real videos, H.264 and VP9."""
    pytest.importorskip("av")
    from umt_fast.data import synthetic

    return synthetic.write_videos(tmp_path_factory.mktemp("videos"), count=8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_disk() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which writing more than `size` bytes to a file fails, as on a full disk."""

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors, where a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

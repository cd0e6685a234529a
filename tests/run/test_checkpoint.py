"""Checkpoints of a run are complete or absent."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from umt_fast import StudentConfig, VideoStudent
from umt_fast.run import checkpoint, train_state
from umt_fast.weights import WeightsError, load_umt_student, umt_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

STUDENT = StudentConfig(image_size=32, frames=2, width=32, depth=2, heads=2, align_layers=2, target_width=16)


NOTHING_ELSE: dict = {"optimizer": {}, "rng": [], "config": {}, "schedule": {}}


def names(folder: Path) -> list[str]:
    """Everything in the folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def content(value: float, size: int = 10) -> dict:
    return {"model": {"weight": torch.full((size,), value)}, **NOTHING_ELSE}


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with checkpoints of clips 10 and 20."""
    for clips in (10, 20):
        checkpoint.save_checkpoint(tmp_path, clips, content(clips), keep=5)
    return tmp_path


def assert_untouched(folder: Path) -> None:
    assert names(folder) == ["clips_0000000010.pth", "clips_0000000020.pth"]
    for clips, path in zip((10, 20), checkpoint.list_checkpoints(folder), strict=True):
        loaded = checkpoint.load_checkpoint(path)
        assert loaded["clips_seen"] == clips
        assert (loaded["model"]["weight"] == clips).all()


def test_round_trip(tmp_path):
    student = VideoStudent(STUDENT)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.randn(1, 3, 2, 32, 32), torch.tensor([[0, 3]])).normed().sum().backward()
    optimizer.step()
    rng = train_state.get_rng_state(torch.device("cpu"))
    drawn = torch.rand(5)
    state = {
        "model": umt_state_dict(student),
        "optimizer": optimizer.state_dict(),
        "rng": [rng],
        "config": {"name": "a", "betas": (0.9, 0.95), "clip_grad": None},
        "schedule": {},
    }
    path = checkpoint.save_checkpoint(tmp_path / "new" / "folder", 3, state, keep=1)
    assert path == checkpoint.checkpoint_path(tmp_path / "new" / "folder", 3)
    loaded = checkpoint.load_checkpoint(path)
    assert loaded["clips_seen"] == 3
    assert loaded["config"] == state["config"]
    other = VideoStudent(STUDENT)
    load_umt_student(other, loaded["model"])
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), student.parameters(), strict=True))
    restored = torch.optim.AdamW(other.parameters())
    restored.load_state_dict(loaded["optimizer"])
    for mine, theirs in zip(restored.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
    train_state.set_rng_state(loaded["rng"][0], torch.device("cpu"))
    assert torch.equal(torch.rand(5), drawn)


def test_a_checkpoint_is_readable_as_weights(tmp_path):
    student = VideoStudent(STUDENT)
    path = checkpoint.save_checkpoint(tmp_path, 3, {"model": umt_state_dict(student), **NOTHING_ELSE}, keep=1)
    assert torch.load(path, weights_only=True)["model"].keys() == student.state_dict().keys()


def test_the_list_is_oldest_first_and_holds_whole_checkpoints_only(tmp_path):
    for clips in (100, 9, 20):
        checkpoint.save_checkpoint(tmp_path, clips, content(clips), keep=5)
    for stray in (
        ".clips_0000000200.pth.123",
        "clips_0000000200.pth.123",
        "clips_abc.pth",
        "clips_0000000200.txt",
        "last.pth",
    ):
        (tmp_path / stray).write_bytes(b"")
    found = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert found == ["clips_0000000009.pth", "clips_0000000020.pth", "clips_0000000100.pth"]
    assert checkpoint.list_checkpoints(tmp_path / "nowhere") == []


def test_the_list_is_oldest_first_past_eight_digits(tmp_path):
    for clips in (9_999_999_999, 10_000_000_000):
        checkpoint.save_checkpoint(tmp_path, clips, content(clips), keep=5)
    found = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert found == ["clips_9999999999.pth", "clips_10000000000.pth"]


def test_the_newest_are_kept(tmp_path):
    for clips in range(1, 6):
        checkpoint.save_checkpoint(tmp_path, clips, content(clips), keep=2)
        expected = [f"clips_{n:010d}.pth" for n in range(max(clips - 1, 1), clips + 1)]
        assert names(tmp_path) == expected


def test_saving_again_replaces_it(saved):
    checkpoint.save_checkpoint(saved, 20, content(21), keep=5)
    assert names(saved) == ["clips_0000000010.pth", "clips_0000000020.pth"]
    assert checkpoint.load_checkpoint(checkpoint.list_checkpoints(saved)[-1])["model"]["weight"][0] == 21


def test_a_new_checkpoint_stays_beside_later_steps(tmp_path):
    """A run that restarts from an early checkpoint, or with a larger batch, has smaller step numbers."""
    for clips in (800, 900, 1000):
        checkpoint.save_checkpoint(tmp_path, clips, content(clips), keep=3)
    path = checkpoint.save_checkpoint(tmp_path, 510, content(510), keep=3)
    assert path.is_file()
    assert checkpoint.load_checkpoint(path)["clips_seen"] == 510


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64 vs 0"), OSError(28, "No space left on device")])
def test_a_failed_write_leaves_the_earlier_ones_and_nothing_else(saved, monkeypatch, error):
    def half(_content, file) -> None:
        file.write(b"half a checkpoint")
        file.flush()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError):  # noqa: PT011, its text is the system's
            checkpoint.save_checkpoint(saved, 30, content(30), keep=1)
    assert_untouched(saved)


def test_an_interrupted_write_leaves_the_earlier_ones_and_nothing_else(saved, monkeypatch):
    def interrupted(_content, file) -> None:
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_checkpoint(saved, 30, content(30), keep=1)
    assert_untouched(saved)


def test_a_disk_that_fills_up_leaves_the_earlier_ones_and_nothing_else(saved):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*clips_0000000030\.pth"):
            checkpoint.save_checkpoint(saved, 30, content(30, size=100_000), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_untouched(saved)


def test_the_file_appears_only_when_it_is_whole_and_on_disk(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))

    def replace(source, target):
        assert torch.load(source, weights_only=True)["clips_seen"] == 1
        events.append("replace")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save_checkpoint(tmp_path, 1, content(1), keep=1)
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize("data", [b"", b"garbage" * 100, None])
def test_error_names_a_file_that_is_not_a_checkpoint(saved, data):
    path = checkpoint.list_checkpoints(saved)[-1]
    path.write_bytes(path.read_bytes()[:-50] if data is None else data)
    with pytest.raises(WeightsError, match=r"cannot read checkpoint .*clips_0000000020\.pth"):
        checkpoint.load_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"cannot read checkpoint .*nowhere\.pth"):
        checkpoint.load_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": 1, "clips_seen": 4, "model": {}, "config": {}}, "its settings lack 'train'"),
        (
            {"format": 1, "clips_seen": 4, "model": {}, "config": {"train": 5, "model": 5}},
            "its settings lack",
        ),
        ({"format": 2, "clips_seen": 4}, "model missing or of another kind"),
        ({"format": 2, "clips_seen": "4", "model": {}}, "clips_seen missing or of another kind"),
        ({"format": 2, "clips_seen": 4, "model": [], "rng": {}}, "model, rng missing or of another kind"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, content, words):
    """Found by fuzzing."""
    torch.save({**NOTHING_ELSE, **content}, tmp_path / "clips_0000000004.pth")
    with pytest.raises(WeightsError, match=words):
        checkpoint.load_checkpoint(tmp_path / "clips_0000000004.pth")


@pytest.mark.parametrize("other", [{"model": {}}, {"format": 999, "model": {}}, [1, 2], torch.zeros(3)])
def test_another_file_of_torch_is_refused(tmp_path, other):
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth is not a checkpoint of a run"):
        checkpoint.load_checkpoint(tmp_path / "other.pth")


class Parallel(nn.Module):
    """Has the structure of DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "wrap",
    [Parallel, torch.compile, lambda s: Parallel(torch.compile(s)), lambda s: torch.compile(Parallel(s))],
    ids=["parallel", "compiled", "parallel of compiled", "compiled parallel"],
)
def test_wrapped_students_are_seen_through(wrap):
    student = VideoStudent(STUDENT)
    wrapped = wrap(student)
    state = umt_state_dict(wrapped)
    assert state.keys() == student.state_dict().keys()
    assert not any(value.requires_grad for value in state.values())
    load_umt_student(wrapped, {key: value + 1 for key, value in state.items()})
    assert (student.encoder.norm.weight == 2).all()


def test_error_names_a_model_that_is_not_a_student():
    with pytest.raises(TypeError, match="Linear is not a VideoStudent"):
        umt_state_dict(nn.Linear(2, 2))

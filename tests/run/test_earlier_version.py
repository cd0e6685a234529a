"""Checkpoints of version 0.1, whose optimiser state is numbered, are read and continued bit for bit.

`golden/run/fe9cadc_clips_0000000012.pth` was written by commit fe9cadc after three steps of a very small run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step
from umt_fast.config import LowPrecisionConfig, MaskConfig, OptimConfig, PretrainConfig
from umt_fast.run import checkpoint
from umt_fast.run.checkpoint import find_checkpoint
from umt_fast.run.optim import build_optimizer, set_learning_rate
from umt_fast.run.train_state import TrainState
from umt_fast.run.world import World

FILE = Path(__file__).parents[1] / "golden" / "run" / "fe9cadc_clips_0000000012.pth"
ALONE = World(0, 1, torch.device("cpu"))
CONFIG = PretrainConfig(
    student=StudentConfig(16, 8, 1, 2, 8, 2, 1, 0.2, 1, 4),
    teacher=TeacherConfig(16, 8, 1, None, 8, 2, 1, 4, 1),
    teacher_weights="random",
    mask=MaskConfig(masks_per_clip=2),
    optim=OptimConfig(epochs=8, warmup_epochs=2, batch_size=4),
    compute=LowPrecisionConfig(attention="math", precision="fp32"),
)


def new_run() -> tuple[VideoStudent, torch.optim.AdamW]:
    student = VideoStudent(CONFIG.student)
    return student, build_optimizer(student, CONFIG.optim)


def two_steps(student: VideoStudent, optimizer: torch.optim.AdamW) -> list[Tensor]:
    """The losses and all weights after two steps, which draw visible sets and dropped paths."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = ClipTeacher(CONFIG.teacher)
    losses = []
    for rate in (1e-2, 2e-2):
        clip = torch.randint(0, 256, (4, 2, 16, 16, 3), dtype=torch.uint8, generator=generator)
        set_learning_rate(optimizer, rate)
        loss = alignment_step(student, teacher, clip, 1, masks_per_clip=2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return [*losses, *(parameter.detach() for parameter in student.parameters())]


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copy(FILE, tmp_path / "clips_0000000012.pth")
    return tmp_path


def test_it_is_continued_bit_for_bit(folder):
    content = torch.load(FILE, weights_only=True)  # as version 0.1 read it
    student, optimizer = new_run()
    student.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["rng"][0]["cpu"])
    expected = two_steps(student, optimizer)

    torch.manual_seed(99)
    student, optimizer = new_run()
    state = TrainState(student, optimizer, ALONE, CONFIG)
    assert state.restore(folder, step_clips=4)
    assert (state.step, state.clips_seen) == (3, 12)
    got = two_steps(student, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    state.advance(4)
    path = state.save(folder, keep=5)
    assert checkpoint.load_checkpoint(path)["format"] == checkpoint.FORMAT


def test_its_settings_are_found_in_their_new_sections(folder):
    found = find_checkpoint(folder, ALONE)
    assert found is not None
    config = found.content["config"]
    assert config["mask"]["masks_per_clip"] == 2
    assert (config["compute"]["attention"], config["compute"]["precision"]) == ("math", "fp32")
    checkpoint.check_same(found, CONFIG, ("student", "teacher", "mask", "teacher_weights", "run.seed"))
    notes = checkpoint.list_changes(found, replace(CONFIG, optim=OptimConfig(lr=1)), {})
    assert "note: optim.lr was 0.00015 when it was saved, now 1" in notes
    assert not [note for note in notes if "compute" in note or "mask" in note]
    assert found.attention == {}
    json.dumps(config)  # nothing but plain settings

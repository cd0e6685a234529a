"""The arithmetic of a step's cost against PyTorch's own counters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import BaselineStep, build_baseline
from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step, costs
from umt_fast.config import STUDENTS, TEACHERS, OptimConfig
from umt_fast.models.attention import load

STUDENT = StudentConfig(64, 16, 1, 3, 32, 3, 2, 0.0, 2, 24)
RESIZED = TeacherConfig(56, 14, 1, 64, 48, 4, 3, 24, 2)
CASES = [
    (STUDENT, RESIZED),
    (replace(STUDENT, frames=4, tubelet_size=2), TeacherConfig(64, 16, 2, None, 48, 3, 3, 24, 2)),
]


def counted(counter: FlopCounterMode) -> int:
    return counter.get_total_flops()


@pytest.mark.parametrize("masks_per_clip", [1, 3])
@pytest.mark.parametrize(("student_config", "teacher_config"), CASES)
def test_lean_flops_are_those_that_are_counted(student_config, teacher_config, masks_per_clip):
    student, teacher = VideoStudent(student_config), ClipTeacher(teacher_config)
    student.set_attention(load("math"))  # made of matmuls that the counter knows on every device
    teacher.set_attention(load("math"), load("math"))
    clip = torch.randint(0, 256, (2, student_config.frames, 64, 64, 3), dtype=torch.uint8)
    seen = student_config.tokens // 16 * 4
    expected = costs.lean_flops(student_config, teacher_config, 2, seen, masks_per_clip)
    with FlopCounterMode(display=False) as counter:
        out = alignment_step(student, teacher, clip, 4, masks_per_clip=masks_per_clip)
    assert counted(counter) == expected.teacher + expected.student_forward
    with FlopCounterMode(display=False) as counter:
        out.loss.backward()
    assert counted(counter) == expected.student_backward


@pytest.mark.parametrize(("student_config", "teacher_config"), CASES)
def test_published_flops_are_those_of_the_baseline(student_config, teacher_config):
    student, teacher = build_baseline(student_config, teacher_config)
    step = BaselineStep(student, teacher, OptimConfig(), 4, "fp32")
    clip = torch.randn(2, 3, student_config.frames, 64, 64)
    seen = student_config.tokens // 16 * 4
    expected = costs.published_flops(student_config, teacher_config, 2, seen)
    with FlopCounterMode(display=False) as counter:
        step(clip)
    # MultiheadAttention's CPU attention is unknown to the counter where no weights are asked for
    tokens, width = teacher_config.grid**2 + 1, teacher_config.width
    frames = student_config.frames // student_config.tubelet_size
    unknown = 2 * frames * (teacher_config.depth - 1) * 4 * tokens * tokens * width
    assert counted(counter) in (expected.total, expected.total - unknown)


@pytest.mark.parametrize(
    ("size", "teacher", "published", "lean"), [("umt_b16", "clip_b16", 471, 447), ("umt_l16", "clip_l14", 1623, 1580)]
)
def test_the_published_sizes_cost_what_the_design_says(size, teacher, published, lean):
    """GFLOP per clip of DESIGN section 3, whose numbers are rounded sums."""
    student, teacher_config = STUDENTS[size], TEACHERS[teacher]
    assert costs.published_flops(student, teacher_config, 1, 320).total / 1e9 == pytest.approx(published, rel=0.02)
    assert costs.lean_flops(student, teacher_config, 1, 320).total / 1e9 == pytest.approx(lean, rel=0.03)


@pytest.mark.parametrize(("size", "teacher"), [("umt_b16", "clip_b16"), ("umt_l16", "clip_l14")])
def test_parameter_counts(size, teacher):
    with torch.device("meta"):
        student = VideoStudent(STUDENTS[size])
    assert costs.student_parameters(STUDENTS[size]) == sum(p.numel() for p in student.parameters())
    small = replace(TEACHERS[teacher], width=64, heads=2, depth=2, align_layers=1)
    model = ClipTeacher(small)
    assert costs.teacher_parameters(small) == sum(p.numel() for p in (*model.parameters(), model.patch_weight))

"""The published step in plain PyTorch, against the recorded numbers of the published implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.step_time.baselines.pretrain import BaselineStep, build_baseline, draw_mask
from benchmarks.step_time.phases import PHASES, PhaseClock
from umt_fast.config import OptimConfig

CASES = ["umt_stage1_b16", "umt_stage1_l14_resized"]


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def golden_baseline(case, sdpa: bool = False):
    """The baseline's models with the recorded weights: their names must be the published ones."""
    student, teacher = build_baseline(case.student.config, case.teacher.config, sdpa)
    student.load_state_dict(part(case.tensors, "student."))
    teacher.load_state_dict(part(case.tensors, "teacher."))
    return student, teacher


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("sdpa", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_golden_files(golden_case, name, sdpa):
    case = golden_case(name)
    recorded = case.tensors
    student, teacher = golden_baseline(case, sdpa)
    targets, scores = teacher(recorded["video"])
    assert (targets - recorded["norm_clip"]).abs().max() < 1e-5
    assert (scores - recorded["attention"]).abs().max() < 1e-5
    predictions = student(recorded["video"], recorded["mask"])
    assert (predictions - recorded["output"]).abs().max() < 1e-5
    step = BaselineStep(student, teacher, OptimConfig(lr=0.0), 1, "fp32")
    assert abs(step(recorded["video"], recorded["mask"]) - float(recorded["loss"])) < 1e-5
    for key, parameter in student.named_parameters():
        assert relative(parameter.grad, recorded[f"grad.{key}"]) < 1e-4, key


def test_five_steps_match_the_golden_trajectory(golden_case):
    case = golden_case("umt_stage1_trajectory")
    recorded = case.tensors
    student, teacher = golden_baseline(case)
    step = BaselineStep(student, teacher, OptimConfig(lr=case.config["lr"]), 1, "fp32")
    for number in range(5):
        loss = step(recorded[f"step{number}.video"], recorded[f"step{number}.mask"])
        assert abs(loss - float(recorded[f"step{number}.loss"])) < 1e-4, number
    for key, value in student.state_dict().items():
        assert relative(value, recorded[f"final.{key}"]) < 1e-4, key


def test_bf16_stays_near_and_every_phase_is_timed(golden_case):
    case = golden_case("umt_stage1_b16")
    student, teacher = golden_baseline(case)
    step = BaselineStep(student, teacher, OptimConfig(), 1, "bf16")
    clock = PhaseClock(torch.device("cpu"))
    loss = step(case.tensors["video"], case.tensors["mask"], clock)
    assert abs(loss - float(case.tensors["loss"])) < 0.02
    spent = clock.seconds()
    assert tuple(spent) == PHASES
    assert all(seconds > 0 for seconds in spent.values())


def test_the_mask_shows_the_likeliest_patches_and_the_right_number():
    scores = torch.full((6, 16), 1e-12)
    liked = torch.rand(6, 16).topk(4).indices
    scores.scatter_(1, liked, 1.0)
    hidden = draw_mask(scores, 2, 4)
    assert hidden.shape == (2, 48)
    assert hidden.dtype == torch.bool
    shown = (~hidden).view(6, 16)
    assert (shown.sum(1) == 4).all()
    assert shown.gather(1, liked).all()

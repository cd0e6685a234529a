"""Results equal the recorded numbers of the published implementation in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import umt_fast
from umt_fast import checkpoint, masking
from umt_fast.config import OptimConfig
from umt_fast.run.optim import build_optimizer

CASES = ["umt_stage1_b16", "umt_stage1_l14_resized"]
ATOL = 1e-5


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def visible_sets(case, mask: Tensor) -> dict[str, Tensor]:
    """The recorded visible set, per frame [B,T,n] and of the whole clip [B,1,m]."""
    visible = case.visible(mask)
    return {"frames": visible, "clip": masking.token_ids(visible, mask.shape[1])[:, None]}


@pytest.mark.parametrize("groups", ["frames", "clip"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(golden_case, name, groups):
    case = golden_case(name)
    recorded = case.tensors
    visible = visible_sets(case, recorded["mask"])[groups]
    out = umt_fast.alignment_step(case.student, case.teacher, recorded["video"], None, visible)
    for got, key in (
        (out.scores.flatten(0, 1), "attention"),
        (out.targets, "target"),
        (out.predictions, "output"),
        (out.loss, "loss"),
    ):
        assert got.shape == recorded[key].shape, key
        assert (got - recorded[key]).abs().max() < ATOL, key
    out.loss.backward()
    parameters = dict(case.student.named_parameters())
    assert {key.removeprefix("grad.") for key in recorded if key.startswith("grad.")} == parameters.keys()
    for key, parameter in parameters.items():
        assert recorded[f"grad.{key}"].norm() > 0, key
        assert relative(parameter.grad, recorded[f"grad.{key}"]) < 1e-4, key
    assert all(parameter.grad is None for parameter in case.teacher.parameters())


@pytest.mark.parametrize("groups", ["frames", "clip"])
@pytest.mark.parametrize("name", CASES)
def test_targets_of_all_tokens(golden_case, name, groups):
    case = golden_case(name)
    shown = torch.zeros_like(case.tensors["mask"])
    state = case.teacher.encode(case.tensors["video"])
    targets = F.normalize(case.teacher.targets(state, visible_sets(case, shown)[groups]), dim=-1)
    assert targets.shape == case.tensors["norm_clip"].shape
    assert (targets - case.tensors["norm_clip"]).abs().max() < ATOL


@pytest.mark.parametrize("name", [*CASES, "umt_stage1_trajectory"])
def test_student_keys_are_the_published_ones(golden_case, name):
    case = golden_case(name)
    recorded = {k.removeprefix("student."): v for k, v in case.tensors.items() if k.startswith("student.")}
    ours = checkpoint.umt_state_dict(case.student)
    assert ours.keys() == recorded.keys()
    for key, value in ours.items():
        assert torch.equal(value, recorded[key]), key


def test_no_resized_clip_is_made(golden_case, monkeypatch):
    case = golden_case("umt_stage1_l14_resized")
    assert case.teacher.conv1.weight.shape[-2:] == (14, 14)
    assert case.teacher.patch_weight.shape[-2:] == (18, 18)

    def refuse(*_args, **_kwargs):
        raise AssertionError("a clip was resized")

    monkeypatch.setattr(torch.nn.functional, "interpolate", refuse)
    visible = case.visible(case.tensors["mask"])
    out = umt_fast.alignment_step(case.student, case.teacher, case.tensors["video"], None, visible)
    assert (out.loss - case.tensors["loss"]).abs() < ATOL


def test_five_steps_of_adamw(golden_case):
    case = golden_case("umt_stage1_trajectory")
    recorded = case.tensors
    optimizer = build_optimizer(case.student, OptimConfig(lr=case.config["lr"]))
    for step in range(5):
        visible = case.visible(recorded[f"step{step}.mask"])
        out = umt_fast.alignment_step(case.student, case.teacher, recorded[f"step{step}.video"], None, visible)
        assert (out.loss - recorded[f"step{step}.loss"]).abs() < 1e-4, step
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    final = checkpoint.umt_state_dict(case.student)
    assert {f"final.{key}" for key in final} == {key for key in recorded if key.startswith("final.")}
    for key, value in final.items():
        assert relative(value, recorded[f"final.{key}"]) < 1e-4, key
        assert not torch.equal(value, recorded[f"student.{key}"]), key

"""Weight decay groups, the schedule and gradient clipping."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from umt_fast import StudentConfig, VideoClassifier, VideoStudent
from umt_fast.config import ConfigError, OptimConfig
from umt_fast.objectives.classification import soft_cross_entropy
from umt_fast.run.optim import (
    Schedule,
    build_optimizer,
    clip_gradients,
    layer_decay_groups,
    learning_rate,
    set_learning_rate,
)

STUDENT = StudentConfig(image_size=32, frames=2, width=32, depth=2, heads=2, align_layers=2, target_width=16)


def test_weight_decay_spares_biases_and_norms():
    student = VideoStudent(STUDENT)
    optimizer = build_optimizer(student, OptimConfig(weight_decay=0.07))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(student.parameters()))
    for name, parameter in student.named_parameters():
        plain = name.endswith("bias") or ".norm" in name
        assert decay[id(parameter)] == (0 if plain else 0.07), name
    assert decay[id(student.encoder.patch_embed.proj.weight)] == 0.07
    assert decay[id(student.encoder.blocks[0].attn.q_bias)] == 0


def test_the_optimizer_has_the_configs_settings():
    config = OptimConfig(lr=3e-4, betas=(0.8, 0.9), eps=1e-6)
    for group in build_optimizer(nn.Linear(3, 2), config).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.9), 1e-6)


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    groups = build_optimizer(layer, OptimConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [0, 1]


def test_a_step_is_adamw_written_out():
    layer = nn.Linear(3, 2).double()
    config = OptimConfig(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    optimizer = build_optimizer(layer, config)
    expected = {}
    layer(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
    for name, p in layer.named_parameters():
        decay = 0.05 if name == "weight" else 0.0
        # the first step: both moments' bias corrections undo their decay
        expected[name] = p.detach() * (1 - 0.1 * decay) - 0.1 * p.grad / (p.grad.abs() + 1e-8)
    optimizer.step()
    for name, p in layer.named_parameters():
        assert (p - expected[name]).abs().max() < 1e-12, name


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 0.04),
        (5, 0.2),
        (10, 0.4),  # the last of the warm-up and the first of the cosine are both the peak
        (11, 0.4),
        (36, 0.1 + 0.3 * 0.5 * (1 + math.cos(math.pi / 4))),
        (61, 0.25),
        (111, 0.1),
        (500, 0.1),
    ],
)
def test_learning_rate(step, expected):
    assert learning_rate(step, total_steps=111, warmup_steps=11, peak=0.4, final=0.1) == pytest.approx(expected)


def test_learning_rates_of_a_run_are_those_of_umt():
    """UMT's list of values: np.linspace over the warm-up, then a cosine over the remaining steps."""
    total, warmup, peak, final = 50, 7, 0.4, 0.1
    cosine = [
        final + 0.5 * (peak - final) * (1 + math.cos(math.pi * i / (total - warmup))) for i in range(total - warmup)
    ]
    expected = [*np.linspace(0, peak, warmup), *cosine]
    assert [learning_rate(step, total, warmup, peak, final) for step in range(total)] == pytest.approx(expected)


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate(0, 100, 0, 0.4, 0.1) == pytest.approx(0.4)
    assert learning_rate(100, 100, 0, 0.4, 0.1) == pytest.approx(0.1)


def test_learning_rate_of_nothing_but_warmup():
    assert [learning_rate(step, 4, 4, 0.3, 0.1) for step in range(4)] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert learning_rate(0, 1, 1, 0.3, 0.1) == 0


def test_the_published_schedule():
    """K710's 658,340 clips on 32 GPUs with 64 clips each, arXiv 2303.16058."""
    schedule = Schedule(OptimConfig(), clips=658_340, global_batch=2048)
    assert schedule.total_steps == 200 * 658_340 // 2048
    assert schedule.warmup_steps == 40 * 658_340 // 2048
    assert schedule.peak == pytest.approx(1.2e-3)
    assert schedule.final == pytest.approx(8e-5)
    assert schedule(0) == 0
    assert schedule(schedule.warmup_steps) == pytest.approx(1.2e-3)
    assert schedule(schedule.warmup_steps // 2) == pytest.approx(0.6e-3, rel=1e-3)
    assert schedule(schedule.total_steps) == pytest.approx(8e-5)
    assert max(schedule(step) for step in range(0, schedule.total_steps, 97)) <= 1.2e-3


def test_epochs_need_not_divide_into_steps():
    schedule = Schedule(OptimConfig(epochs=3, warmup_epochs=0.5), clips=10, global_batch=4)
    assert schedule.total_steps == 7
    assert schedule.warmup_steps == 1


def test_a_warmup_longer_than_the_run_ends_with_it():
    schedule = Schedule(OptimConfig(epochs=2, warmup_epochs=40), clips=10, global_batch=4)
    assert schedule.warmup_steps == schedule.total_steps == 5


def test_error_names_too_few_clips_for_a_step():
    with pytest.raises(ConfigError) as caught:
        Schedule(OptimConfig(epochs=2), clips=10, global_batch=64)
    for words in ("2 epochs of 10 videos", "64", "--optim.batch-size"):
        assert words in str(caught.value)


def two_gradients() -> nn.Module:
    model = nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[3.0, 0.0]])
    model.bias.grad = torch.tensor([4.0])
    return model


def test_clip_gradients_scales_down_to_the_limit():
    model = two_gradients()
    assert clip_gradients(model, 0.5) == pytest.approx(5.0)
    assert model.weight.grad.tolist() == [[pytest.approx(0.3, rel=1e-4), 0.0]]
    assert model.bias.grad.tolist() == [pytest.approx(0.4, rel=1e-4)]


@pytest.mark.parametrize("limit", [None, 10.0])
def test_clip_gradients_leaves_what_is_within_the_limit(limit):
    model = two_gradients()
    assert clip_gradients(model, limit) == pytest.approx(5.0)
    assert model.weight.grad.tolist() == [[3.0, 0.0]]
    assert model.bias.grad.tolist() == [4.0]


def test_clip_gradients_passes_over_parameters_without_gradient():
    model = two_gradients()
    model.bias.grad = None
    assert clip_gradients(model, 1.0) == pytest.approx(3.0)


def test_the_norm_of_a_gradient_that_is_not_finite_is_not_finite():
    model = two_gradients()
    model.bias.grad = torch.tensor([math.nan])
    assert not clip_gradients(model, None).isfinite()


def test_the_rate_of_a_captured_step_is_changed_in_place():
    optimizer = build_optimizer(nn.Linear(3, 2), OptimConfig())
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    for group in optimizer.param_groups:
        group["capturable"] = True
    set_learning_rate(optimizer, 0.25)
    places = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.125)
    for group, place in zip(optimizer.param_groups, places, strict=True):
        assert group["lr"] is place
        assert float(place) == 0.125
    for group in optimizer.param_groups:  # as when a run without a graph resumes from such a checkpoint
        group["capturable"] = False
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_published_schedules(recorded_sampling):
    for case in recorded_sampling["schedules"]:
        warmup = case["warmup_steps"] if case["warmup_steps"] > 0 else case["warmup_epochs"] * case["steps_per_epoch"]
        total = case["epochs"] * case["steps_per_epoch"]
        rates = [learning_rate(i, total, warmup, case["base"], case["final"], case["start"]) for i in range(total)]
        assert np.allclose(rates, case["values"], rtol=1e-12, atol=0), case


def test_layer_decay_repeats_the_published_steps(recorded, classifier_config):
    case = recorded("c_layer_decay")
    settings, tensors = case.config, case.tensors
    model = VideoClassifier(classifier_config(settings))
    model.load_state_dict(case.part("init."))
    groups = layer_decay_groups(model, settings["layer_decay"], settings["weight_decay"])
    keys = ("lr_scale", "weight_decay", "names")
    assert [{key: group[key] for key in keys} for group in groups] == settings["groups"]
    optimizer = torch.optim.AdamW(groups, betas=settings["betas"], eps=settings["eps"], capturable=False)
    warmup = settings["warmup_epochs"] * settings["steps"] // settings["epochs"]
    for step in range(settings["steps"]):
        peak, final, start = (settings[key] for key in ("lr", "min_lr", "warmup_lr"))
        set_learning_rate(optimizer, learning_rate(step, settings["steps"], warmup, peak, final, start))
        rates = torch.tensor([group["lr"] for group in optimizer.param_groups])
        assert torch.allclose(rates, tensors["group_lr"][step].float(), rtol=1e-6, atol=0)
        optimizer.zero_grad()
        loss = soft_cross_entropy(model(tensors["videos"][step]), tensors["targets"][step])
        loss.backward()
        assert abs(loss - tensors["losses"][step]) < 1e-4
        assert abs(clip_gradients(model, None) / tensors["grad_norms"][step] - 1) < 1e-4
        optimizer.step()
    for key, expected in case.part("final.").items():
        assert float((model.state_dict()[key] - expected).norm() / expected.norm()) < 1e-4, key
        assert key == "pos_embed" or not torch.equal(model.state_dict()[key], tensors[f"init.{key}"]), key


def test_layer_decay_of_parameters_that_no_recipe_has():
    model = nn.Module()
    for name in ("cls_token", "mask_token", "pos_embed", "patch_embed_extra", "rel_pos_bias_table"):
        setattr(model, name, nn.Parameter(torch.zeros(1, 1, 4)))
    model.blocks = nn.ModuleList([nn.Linear(4, 4)])
    found = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in layer_decay_groups(model, 0.5, 0.1)
        for name in group["names"]
    }
    assert found == {
        **dict.fromkeys(("cls_token", "pos_embed"), (0.25, 0.0)),
        **dict.fromkeys(("mask_token", "patch_embed_extra"), (0.25, 0.1)),
        "rel_pos_bias_table": (1.0, 0.1),
        "blocks.0.weight": (0.5, 0.1),
        "blocks.0.bias": (0.5, 0.0),
    }

"""Crops, frames, schedules and layers of VideoMAE's published code, exactly as recorded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from umt_fast.config import DataConfig, FinetuneOptimConfig, OptimConfig
from umt_fast.data.crops import draw_view
from umt_fast.data.sampling import (
    Draws,
    Timeline,
    span_frames,
    spread_frames,
    stride_frames,
    stride_start,
    test_frames,
    train_frames,
)
from umt_fast.run.optim import EpochSchedule, Schedule, layer_decay_groups, learning_rate

RULES = json.loads((Path(__file__).parents[1] / "golden" / "pixels" / "data_rules.json").read_text())


class PythonChoices:
    """`random.choice` of the published code instead of a NumPy generator: a pair of sides, then a position."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integers(self, count: int) -> int:
        return self._random.choice(range(count))

    def random(self) -> float:
        return 1.0  # no flip


@pytest.mark.parametrize("case", RULES["crops"], ids=lambda case: f"{case['image']}-{case['seed']}")
def test_crop_boxes(case):
    width, height = case["image"]
    choices = PythonChoices(case["seed"])
    scales = DataConfig().crop_scales
    views = [draw_view(width, height, case["side"], scales, 0.0, choices) for _ in case["boxes"]]
    assert [[view.width, view.height, view.x, view.y] for view in views] == case["boxes"]
    assert not any(view.flip for view in views)


def test_frame_ids():
    assert len(RULES["frames"]) >= 48
    for case in RULES["frames"]:
        start = np.random.RandomState(case["seed"]).randint(
            stride_start(case["duration"], case["frames"], case["step"])
        )
        found = stride_frames(case["duration"], case["frames"], case["step"], int(start))
        assert found == case["ids"], case


def test_learning_rates():
    for case in RULES["schedules"]:
        total = case["epochs"] * case["niter"]
        warmup = case["warmup_steps"] if case["warmup_steps"] > 0 else case["warmup_epochs"] * case["niter"]
        rates = [learning_rate(step, total, warmup, case["base"], case["final"]) for step in range(total)]
        assert np.allclose(rates, case["values"], rtol=1e-14, atol=0), case
        if case["warmup_steps"] <= 0:  # and through the settings of a run of 256 clips a step
            optim = OptimConfig(case["epochs"], case["warmup_epochs"], 256, lr=case["base"], min_lr=case["final"])
            schedule = Schedule(optim, case["niter"] * 256, 256)
            assert [schedule(step) for step in range(total)] == rates


@pytest.mark.parametrize("kind", [OptimConfig, FinetuneOptimConfig])
def test_the_warm_up_of_mae_st_reaches_its_peak_one_step_later(kind):
    optim = kind(epochs=5, warmup_epochs=2, batch_size=256, lr=1.0, min_lr=0.0, repeat_peak=False)
    schedule = Schedule(optim, 256, 256) if kind is OptimConfig else EpochSchedule(optim, 256, 1, 256)
    found = [schedule(step) for step in range(5)]
    assert found[1:] == pytest.approx([(1 + found[0]) / 2, 1.0, 0.75, 0.25])


def test_layer_ids():
    depth = RULES["layer_ids_depth"]
    names = dict(RULES["layer_ids"])
    assert len(names) >= 9
    groups = layer_decay_groups(_Named([*names, f"blocks.{depth - 1}.mlp.fc1.weight"]), 0.5, 0.05)
    found = {name: group["lr_scale"] for group in groups for name in group["names"]}
    for name, layer in names.items():
        assert found[name] == 0.5 ** (depth + 1 - layer), name
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert not decayed & {"cls_token", "pos_embed", "blocks.3.mlp.fc2.bias"}


def test_positions_of_mae_st_have_the_first_layers_rate():
    groups = layer_decay_groups(_Named(["pos_embed_spatial", "pos_embed_class", "blocks.3.norm1.weight"]), 0.5, 0.05)
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found["pos_embed_spatial"] == found["pos_embed_class"] == (0.5**5, 0.0)


class _Named(nn.Module):
    """Parameters of given names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        depth = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))
        self.blocks = nn.ModuleList(nn.Module() for _ in range(depth))
        for name in names:
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            shape = (2,) if last == "bias" or "norm" in name else (2, 2)
            module.register_parameter(last, nn.Parameter(torch.zeros(shape)))


def test_clips_of_mae_st_are_spread_over_seconds():
    """16 x 4 frames at 30 frames per second: 64 frames, including the last; other rates cover the same time."""
    assert span_frames(300, 16, 10.0, 73.0) == [10, 14, 18, 22, 26, 31, 35, 39, 43, 47, 52, 56, 60, 64, 68, 73]
    assert span_frames(40, 16, 0.0, 63.0)[-6:] == [39] * 6
    rng = np.random.default_rng(0)
    for fps, total in ((30, 300), (15, 100), (60, 64), (30, 1)):
        timeline = Timeline(np.arange(total), lambda fps=fps: 1 / fps)
        drawn = np.array([spread_frames(timeline, 16, 64 / 30, rng) for _ in range(200)])
        length = 64 / 30 * (fps if total > 1 else 25)
        assert drawn.min() >= 0
        assert drawn.max() < total
        spans = drawn[:, -1] - drawn[:, 0]
        if total > length:
            assert set(spans) <= {int(length) - 1, int(length)}
            assert len(set(drawn[:, 0])) > min(20, total - length - 1) / 2


@pytest.mark.parametrize("total", [1, 15, 17, 63, 64, 65, 100, 250, 300, 301])
@pytest.mark.parametrize("step", [2, 4])
def test_test_views_of_videomae(total, step):
    """As in its source: decode every `step`-th frame, then 5 starts at int(k (n - 16) / 4); the last frame repeats."""
    decoded = list(range(0, total, step))
    decoded += [decoded[-1]] * (16 - len(decoded))
    for k in range(5):
        start = int(k * ((len(decoded) - 16) / 4))
        assert test_frames(total, 16, "strided", 5, k, step) == decoded[start : start + 16]
    draws = (Draws.seeded(5), Draws.seeded(5))
    one, two = (train_frames(total, 16, rule, own, step) for rule, own in zip(("strided", "dense"), draws, strict=True))
    assert one == two  # training clips are the same

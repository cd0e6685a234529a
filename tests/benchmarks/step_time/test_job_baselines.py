"""The plain steps of fine-tuning and VideoMAE against recorded numbers, and both ladders on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import read_recorded
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step_time import measure
from benchmarks.step_time.baselines.finetune import (
    BaselineClassifier,
    FinetuneBaselineStep,
    HalfPrecision,
    mix_in_place,
)
from benchmarks.step_time.baselines.pixels import BaselineVideoMae, PixelsBaselineStep, make_targets
from benchmarks.step_time.jobs import JOBS
from benchmarks.step_time.phases import PhaseClock, no_mark
from umt_fast.config import MixConfig, OptimConfig, VideoMaeConfig
from umt_fast.objectives.classification import mix

CPU = torch.device("cpu")
PIXELS = Path(__file__).parents[2] / "golden" / "pixels" / "videomae_pretrain.safetensors"
JOB_NAMES = ["finetune", "pixels"]

pytestmark = pytest.mark.usefixtures("one_thread")


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("sdpa", [False, True])
def test_the_finetuning_baseline_matches_the_recorded_model(recorded, classifier_config, sdpa):
    case = recorded("a_classify")
    config = classifier_config(case.config)
    model = BaselineClassifier(config, sdpa)
    weights = case.part("model.")
    model.position = weights.pop("pos_embed")  # resized there, as the clip has another size than the published one
    model.load_state_dict(weights)
    assert (model(case.tensors["video"]) - case.tensors["logits"]).abs().max() < 1e-5
    smoothed = MixConfig(probability=0.0, smoothing=case.config["label_smoothing"])
    step = FinetuneBaselineStep(model, smoothed, OptimConfig(lr=0.0), 0.75, "fp32")
    loss = step(case.tensors["video"].clone(), case.tensors["labels"], np.random.RandomState(0))
    assert abs(loss - float(case.tensors["loss_hard_smoothing"])) < 1e-5


def test_the_baseline_mixes_as_the_recorded_rules_do():
    """The rules of `mix`, which is tested against the recorded numbers."""
    clip, labels = torch.randn(4, 3, 2, 12, 10), torch.tensor([0, 3, 1, 1])
    ours, theirs = np.random.RandomState(3), np.random.RandomState(3)
    changed = 0
    for _ in range(30):
        mixed = clip.clone()
        targets = mix_in_place(mixed, labels, 5, MixConfig(), ours)
        expected, wanted = mix(clip, labels, 5, MixConfig(), theirs)
        assert (mixed - expected).abs().max() < 1e-6
        assert (targets - wanted).abs().max() < 1e-6
        changed += not torch.equal(mixed, clip)
    assert changed > 20


def test_half_precision_weights_follow_their_float32_copies():
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4).bfloat16()
    before = layer.weight.detach().clone()
    half = HalfPrecision([{"params": list(layer.parameters())}], OptimConfig(lr=1e-5))
    for _ in range(300):
        (half.scale * layer(torch.ones(1, 4, dtype=torch.bfloat16)).float().square().sum()).backward()
        half.step()
    assert not torch.equal(layer.weight, before)  # single steps would be lost in rounding
    for copy, parameter in zip(half.copies, half.trained, strict=True):
        assert torch.equal(copy.detach().bfloat16(), parameter.detach())


@pytest.mark.parametrize("sdpa", [False, True])
def test_the_pixel_baseline_matches_the_recorded_model(sdpa):
    metadata, tensors = read_recorded(PIXELS)
    given = json.loads(metadata["config"])
    encoder = (given["image"], given["patch"], given["tubelet"], given["frames"])
    sizes = (given["enc_width"], given["enc_depth"], given["enc_heads"])
    config = VideoMaeConfig(*encoder, *sizes, given["dec_width"], given["dec_depth"], given["dec_heads"])
    model = BaselineVideoMae(config, sdpa)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    clip, hidden = tensors["clip"], tensors["mask"]
    if clip.dtype == torch.uint8:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        clip = (clip / 255 - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    assert (make_targets(clip, hidden, config)[..., :24] - tensors["targets"]).abs().max() < 1e-4
    step = PixelsBaselineStep(model, config, OptimConfig(lr=0.0), "fp32")
    assert abs(step(clip, hidden) - float(tensors["loss"])) < 1e-5
    parameters = dict(model.named_parameters())
    gradients = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        assert relative(parameters[name].grad, gradient) < 1e-4, name


@pytest.mark.parametrize("name", JOB_NAMES)
def test_every_rung_of_a_job_has_the_same_losses(name, monkeypatch):
    monkeypatch.setitem(measure.GEMM_SIDE, "cpu", 64)
    job = JOBS[name]
    rungs = [rung for rung in job.ladder(CPU) if not (rung.compiled or rung.kernels)]
    first, *others = measure.measure_model(job, "tiny", job.cpu_batch, rungs, 1, CPU, {}, checked_steps=8)
    assert len(first.losses) == 8
    assert abs(first.losses[-1] - first.losses[0]) > 2 * rungs[0].loss_tolerance / 8
    for result in others:
        assert result.seconds, result.not_run
        assert 0 < result.loss_error <= result.loss_tolerance, result.rung


@pytest.mark.parametrize("name", JOB_NAMES)
def test_the_phases_and_operations_of_a_job(name):
    job = JOBS[name]
    work = job.prepare("tiny", job.cpu_batch, CPU)
    for rung in job.ladder(CPU):
        if rung.compiled or rung.kernels:
            continue
        step, clock = work.build(rung), PhaseClock(CPU)
        step(False, clock)
        spent = clock.seconds()
        assert {"forward", "backward", "optimiser"} <= set(spent)
        assert set(work.flops(lean=rung.lean)) <= set(spent)
    assert work.flops(lean=True)["backward"] <= work.flops(lean=False)["backward"]


@pytest.mark.parametrize("name", JOB_NAMES)
def test_operations_are_those_that_torch_counts(name):
    job = JOBS[name]
    work = job.prepare("tiny", job.cpu_batch, CPU)
    for rung in job.ladder(CPU):
        if rung.compiled or rung.kernels or rung.sdpa:  # fused attention recomputes its forward pass
            continue
        step = work.build(rung)
        with FlopCounterMode(display=False) as counter:
            step(False, no_mark)
        assert counter.get_total_flops() == pytest.approx(sum(work.flops(lean=False).values()), rel=1e-3), rung.name

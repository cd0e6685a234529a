"""Fine-tuning on labels: mixing, the classifier over all tokens, loss, backward, optimiser.

The published step and ours get the same clips, normalised float32 as from the published augmentation, and the same
mixing. Stochastic depth is off on every rung.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.step_time.baselines.finetune import BaselineClassifier, FinetuneBaselineStep
from benchmarks.step_time.jobs.own import normalised, timed_step
from benchmarks.step_time.ladder import Rung, TimedStep
from benchmarks.step_time.phases import Mark
from umt_fast import ClassifierConfig, VideoClassifier
from umt_fast.config import MixConfig, OptimConfig
from umt_fast.objectives.classification import mix, soft_cross_entropy
from umt_fast.run import attention_choice, costs
from umt_fast.run.attention_choice import Use
from umt_fast.run.optim import layer_decay_groups, set_learning_rate

OPTIM = OptimConfig(lr=3e-5, betas=(0.9, 0.999))
LAYER_DECAY = 0.75
MODELS = {
    "vit_b16": ClassifierConfig(),
    "vit_l16": ClassifierConfig(width=1024, depth=24, heads=16),
    "tiny": ClassifierConfig(64, 16, 1, 2, 64, 2, 2, num_classes=8, positions="direct"),
}


@dataclass(frozen=True)
class FinetuneWork:
    """Clips, labels and weights, on the device."""

    config: ClassifierConfig
    clip: Tensor
    """Normalised float32 [B,3,T,H,W]"""
    labels: Tensor
    weights: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def build(self, rung: Rung) -> TimedStep:
        return _build_own(rung, self) if rung.lean else _build_baseline(rung, self)

    def flops(self, lean: bool) -> dict[str, int]:
        """The same for both steps, as all tokens are needed."""
        flops = costs.classifier_flops(self.config, len(self.clip))
        return {"forward": flops.student_forward, "backward": flops.student_backward}


def prepare(model: str, batch: int, device: torch.device) -> FinetuneWork:
    """Random weights, clips and labels from a fixed seed."""
    config = MODELS[model]
    torch.manual_seed(0)
    shape = (batch, config.frames, config.image_size, config.image_size, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    labels = torch.randint(0, config.num_classes, (batch,)).to(device)
    # Not the near-zero initial head of a run: all losses would be log(classes), which shows no difference.
    weights = VideoClassifier(config, init_scale=1.0).state_dict()
    return FinetuneWork(config, normalised(clip), labels, weights)


def _random_states() -> tuple[np.random.RandomState, np.random.RandomState]:
    """One for the compared steps and one for the timed steps, the same on every rung."""
    return np.random.RandomState(1), np.random.RandomState(2)


def _build_baseline(rung: Rung, work: FinetuneWork) -> TimedStep:
    model = BaselineClassifier(work.config, rung.sdpa)
    model.load_state_dict(work.weights)
    model.to(work.device)
    step = FinetuneBaselineStep(model, MixConfig(), OPTIM, LAYER_DECAY, rung.precision)
    if rung.compiled:
        model.compile(backend=rung.backend)
    compared, timed = _random_states()

    def run(shared: bool, mark: Mark) -> float:
        return step(work.clip.clone(), work.labels, compared if shared else timed, mark)

    return run


def _build_own(rung: Rung, work: FinetuneWork) -> TimedStep:
    config, device = work.config, work.device
    model = VideoClassifier(config)
    model.load_state_dict(work.weights)
    model.to(device)
    use = Use.within(config, len(work.clip), config.tokens)
    model.set_attention(attention_choice.choose("auto", use, device, torch.bfloat16, rung.compiled).backend)
    if rung.compiled:
        model.compile(fullgraph=True, dynamic=False, backend=rung.backend, mode=rung.mode)
    groups = layer_decay_groups(model, LAYER_DECAY, OPTIM.weight_decay)
    optimizer = torch.optim.AdamW(
        groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, fused=True, capturable=rung.captured
    )
    set_learning_rate(optimizer, OPTIM.lr)
    compared, timed = _random_states()
    targets = torch.empty(len(work.clip), config.num_classes, device=device)

    def draw(shared: bool) -> Tensor:
        clip, mixed = mix(work.clip, work.labels, config.num_classes, MixConfig(), compared if shared else timed)
        targets.copy_(mixed)
        return clip

    def step(clip: Tensor, mark: Mark) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(clip)
            mark("forward")
            loss = soft_cross_entropy(logits, targets)
        mark("loss")
        loss.backward()
        mark("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("optimiser")
        return loss.detach()

    return timed_step(rung, draw, step, "mixing")

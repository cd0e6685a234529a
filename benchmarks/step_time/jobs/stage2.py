"""Stage 2 on a batch of videos with captions: four losses, backward, optimiser.

Stochastic depth and dropout are off on every rung, because all rungs must give the same losses, which are compared
before timing. Texts have 6 to 20 tokens, like WebVid's captions, padded to 32. `+ lean math` compiles the video
encoder, the teacher and, for texts of any length, the text layers. No step is recorded as a graph.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD

from benchmarks.step_time.baselines.stage2 import BaselineStage2Step, BaselineVideoText, StepInputs
from benchmarks.step_time.jobs.pretrain import MASK_RATIO, reference_ops
from benchmarks.step_time.ladder import Rung, TimedStep, ladder
from benchmarks.step_time.phases import Mark
from umt_fast import VideoTextConfig, VideoTextModel, masking, video_text_step
from umt_fast.config import STUDENTS, TEACHERS, TEXTS, OptimConfig, StudentConfig, TeacherConfig, TextConfig
from umt_fast.objectives.video_text import IGNORED, Draws, mask_words
from umt_fast.run import attention_choice, costs
from umt_fast.run.compute import compile_video_text
from umt_fast.run.optim import build_optimizer, clip_gradients

OPTIM = OptimConfig(lr=1e-5, betas=(0.9, 0.999), weight_decay=0.02)
"""The learning rate is low because there is no warm-up."""
LENGTH, SHORTEST, LONGEST = 32, 6, 20
"""Tokens: of a padded text, of the texts."""
LOSS_TOLERANCE = 0.15
"""Largest difference of losses, which are near 15, mostly from the masked words of an untrained model."""

MODELS = {
    "umt_b16": VideoTextConfig(replace(STUDENTS["umt_b16"], frames=4, drop_path=0.0), TEACHERS["clip_b16"]),
    "umt_l16": VideoTextConfig(
        replace(STUDENTS["umt_l16"], frames=4, drop_path=0.0), TEACHERS["clip_l14"], TEXTS["bert_large"], 768
    ),
    "tiny": VideoTextConfig(
        StudentConfig(64, 16, 1, 2, 64, 2, 2, 0.0, 2, 32),
        TeacherConfig(56, 14, 1, 64, 64, 2, 2, 32, 2),
        TextConfig(64, 3, 2, 2, 200, 40, 128, cls_id=2, sep_id=3, mask_id=4),
        32,
    ),
}


def stage2_ladder(device: torch.device) -> tuple[Rung, ...]:
    """All rungs that stage 2 supports."""
    kept = [rung for rung in ladder(device, frozen_teacher=False) if not (rung.captured or rung.max_autotune)]
    return tuple(replace(rung, loss_tolerance=LOSS_TOLERANCE) for rung in kept)


@dataclass(frozen=True)
class Stage2Work:
    """A batch, weights and draws, on the device."""

    config: VideoTextConfig
    clip: Tensor
    """uint8 [B,T,H,W,3]"""
    ids: Tensor
    mask: Tensor
    draws: Draws
    weights: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def build(self, rung: Rung) -> TimedStep:
        return _build_lean(rung, self) if rung.lean else _build_baseline(rung, self)

    def flops(self, lean: bool) -> dict[str, int]:
        """Operations of the video models, by `costs`, and of the text model's linear layers and attention."""
        config, teacher = self.config, self.config.teacher
        assert teacher is not None
        count = costs.lean_flops if lean else costs.published_flops
        visible = masking.count_visible(config.vision.patches, MASK_RATIO) * config.vision.frames
        phases = dict(count(config.vision, teacher, len(self.clip), visible).by_phase())
        assert self.draws.mlm_labels is not None
        if lean:
            masked = int(torch.ne(self.draws.mlm_labels, IGNORED).sum())
            forward = costs.text_flops(config, len(self.clip), int(self.mask.sum(1).max()), visible, masked)
        else:
            forward = published_text_flops(config, len(self.clip), visible)
        phases["loss"] = phases.get("loss", 0) + forward
        phases["backward"] = phases.get("backward", 0) + 2 * forward
        return phases


def published_text_flops(config: VideoTextConfig, batch: int, seen: int) -> int:
    """Floating-point operations of the published text model's forward pass: padded, nothing shared between pairs."""
    text, rows = config.text, 4 * batch
    width, fusion = text.width, text.depth - text.fusion_layer
    layer = 2 * LENGTH * (4 * width**2 + 2 * width * text.mlp_width) + 4 * LENGTH**2 * width
    cross = 4 * LENGTH * width**2 + 4 * LENGTH * seen * width
    projected = rows * 4 * seen * config.vision.width * width
    passes = 2 * batch * text.fusion_layer * layer + fusion * (rows * (layer + cross) + projected)
    return passes + 2 * batch * LENGTH * width * (width + text.vocab_size)


def prepare(model: str, batch: int, device: torch.device) -> Stage2Work:
    """Random models, clips and texts from a fixed seed."""
    if batch < 2:
        raise ValueError(f"batch = {batch}: matching needs negatives; use 2 or more")
    config = MODELS[model]
    torch.manual_seed(0)
    vision, text = config.vision, config.text
    clip = torch.randint(0, 256, (batch, vision.frames, vision.image_size, vision.image_size, 3), dtype=torch.uint8)
    mask = (torch.arange(LENGTH) < torch.randint(SHORTEST, LONGEST + 1, (batch, 1))).long()
    ids = torch.randint(5, text.vocab_size, mask.shape) * mask
    ids[:, 0] = text.cls_id
    shown = torch.rand(batch, vision.frames, vision.patches).topk(masking.count_visible(vision.patches, MASK_RATIO))
    away = (torch.arange(batch) + 1) % batch
    draws = Draws(shown.indices.sort().values, away, away.flip(0), *mask_words(ids, text, 0.5))
    if batch == 2:
        draws.negative_texts = away
    return Stage2Work(config, clip.to(device), ids, mask, draws, VideoTextModel(config).state_dict())


def _build_baseline(rung: Rung, work: Stage2Work) -> TimedStep:
    device, draws, config = work.device, work.draws, work.config
    model = BaselineVideoText(config, rung.sdpa)
    model.load_state_dict(work.weights)
    model.to(device)
    if rung.compiled:
        model.vision_encoder.compile(backend=rung.backend)
        model.clip_teacher.compile(backend=rung.backend)
        for layer in model.text_encoder.bert.encoder.layer:
            layer.compile(backend=rung.backend)
    visible = draws.visible
    assert visible is not None
    step = BaselineStage2Step(model, OPTIM, visible.shape[-1], rung.precision)
    mean, std = torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)
    clip = ((work.clip.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()  # as its loader gives it
    shown = torch.zeros(*visible.shape[:2], config.vision.patches, dtype=torch.bool)
    hidden = ~shown.scatter_(2, visible, True).flatten(1)
    texts = (work.ids, work.mask, torch.arange(len(clip)), hidden)
    ids, mask, idx, hidden = (x.to(device) for x in texts)
    drawn = (draws.negative_videos, draws.negative_texts, draws.mlm_input_ids, draws.mlm_labels)
    videos, negatives, mlm_ids, mlm_labels = (x.to(device) for x in drawn if x is not None)

    def run(shared: bool, mark: Mark) -> float:
        if not shared:
            hidden_ids, labels = (x.to(device) for x in mask_words(work.ids, config.text, 0.5))
            return step(StepInputs(clip, ids, mask, idx, None, videos, negatives, hidden_ids, labels), mark)
        return step(StepInputs(clip, ids, mask, idx, hidden, videos, negatives, mlm_ids, mlm_labels), mark)

    return run


def _build_lean(rung: Rung, work: Stage2Work) -> TimedStep:
    device, config, batch = work.device, work.config, len(work.clip)
    model = VideoTextModel(config)
    model.load_state_dict(work.weights)
    model.to(device).train()
    teacher, vision = model.clip_teacher, config.vision
    assert teacher is not None
    assert config.teacher is not None
    visible = masking.count_visible(vision.patches, MASK_RATIO)
    uses = attention_choice.uses(vision, config.teacher, batch, batch, vision.frames * visible, visible)
    fastest = {
        name: attention_choice.choose("auto", use, device, torch.bfloat16, rung.compiled).backend
        for name, use in uses.items()
    }
    teacher.set_attention(fastest["teacher"], fastest["teacher's last block"])
    model.set_attention(fastest["student"], fastest["student"])
    if rung.compiled:
        compile_video_text(model, rung.backend)
    optimizer = build_optimizer(model, OPTIM, decay_scalars=True)
    idx = torch.arange(batch)

    def run(shared: bool, mark: Mark) -> Tensor:
        with contextlib.nullcontext() if rung.kernels else reference_ops():
            with torch.autocast(device.type, torch.bfloat16):
                out = video_text_step(model, work.clip, work.ids, work.mask, idx, work.draws if shared else None)
            mark("loss")
            out.total.backward()
            mark("backward")
            clip_gradients(model, None)  # computes the norm, which a run logs
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mark("optimiser")
        return out.total.detach()

    return run

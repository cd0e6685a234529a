"""Model of a stage-2 run: sizes, starting weights, acceleration."""

from __future__ import annotations

import dataclasses

import torch

from train.pretrain_alignment import build_teacher
from umt_fast import masking, weights
from umt_fast.config import ConfigError, Stage2Config, TextConfig, VideoTextObjective
from umt_fast.data.tokens import Tokenizer
from umt_fast.models.video_text import VideoQaModel, VideoTextModel
from umt_fast.run.attention_choice import Use
from umt_fast.run.compute import choose_attention, compile_video_text, refuse_unsupported
from umt_fast.run.world import World


def fit_text(text: TextConfig, tokenizer: Tokenizer) -> TextConfig:
    """The settings of the text encoder with the size and the special ids of a vocabulary."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id", "mask_id")}
    return dataclasses.replace(text, vocab_size=len(tokenizer.vocabulary), **ids)


def build_model(config: Stage2Config, started: bool) -> tuple[VideoTextModel | VideoQaModel, list[str]]:
    """The model with its starting weights, and log lines about them. A resumed run (`started`) loads none."""
    model = VideoQaModel(config.video_text) if config.job == "qa" else VideoTextModel(config.video_text)
    if started:
        return model, []
    notes = []
    state = weights.read_weights(config.init) if config.init else {}
    whole = any(key.startswith("vision_encoder.") for key in state)
    if isinstance(model, VideoTextModel) and model.clip_teacher is not None and not whole:
        teacher = build_teacher(config.teacher, config.teacher_weights, config.run.seed)
        model.clip_teacher.load_state_dict(teacher.state_dict())
        notes.append(f"teacher: {_or_random(config.teacher_weights)}")
    if config.bert != "random" and not whole and isinstance(model, VideoTextModel):
        weights.load_bert(model, weights.read_bert(config.bert))
        notes.append(f"text encoder: {config.bert}; its cross-attention starts random")
    elif not whole:
        notes.append(f"text encoder: {_or_random('random')}")
    if whole:
        left = weights.load_video_text(model, state)
        parts = sorted({key.split(".")[0] if key.startswith("clip_") else ".".join(key.split(".")[:2]) for key in left})
        notes.append(f"start: {config.init}" + (f", without its {', '.join(parts)}" if left else ""))
    elif state:
        weights.load_stage1(model, state)
        notes.append(f"video encoder: {config.init}")
    elif config.job == "pretrain":
        notes.append(f"video encoder: {_or_random('random')}; give --init a stage-1 checkpoint")
    else:
        raise ConfigError(f"job = {config.job} fine-tunes a stage-2 checkpoint; give it with --init")
    return model, notes


def freeze_unused(model: VideoTextModel | VideoQaModel, objective: VideoTextObjective) -> list[str]:
    """Freeze the parameters that get no gradient because a loss has weight 0: DDP would wait for their gradients.

    Returns their names. AdamW never moves a parameter without a gradient, so no result depends on this.
    """
    if isinstance(model, VideoQaModel):
        return []
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    unused: tuple[str, ...] = ()
    if objective.uta == 0:
        unused += ("vision_encoder.clip_decoder.",)
    if objective.vtc == 0:
        unused += ("temp", "vision_proj.", "text_proj.", "vision_encoder.pool_norm.")
    if objective.vtm == 0:
        unused += ("itm_head.",)
    fills = objective.mlm > 0 and model.config.has_language_head
    if not fills:
        unused += ("text_encoder.cls.",)
    if objective.vtm == 0 and not fills:
        layers = range(model.config.text.fusion_layer, model.config.text.depth)
        inner = "bert.encoder.layer" if model.config.has_language_head else "encoder.layer"
        unused += tuple(f"text_encoder.{inner}.{number}." for number in layers)
        if objective.vtc == 0:
            unused += ("text_encoder.",)
    frozen = [name for name in trained if name.startswith(unused)] if unused else []
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def _or_random(source: str) -> str:
    return "RANDOM weights" if source == "random" else source


def accelerate(
    config: Stage2Config, world: World, model: VideoTextModel | VideoQaModel, bf16: bool, stored: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Set attention, recomputation and compilation of the model. Returns the same as `run.compute.accelerate`."""
    vision, compute, clips = config.student, config.compute, config.optim.batch_size
    refuse_unsupported(compute, world)
    visible = masking.count_visible(vision.patches, config.objective.video_mask_ratio)
    teacher = model.clip_teacher
    masked = teacher is not None and config.objective.uta > 0
    seen = vision.frames * visible if masked else vision.tokens
    uses = {"student": Use.within(vision, clips, seen)}
    if teacher is not None:
        heads = (config.teacher.heads, config.teacher.width // config.teacher.heads, False)
        frames, keys = clips * vision.frames, vision.patches + 1
        uses |= {"teacher": Use(frames, keys, keys, *heads), "teacher's last block": Use(frames, visible, keys, *heads)}
    dtype = torch.bfloat16 if bf16 else torch.float32
    chosen, said = choose_attention(compute, uses, world, dtype, stored)
    model.set_attention(chosen["student"], chosen["student"])
    if teacher is not None:
        teacher.set_attention(chosen["teacher"], chosen["teacher's last block"])
    if compute.recompute != "none":
        model.set_recompute(compute.recompute, compute.recompute)
        said.append(f"recompute: {compute.recompute}")
    if compute.compile:
        compile_video_text(model)
        said.append("torch.compile: video encoder, text layers and teacher; the first steps take minutes")
    return {name: backend.name for name, backend in chosen.items()}, said

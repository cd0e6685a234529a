"""Precision, attention, recomputation and compilation of the models, set before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from umt_kernels.backend import lacking

from umt_fast import masking
from umt_fast.config import ComputeConfig, ConfigError, PretrainConfig
from umt_fast.models import attention
from umt_fast.models.attention import Backend
from umt_fast.models.classifier import Classifier
from umt_fast.models.clip_vision import ClipTeacher
from umt_fast.models.heads import VideoStudent
from umt_fast.models.pixels import MaskedAutoencoder
from umt_fast.models.video_text import VideoQaModel, VideoTextModel
from umt_fast.run import attention_choice
from umt_fast.run.attention_choice import Use
from umt_fast.run.low_precision import lower_precision, lower_student_precision
from umt_fast.run.world import World

RECOMPUTES_COMPILED_UNDER_DDP = TorchVersion("2.9")
"""First torch version that compiles recomputation under DDP; 2.8 fails in the first step."""


def choose_attention(
    compute: ComputeConfig,
    uses: dict[str, Use],
    world: World,
    dtype: torch.dtype,
    stored: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, Backend], list[str]]:
    """The backend of each use, and log lines with the reasons. All ranks use the choices of rank 0.

    `stored`: the backends of the checkpoint, which are kept if they run here. Raises ConfigError if a backend that the
    settings name does not run here.
    """
    chosen, lines = {}, []
    for name, use in uses.items():
        choice = None
        if compute.attention == "auto":
            choice = attention_choice.keep(stored.get(name), use, world.device, dtype, compute.compile)
        if choice is None:
            choice = attention_choice.choose(compute.attention, use, world.device, dtype, compute.compile)
        first, reason = world.gather((choice.backend.name, choice.reason))[0]
        chosen[name] = attention.load(first)
        lines.append(f"attention: {name} {first} ({reason})")
    return chosen, lines


def accelerate_model(
    model: Classifier | MaskedAutoencoder,
    compute: ComputeConfig,
    uses: dict[str, Use],
    world: World,
    bf16: bool,
    stored: Mapping[str, str],
) -> tuple[dict[str, str], list[str]]:
    """Set attention, recomputation and compilation of a model without a teacher; returns the same as `accelerate`.

    `model.set_attention` gets the backends in the order of `uses`.
    """
    chosen, said = choose_attention(compute, uses, world, torch.bfloat16 if bf16 else torch.float32, stored)
    model.set_attention(*chosen.values())
    if compute.recompute != "none":
        model.set_recompute(compute.recompute)
        said.append(f"recompute: {compute.recompute}")
    if compute.compile:
        model.compile(fullgraph=True, dynamic=False)
        said.append("torch.compile: the first step takes minutes")
    return {name: backend.name for name, backend in chosen.items()}, said


def accelerate(
    config: PretrainConfig,
    world: World,
    student: VideoStudent,
    teacher: ClipTeacher,
    bf16: bool,
    sample: Callable[[], Tensor],
    stored: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, str], list[str]]:
    """Set attention, recomputation, precision and compilation of student and teacher.

    `sample` returns clips [B,T,H,W,3] for measuring the error of low precision; `stored` is as in `choose_attention`.
    Returns the attention backends by use, for the checkpoint, and log lines. Raises ConfigError if the device does not
    support a setting, or if the error of low precision is too large.
    """
    refuse_unsupported(config.compute, world)
    dtype = torch.bfloat16 if bf16 else torch.float32
    student_config, mask, masks = config.student, config.mask, config.mask.masks_per_clip
    frames, patches = student_config.token_frames, student_config.patches
    seen, rule = masking.count_seen(mask.rule, frames, patches, mask.ratio), masking.find_rule(mask.rule)
    finished = masks * rule.num_visible(frames, patches, mask.ratio) if rule.counts == "per frame" else patches
    clips = config.optim.batch_size
    uses = attention_choice.uses(student_config, config.teacher, clips, masks * clips, seen, finished)
    chosen, said = choose_attention(config.compute, uses, world, dtype, stored)
    if bf16:
        teacher.store_matmul_weights(torch.bfloat16)
    teacher.set_attention(chosen["teacher"], chosen["teacher's last block"])
    student.set_attention(chosen["student"])
    if config.compute.teacher_precision != "same":
        if not bf16:
            raise ConfigError("compute.teacher_precision is for runs in bf16; add --compute.precision bf16")
        precision, least = config.compute.teacher_precision, config.compute.least_teacher_cosine
        said.append(lower_precision(teacher, precision, sample().to(world.device), least))
    if config.compute.student_precision != "same":
        if not bf16:
            raise ConfigError("compute.student_precision is for runs in bf16; add --compute.precision bf16")
        least = config.compute.least_student_cosine
        said.append(lower_student_precision(student, sample().to(world.device), masks * clips, seen, least))
    if config.compute.recompute != "none":
        student.set_recompute(config.compute.recompute)
        said.append(f"recompute: {config.compute.recompute}")
    if config.compute.compile:
        compile_models(student, teacher)
        said.append("torch.compile: both models; the first step takes minutes")
    return {name: backend.name for name, backend in chosen.items()}, said


def refuse_unsupported(compute: ComputeConfig, world: World) -> None:
    """Raise ConfigError for settings whose first step would fail on this device or torch version."""
    if compute.cuda_graph and world.device.type != "cuda":
        raise ConfigError(f"compute.cuda_graph needs a CUDA GPU; this run is on the {world.device.type}")
    if compute.cuda_graph and (lacks := lacking(world.device)) is not None:
        raise ConfigError(
            f"compute.cuda_graph records the Triton kernels, and this run uses plain PyTorch instead: it needs "
            f"{lacks}; or leave out --compute.cuda-graph"
        )
    recomputes = compute.compile and compute.recompute != "none"
    if recomputes and world.size > 1 and TorchVersion(torch.__version__) < RECOMPUTES_COMPILED_UNDER_DDP:
        raise ConfigError(
            f"compute.recompute = {compute.recompute} with --compute.compile on several processes needs torch "
            f"{RECOMPUTES_COMPILED_UNDER_DDP} or later, this is {torch.__version__}; upgrade it, or leave out either"
        )


def compile_models(
    student: VideoStudent, teacher: ClipTeacher, backend: str = "inductor", mode: str | None = None
) -> None:
    """Compile each model as one graph of static shapes; a graph break is an error. Parameter names do not change."""
    options = {"fullgraph": True, "dynamic": False, "backend": backend, "mode": mode}
    student.compile(**options)
    teacher.encode = torch.compile(teacher.encode, **options)  # type: ignore[method-assign, call-overload]
    teacher.targets = torch.compile(teacher.targets, **options)  # type: ignore[method-assign, call-overload]


def compile_video_text(model: VideoTextModel | VideoQaModel, backend: str = "inductor") -> None:
    """Compile the video encoder, the teacher and each text layer. Parameter names do not change.

    Each shape of clips (one per kind of batch, one in evaluation) gets its own graph. The lengths of texts vary, so the
    graphs of text layers are for any length.
    """
    model.vision_encoder.compile(backend=backend, dynamic=False)
    model.compile_text(backend=backend)
    teacher = model.clip_teacher
    if teacher is not None:
        options: Any = {"backend": backend, "dynamic": False}
        teacher.encode = torch.compile(teacher.encode, **options)  # type: ignore[method-assign]
        teacher.targets = torch.compile(teacher.targets, **options)  # type: ignore[method-assign]

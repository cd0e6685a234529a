"""What makes both models run faster, or in less memory, without another result: set before the first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from umt_kernels.backend import lacking

from umt_fast import masking
from umt_fast.config import Config, ConfigError
from umt_fast.models import attention
from umt_fast.models.clip_vision import ClipTeacher
from umt_fast.models.heads import VideoStudent
from umt_fast.run import attention_choice
from umt_fast.run.low_precision import lower_precision, lower_student_precision
from umt_fast.run.world import World

RECOMPUTES_COMPILED_UNDER_DDP = TorchVersion("2.9")
"""The first torch known to cut a compiled graph that recomputes at DDP's buckets; 2.8 fails in the first step."""


def accelerate(
    config: Config,
    world: World,
    student: VideoStudent,
    teacher: ClipTeacher,
    bf16: bool,
    sample: Callable[[], Tensor],
) -> list[str]:
    """Give both models the run's attention, recomputation, precision and compilation. Returns what was done, in lines.

    Ranks take the first one's choices. `sample` gives clips [B,T,H,W,3] on which a quantised model is judged. Raises
    ConfigError for what this device cannot do, or a model that is too far off.
    """
    _refuse_what_fails(config, world)
    dtype = torch.bfloat16 if bf16 else torch.float32
    student_config, mask, masks = config.student, config.mask, config.train.masks_per_clip
    frames, patches = student_config.tokens // student_config.grid**2, student_config.grid**2
    seen = masking.count_seen(mask.rule, frames, patches, mask.ratio)
    finished = patches if mask.rule == "random" else masks * masking.count_visible(patches, mask.ratio)
    clips = config.optim.batch_size
    uses = attention_choice.uses(student_config, config.teacher, clips, masks * clips, seen, finished)
    chosen = {}
    for name, use in uses.items():
        choice = attention_choice.choose(config.model.attention, use, world.device, dtype, config.model.compile)
        chosen[name] = attention.load(world.gather(choice.backend.name)[0])
    if bf16:
        teacher.store_matmul_weights(torch.bfloat16)
    teacher.set_attention(chosen["teacher"], chosen["teacher's last block"])
    student.set_attention(chosen["student"])
    said = ["attention: " + ", ".join(f"{name} {backend.name}" for name, backend in chosen.items())]
    if config.model.teacher_precision != "same":
        if not bf16:
            raise ConfigError("model.teacher_precision is for runs in bf16; add --run.precision bf16")
        precision, least = config.model.teacher_precision, config.model.least_teacher_cosine
        said.append(lower_precision(teacher, precision, sample().to(world.device), least))
    if config.model.student_precision != "same":
        if not bf16:
            raise ConfigError("model.student_precision is for runs in bf16; add --run.precision bf16")
        least = config.model.least_student_cosine
        said.append(lower_student_precision(student, sample().to(world.device), masks * clips, seen, least))
    if config.model.recompute != "none":
        student.set_recompute(config.model.recompute)
        said.append(f"recompute: {config.model.recompute}")
    if config.model.compile:
        compile_models(student, teacher)
        said.append("torch.compile: both models; the first step takes minutes")
    return said


def _refuse_what_fails(config: Config, world: World) -> None:
    """Raise ConfigError for settings whose first step is known to fail here."""
    if config.train.cuda_graph and world.device.type != "cuda":
        raise ConfigError(f"train.cuda_graph needs a CUDA GPU; this run is on the {world.device.type}")
    if config.train.cuda_graph and (lacks := lacking(world.device)) is not None:
        raise ConfigError(
            f"train.cuda_graph records the Triton kernels, and this run takes plain PyTorch in their place: it needs "
            f"{lacks}; or leave out --train.cuda-graph"
        )
    recomputes = config.model.compile and config.model.recompute != "none"
    if recomputes and world.size > 1 and TorchVersion(torch.__version__) < RECOMPUTES_COMPILED_UNDER_DDP:
        raise ConfigError(
            f"model.recompute = {config.model.recompute} with --model.compile on several processes needs torch "
            f"{RECOMPUTES_COMPILED_UNDER_DDP} or later, this is {torch.__version__}; upgrade it, or leave out either"
        )


def compile_models(
    student: VideoStudent, teacher: ClipTeacher, backend: str = "inductor", mode: str | None = None
) -> None:
    """Compile each as one graph of static shapes; a graph break is an error. Their keys stay as they are."""
    options = {"fullgraph": True, "dynamic": False, "backend": backend, "mode": mode}
    student.compile(**options)
    teacher.encode = torch.compile(teacher.encode, **options)  # type: ignore[method-assign, call-overload]
    teacher.targets = torch.compile(teacher.targets, **options)  # type: ignore[method-assign, call-overload]

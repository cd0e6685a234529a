"""A teacher that multiplies in int8 or float8, through torchao, and what that costs in accuracy.

The scores decide what the student sees, so the last block's queries, keys and values stay as they are, with the patch
embedding and the output projection. Everything else of the blocks is quantised: weights once, per output channel,
activations at every call, per row.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import ConfigError, TeacherPrecision
from umt_fast.models.teacher import Block, ClipTeacher

INSTALL = "pip install torchao"
FLOAT8_CAPABILITY = (8, 9)
"""The first compute capability with float8 matmuls."""


@dataclass(frozen=True)
class TargetError:
    """Cosine between the targets of the quantised teacher and those before, over all tokens and layers."""

    mean: float
    lowest_percent: float
    """The cosine that 1% of the targets stay below."""
    median: float
    score_difference: float
    """Largest difference of a score, over the largest score."""

    def __str__(self) -> str:
        return (
            f"cosine of its targets with the exact ones: mean {self.mean:.5f}, median {self.median:.5f}, "
            f"1% below {self.lowest_percent:.5f}; scores off by up to {100 * self.score_difference:.2f}% of the largest"
        )


def check_device(precision: TeacherPrecision, device: torch.device) -> None:
    """Raise ConfigError unless this device can run a teacher of that precision."""
    try:
        importlib.import_module("torchao")
    except ImportError as error:
        raise ConfigError(f"model.teacher_precision = {precision} needs torchao ({error}); {INSTALL}") from None
    if precision == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY):
        raise ConfigError("model.teacher_precision = fp8 needs a GPU with float8 matmuls: Ada, Hopper or later")


def quantize_teacher(teacher: ClipTeacher, precision: TeacherPrecision) -> None:
    """Quantise the matmuls of the blocks in place. Raises ConfigError where torchao or the device cannot."""
    device = teacher.proj.device
    check_device(precision, device)
    blocks = [block for block in teacher.transformer.resblocks if isinstance(block, Block)]
    for block in blocks:
        if block is not blocks[-1]:
            block.attn.in_proj_weight = _quantized(block.attn.in_proj_weight, precision)
        for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.weight = _quantized(layer.weight, precision)


def _quantized(weight: Tensor, precision: TeacherPrecision) -> nn.Parameter:
    """torchao quantises layers: the weight goes through one."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
    # torchao would also turn on Inductor's long searches, for the student too.
    if precision == "fp8":
        quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    else:
        quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return layer.weight


def lower_precision(teacher: ClipTeacher, precision: TeacherPrecision, clip: Tensor, least_cosine: float) -> str:
    """Quantise the teacher and measure the error on `clip` [B,T,H,W,3]. Returns a line that says it.

    Raises ConfigError if the mean cosine is below `least_cosine`.
    """
    everything = torch.arange(teacher.config.grid**2, device=clip.device)
    frames = clip.shape[1] // teacher.config.tubelet_size
    visible = everything.expand(len(clip), frames, -1)
    with torch.autocast(clip.device.type, torch.bfloat16):
        exact = teacher.encode(clip)
        exact_targets = teacher.targets(exact, visible)
        quantize_teacher(teacher, precision)
        rounded = teacher.encode(clip)
        rounded_targets = teacher.targets(rounded, visible)
    cosine = F.cosine_similarity(exact_targets.float(), rounded_targets.float(), dim=-1).flatten()
    low, median = cosine.kthvalue(max(1, len(cosine) // 100)).values, cosine.median()
    difference = (exact.scores - rounded.scores).abs().max() / exact.scores.max()
    error = TargetError(float(cosine.mean()), float(low), float(median), float(difference))
    if not error.mean >= least_cosine:
        raise ConfigError(
            f"model.teacher_precision = {precision} is refused: {error}; model.least_teacher_cosine is {least_cosine}"
        )
    return f"{precision} teacher: {error}"

"""A teacher in int8 or float8, through torchao or umt_kernels; a student that trains in float8 through torchao; and
their measured errors.

The scores decide which patches the student sees, so the last block's queries, keys and values stay exact, as do the
patch embedding and the output projection. All other matmuls of the blocks are quantised: weights once, per output
channel; activations at every call, per row.

The student's float8 is an experiment: all matmuls of its blocks, forward and backward, with one scale per tensor that
is computed at every call. Patch embedding, attention, norms and heads stay exact; weights and their keys do not change.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import ConfigError, TeacherPrecision
from umt_fast.models.clip_8bit import convert_blocks
from umt_fast.models.clip_vision import Block, ClipTeacher
from umt_fast.models.heads import VideoStudent

INSTALL = "pip install torchao, which needs torch 2.10 or later"
FLOAT8_CAPABILITY = (8, 9)
"""The first compute capability with float8 matmuls."""
OWN = {"int8-triton": torch.int8, "fp8-triton": torch.float8_e4m3fn}
"""Precisions that umt_kernels computes, and their dtypes. On a CPU its reference in plain PyTorch emulates them."""
INT8_CAPABILITY = (8, 0)
"""The first compute capability that the int8 kernels are compiled and checked for."""
FLOAT8_MULTIPLE = 16
"""The sizes of a float8 matmul must be multiples of this; in the weights' gradient also the rows of a batch."""


@dataclass(frozen=True)
class Cosines:
    """Cosines between a model's outputs in low precision and its exact outputs, over all tokens and layers."""

    mean: float
    lowest_percent: float
    """1% of the cosines are below this."""
    median: float

    @staticmethod
    def between(rounded: Tensor, exact: Tensor) -> Cosines:
        cosine = F.cosine_similarity(exact.float(), rounded.float(), dim=-1).flatten()
        low = cosine.kthvalue(max(1, len(cosine) // 100)).values
        return Cosines(float(cosine.mean()), float(low), float(cosine.median()))

    def __str__(self) -> str:
        return f"mean {self.mean:.5f}, median {self.median:.5f}, 1% below {self.lowest_percent:.5f}"


def check_device(setting: str, precision: TeacherPrecision, device: torch.device) -> None:
    """Raise ConfigError, naming the setting, unless this device supports the precision."""
    if precision in OWN:
        least = FLOAT8_CAPABILITY if precision == "fp8-triton" else INT8_CAPABILITY
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < least:
            raise ConfigError(
                f"{setting} = {precision} needs a GPU of compute capability {least[0]}.{least[1]} or later"
            )
        return
    try:
        importlib.import_module("torchao")
    except ImportError as error:
        raise ConfigError(f"{setting} = {precision} needs torchao ({error}); {INSTALL}") from None
    if precision == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY):
        raise ConfigError(f"{setting} = fp8 needs a GPU with float8 matmuls: Ada, Hopper or later")


def quantize_teacher(teacher: ClipTeacher, precision: TeacherPrecision) -> None:
    """Quantise the matmuls of the blocks in place. Raises ConfigError if torchao or the device cannot."""
    device = teacher.proj.device
    check_device("compute.teacher_precision", precision, device)
    if precision in OWN:
        convert_blocks(teacher, OWN[precision])
        return
    blocks = [block for block in teacher.transformer.resblocks if isinstance(block, Block)]
    for block in blocks:
        if block is not blocks[-1]:
            block.attn.in_proj_weight = _quantized(block.attn.in_proj_weight, precision)
        for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.weight = _quantized(layer.weight, precision)


def _quantized(weight: Tensor, precision: TeacherPrecision) -> nn.Parameter:
    """Quantise a weight by way of a linear layer: torchao quantises only layers."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
    # By default torchao also turns on Inductor's long searches, for the whole process.
    if precision == "fp8":
        quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    else:
        quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return layer.weight


def lower_precision(teacher: ClipTeacher, precision: TeacherPrecision, clip: Tensor, least_cosine: float) -> str:
    """Quantise the teacher and measure the error on `clip` [B,T,H,W,3]. Returns a log line with the error.

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
    cosines = Cosines.between(rounded_targets, exact_targets)
    difference = float((exact.scores - rounded.scores).abs().max() / exact.scores.max())
    error = (
        f"cosine of its targets with the exact ones: {cosines}; "
        f"scores off by up to {100 * difference:.2f}% of the largest"
    )
    if not cosines.mean >= least_cosine:
        raise ConfigError(
            f"compute.teacher_precision = {precision} is refused: {error}; "
            f"compute.least_teacher_cosine is {least_cosine}"
        )
    return f"{precision} teacher: {error}"


def convert_student(student: VideoStudent, batch: int, seen: int, emulate: bool = False) -> None:
    """Let the matmuls of the student's blocks train in float8, on `batch` samples of `seen` tokens.

    Parameters and keys do not change. `emulate` rounds to float8 but multiplies in float32, on any device. Raises
    ConfigError if torchao, the device or a size does not allow it.
    """
    if not emulate:
        check_device("compute.student_precision", "fp8", student.position.device)
    for name, size in (("student.width", student.config.width), ("visible tokens of a batch", batch * seen)):
        if size % FLOAT8_MULTIPLE:
            raise ConfigError(
                f"compute.student_precision = fp8: {name} = {size} is not a multiple of {FLOAT8_MULTIPLE}"
            )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(student.encoder.blocks, config=Float8LinearConfig(emulate=emulate))


def lower_student_precision(
    student: VideoStudent, clip: Tensor, batch: int, seen: int, least_cosine: float, emulate: bool = False
) -> str:
    """Convert the student and measure the error of its predictions on `clip` [B,T,H,W,3]. Returns a log line.

    Raises ConfigError if the mean cosine is below `least_cosine`.
    """
    ids = (torch.arange(seen, device=clip.device) * student.config.tokens // seen).expand(len(clip), -1)

    def predict() -> Tensor:
        with torch.no_grad(), torch.autocast(clip.device.type, torch.bfloat16):
            return student(clip, ids).normed()

    training = student.training
    student.eval()  # no dropped paths, which would differ
    exact = predict()
    convert_student(student, batch, seen, emulate)
    cosines = Cosines.between(predict(), exact)
    student.train(training)
    error = f"cosine of its predictions with the exact ones: {cosines}"
    if not cosines.mean >= least_cosine:
        raise ConfigError(
            f"compute.student_precision = fp8 is refused: {error}; compute.least_student_cosine is {least_cosine}"
        )
    return f"fp8 student: {error}"

"""What every settings class uses: choices of words, checks, the error."""

from __future__ import annotations

import math
from typing import Any, Literal

from umt_fast.errors import RunError

Masking = Literal["attention", "random", "tube", "mae_st", "frame"]
PixelMasking = Literal["tube", "random", "frame", "mae_st", "adamae", "everest", "motion", "region", "flow", "text"]
Precision = Literal["auto", "bf16", "fp32"]
Decoder = Literal["auto", "dali", "pyav"]
TorchAttention = Literal["sdpa", "cudnn", "flash", "efficient", "math", "matmul", "heads"]
Attention = Literal["auto", TorchAttention, "flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers"]
Recompute = Literal["none", "selective", "full"]
Parallel = Literal["ddp", "fsdp"]
FrameRule = Literal["sparse", "dense", "strided", "segment"]
TeacherPrecision = Literal["same", "int8", "fp8", "int8-triton", "fp8-triton"]
"""8-bit matmuls of the teacher: torchao's, or umt_kernels' with norms and activations in the same passes."""
StudentPrecision = Literal["same", "fp8"]
GatherGradient = Literal["published", "true"]
Stage2Job = Literal["pretrain", "retrieval", "qa"]
Activation = Literal["quick_gelu", "gelu"]
MLP_RATIO = 4
"""Width of a hidden layer over the width of its block, in every model here."""


class ConfigError(RunError, ValueError):
    """A setting with a value that cannot be used."""


def check_divides(owner: str, name: str, value: int, by_name: str, by: int) -> None:
    if by < 1 or value < 1 or value % by:
        raise ConfigError(f"{owner}: {name} = {value} is not a positive multiple of {by_name} = {by}")


def check_at_least(section: Any, name: str, **lowest: float) -> None:
    """Raise ConfigError unless each named setting of a section is None or finite and at least the number given."""
    for key, low in lowest.items():
        value = getattr(section, key)
        if value is not None and not low <= value < math.inf:
            raise ConfigError(f"{name}.{key} = {value}: must be a finite number >= {low:g}")


def check_share(key: str, *values: float, below_one: bool = False) -> None:
    for value in values:
        if not (0 <= value < 1 or (value == 1 and not below_one)):
            raise ConfigError(f"{key} = {value}: must be in [0, 1{')' if below_one else ']'}")

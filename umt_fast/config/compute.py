"""Sections `compute`: precision, attention, compilation and parallelism of the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from umt_fast.config.base import ConfigError

Precision = Literal["auto", "bf16", "fp32"]
TorchAttention = Literal["sdpa", "cudnn", "flash", "efficient", "math", "matmul", "heads"]
Attention = Literal["auto", TorchAttention, "flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers"]
Recompute = Literal["none", "selective", "full"]
Parallel = Literal["ddp", "fsdp"]
TeacherPrecision = Literal["same", "int8", "fp8", "int8-triton", "fp8-triton"]
"""8-bit matmuls of the teacher by torchao, or by umt_kernels, which fuses norms and activations."""
StudentPrecision = Literal["same", "fp8"]


@dataclass(frozen=True)
class ComputeConfig:
    """Precision, attention, compilation and parallelism of the models."""

    precision: Precision = "auto"
    """auto: bf16 autocast if the device computes in bf16, else float32."""
    attention: Attention = "auto"
    """auto: measure the installed backends on the run's shapes once, and remember the fastest."""
    compile: bool = False
    """Compile the models by torch.compile: the start takes minutes longer, steps are faster."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again. selective: all but the outputs of matmuls and attention;
    full: whole blocks. This saves memory and costs time."""
    cuda_graph: bool = False
    """Record the whole step as one CUDA graph and replay it, so that the host does not launch each kernel."""
    parallel: Parallel = "ddp"
    """With several processes: ddp copies the model to each; fsdp (FSDP2) shards weights, gradients and optimiser."""

    def __post_init__(self) -> None:
        if self.cuda_graph and self.recompute != "none" and not self.compile:
            raise ConfigError(
                "compute.recompute reads the random state, which a CUDA graph forbids; add --compute.compile"
            )
        for name in ("compile", "cuda_graph"):
            if self.parallel == "fsdp" and getattr(self, name):
                raise ConfigError(f"compute.parallel = fsdp does not work with compute.{name}; leave out either")


@dataclass(frozen=True)
class LowPrecisionConfig(ComputeConfig):
    """ComputeConfig with pre-training's options for low precision, which change the numbers a little."""

    teacher_precision: TeacherPrecision = "same"
    """same as the run; int8 (Ampere and later) or fp8 (Ada, Hopper and later) through torchao; int8-triton or
    fp8-triton by umt_kernels. The error is measured on clips of the run and printed at the start."""
    least_teacher_cosine: float = 0.999
    """The run is refused if the mean cosine with the exact targets is below this."""
    student_precision: StudentPrecision = "same"
    """same as the run; fp8 (Ada, Hopper and later) trains the blocks' matmuls in float8 through torchao: an experiment.
    The error is measured on clips of the run and printed at the start."""
    least_student_cosine: float = 0.99
    """The run is refused if the mean cosine with the exact predictions is below this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_precision", "student_precision"):
            if getattr(self, name) != "same" and self.precision == "fp32":
                raise ConfigError(f"compute.{name} is for runs in bf16; remove --compute.precision fp32")

"""The rungs of a ladder and their additions to the published step. `benchmarks.step_time.jobs` lists each job's rungs.

baseline, float32    the published step without autocast: the reference of the losses; not timed on GPUs
baseline             the published step: fp16 with loss scaling on GPUs, bf16 on CPUs
+ SDPA               attention by torch's scaled_dot_product_attention
+ torch.compile      the published models compiled
+ lean math, eager   umt_fast's models with the fastest attention on this machine and the plain PyTorch forms of
                     umt_kernels' ops; not compiled, which may be faster on CPUs
+ lean math          the same, compiled
+ fused kernels      with the Triton kernels of umt_kernels
+ CUDA graph         the whole step recorded once and replayed
+ max-autotune       compiled with Inductor's mode of that name: matmuls from tuned Triton templates where these are
                     faster than cuBLAS, with the following pointwise work fused in
+ fp8 teacher        on the recorded step of `+ CUDA graph`: the teacher's matmuls in float8 through torchao
+ int8 teacher       in int8 instead, for GPUs without float8
+ own fp8 teacher    in float8 by umt_kernels, with norms and activations in the passes of the matmuls
+ own int8 teacher   in int8 by umt_kernels
+ fp8 student        on `+ fp8 teacher`: the matmuls of the student's blocks too, forward and backward; only on request
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import umt_kernels.backend
from torch import Tensor

from benchmarks.step_time.phases import Mark
from umt_fast.config import TeacherPrecision
from umt_fast.run.low_precision import FLOAT8_CAPABILITY, INSTALL

TimedStep = Callable[[bool, Mark], "Tensor | float"]
"""Makes one training step and returns its loss. True: with random choices shared by all rungs, to compare losses;
False: with its own draws, as in a run."""


@dataclass(frozen=True)
class Rung:
    """One rung: all its changes to the published step."""

    name: str
    precision: str
    lean: bool = False
    sdpa: bool = False
    compiled: bool = False
    kernels: bool = False
    captured: bool = False
    max_autotune: bool = False
    teacher_precision: TeacherPrecision = "same"
    fp8_student: bool = False
    timed: bool = True
    backend: str = "inductor"
    """Backend of torch.compile."""
    loss_tolerance: float = 0.02
    """Largest difference of a loss from the reference at the same step, for bf16 and fp16 rounding of losses near 2."""

    @property
    def timed_by_phase(self) -> bool:
        return not self.captured

    @property
    def mode(self) -> str | None:
        """Mode of torch.compile. Its graphs are off, because our graph holds the whole step."""
        return "max-autotune-no-cudagraphs" if self.max_autotune and self.backend == "inductor" else None

    @property
    def exact(self) -> bool:
        """Whether the rung computes the published step up to the rounding of its precision."""
        return self.teacher_precision == "same" and not self.fp8_student


BEST = "+ CUDA graph"
"""The rung that a short session compares with the baseline first: the last exact rung that compiles in a minute."""


def ladder(device: torch.device, frozen_teacher: bool = True) -> tuple[Rung, ...]:
    """The rungs in order. A job without a frozen teacher has no 8-bit rungs."""
    half = "fp16" if device.type == "cuda" else "bf16"
    lean = Rung("+ lean math", "bf16", lean=True, sdpa=True, compiled=True)
    graph = replace(lean, name=BEST, kernels=True, captured=True)
    rungs = (
        Rung("baseline, float32", "fp32", timed=device.type != "cuda"),
        Rung("baseline", half),
        Rung("+ SDPA", half, sdpa=True),
        Rung("+ torch.compile", half, sdpa=True, compiled=True),
        replace(lean, name="+ lean math, eager", compiled=False),
        lean,
        replace(lean, name="+ fused kernels", kernels=True),
        graph,
        replace(graph, name="+ max-autotune", max_autotune=True),
    )
    if not frozen_teacher:
        return rungs
    coarse = replace(graph, loss_tolerance=0.05)
    return (
        *rungs,
        replace(coarse, name="+ fp8 teacher", teacher_precision="fp8"),
        replace(coarse, name="+ int8 teacher", teacher_precision="int8"),
        replace(coarse, name="+ own fp8 teacher", teacher_precision="fp8-triton"),
        replace(coarse, name="+ own int8 teacher", teacher_precision="int8-triton"),
        replace(graph, name="+ fp8 student", teacher_precision="fp8", fp8_student=True, loss_tolerance=0.1),
    )


def missing(rung: Rung, device: torch.device) -> str | None:
    """The rung's requirement that this machine lacks; None if it lacks none."""
    if (rung.kernels or rung.captured) and device.type != "cuda":
        return "a CUDA GPU"
    if rung.kernels and (lacks := umt_kernels.backend.lacking(device)) is not None:
        return lacks
    if rung.teacher_precision.startswith("fp8") and torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        return "a GPU with float8 matmuls: Ada, Hopper or later"
    if rung.teacher_precision in ("fp8", "int8") and importlib.util.find_spec("torchao") is None:
        return f"torchao ({INSTALL})"
    return None

"""The rungs of the ladder from the published step to the fastest one, each a training step that can be called.

    baseline, float32    the published step without autocast: the reference of the losses; not timed on GPUs
    baseline             the published step: fp16 with loss scaling on GPUs, bf16 on CPUs
    + SDPA               its student attends by torch's scaled_dot_product_attention
    + torch.compile      its models compiled
    + lean math, eager   umt_fast's models and the attention that is fastest here, with umt_kernels' plain PyTorch;
                         not compiled, which on CPUs may be the faster way
    + lean math          the same, compiled
    + fused kernels      with umt_kernels' Triton kernels
    + CUDA graph         the whole step recorded and replayed
    + fp8 teacher        the teacher's matmuls in float8
    + fp8 student        those of the student's blocks too, both ways: an experiment, timed only where it is asked for

Stochastic depth is off in all of them: every rung must give the same losses, and they are compared before it is timed.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import umt_kernels.backend
from torch import Tensor, nn
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD

from benchmarks.baseline import BaselineStep, build_baseline
from benchmarks.phases import Mark, no_mark
from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step, masking
from umt_fast.config import STUDENTS, TEACHERS, OptimConfig
from umt_fast.run import attention_choice
from umt_fast.run.compute import compile_models
from umt_fast.run.cuda_graph import CapturedStep
from umt_fast.run.low_precision import FLOAT8_CAPABILITY, INSTALL, convert_student, quantize_teacher
from umt_fast.run.optim import build_optimizer, clip_gradients

MASK_RATIO = 0.8
OPTIM = OptimConfig(lr=3e-5)
"""Low, for there is no warm-up: at 1.5e-4 the loss leaps after some steps, at another step with every rounding."""

MODELS = {
    "umt_b16": (STUDENTS["umt_b16"], TEACHERS["clip_b16"]),
    "umt_l16": (STUDENTS["umt_l16"], TEACHERS["clip_l14"]),
    "tiny": (  # to try the benchmark
        StudentConfig(64, 16, 1, 2, 64, 2, 2, 0.0, 2, 32),
        TeacherConfig(56, 14, 1, 64, 64, 2, 2, 32, 2),
    ),
}

TimedStep = Callable[[Tensor | None, Mark], "Tensor | float"]
"""Makes one training step with the given visible set [B,T,n], the same at every call, or, for None, a draw; returns the
loss."""


@dataclass(frozen=True)
class Rung:
    """What a rung has over the published step."""

    name: str
    precision: str
    lean: bool = False
    sdpa: bool = False
    compiled: bool = False
    kernels: bool = False
    captured: bool = False
    fp8: bool = False
    fp8_student: bool = False
    timed: bool = True
    loss_tolerance: float = 0.02
    """How far a loss may be from the reference's at the same step: bf16 and fp16 rounding, of losses near 2."""

    @property
    def timed_by_phase(self) -> bool:
        return not self.captured


def ladder(device: torch.device) -> tuple[Rung, ...]:
    half = "fp16" if device.type == "cuda" else "bf16"
    lean = Rung("+ lean math", "bf16", lean=True, sdpa=True, compiled=True)
    graph = replace(lean, name="+ CUDA graph", kernels=True, captured=True)
    return (
        Rung("baseline, float32", "fp32", timed=device.type != "cuda"),
        Rung("baseline", half),
        Rung("+ SDPA", half, sdpa=True),
        Rung("+ torch.compile", half, sdpa=True, compiled=True),
        replace(lean, name="+ lean math, eager", compiled=False),
        lean,
        replace(lean, name="+ fused kernels", kernels=True),
        graph,
        replace(graph, name="+ fp8 teacher", fp8=True, loss_tolerance=0.05),
        replace(graph, name="+ fp8 student", fp8=True, fp8_student=True, loss_tolerance=0.1),
    )


def missing(rung: Rung, device: torch.device) -> str | None:
    """What the rung needs that is not there."""
    if (rung.kernels or rung.captured) and device.type != "cuda":
        return "a CUDA GPU"
    if rung.kernels and (lacks := umt_kernels.backend.lacking(device)) is not None:
        return lacks
    if rung.fp8:
        if torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
            return "a GPU with float8 matmuls: Ada, Hopper or later"
        if importlib.util.find_spec("torchao") is None:
            return f"torchao ({INSTALL})"
    return None


@dataclass(frozen=True)
class Work:
    """What every rung of a ladder works on, on the device: the same clips, weights and visible set."""

    student: StudentConfig
    teacher: TeacherConfig
    clip: Tensor
    """uint8 [B,T,H,W,3]"""
    visible: Tensor
    """[B,T,n], to compare losses with"""
    student_weights: dict[str, Tensor]
    teacher_weights: dict[str, Tensor]


def prepare(model: str, batch: int, device: torch.device) -> Work:
    student, teacher = MODELS[model]
    student = replace(student, drop_path=0.0)
    torch.manual_seed(0)
    shape = (batch, student.frames, student.image_size, student.image_size, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    patches = teacher.grid**2
    shown = torch.rand(batch, student.tokens // patches, patches).topk(masking.count_visible(patches, MASK_RATIO))
    return Work(
        student,
        teacher,
        clip,
        shown.indices.sort().values.to(device),
        VideoStudent(student).state_dict(),
        ClipTeacher(teacher).state_dict(),
    )


def build(rung: Rung, work: Work) -> TimedStep:
    """The rung's step, its models on the device. The first call compiles."""
    return _build_lean(rung, work) if rung.lean else _build_baseline(rung, work)


def _build_baseline(rung: Rung, work: Work) -> TimedStep:
    device, patches = work.clip.device, work.teacher.grid**2
    student, teacher = build_baseline(work.student, work.teacher, rung.sdpa)
    student.load_state_dict(work.student_weights)
    teacher.load_state_dict(work.teacher_weights)
    student.to(device)
    teacher.to(device)
    if rung.compiled:
        student.compile()
        teacher.compile()
    step = BaselineStep(student, teacher, OPTIM, work.visible.shape[-1], rung.precision)
    mean, std = torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)
    clip = ((work.clip.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()  # as its loader gives it

    def run(visible: Tensor | None, mark: Mark) -> float:
        hidden = None
        if visible is not None:
            shown = torch.zeros(*visible.shape[:2], patches, dtype=torch.bool, device=device)
            hidden = ~shown.scatter_(2, visible, True).flatten(1)
        return step(clip, hidden, mark)

    return run


class _Marked(nn.Module):
    """A student that marks the end of its forward pass."""

    def __init__(self, student: VideoStudent) -> None:
        super().__init__()
        self.module = student
        self.mark: Mark = no_mark

    def forward(self, clip: Tensor, token_ids: Tensor) -> object:
        predictions = self.module(clip, token_ids)
        self.mark("student forward")
        return predictions


def _build_lean(rung: Rung, work: Work) -> TimedStep:
    device, batch, seen = work.clip.device, len(work.clip), work.visible[0].numel()
    student, teacher = VideoStudent(work.student), ClipTeacher(work.teacher)
    student.load_state_dict(work.student_weights)
    teacher.load_state_dict(work.teacher_weights)
    student.to(device)
    teacher.to(device).eval()
    finished = work.visible.shape[-1]
    uses = attention_choice.uses(work.student, work.teacher, batch, batch, seen, finished)
    fastest = {
        name: attention_choice.choose("auto", use, device, torch.bfloat16, rung.compiled).backend
        for name, use in uses.items()
    }
    teacher.set_attention(fastest["teacher"], fastest["teacher's last block"])
    student.set_attention(fastest["student"])
    teacher.store_matmul_weights(torch.bfloat16)
    if rung.fp8:
        quantize_teacher(teacher, "fp8")
    if rung.fp8_student:
        convert_student(student, batch, seen)
    if rung.compiled:
        compile_models(student, teacher)
    optimizer = build_optimizer(student, OPTIM, capturable=rung.captured)
    marked, encode, targets = _Marked(student), teacher.encode, teacher.targets

    def step(clip: Tensor, visible: Tensor | None, mark: Mark) -> Tensor:
        def marked_encode(clip: Tensor) -> object:
            state = encode(clip)
            mark("teacher")
            return state

        def marked_targets(*arguments: object) -> object:
            mark("sampling")
            found = targets(*arguments)  # type: ignore[arg-type]
            mark("teacher")
            return found

        teacher.encode, teacher.targets = marked_encode, marked_targets  # type: ignore[method-assign, assignment]
        marked.mark = mark
        with torch.autocast(device.type, torch.bfloat16):
            loss = alignment_step(marked, teacher, clip, work.visible.shape[-1], visible).loss
        mark("loss")
        loss.backward()
        mark("backward")
        clip_gradients(student, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("optimiser")
        return loss.detach()

    recorded: dict[bool, CapturedStep[Tensor]] = {}

    def run(visible: Tensor | None, mark: Mark) -> Tensor:
        with contextlib.nullcontext() if rung.kernels else _reference_ops():
            if not rung.captured:
                return step(work.clip, visible, mark)
            drawn = visible is None
            if drawn not in recorded:
                recorded.clear()  # each holds the memory of a step
                recorded[drawn] = CapturedStep(lambda clip: step(clip, visible, no_mark))
            return recorded[drawn](work.clip)

    return run


@contextlib.contextmanager
def _reference_ops() -> Iterator[None]:
    """umt_kernels by its plain PyTorch meanwhile, on a GPU too."""
    before = umt_kernels.backend.REFERENCE_ONLY
    umt_kernels.backend.REFERENCE_ONLY = True
    try:
        yield
    finally:
        umt_kernels.backend.REFERENCE_ONLY = before

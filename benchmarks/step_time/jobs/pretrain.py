"""Stage-1 pre-training: teacher, sampling, student, loss, backward, optimiser.

Stochastic depth is off on every rung, because all rungs must give the same losses, which are compared before timing.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.step_time.baselines.pretrain import BaselineStep, build_baseline
from benchmarks.step_time.jobs.own import normalised, reference_ops
from benchmarks.step_time.ladder import Rung, TimedStep
from benchmarks.step_time.phases import Mark, no_mark
from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step, masking
from umt_fast.config import STUDENTS, TEACHERS, OptimConfig
from umt_fast.run import attention_choice, costs
from umt_fast.run.compute import compile_models
from umt_fast.run.cuda_graph import CapturedStep
from umt_fast.run.low_precision import convert_student, quantize_teacher
from umt_fast.run.optim import build_optimizer, clip_gradients

MASK_RATIO = 0.8
OPTIM = OptimConfig(lr=3e-5)
"""The learning rate is low because there is no warm-up: at 1.5e-4 the loss jumps after some steps, at a step that
depends on rounding."""

MODELS = {
    "umt_b16": (STUDENTS["umt_b16"], TEACHERS["clip_b16"]),
    "umt_l16": (STUDENTS["umt_l16"], TEACHERS["clip_l14"]),
    "tiny": (  # to try the benchmark
        StudentConfig(64, 16, 1, 2, 64, 2, 2, 0.0, 2, 32),
        TeacherConfig(56, 14, 1, 64, 64, 2, 2, 32, 2),
    ),
}


@dataclass(frozen=True)
class PretrainWork:
    """Clips, weights and a visible set, on the device."""

    student: StudentConfig
    teacher: TeacherConfig
    clip: Tensor
    """uint8 [B,T,H,W,3]"""
    visible: Tensor
    """[B,T,n], to compare losses with"""
    student_weights: dict[str, Tensor]
    teacher_weights: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def build(self, rung: Rung) -> TimedStep:
        return _build_lean(rung, self) if rung.lean else _build_baseline(rung, self)

    def flops(self, lean: bool) -> dict[str, int]:
        count = costs.lean_flops if lean else costs.published_flops
        return count(self.student, self.teacher, len(self.clip), self.visible[0].numel()).by_phase()


def prepare(model: str, batch: int, device: torch.device) -> PretrainWork:
    """Random models and clips from a fixed seed."""
    student, teacher = MODELS[model]
    student = replace(student, drop_path=0.0)
    torch.manual_seed(0)
    shape = (batch, student.frames, student.image_size, student.image_size, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    patches = teacher.grid**2
    shown = torch.rand(batch, student.tokens // patches, patches).topk(masking.count_visible(patches, MASK_RATIO))
    return PretrainWork(
        student,
        teacher,
        clip,
        shown.indices.sort().values.to(device),
        VideoStudent(student).state_dict(),
        ClipTeacher(teacher).state_dict(),
    )


def _build_baseline(rung: Rung, work: PretrainWork) -> TimedStep:
    device, patches = work.device, work.teacher.grid**2
    student, teacher = build_baseline(work.student, work.teacher, rung.sdpa)
    student.load_state_dict(work.student_weights)
    teacher.load_state_dict(work.teacher_weights)
    student.to(device)
    teacher.to(device)
    if rung.compiled:
        student.compile(backend=rung.backend)
        teacher.compile(backend=rung.backend)
    step = BaselineStep(student, teacher, OPTIM, work.visible.shape[-1], rung.precision)
    clip = normalised(work.clip)
    shown = torch.zeros(*work.visible.shape[:2], patches, dtype=torch.bool, device=device)
    hidden = ~shown.scatter_(2, work.visible, True).flatten(1)

    def run(shared: bool, mark: Mark) -> float:
        return step(clip, hidden if shared else None, mark)

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


def _build_lean(rung: Rung, work: PretrainWork) -> TimedStep:
    device, batch, seen = work.device, len(work.clip), work.visible[0].numel()
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
    if rung.teacher_precision != "same":
        quantize_teacher(teacher, rung.teacher_precision)
    if rung.fp8_student:
        convert_student(student, batch, seen)
    if rung.compiled:
        compile_models(student, teacher, rung.backend, rung.mode)
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

    def run(shared: bool, mark: Mark) -> Tensor:
        visible = work.visible if shared else None
        with contextlib.nullcontext() if rung.kernels else reference_ops():
            if not rung.captured:
                return step(work.clip, visible, mark)
            if shared not in recorded:
                recorded.clear()  # each recorded graph holds the memory of a step
                recorded[shared] = CapturedStep(lambda clip: step(clip, visible, no_mark))
            return recorded[shared](work.clip)

    return run

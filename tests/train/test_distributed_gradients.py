"""Two processes give the gradients of one process on the joined batch."""

from __future__ import annotations

import torch
from forked import run_ranks
from torch.nn.parallel import DistributedDataParallel

import umt_fast
from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent
from umt_fast.run import world as processes

MICRO_BATCHES = 2


def models() -> tuple[VideoStudent, ClipTeacher]:
    torch.manual_seed(1)
    student = VideoStudent(StudentConfig(32, 16, 1, 2, 32, 2, 2, 0.0, 2, 16))
    teacher = ClipTeacher(TeacherConfig(32, 16, 1, 32, 32, 2, 2, 16, 2))
    return student, teacher


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Four clips and their visible sets."""
    generator = torch.Generator().manual_seed(2)
    clips = torch.randint(0, 256, (4, 2, 32, 32, 3), generator=generator, dtype=torch.uint8)
    visible = torch.rand(4, 2, 4, generator=generator).topk(2).indices.sort().values
    return clips, visible


def worker(path: str) -> None:
    """One of two processes, each with half the clips in two accumulated micro-batches."""
    world = processes.start("cpu")
    student, teacher = models()
    model = DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)
    clips, visible = inputs()
    for micro in range(MICRO_BATCHES):
        chosen = slice(micro * world.size + world.rank, micro * world.size + world.rank + 1)
        loss = umt_fast.alignment_step(model, teacher, clips[chosen], 2, visible[chosen]).loss / MICRO_BATCHES
        if micro < MICRO_BATCHES - 1:
            with model.no_sync():
                loss.backward()
        else:
            loss.backward()
    if world.main:
        torch.save({name: parameter.grad for name, parameter in student.named_parameters()}, path)
    world.close()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    path = tmp_path / "gradients.pth"
    run_ranks(worker, [str(path)])
    student, teacher = models()
    clips, visible = inputs()
    umt_fast.alignment_step(student, teacher, clips, 2, visible).loss.backward()
    joined = torch.load(path, weights_only=True)
    for name, parameter in student.named_parameters():
        assert (parameter.grad - joined[name]).abs().max() < 1e-6, name
        assert parameter.grad.abs().max() > 0, name

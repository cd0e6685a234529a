"""DDP and FSDP2 train alike and write the same checkpoint, which both read."""

from __future__ import annotations

from pathlib import Path

import torch
from forked import run_ranks
from torch import nn

from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step
from umt_fast.config import OptimConfig, PretrainConfig
from umt_fast.run import checkpoint, parallel
from umt_fast.run import world as processes
from umt_fast.run.optim import build_optimizer, clip_gradients, set_learning_rate
from umt_fast.run.train_state import TrainState
from umt_fast.run.world import World


def build(world: World, kind: str) -> tuple[nn.Module, TrainState]:
    torch.manual_seed(1)
    student = VideoStudent(StudentConfig(32, 16, 1, 2, 32, 2, 2, 0.0, 2, 16))
    model = parallel.wrap(student, world, kind, student.encoder.blocks)
    return model, TrainState(student, build_optimizer(student, OptimConfig()), world, PretrainConfig())


def steps(model: nn.Module, state: TrainState, world: World, first: int, last: int) -> None:
    torch.manual_seed(2)
    teacher = ClipTeacher(TeacherConfig(32, 16, 1, 32, 32, 2, 2, 16, 2))
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        clips = torch.randint(0, 256, (4, 2, 32, 32, 3), generator=generator, dtype=torch.uint8)
        visible = torch.rand(4, 2, 4, generator=generator).topk(2).indices.sort().values
        set_learning_rate(state.optimizer, 1e-2)
        for micro in range(2):
            mine = slice(2 * micro + world.rank, 2 * micro + world.rank + 1)
            with parallel.reduce_if(model, micro == 1):
                (alignment_step(model, teacher, clips[mine], 2, visible[mine]).loss / 2).backward()
        assert clip_gradients(state.model, 1.0).isfinite()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.advance(4)


def worker(folder: Path) -> None:
    world = processes.start("cpu")
    for kind in ("ddp", "fsdp"):
        model, state = build(world, kind)
        steps(model, state, world, 0, 2)
        state.save(folder / kind, keep=3)
        steps(model, state, world, 2, 4)
        state.save(folder / kind, keep=3)
    for kind, source in (("fsdp", "ddp"), ("ddp", "fsdp"), ("fsdp", "fsdp")):
        model, state = build(world, kind)
        found = checkpoint.find_checkpoint(folder, world, str(folder / source / "clips_0000000008.pth"))
        assert state.restore(folder, found, step_clips=4)
        steps(model, state, world, 2, 4)
        state.save(folder / f"{kind}_from_{source}", keep=3)
    world.close()


def test_ddp_and_fsdp_train_alike_and_read_each_others_checkpoints(tmp_path):
    run_ranks(worker, [tmp_path])
    ends = {path.name: checkpoint.load_checkpoint(path / "clips_0000000016.pth") for path in tmp_path.iterdir()}
    assert len(ends) == 5
    keys = list(VideoStudent(StudentConfig(32, 16, 1, 2, 32, 2, 2, 0.0, 2, 16)).state_dict())
    for name, end in ends.items():
        assert list(end["model"]) == keys, name
        for key, value in end["model"].items():
            assert (value - ends["ddp"]["model"][key]).abs().max() < 1e-5, (name, key)
    for key, value in ends["fsdp_from_fsdp"]["model"].items():
        assert torch.equal(value, ends["fsdp"]["model"][key]), key

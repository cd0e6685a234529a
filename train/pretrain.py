"""Pre-training of video ViTs, from video files to a checkpoint: Unmasked Teacher's stage 1 (arXiv 2303.16058), and
reconstruction of pixels (VideoMAE, VideoMAE V2, AdaMAE, MAE-ST). The recipe's `objective` chooses.

    python -m train.pretrain --recipe umt_b16_k710 --data.train list.csv
    torchrun --nproc-per-node 8 -m train.pretrain --recipe videomae_b16_k400 --data.train list.csv

--recipe names a file of train/recipes/pretrain or a TOML file of your own (default umt_b16_k710); every setting of it
but `objective` can be overridden below. --dry-run prints the cost of a step and the batch that fits [--gpu-memory GIB],
and exits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from train.pretrain_objectives import OBJECTIVES, SETTINGS, Objective, StepResult
from umt_fast.data.manifest import check_files, read_manifest
from umt_fast.run import hardware, launch, parallel
from umt_fast.run.batches import open_batches
from umt_fast.run.checkpoint import find_own_checkpoint
from umt_fast.run.cuda_graph import DDP_WARM_UPS, WARM_UPS, CapturedStep
from umt_fast.run.log import LossBuffer, RunLog, Throughput, say
from umt_fast.run.lost_rank import save_if_lost
from umt_fast.run.optim import Schedule, build_optimizer, set_learning_rate, update
from umt_fast.run.stop import StopSignal
from umt_fast.run.train_state import TrainState
from umt_fast.run.world import World

if TYPE_CHECKING:
    from umt_fast.data.loader import Loader

RECIPES = Path(__file__).parent / "recipes" / "pretrain"


class Job(NamedTuple):
    """The objects that the loop uses."""

    state: TrainState
    model: nn.Module
    """The student as its processes train it: bare, in DDP's wrapper or sharded by FSDP."""
    objective: Objective
    forward: Callable[[Tensor], StepResult]
    """Clips -> the loss, and what the objective's picture needs."""
    schedule: Schedule
    loader: Loader
    log: RunLog
    last: int
    """The step to stop after."""
    epoch_clips: int
    max_bad: float
    """The run stops when more videos than this cannot be read."""


def train(config: Any, world: World) -> bool:
    """Start or resume a pre-training run. Returns False if a signal stopped it before its last step."""
    job = prepare(config, world)
    state, model, log, run, optim = job.state, job.model, job.log, config.run, config.optim
    losses, start, out, step_clips = LossBuffer(), state.step, None, optim.step_clips(world.size)
    if start >= job.last:
        log.say(run.nothing_left(start, job.schedule.total_steps))
        log.finish(state, job.objective.loss_label)
        job.loader.close()
        return True

    def forward_backward(clip: Tensor) -> StepResult:
        out = job.forward(clip)
        (out.loss / optim.accumulate).backward()
        return out

    def report() -> None:
        if len(losses):
            rate = job.schedule(state.step - 1)
            log.report(state, losses, job.max_bad, lr=rate, epoch=state.clips_seen / job.epoch_clips)

    def save() -> None:
        state.save(run.checkpoints, run.keep)
        log.start_clock(state.step)

    def whole_step(clip: Tensor) -> tuple[StepResult, Tensor]:
        return forward_backward(clip), update(state.model, state.optimizer, optim.clip_grad)

    captured = None
    if config.compute.cuda_graph:
        captured = CapturedStep(whole_step, DDP_WARM_UPS if world.size > 1 else WARM_UPS)

    with StopSignal(world) as stop, log, job.loader as loader, save_if_lost(state, run.checkpoints, run.keep):
        log.start_clock(start)
        for step in range(start + 1, job.last + 1):
            waiting = time.perf_counter()
            batches = stop.fetch(loader, optim.accumulate)
            if batches is None:
                break
            losses.add_data(batches, time.perf_counter() - waiting)

            set_learning_rate(state.optimizer, job.schedule(step - 1))
            values = []
            for i, batch in enumerate(batches):
                clip = job.objective.to_device(batch)
                if captured is not None:
                    out, norm = captured(clip)
                else:
                    with parallel.reduce_if(model, i == optim.accumulate - 1):
                        out = forward_backward(clip)
                values.append({"loss": out.loss.clone()})  # the next captured step overwrites out.loss
            norm = norm.clone() if captured is not None else update(state.model, state.optimizer, optim.clip_grad)
            losses.add(step, values, norm, batches)
            state.advance(step_clips)
            log.advance()

            # once in a while
            if stop.requested():
                break
            if step % run.log_every == 0:
                report()
            if state.save_due(run):
                report()
                save()

        stop.settle()
        if state.step > start:
            report()
            save()
        if world.main and out is not None:
            job.objective.save_picture(batch, out, run.folder)
        log.finish(state, job.objective.loss_label)
    stop.raise_failure()
    return state.step >= job.last


def prepare(config: Any, world: World) -> Job:
    """Build data, models, optimiser and log of a run, and restore its last checkpoint if it has one."""
    import av  # noqa: F401, a run reads videos: if PyAV is missing, fail before anything else

    from umt_fast.data.loader import first_clips

    run, data, optim, compute = config.run, config.data, config.optim, config.compute
    kind = OBJECTIVES[config.objective].objective
    videos = read_manifest(data.train, data.prefix, data.read_timeout)
    check_files(videos, data.train, data.prefix)
    stream = kind.make_stream(config, videos)
    step_clips, epoch_clips = optim.step_clips(world.size), len(videos) * data.crops_per_clip
    schedule = Schedule(optim, epoch_clips, step_clips)
    found = find_own_checkpoint(config, world, kind.FIXED, say)

    torch.manual_seed(run.seed)  # the same initial model on every rank
    objective = kind(config, world)
    if found is None:
        objective.load_initial()
    bf16 = hardware.resolve_precision(compute.precision, world.device)
    stored = found.attention if found is not None else {}
    attention, notes = objective.accelerate(bf16, lambda: first_clips(stream), stored)
    model = parallel.wrap(objective.model, world, compute.parallel, objective.blocks, compute.cuda_graph)
    optimizer = build_optimizer(objective.model, optim, capturable=compute.cuda_graph, no_decay=objective.no_decay)
    torch.manual_seed(run.seed + 1 + world.rank)  # each rank draws its own visible sets and dropped paths

    plan = {"videos": len(videos), "list": videos.digest(), "total_steps": schedule.total_steps}
    state = TrainState(objective.model, optimizer, world, config, plan, attention)
    notes += state.go_on(found, step_clips)
    throughput = Throughput.measure(objective.flops * optim.accumulate, world, bf16)
    log = RunLog(run.folder, world, state.step, schedule.total_steps, step_clips, throughput)
    log.say("\n".join((describe(config, world, bf16, len(videos), schedule, objective.description), *notes)))
    last = run.last_step(schedule.total_steps)
    loader = open_batches(stream, optim, world, log.say, state.clips_seen, last - state.step)
    max_bad = data.max_bad_fraction * videos.count_distinct()
    return Job(
        state=state,
        model=model,
        objective=objective,
        forward=objective.make_step(model, bf16),
        schedule=schedule,
        loader=loader,
        log=log,
        last=last,
        epoch_clips=epoch_clips,
        max_bad=max_bad,
    )


def describe(config: Any, world: World, bf16: bool, videos: int, schedule: Schedule, models: str) -> str:
    """First lines of the log: device and backends, models, data and schedule."""
    optim = config.optim
    return "\n".join(
        (
            hardware.describe(world.device, bf16, config.data.decoder),
            models,
            f"{videos} videos, {optim.epochs} epochs = {schedule.total_steps} steps of "
            f"{world.size} x {optim.batch_size} x {optim.accumulate} clips, peak lr {schedule.peak:.3g}",
        )
    )


def main(arguments: list[str] | None = None) -> None:
    with launch.one_line_errors():
        config: Any
        config, named = launch.read_settings(
            SETTINGS, RECIPES, "umt_b16_k710", "python -m train.pretrain", __doc__ or "", arguments
        )
        if named.dry_run:
            print(OBJECTIVES[config.objective].objective.plan(config, named.gpu_memory))
            return
        launch.run(config, train)


if __name__ == "__main__":
    launch.as_program(main)

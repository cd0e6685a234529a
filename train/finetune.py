"""Fine-tuning of a video encoder on labels (UMT, arXiv 2303.16058, section 4.2), from lists to a tested classifier.

    python -m train.finetune --recipe k400_b16 --init x.pth --data.train train.csv --data.test test.csv
    torchrun --nproc-per-node 8 -m train.finetune --recipe k710_l16 --init x.pth --data.train train.csv

--recipe names a file of train/recipes/finetune or a TOML file of your own (default k400_b16); every setting of it can
be overridden below. A line of a list is `path,label` or `path label`.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from train.finetune_data import make_stream, read_lists
from train.finetune_model import accelerate, load_init, make_objective
from train.finetune_validation import Validation
from umt_fast.config import ConfigError, FinetuneConfig
from umt_fast.files import write_whole
from umt_fast.models.classifier import build_classifier
from umt_fast.run import costs, hardware, launch, parallel
from umt_fast.run.batches import open_batches
from umt_fast.run.checkpoint import find_own_checkpoint
from umt_fast.run.log import LossBuffer, RunLog, Throughput, say
from umt_fast.run.lost_rank import save_if_lost
from umt_fast.run.optim import EpochSchedule, MovingAverage, layer_decay_groups, set_learning_rate, update
from umt_fast.run.stop import StopSignal
from umt_fast.run.train_state import TrainState
from umt_fast.run.world import World

if TYPE_CHECKING:
    from umt_fast.data.batch import Batch
    from umt_fast.data.loader import Loader

RECIPES = Path(__file__).parent / "recipes" / "finetune"
FIXED = ("classifier", "data.crops_per_clip", "data.rule", "augment", "mix", "run.seed")
"""Settings that a resumed run must share with the run that it continues."""


class Job(NamedTuple):
    """The objects that the loop uses."""

    state: TrainState
    model: nn.Module
    """The classifier as its processes train it: bare, in DDP's wrapper or sharded by FSDP."""
    average: MovingAverage | None
    schedule: EpochSchedule
    loader: Loader
    objective: Callable[[Batch], Tensor]
    validation: Validation
    log: RunLog
    last: int
    """The step to stop after."""
    max_bad: float
    """The run stops when more videos than this cannot be read."""


def train(config: FinetuneConfig, world: World) -> bool:
    """Start or resume a fine-tuning run. Returns False if a signal stopped it before its last step."""
    job = prepare(config, world)
    state, model, schedule, log, run, optim = job.state, job.model, job.schedule, job.log, config.run, config.optim
    losses, start, validation, step_clips = LossBuffer(), state.step, job.validation, optim.step_clips(world.size)
    if start >= job.last:
        log.say(run.nothing_left(start, schedule.total_steps))

    def report() -> None:
        if len(losses):
            rate = schedule(state.step - 1)
            log.report(state, losses, job.max_bad, lr=rate, epoch=state.step / schedule.epoch_steps)

    def save() -> None:
        state.save(run.checkpoints, run.keep)
        log.start_clock(state.step)

    if validation.missed():
        validation.run(log.say)
    with StopSignal(world) as stop, log:
        with job.loader as loader, save_if_lost(state, run.checkpoints, run.keep):
            log.start_clock(start)
            for step in range(start + 1, job.last + 1):
                waiting = time.perf_counter()
                batches = stop.fetch(loader, optim.accumulate)
                if batches is None:
                    break
                losses.add_data(batches, time.perf_counter() - waiting)

                set_learning_rate(state.optimizer, schedule(step - 1))
                values = []
                for i, batch in enumerate(batches):
                    with parallel.reduce_if(model, i == optim.accumulate - 1):
                        loss = job.objective(batch)
                        (loss / optim.accumulate).backward()
                    values.append({"loss": loss.detach()})
                norm = update(state.model, state.optimizer, optim.clip_grad)
                if job.average is not None:
                    job.average.update(state.model)
                losses.add(step, values, norm, batches)
                state.advance(step_clips)
                log.advance()

                # once in a while
                if stop.requested():
                    break
                if step % run.log_every == 0:
                    report()
                if validation.due(step):
                    report()
                    validation.run(log.say)
                    save()
                elif state.save_due(run):
                    report()
                    save()

            stop.settle()
            if state.step > start:
                report()
                save()
        log.finish(state, "loss: soft cross-entropy")
        if state.step >= schedule.total_steps:
            validation.test(log.say)
    stop.raise_failure()
    return state.step >= job.last


def prepare(config: FinetuneConfig, world: World) -> Job:
    """Build data, model, optimiser and log of a run, and restore its last checkpoint if it has one."""
    run, data, optim, compute = config.run, config.data, config.optim, config.compute
    config, lists = read_lists(config)
    listed, step_clips = lists.train, optim.step_clips(world.size)
    schedule = EpochSchedule(optim, len(listed.videos), data.crops_per_clip, step_clips)
    found = find_own_checkpoint(config, world, FIXED, say)

    torch.manual_seed(run.seed)  # the same new head on every rank
    classifier = build_classifier(config.classifier, config.init.scale)
    notes = load_init(classifier, config) if found is None else []
    if len(listed.classes) < config.classifier.num_classes:
        notes.append(f"note: the list has {len(listed.classes)} classes, the head {config.classifier.num_classes}")
    classifier.to(world.device)
    bf16 = hardware.resolve_precision(compute.precision, world.device)
    attention, said = accelerate(classifier, config, world, bf16, found.attention if found is not None else {})
    average = MovingAverage(classifier, optim.ema_decay) if optim.ema_decay > 0 else None
    model = parallel.wrap(classifier, world, compute.parallel, classifier.blocks)
    groups = layer_decay_groups(classifier, optim.layer_decay, optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True, capturable=False)
    torch.manual_seed(run.seed + 1 + world.rank)  # each rank draws its own dropped paths

    plan = {"videos": len(listed.videos), "list": listed.videos.digest(), "total_steps": schedule.total_steps}
    plan["classes"] = list(listed.classes)
    state = TrainState(classifier, optimizer, world, config, plan, attention)
    if average is not None:
        state.companions["average"] = average
    validation = Validation(config, state, lists, average, schedule, bf16)
    notes += [*said, *state.go_on(found, step_clips, kept=("best_top1", "validated"))]
    if world.main:
        names = "".join(f"{name}\n" for name in listed.classes)
        write_whole(run.folder / "classes.txt", names.encode("utf-8", "surrogateescape"))
    flops = costs.classifier_flops(config.classifier, optim.batch_size).total
    throughput = Throughput.measure(flops * optim.accumulate, world, bf16)
    log = RunLog(run.folder, world, state.step, schedule.total_steps, step_clips, throughput)
    log.say("\n".join((describe(config, world, bf16, len(listed.videos), schedule, classifier), *notes)))
    last = run.last_step(schedule.total_steps)
    loader = open_batches(make_stream(config, listed), optim, world, log.say, state.clips_seen, last - state.step)
    objective = make_objective(config, model, listed, world.device, bf16)
    max_bad = data.max_bad_fraction * listed.videos.count_distinct()
    return Job(
        state=state,
        model=model,
        average=average,
        schedule=schedule,
        loader=loader,
        objective=objective,
        validation=validation,
        log=log,
        last=last,
        max_bad=max_bad,
    )


def describe(
    config: FinetuneConfig, world: World, bf16: bool, videos: int, schedule: EpochSchedule, model: nn.Module
) -> str:
    """First lines of the log: device and backends, model, data and schedule."""
    optim, sizes = config.optim, config.classifier
    parameters = sum(parameter.numel() for parameter in model.parameters())
    decoder = config.data.file_decoder if config.augment.mode == "published" else config.data.decoder
    return "\n".join(
        (
            hardware.describe(world.device, bf16, decoder),
            f"classifier {sizes.width} x {sizes.depth}, {parameters / 1e6:.1f} M parameters, {sizes.num_classes} "
            f"classes, {sizes.frames} frames of {sizes.image_size} px; {config.augment.mode} augmentation",
            f"{videos} videos, {optim.epochs} epochs = {schedule.total_steps} steps of "
            f"{world.size} x {optim.batch_size} x {optim.accumulate} clips, peak lr {schedule.peak:.3g}",
        )
    )


def short_flags(arguments: list[str]) -> list[str]:
    """Replace `--init FILE` by --init.checkpoint, and `--a.b true` or `false` by the flags --a.b and --a.no-b."""
    flags: list[str] = []
    for argument in arguments:
        argument = re.sub(r"^--init(?==|$)", "--init.checkpoint", argument)
        if argument.lower() in ("true", "false") and flags and re.fullmatch(r"--[\w.-]+", flags[-1]):
            name = flags.pop()
            section, dot, key = name.rpartition(".")
            argument = name if argument.lower() == "true" else f"{section}{dot}no-{key}"
        flags.append(argument)
    return flags


def main(arguments: list[str] | None = None) -> None:
    with launch.one_line_errors():
        given = short_flags(sys.argv[1:] if arguments is None else arguments)
        config, named = launch.read_settings(
            FinetuneConfig, RECIPES, "k400_b16", "python -m train.finetune", __doc__ or "", given
        )
        if named.dry_run:
            raise ConfigError("--dry-run is for train.pretrain")
        launch.run(config, train)


if __name__ == "__main__":
    launch.as_program(main)

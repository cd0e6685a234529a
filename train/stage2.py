"""Stage 2 of Unmasked Teacher (arXiv 2303.16058): video and text. Pre-training, retrieval and question answering.

    python -m train.stage2 --recipe 5m_b16 --init stage1.pth --data.images cc3m.json=/data --data.videos webvid.db=/data
    torchrun --nproc-per-node 8 -m train.stage2 --recipe ret_msrvtt_b16 --init stage2.pth --data.videos train9k.json=/d

--recipe names a file of train/recipes/stage2 or a TOML file of your own (default 5m_b16); every setting of it can be
overridden below. Lists: docs/stage2.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from train.stage2_data import VOCABULARY, Alternation, find_tokenizer, make_stream, read_lists
from train.stage2_model import accelerate, build_model, fit_text, freeze_unused
from train.stage2_objective import LossFunction, make_answering, make_objective
from train.stage2_validation import Validation
from umt_fast.config import ConfigError, Stage2Config
from umt_fast.data.captions import CaptionList
from umt_fast.data.video import Limits
from umt_fast.objectives.video_text import LOSSES
from umt_fast.run import hardware, launch, parallel
from umt_fast.run.batches import open_batches
from umt_fast.run.checkpoint import find_own_checkpoint
from umt_fast.run.kind_clock import KindClock
from umt_fast.run.log import LossBuffer, RunLog, say
from umt_fast.run.lost_rank import save_if_lost
from umt_fast.run.optim import build_optimizer, floored_cosine, set_learning_rate, update
from umt_fast.run.stop import StopSignal
from umt_fast.run.train_state import TrainState
from umt_fast.run.world import World

if TYPE_CHECKING:
    from umt_fast.data.loader import Loader

RECIPES = Path(__file__).parent / "recipes" / "stage2"
FIXED = (
    *("job", "student", "teacher", "text", "joint", "objective", "teacher_weights", "data.identity"),
    *("data.same_caption", "run.seed"),
)
"""Settings that a resumed run must share with the run that it continues."""


class Job(NamedTuple):
    """The objects that the loop uses."""

    state: TrainState
    model: nn.Module
    """The model as its processes train it: bare or in DDP's wrapper."""
    alternation: Alternation
    loaders: dict[str, Loader]
    objective: LossFunction
    validation: Validation
    log: RunLog
    clock: KindClock
    schedule: Callable[[int], float]
    total: int
    last: int
    """The step to stop after."""
    max_bad: float
    """The run stops when more files than this cannot be read."""


def train(config: Stage2Config, world: World) -> bool:
    """Start or resume a stage-2 run. Returns False if a signal stopped it before its last step."""
    job = prepare(config, world)
    state, model, log, run, optim = job.state, job.model, job.log, config.run, config.optim
    losses, start, validation, step_clips = LossBuffer(), state.step, job.validation, optim.step_clips(world.size)
    if validation.missed():
        validation.run(log.say)
    curve: tuple[str, tuple[str, ...]] = ("loss: weighted sum", LOSSES)
    if config.job == "qa":
        curve = ("loss: -log likelihood of the answers", ())
    if start >= job.last:
        log.say(run.nothing_left(start, job.total))
        log.finish(state, *curve)
        return True

    def report() -> None:
        if len(losses):
            epoch = state.step / job.alternation.per_epoch
            log.report(state, losses, job.max_bad, lr=job.schedule(state.step - 1), epoch=epoch, **job.clock.take())

    def save() -> None:
        state.save(run.checkpoints, run.keep)
        start_clocks()

    def start_clocks() -> None:
        log.start_clock(state.step)
        job.clock.start()

    with StopSignal(world) as stop, log, contextlib.ExitStack() as opened:
        for loader in job.loaders.values():
            opened.enter_context(loader)
        opened.enter_context(save_if_lost(state, run.checkpoints, run.keep))
        start_clocks()
        for step in range(start + 1, job.last + 1):
            kind = job.alternation.kind(step - 1)
            waiting = time.perf_counter()
            batches = stop.fetch(job.loaders[kind], optim.accumulate)
            if batches is None:
                break
            losses.add_data(batches, time.perf_counter() - waiting)

            set_learning_rate(state.optimizer, job.schedule(step - 1))
            values, flops = [], 0
            for i, batch in enumerate(batches):
                with parallel.reduce_if(model, i == optim.accumulate - 1):
                    work = job.objective(kind, batch)
                    (work.losses["loss"] / optim.accumulate).backward()
                values.append(work.losses)
                flops += work.flops
            losses.add(step, values, update(state.model, state.optimizer, optim.clip_grad), batches)
            state.advance(step_clips)
            log.advance()
            job.clock.add(kind, flops)

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
        log.finish(state, *curve)
    stop.raise_failure()
    return state.step >= job.last


def prepare(config: Stage2Config, world: World) -> Job:
    """Build data, model, optimiser and log of a run, and restore its last checkpoint if it has one."""
    run, data, optim, compute = config.run, config.data, config.optim, config.compute
    lists, questions = read_lists(config)
    for listed in lists.values():
        listed.videos.limits = Limits.of(data)
    tokenizer = find_tokenizer(config, lists, world)
    config = dataclasses.replace(config, text=fit_text(config.text, tokenizer))
    found = find_own_checkpoint(config, world, FIXED, say)

    torch.manual_seed(run.seed)  # the same initial model on every rank
    model, notes = build_model(config, started=found is not None)
    model = model.to(world.device).train()
    if frozen := freeze_unused(model, config.objective):
        notes.append(f"left out: {len(frozen)} tensors that no loss of this run depends on")
    bf16 = hardware.resolve_precision(compute.precision, world.device)
    attention, said = accelerate(config, world, model, bf16, found.attention if found is not None else {})
    wrapped = parallel.wrap(model, world, compute.parallel)
    optimizer = build_optimizer(model, optim, decay_scalars=True)
    torch.manual_seed(run.seed + 1 + world.rank)  # each rank draws its own visible sets, negatives and words

    step_clips = optim.step_clips(world.size)
    alternation = Alternation({kind: len(listed) // step_clips for kind, listed in lists.items()}, run.seed)
    if not alternation.batches:
        counts = ", ".join(f"{len(listed)} {kind}s" for kind, listed in lists.items())
        raise ConfigError(
            f"{counts} do not fill one batch of {step_clips}; lower --optim.batch-size or give longer lists"
        )
    total = optim.epochs * alternation.per_epoch
    warmup = optim.warmup_epochs * alternation.per_epoch
    plan = {f"list of {kind}s": listed.videos.digest() for kind, listed in lists.items()} | {"total_steps": total}
    state = TrainState(model, optimizer, world, config, plan, attention)
    validation = Validation(config, state, tokenizer, alternation.per_epoch, total, bf16)
    notes += state.go_on(found, step_clips, kept=("best", "validated"))
    if world.main:
        tokenizer.write(run.folder / VOCABULARY)
    last = run.last_step(total)
    log = RunLog(run.folder, world, state.step, total, step_clips)
    log.say("\n".join((describe(config, world, bf16, lists, total, model), *notes, *said)))
    streams = {kind: make_stream(config, kind, lists[kind].videos) for kind in alternation.batches}
    loaders = {}
    for kind, stream in streams.items():
        done, steps = alternation.count(kind, state.step), alternation.count(kind, last)
        loaders[kind] = open_batches(stream, optim, world, log.say, done * step_clips, steps - done)
    if questions:
        objective = make_answering(config, wrapped, tokenizer, questions, bf16)
    else:
        objective = make_objective(config, wrapped, tokenizer, lists, streams, bf16, log.say)
    max_bad = data.max_bad_fraction * sum(listed.videos.count_distinct() for listed in lists.values())

    def schedule(step: int) -> float:
        return floored_cosine(step, total, warmup, optim.lr, optim.min_lr / optim.lr if optim.lr else 0.0)

    clock = KindClock(world.device, hardware.peak_flops(world.device, bf16).flops)
    return Job(
        state=state,
        model=wrapped,
        alternation=alternation,
        loaders=loaders,
        objective=objective,
        validation=validation,
        log=log,
        clock=clock,
        schedule=schedule,
        total=total,
        last=last,
        max_bad=max_bad,
    )


def describe(
    config: Stage2Config, world: World, bf16: bool, lists: dict[str, CaptionList], total: int, model: nn.Module
) -> str:
    """First lines of the log: device and backends, model, data and schedule."""
    optim, vision, text = config.optim, config.student, config.text
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counts = " and ".join(f"{len(found)} {kind}s" for kind, found in lists.items())
    return "\n".join(
        (
            hardware.describe(world.device, bf16, config.data.decoder),
            f"{config.job}: video {vision.width} x {vision.depth} at {vision.frames} frames, text {text.width} x "
            f"{text.depth} of {text.vocab_size} words, {trained / 1e6:.1f} M trained parameters",
            f"{counts}, {optim.epochs} epochs = {total} steps of {world.size} x {optim.batch_size} x "
            f"{optim.accumulate} clips, peak lr {optim.lr:.3g}",
        )
    )


def main(arguments: list[str] | None = None) -> None:
    with launch.one_line_errors():
        config, named = launch.read_settings(
            Stage2Config, RECIPES, "5m_b16", "python -m train.stage2", __doc__ or "", arguments
        )
        if named.dry_run:
            raise ConfigError("--dry-run is for train.pretrain; stage 2 has no plan of its costs")
        launch.run(config, train)


if __name__ == "__main__":
    launch.as_program(main)

"""Fine-tuning of a video encoder on labels (UMT, arXiv 2303.16058, section 4.2), from lists to a tested classifier.

    python -m train.finetune --recipe k400_b16 --init x.pth --data.train train.csv --data.test test.csv
    torchrun --nproc-per-node 8 -m train.finetune --recipe k710_l16 --init x.pth --data.train train.csv

--recipe names a file of train/recipes/finetune or a TOML file of your own (default k400_b16); every setting of it can
be overridden below. A line of a list is `path,label` or `path label`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import umt_fast
from umt_fast.config import ConfigError, FinetuneConfig
from umt_fast.data import open_loader
from umt_fast.data.augment import PublishedAugment, TrainSampling
from umt_fast.data.clips import ClipStream
from umt_fast.data.fast_augment import CroppedStream, augment_batch
from umt_fast.data.labels import LabelledVideos, read_classes, read_labelled
from umt_fast.data.manifest import check_files
from umt_fast.evaluation.classification import Predictions, predict, score
from umt_fast.evaluation.report import write_report
from umt_fast.evaluation.views import Views
from umt_fast.files import read_small, write_whole
from umt_fast.models.attention import load as load_attention
from umt_fast.models.classifier import Classifier, build_classifier
from umt_fast.objectives.classification import mix, soft_cross_entropy
from umt_fast.run import checkpoint, launch, parallel
from umt_fast.run.attention_choice import Use
from umt_fast.run.checkpoint import TrainState
from umt_fast.run.compute import choose_attention
from umt_fast.run.hardware import in_use, peak_flops, resolve_precision
from umt_fast.run.log import LossBuffer, RunLog, Throughput, read_metrics, say
from umt_fast.run.lost_rank import save_if_lost
from umt_fast.run.optim import EpochSchedule, MovingAverage, clip_gradients, layer_decay_groups, set_learning_rate
from umt_fast.run.stop import StopSignal
from umt_fast.run.world import World
from umt_fast.weights import WeightsError, load_classifier, read_model, section_of

if TYPE_CHECKING:
    from umt_fast.data.batch import Batch
    from umt_fast.data.loader import Loader

RECIPES = Path(__file__).parent / "recipes" / "finetune"
BEST = "best.pth"
FIXED = ("classifier", "data.crops_per_clip", "data.rule", "augment", "mix", "run.seed")
"""Settings that a resumed run must share with the run that it continues."""


class Job(NamedTuple):
    """What the loop works with."""

    state: TrainState
    model: nn.Module
    """The classifier as its processes train it: bare, in DDP's wrapper or sharded by FSDP."""
    average: MovingAverage | None
    schedule: EpochSchedule
    loader: Loader
    objective: Callable[[Batch], Tensor]
    listed: LabelledVideos
    validation: LabelledVideos | None
    test: LabelledVideos | None
    log: RunLog
    last: int
    """The step to stop after."""
    max_bad: float
    """Unreadable videos above which the run stops."""
    bf16: bool


def train(config: FinetuneConfig, world: World) -> bool:
    """Run, or go on with, a fine-tuning run. Returns False if a signal stopped it before its last step."""
    job = prepare(config, world)
    state, model, schedule, log, run, optim = job.state, job.model, job.schedule, job.log, config.run, config.optim
    folder, step_clips = run.folder / "checkpoints", world.size * optim.batch_size * optim.accumulate
    losses, start = LossBuffer(), state.step
    if start >= job.last:
        longer = "--optim.epochs" if job.last == schedule.total_steps else "--run.stop-at"
        log.say(f"nothing to train: step {start} of {job.last} is reached; raise {longer} or add --run.name NEW")

    def update() -> Tensor:
        norm = clip_gradients(state.model, optim.clip_grad)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if job.average is not None:
            job.average.update(state.model)
        return norm

    def report() -> None:
        if len(losses):
            rate = schedule(state.step - 1)
            log.report(state, losses, job.max_bad, lr=rate, epoch=state.step / schedule.epoch_steps)

    def save() -> None:
        state.save(folder, run.keep)
        log.start_clock(state.step)

    if is_validated(config, schedule, start) and state.plan["validated"] != start:
        validate(config, job)  # a signal came between the step and this
    with StopSignal(world) as stop, log:
        with job.loader as loader, save_if_lost(state, folder, run.keep):
            log.start_clock(start)
            for step in range(start + 1, job.last + 1):
                waiting = time.perf_counter()
                batches = stop.fetch(loader, optim.accumulate)
                if batches is None:
                    break
                losses.add_data([bad for batch in batches for bad in batch.bad], time.perf_counter() - waiting)

                set_learning_rate(state.optimizer, schedule(step - 1))
                values = []
                for i, batch in enumerate(batches):
                    with parallel.reduce_if(model, i == optim.accumulate - 1):
                        loss = job.objective(batch)
                        (loss / optim.accumulate).backward()
                    values.append({"loss": loss.detach()})
                losses.add(step, values, update(), [path for batch in batches for path in batch.paths])
                state.advance(step_clips)
                log.advance()

                # once in a while
                if stop.requested():
                    break
                if step % run.log_every == 0:
                    report()
                if is_validated(config, schedule, step):
                    report()
                    validate(config, job)
                    save()
                elif step % run.save_every == 0 or (step % run.log_every == 0 and state.save_due(run.save_minutes)):
                    report()
                    save()

            stop.settle()
            if state.step > start:
                report()
                save()
        finished = state.step >= job.last
        if world.main and state.step > start:
            finish(log)
        ended = "done" if state.step >= schedule.total_steps else "stopped"
        log.say(f"{ended} at step {state.step}: {state.last_saved}")
        if state.step >= schedule.total_steps and job.test is not None:
            test(config, job)
    stop.raise_failure()
    return finished


def prepare(config: FinetuneConfig, world: World) -> Job:
    """Data, model, optimiser and log of a run, as they were when its last checkpoint was saved, if it has one."""
    run, data, optim, compute = config.run, config.data, config.optim, config.compute
    folder = run.folder / "checkpoints"
    config, listed, validation, test_list = read_lists(config)
    step_clips = world.size * optim.batch_size * optim.accumulate
    schedule = EpochSchedule(optim, len(listed.videos), data.crops_per_clip, step_clips)
    found = checkpoint.find_checkpoint(folder, world, run.resume, say)
    if found is not None:
        checkpoint.check_same(found, config, FIXED)

    torch.manual_seed(run.seed)  # the same new head on every rank
    classifier = build_classifier(config.classifier, config.init.scale)
    notes = load_init(classifier, config) if found is None else []
    if len(listed.classes) < config.classifier.num_classes:
        notes.append(f"note: the list has {len(listed.classes)} classes, the head {config.classifier.num_classes}")
    classifier.to(world.device)
    bf16 = resolve_precision(compute.precision, world.device)
    stored = found.attention if found is not None else {}
    attention = accelerate(classifier, config, world, bf16, stored, notes)
    average = MovingAverage(classifier, optim.ema_decay) if optim.ema_decay > 0 else None
    model = parallel.wrap(classifier, world, compute.parallel, classifier.blocks)
    groups = layer_decay_groups(classifier, optim.layer_decay, optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True, capturable=False)
    torch.manual_seed(run.seed + 1 + world.rank)  # each rank draws its own dropped paths

    plan = {"videos": len(listed.videos), "list": listed.videos.digest(), "total_steps": schedule.total_steps}
    chosen = {"best_top1": -1.0, "validated": 0, "classes": list(listed.classes)}
    state = TrainState(classifier, optimizer, world, config, {**plan, **chosen}, attention)
    if average is not None:
        state.companions["average"] = average
    if found is not None:
        before = found.content["schedule"]
        state.plan |= {key: before[key] for key in ("best_top1", "validated") if key in before}
    notes += state.go_on(folder, found, step_clips)
    if world.main:
        names = "".join(f"{name}\n" for name in listed.classes)
        write_whole(run.folder / "classes.txt", names.encode("utf-8", "surrogateescape"))
    last = run.last_step(schedule.total_steps)
    throughput = measure_throughput(config, world, bf16)
    log = RunLog(run.folder, world, state.step, schedule.total_steps, step_clips, throughput)
    log.say("\n".join((describe(config, world, bf16, listed, schedule, classifier), *notes)))
    stream = make_stream(config, listed)
    loader = open_loader(
        stream,
        world.device,
        log.say,
        start=state.clips_seen,
        batches=max(last - state.step, 0) * optim.accumulate,
        batch_size=optim.batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    objective = make_objective(config, model, listed, world.device, bf16)
    max_bad = data.max_bad_fraction * listed.videos.count_distinct()
    return Job(
        state, model, average, schedule, loader, objective, listed, validation, test_list, log, last, max_bad, bf16
    )


def read_lists(
    config: FinetuneConfig,
) -> tuple[FinetuneConfig, LabelledVideos, LabelledVideos | None, LabelledVideos | None]:
    """The lists for training, validation and test; the config with the number of classes that they have.

    All labels are checked here, before any video is opened. Raises LabelError and ManifestError.
    """
    data = config.data
    names = read_classes(data.classes) if data.classes else None
    count = None if data.count_classes else config.classifier.num_classes
    listed = read_labelled(data.train, data.prefix, names if names is not None else count, data.read_timeout)
    check_files(listed.videos, data.train, data.prefix)
    if data.count_classes:
        classifier = dataclasses.replace(config.classifier, num_classes=len(listed.classes))
        config = dataclasses.replace(config, classifier=classifier)
    elif names is not None and len(names) != count:
        raise ConfigError(
            f"{data.classes} has {len(names)} classes, the model {count}; give --classifier.num-classes {len(names)} "
            "or --data.count-classes"
        )
    others: list[LabelledVideos | None] = []
    for source in (data.validation, data.test):
        others.append(read_labelled(source, data.prefix, listed.classes, data.read_timeout) if source else None)
        if others[-1] is not None:
            check_files(others[-1].videos, source, data.prefix)
    return config, listed, others[0], others[1]


def load_init(classifier: Classifier, config: FinetuneConfig) -> list[str]:
    """Load the weights that the run starts from. Returns lines that say what was loaded and what was not.

    Raises WeightsError for a file that does not fit, unless init.strict is off.
    """
    init = config.init
    if not init.checkpoint:
        return ["init: random weights; give --init FILE to start from a pre-trained encoder"]
    state, settings = read_model(init.checkpoint)
    ours = section_of(settings, "classifier") or section_of(settings, "student")
    frames = ours.get("frames") or settings.get("num_frames")
    report = load_classifier(
        classifier,
        state,
        delete_head=init.delete_head,
        class_map=read_class_map(init.class_map, config.classifier.num_classes) if init.class_map else None,
        frames=frames // config.classifier.tubelet_size if isinstance(frames, int) else None,
    )
    if init.strict and (unforeseen := report.unforeseen()):
        shown = "\n  ".join(unforeseen[:8] + ([f"and {len(unforeseen) - 8} more"] if len(unforeseen) > 8 else []))
        raise WeightsError(f"{init.checkpoint} does not fit (--init.strict false loads what does):\n  {shown}")
    return [f"init: {len(report.loaded)} tensors from {init.checkpoint}", *(f"  {line}" for line in report.lines())]


def read_class_map(path: str, classes: int) -> list[int]:
    """The published JSON list of head rows. Raises WeightsError for anything else."""
    try:
        rows = json.loads(read_small(Path(path).expanduser()).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"cannot read the class map {path}: {error}") from None
    if not isinstance(rows, list) or not all(type(row) is int for row in rows) or len(rows) != classes:
        raise WeightsError(f"the class map {path} is not a list of {classes} numbers, one for each class")
    return rows


def accelerate(
    model: Classifier, config: FinetuneConfig, world: World, bf16: bool, stored: dict, notes: list[str]
) -> dict[str, str]:
    """Give the model the run's attention, recomputation and compilation. Returns the attention by use."""
    sizes = config.classifier
    dtype = torch.bfloat16 if bf16 else torch.float32
    use = Use(config.optim.batch_size, sizes.tokens, sizes.tokens, sizes.heads, sizes.width // sizes.heads, True)
    chosen, lines = choose_attention(config.compute, {"classifier": use}, world, dtype, stored)
    model.set_attention(chosen["classifier"])
    model.set_recompute(config.compute.recompute)
    notes += lines
    if config.compute.recompute != "none":
        notes.append(f"recompute: {config.compute.recompute}")
    if config.compute.compile:
        model.compile(fullgraph=True, dynamic=False)
        notes.append("torch.compile: the first step takes minutes")
    return {name: backend.name for name, backend in chosen.items()}


def make_stream(config: FinetuneConfig, listed: LabelledVideos) -> ClipStream:
    """The clips that the run sees, augmented as `augment.mode` says; what is left for the device is the objective's."""
    data, sizes = config.data, config.classifier
    sampling = TrainSampling(sizes.frames, data.rule, data.rate, data.fps)
    shape = (listed.videos, data, sizes.frames, sizes.image_size, config.run.seed, sampling)
    if config.augment.mode == "published":
        shape_of = (sizes.frames, sizes.image_size, data.crops_per_clip)
        transform = PublishedAugment(*shape_of, config.augment, sizes.pixel_statistics)
        return ClipStream(*shape, transform=transform)
    return CroppedStream(*shape, augment=config.augment)


def make_objective(
    config: FinetuneConfig, model: nn.Module, listed: LabelledVideos, device: torch.device, bf16: bool
) -> Callable[[Batch], Tensor]:
    """batch -> loss. What is drawn for it depends on its visits alone, so that a resumed run draws the same."""
    labels, classes = torch.from_numpy(listed.labels), config.classifier.num_classes
    crops, seed = config.data.crops_per_clip, config.run.seed
    augment = config.augment
    if augment.mode == "none":
        augment = dataclasses.replace(augment, operations=0, erase=0)

    def objective(batch: Batch) -> Tensor:
        clips = batch.clip.to(device, non_blocking=True)
        truth = labels[batch.rows].repeat_interleave(crops).to(device, non_blocking=True)
        if augment.mode != "published":
            seeds = np.array([[(seed, visit, crop, 3) for crop in range(crops)] for visit in batch.visits])
            drawn = [int(np.random.SeedSequence(key).generate_state(1)[0]) for key in seeds.reshape(-1, 4)]
            clips = augment_batch(clips, drawn, augment, config.classifier.pixel_statistics)
        key = np.random.SeedSequence((seed, batch.visits[0], 4)).generate_state(1)
        clips, targets = mix(clips, truth, classes, config.mix, np.random.RandomState(key))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return soft_cross_entropy(model(clips), targets)

    return objective


def is_validated(config: FinetuneConfig, schedule: EpochSchedule, step: int) -> bool:
    """Whether validation follows a step: after whole epochs, and after the last step."""
    return step > 0 and (step % (schedule.epoch_steps * config.test.every_epochs) == 0 or step == schedule.total_steps)


def validate(config: FinetuneConfig, job: Job) -> None:
    """Test the validation list's one view, and keep the weights if they are the best so far."""
    found, top1, model = None, float(job.state.step), evaluated(job)  # without a list the last weights are the best
    if job.validation is not None:
        found = run_views(config, job, model, job.validation, validation=True)
        scores = score(found.probabilities, torch.from_numpy(job.validation.labels)[found.rows])
        top1 = scores.top1
        unread = f", {len(found.bad)} could not be read" if found.bad else ""
        job.log.say(
            f"validation after step {job.state.step}: top-1 {scores.top1:.2f}  top-5 {scores.top5:.2f}  "
            f"loss {scores.loss:.4f}  ({scores.videos} videos{unread})"
        )
    job.state.plan["validated"] = job.state.step
    if top1 > job.state.plan["best_top1"]:
        job.state.plan["best_top1"] = top1
        save_best(config, job, model, None if found is None else top1)


def evaluated(job: Job) -> nn.Module:
    """The weights that are validated and tested: the moving average where there is one. Every rank calls it.

    A model that FSDP has sharded is copied whole: the ranks test different numbers of clips, and could not gather its
    shards at each of them.
    """
    if job.average is not None:
        return job.average.module
    model = job.state.model
    if not isinstance(model, FSDPModule):
        return model
    copy = build_classifier(job.state.config.classifier).to(job.state.world.device).requires_grad_(False)
    copy.set_attention(load_attention(job.state.attention["classifier"]))
    copy.load_state_dict({key: parallel.whole(value) for key, value in model.state_dict().items()})
    return copy


def run_views(
    config: FinetuneConfig, job: Job, model: nn.Module, listed: LabelledVideos, *, validation: bool = False
) -> Predictions:
    sizes, data, views = config.classifier, config.data, config.test
    chosen = Views(
        sizes.frames, sizes.image_size, data.rule, data.rate, data.fps, views.segments, views.crops, validation
    )
    return predict(
        model,
        listed.videos,
        chosen,
        data,
        job.state.world,
        clips_per_pass=views.clips_per_pass,
        bf16=job.bf16,
        merge=views.merge,
    )


def save_best(config: FinetuneConfig, job: Job, model: nn.Module, top1: float | None) -> None:
    """Write best.pth: weights, settings and class names; `load_encoder` and `train.evaluate` read it.

    Raises OSError, on every rank, for a disk that is full.
    """
    problem = None
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    content = {"model": state, "config": dataclasses.asdict(job.state.config), "schedule": job.state.plan, "top1": top1}
    if job.state.world.main:
        try:
            checkpoint.write_tensors(config.run.folder / BEST, {**content, "step": job.state.step})
        except OSError as error:
            problem = error
    problem = job.state.world.gather(problem)[0]
    if problem is not None:
        raise problem


def test(config: FinetuneConfig, job: Job) -> None:
    """The multi-view test of the best weights. Leaves its report in the run's folder `test`."""
    assert job.test is not None
    best = config.run.folder / BEST
    job.state.world.gather(None)  # the main rank may still be writing it
    state, _ = read_model(best)
    model = evaluated(job)
    model.load_state_dict(state)
    found = run_views(config, job, model, job.test)
    if job.state.world.main:
        about = {"checkpoint": str(best), "list": config.data.test, "views": [config.test.segments, config.test.crops]}
        scores = write_report(config.run.folder / "test", found, job.test, about)
        unread = f"; {len(found.bad)} could not be read, see test.json" if found.bad else ""
        job.log.say(
            f"test, {config.test.segments} x {config.test.crops} views: top-1 {scores.top1:.2f}  "
            f"top-5 {scores.top5:.2f}  mean per class {scores.mean_class:.2f}  ({scores.videos} videos{unread}); "
            f"report in {config.run.folder / 'test'}"
        )


def describe(
    config: FinetuneConfig,
    world: World,
    bf16: bool,
    listed: LabelledVideos,
    schedule: EpochSchedule,
    model: Classifier,
) -> str:
    """The lines at the top of a run: what is computed, with what, on what."""
    optim, sizes = config.optim, config.classifier
    parameters = sum(parameter.numel() for parameter in model.parameters())
    decoder = "pyav" if config.augment.mode == "published" else config.data.decoder
    used = ", ".join(f"{name} {value}" for name, value in in_use(world.device, decoder).items())
    return "\n".join(
        (
            f"umt-fast {umt_fast.__version__}  {used}, precision {'bf16 autocast' if bf16 else 'float32'}",
            f"classifier {sizes.width} x {sizes.depth}, {parameters / 1e6:.1f} M parameters, {sizes.num_classes} "
            f"classes, {sizes.frames} frames of {sizes.image_size} px; {config.augment.mode} augmentation",
            f"{len(listed.videos)} videos, {optim.epochs} epochs = {schedule.total_steps} steps of "
            f"{world.size} x {optim.batch_size} x {optim.accumulate} clips, peak lr {schedule.peak:.3g}",
        )
    )


def measure_throughput(config: FinetuneConfig, world: World, bf16: bool) -> Throughput:
    """What a step's time is compared with to give the MFU."""
    sizes, optim = config.classifier, config.optim
    patch = 2 * 3 * sizes.tubelet_size * sizes.patch_size**2 * sizes.width
    block = 24 * sizes.width**2 + 4 * sizes.tokens * sizes.width  # per token: matmuls, then attention
    flops = 3 * sizes.tokens * (patch + sizes.depth * block) * optim.batch_size
    peaks = world.gather(peak_flops(world.device, bf16).flops)
    return Throughput(flops * optim.accumulate * world.size, sum(peaks))


def finish(log: RunLog) -> None:
    """Leave the picture of the loss."""
    from umt_fast.run.pictures import draw_loss_curve

    metrics = read_metrics(log.metrics_path)
    draw_loss_curve(metrics, log.folder / "loss.png", "loss: soft cross-entropy")
    if len(metrics) > 1:
        log.say(f"loss {metrics[0]['loss']:.4f} -> {metrics[-1]['loss']:.4f}; metrics in {log.folder}")
    log.say(f"waited for data {log.stall:.1%} of the time")


def short_flags(arguments: list[str]) -> list[str]:
    """`--init FILE` as --init.checkpoint, and `--a.b true` or `false` as the flags --a.b and --a.no-b."""
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
            FinetuneConfig, RECIPES, "k400_b16", "train.finetune", __doc__ or "", given
        )
        if named.dry_run:
            raise ConfigError("--dry-run is for train.pretrain")
        launch.run(config, train)


if __name__ == "__main__":
    launch.as_program(main)

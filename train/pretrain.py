"""Unmasked Teacher stage-1 pre-training (arXiv 2303.16058), from video files to a checkpoint.

    python -m train.pretrain --recipe umt_b16_k710 --data.train list.csv
    torchrun --nproc-per-node 8 -m train.pretrain --recipe umt_l16_k710 --data.train list.csv

--recipe names a file of train/recipes/pretrain or a TOML file of your own (default umt_b16_k710); every setting of
it can be overridden below. --dry-run says what a step costs and which batch fits [--gpu-memory GIB], and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import umt_fast
from umt_fast import masking, weights
from umt_fast.config import Config, ConfigError, load_recipe
from umt_fast.data import open_loader
from umt_fast.data.clips import ClipStream
from umt_fast.data.manifest import read_manifest
from umt_fast.doctor import PACKAGES, in_use, resolve_precision
from umt_fast.errors import RunError
from umt_fast.run import checkpoint, costs
from umt_fast.run import world as processes
from umt_fast.run.compute import accelerate
from umt_fast.run.cuda_graph import DDP_WARM_UPS, WARM_UPS, CapturedStep, capture_stream
from umt_fast.run.folder import hold_folder
from umt_fast.run.log import Ledger, NotFinite, RunLog, merge, read_metrics
from umt_fast.run.optim import Schedule, build_optimizer, clip_gradients, set_learning_rate
from umt_fast.run.stop import StopSignal
from umt_fast.run.world import World
from umt_fast.weights import HOW_TO_GET_CLIP, WeightsError, read_weights

if TYPE_CHECKING:
    from umt_fast.data.loader import Batch

RECIPES = Path(__file__).parent / "recipes" / "pretrain"
WIDEST_RANDOM_TEACHER = 256


class CannotResume(RunError):
    """A run whose folder or checkpoint does not fit its settings."""


class TooManyBadFiles(RunError):
    """More of the videos are unreadable than the run accepts."""


def parse(arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The recipe and, on top of it, the command line; and what is no setting."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="umt_b16_k710")
    first.add_argument("--dry-run", action="store_true")
    first.add_argument("--gpu-memory", type=float)
    named, rest = first.parse_known_args(arguments)
    path = Path(named.recipe) if named.recipe.endswith(".toml") else RECIPES / f"{named.recipe}.toml"
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise ConfigError(f"no recipe {named.recipe}; there are {known}, or give the path of a .toml file")
    config = tyro.cli(Config, args=rest, default=load_recipe(path), prog="train.pretrain", description=__doc__)
    return config, named


def build_teacher(config: Config, world: World) -> umt_fast.ClipTeacher:
    """The frozen teacher with its weights. Raises WeightsError, saying how to get some, if there are none."""
    if config.teacher_weights == "random" and config.teacher.width > WIDEST_RANDOM_TEACHER:
        raise WeightsError(
            f"a random teacher teaches nothing, so only one up to {WIDEST_RANDOM_TEACHER} wide may be `random`, to try "
            f"the code; this one is {config.teacher.width} wide.\n{HOW_TO_GET_CLIP}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        teacher = umt_fast.ClipTeacher(config.teacher)
    if config.teacher_weights != "random":
        weights.load_clip_teacher(teacher, read_weights(config.teacher_weights))
    return teacher.to(world.device).eval()


def train(config: Config, world: World) -> Path:
    """Run (or go on with) a pre-training run and return its folder: everything that happens, in order, on one page."""
    from umt_fast.data.loader import first_clips  # wants PyAV, which --dry-run does without

    run, optim = config.run, config.optim
    folder = Path(run.dir) / run.name
    videos = read_manifest(config.data.train, config.data.prefix, config.data.read_timeout)
    step_clips = world.size * optim.batch_size * optim.accumulate
    epoch_clips = len(videos) * config.data.crops_per_clip
    schedule = Schedule(optim, epoch_clips, step_clips)
    autocast = resolve_precision(run.precision, world.device)

    torch.manual_seed(run.seed)  # the same initial student on every rank
    student = umt_fast.VideoStudent(config.student).to(world.device)
    teacher = build_teacher(config, world)
    stream = ClipStream(videos, config.data, config.student.frames, config.student.image_size, run.seed)
    done = accelerate(config, world, student, teacher, autocast, lambda: first_clips(stream))
    optimizer = build_optimizer(student, optim, capturable=config.train.cuda_graph)
    model: torch.nn.Module = student
    if world.size > 1:
        with capture_stream(config.train.cuda_graph):
            model = DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)
    torch.manual_seed(run.seed + 1 + world.rank)  # each rank draws its own visible sets and dropped paths

    source = world.gather(find_checkpoint(config, folder))[0]
    plan = {"videos": len(videos), "list": videos.digest(), "total_steps": schedule.total_steps}
    start, clips_seen, rng, planned = 0, 0, None, plan
    if source is not None:
        start, clips_seen, rng, planned = restore(source, config, world, student, optimizer, step_clips)
    last = schedule.total_steps if run.stop_at is None else min(run.stop_at, schedule.total_steps)
    if world.main:
        checkpoint.remove_unfinished(folder / "checkpoints")

    log = RunLog(folder, world.main, start, schedule.total_steps, step_clips)
    log.say("\n".join((describe(config, world, autocast, len(videos), schedule, student), *done)))
    if source is not None:
        log.say(f"going on from {source} at step {start}")
        for name, then in planned.items():
            if then != plan[name]:
                log.say(f"note: {name.replace('_', ' ')} was {then} when it was saved, now {plan[name]}")
    if start >= last:
        log.say(f"nothing to do: step {start} of {last} is reached; raise --optim.epochs or choose another --run.name")
        log.close()
        return folder

    mask, patches = config.mask, config.student.grid**2
    frames = config.student.tokens // patches
    num_visible = masking.count_visible(patches, mask.ratio)
    distinct = videos.count_distinct()
    ledger = Ledger()
    saved: Path | None = source
    if rng is not None:
        checkpoint.set_rng_state(rng, world.device)

    def forward_backward(clip: Tensor) -> umt_fast.Alignment:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=autocast):
            sets = len(clip) * config.train.masks_per_clip
            visible = masking.draw_blind(mask.rule, sets, frames, patches, mask.ratio, clip.device)
            out = umt_fast.alignment_step(
                model, teacher, clip, num_visible, visible, masks_per_clip=config.train.masks_per_clip
            )
        (out.loss / optim.accumulate).backward()
        return out

    def update() -> Tensor:
        norm = clip_gradients(student, optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    captured = None
    if config.train.cuda_graph:
        captured = CapturedStep(
            lambda clip: (forward_backward(clip), update()), DDP_WARM_UPS if world.size > 1 else WARM_UPS
        )

    def check_and_log(step: int) -> None:
        """Read the losses since the last time; stop if one is not finite or too many videos are bad."""
        report = merge(world.gather(ledger.report()))
        bad = world.gather(log.record_bad(report.bad))[0]
        if report.not_finite is not None:
            number, values, files = report.not_finite
            raise NotFinite(
                f"step {number} is not finite ({values}). Last good checkpoint: {saved or 'none'}. "
                f"Files of that step: {', '.join(files)}"
            )
        log.record(step, {**report.means, "lr": schedule(step - 1), "epoch": step * step_clips / epoch_clips})
        if bad > config.data.max_bad_fraction * distinct:
            raise TooManyBadFiles(
                f"{bad} of {distinct} videos could not be read, more than --data.max-bad-fraction "
                f"{config.data.max_bad_fraction}; see {folder / 'bad_files.txt'}"
            )

    def save(step: int) -> Path:
        states = world.gather(checkpoint.get_rng_state(world.device))
        path = checkpoint.checkpoint_path(folder / "checkpoints", clips_seen)
        if world.main:
            content = {
                "model": weights.umt_state_dict(student),
                "optimizer": optimizer.state_dict(),
                "rng": states,
                "config": dataclasses.asdict(config),
                "schedule": plan,
            }
            checkpoint.save_checkpoint(path.parent, clips_seen, content, run.keep)
        world.gather(None)  # no rank goes on before the file is there
        log.restart_clock(step)
        return path

    loader = open_loader(
        stream,
        world.device,
        log.say,
        start=clips_seen,
        batches=(last - start) * optim.accumulate,
        batch_size=optim.batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    with StopSignal(world) as stop, loader, contextlib.closing(log):
        log.restart_clock(start)
        try:
            for step in range(start + 1, last + 1):
                set_learning_rate(optimizer, schedule(step - 1))
                ledger.begin(step)
                drawn = checkpoint.get_rng_state(world.device) if optim.accumulate > 1 else None
                for micro in range(optim.accumulate):
                    waiting = time.perf_counter()
                    with stop.waiting():
                        batch = next(loader)
                    ledger.add_batch(batch.paths, batch.bad, time.perf_counter() - waiting)
                    clip = batch.clip.to(world.device, non_blocking=True)
                    if captured is not None:
                        out, norm = captured(clip)
                    else:
                        reduces = world.size == 1 or micro == optim.accumulate - 1
                        with contextlib.nullcontext() if reduces else model.no_sync():  # type: ignore[operator]
                            out = forward_backward(clip)
                    ledger.add_loss(out.loss.clone())  # a captured step writes over its own
                ledger.end(norm.clone() if captured is not None else update())
                clips_seen += step_clips
                log.advance()

                stopping = stop.requested()
                ending = stopping or step == last
                saving = ending or step % run.save_every == 0
                if saving or step % run.log_every == 0:
                    check_and_log(step)
                if saving:
                    saved = save(step)
                if ending:
                    break
        except KeyboardInterrupt:  # told to stop before the data for a step came
            step -= 1
            if drawn is not None:
                checkpoint.set_rng_state(drawn, world.device)
            if ledger.drop():
                check_and_log(step)
            saved = save(step) if step > start else saved
        stop.settle()
        if world.main:
            if step > start:
                finish(folder, batch, out, config, log)
            ended = "stopped" if step < schedule.total_steps else "done"
            log.say(f"{ended} at step {step}: {saved or 'nothing to save'}")
    return folder


def find_checkpoint(config: Config, folder: Path) -> Path | None:
    """The checkpoint to go on from, if any."""
    existing = checkpoint.list_checkpoints(folder / "checkpoints")
    if config.run.resume == "auto":
        return existing[-1] if existing else None
    if config.run.resume == "never":
        if existing:
            raise CannotResume(f"{folder} already holds {existing[-1].name}; choose another --run.name or remove it")
        return None
    source = Path(config.run.resume)
    if existing and existing[-1].resolve() != source.resolve():
        raise CannotResume(f"{folder} already holds {existing[-1].name}; to go on from {source}, add --run.name NEW")
    return source


def restore(
    source: Path,
    config: Config,
    world: World,
    student: umt_fast.VideoStudent,
    optimizer: torch.optim.Optimizer,
    step_clips: int,
) -> tuple[int, int, dict[str, Tensor] | None, dict[str, Any]]:
    """Load a checkpoint. Returns the steps done, the clips seen, this rank's random state and what the run had planned.

    With another global batch the steps done are counted anew from the clips seen; a rank that the checkpoint does
    not know starts with a random state of its own.
    """
    content = checkpoint.load_checkpoint(source)
    for name in ("student", "teacher", "mask", "teacher_weights", "data.crops_per_clip", "run.seed"):
        then, now = (_setting(settings, name) for settings in (content["config"], dataclasses.asdict(config)))
        if isinstance(then, dict):  # a setting younger than the checkpoint had its default value
            then = {**_setting(dataclasses.asdict(Config()), name), **then}
        if then != now:
            raise CannotResume(f"{source} was made with {_difference(name, then, now)}; choose another --run.name")
    weights.load_umt_student(student, content["model"])
    own_keys = ("betas", "eps", "weight_decay", "capturable")
    settings = [{key: group[key] for key in own_keys} for group in optimizer.param_groups]
    optimizer.load_state_dict(content["optimizer"])
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # the settings of this run hold, not those of the one that saved
    states = content["rng"]
    rng = states[world.rank] if world.rank < len(states) else None
    return content["clips_seen"] // step_clips, content["clips_seen"], rng, content["schedule"]


def _setting(config: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def _difference(name: str, then: Any, now: Any) -> str:
    if isinstance(then, dict):
        key = next(key for key in now if then.get(key) != now[key])
        return _difference(f"{name}.{key}", then.get(key), now[key])
    return f"{name} = {then}, this run has {now}"


def describe(
    config: Config, world: World, autocast: bool, videos: int, schedule: Schedule, student: torch.nn.Module
) -> str:
    """The lines at the top of a run: what is computed, with what, on what."""
    optim = config.optim
    parameters = sum(parameter.numel() for parameter in student.parameters())
    named = config.teacher_weights
    if named == "random":
        named = f"RANDOM weights (seed {config.run.seed}), which teach nothing about videos"
    used = ", ".join(f"{name} {value}" for name, value in in_use(world.device, config.data.decoder).items())
    return "\n".join(
        (
            f"umt-fast {umt_fast.__version__}  {used}, precision {'bf16 autocast' if autocast else 'float32'}",
            f"student {config.student.width} x {config.student.depth}, {parameters / 1e6:.1f} M parameters; "
            f"teacher {config.teacher.width} x {config.teacher.depth}, {named}",
            f"{videos} videos, {optim.epochs} epochs = {schedule.total_steps} steps of "
            f"{world.size} x {optim.batch_size} x {optim.accumulate} clips, peak lr {schedule.peak:.3g}",
        )
    )


def finish(folder: Path, batch: Batch, out: umt_fast.Alignment, config: Config, log: RunLog) -> None:
    """Leave the pictures of a run."""
    from umt_fast.run.pictures import draw_loss_curve, draw_visible

    metrics = read_metrics(log.metrics_path)
    draw_loss_curve(metrics, folder / "loss.png")
    title = f"{Path(batch.paths[0]).name}: {out.visible[0].numel()} of {out.scores[0].numel()} tokens visible"
    if config.teacher_weights == "random":
        title += " (random teacher)"
    draw_visible(batch.clip[0], out.scores[0], out.visible[0], folder / "visible.png", title)
    if len(metrics) > 1:
        log.say(f"loss {metrics[0]['loss']:.4f} -> {metrics[-1]['loss']:.4f}; pictures and metrics in {folder}")
    log.say(f"waited for data {log.stall:.1%} of the time")


def main(arguments: list[str] | None = None) -> None:
    try:
        config, named = parse(arguments)
        if named.dry_run:
            print(costs.plan(config, config.run.precision != "fp32", named.gpu_memory))
            return
        world = processes.start(config.run.device)
        try:
            with hold_folder(Path(config.run.dir) / config.run.name, world):
                train(config, world)
        finally:
            world.close()
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        lacks = next((package for package in PACKAGES if package.module == error.name), None)
        if lacks is None:
            raise
        sys.exit(f"error: {lacks.purpose} needs {lacks.distribution}, which is missing: {lacks.install}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

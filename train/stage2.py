"""Stage 2 of Unmasked Teacher (arXiv 2303.16058): video and text. Pre-training, retrieval and question answering.

    python -m train.stage2 --recipe 5m_b16 --init stage1.pth --data.images cc3m.json=/data --data.videos webvid.db=/data
    torchrun --nproc-per-node 8 -m train.stage2 --recipe ret_msrvtt_b16 --init stage2.pth --data.videos train9k.json=/d

--recipe names a file of train/recipes/stage2 or a TOML file of your own (default 5m_b16); every setting of it can be
overridden below. Lists: docs/stage2.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import umt_fast
from umt_fast import masking, weights
from umt_fast.config import ConfigError, Stage2Config, TextConfig
from umt_fast.data import captions, open_loader
from umt_fast.data.captions import CaptionList, Question
from umt_fast.data.clips import ClipStream
from umt_fast.data.index import Limits, VideoList
from umt_fast.data.pairs import IntervalSampling, PairTransform
from umt_fast.data.sampling import epoch_order
from umt_fast.data.tokens import Tokenizer, clean_text, make_vocabulary
from umt_fast.models.video_text import VideoQaModel, VideoTextModel
from umt_fast.objectives.answering import answering_loss
from umt_fast.objectives.video_text import video_text_step
from umt_fast.run import checkpoint, launch, parallel
from umt_fast.run.attention_choice import Use
from umt_fast.run.checkpoint import TrainState
from umt_fast.run.compute import choose_attention
from umt_fast.run.hardware import in_use, resolve_precision
from umt_fast.run.log import LossBuffer, RunLog, read_metrics, say
from umt_fast.run.lost_rank import save_if_lost
from umt_fast.run.optim import build_optimizer, clip_gradients, floored_cosine, set_learning_rate
from umt_fast.run.stop import StopSignal
from umt_fast.run.world import World

if TYPE_CHECKING:
    from umt_fast.data.loader import Batch, Loader

RECIPES = Path(__file__).parent / "recipes" / "stage2"
VOCABULARY = "vocab.txt"
FIXED = ("job", "student", "teacher", "text", "joint", "objective", "teacher_weights", "data.identity", "run.seed")
"""Settings that a resumed run must share with the run that it continues."""


class Alternation:
    """Which kind of batch each step is of: every epoch shuffles as many of each kind as its list fills."""

    def __init__(self, batches: dict[str, int], seed: int) -> None:
        self.batches = {kind: count for kind, count in batches.items() if count}
        self.per_epoch = sum(self.batches.values())
        self._seed = seed
        self._known: tuple[int, list[str]] = (-1, [])

    def kind(self, step: int) -> str:
        """Learning rate of step number `step`, from 0."""
        epoch, place = divmod(step, self.per_epoch)
        return self._epoch(epoch)[place]

    def count(self, kind: str, step: int) -> int:
        """How many of the first `step` steps are of a kind."""
        epoch, place = divmod(step, self.per_epoch)
        return epoch * self.batches[kind] + self._epoch(epoch)[:place].count(kind)

    def _epoch(self, epoch: int) -> list[str]:
        if self._known[0] != epoch:
            kinds = [kind for kind, count in self.batches.items() for _ in range(count)]
            self._known = (epoch, [kinds[i] for i in epoch_order(self._seed, epoch, len(kinds))])
        return self._known[1]


class Job(NamedTuple):
    """What the loop works with."""

    state: TrainState
    model: nn.Module
    """As its processes train it: bare or in DDP's wrapper."""
    alternation: Alternation
    loaders: dict[str, Loader]
    objective: Callable[[str, Batch], dict[str, Tensor]]
    """A kind and a batch of it -> its losses by name; `loss` is the one to minimise."""
    log: RunLog
    schedule: Callable[[int], float]
    total: int
    last: int
    """The step to stop after."""
    max_bad: float
    """Unreadable files above which the run stops."""


def train(config: Stage2Config, world: World) -> bool:
    """Run, or go on with, a run. Returns False if a signal stopped it before its last step."""
    job = prepare(config, world)
    state, model, log, run, optim = job.state, job.model, job.log, config.run, config.optim
    folder, step_clips = run.folder / "checkpoints", world.size * optim.batch_size * optim.accumulate
    losses, start = LossBuffer(), state.step
    if start >= job.last:
        log.say(f"nothing to do: step {start} of {job.last} is reached; raise --optim.epochs or add --run.name NEW")
        return True

    def report() -> None:
        if len(losses):
            epoch = state.step / job.alternation.per_epoch
            log.report(state, losses, job.max_bad, lr=job.schedule(state.step - 1), epoch=epoch)

    def save() -> None:
        state.save(folder, run.keep)
        log.start_clock(state.step)

    with StopSignal(world) as stop, log, contextlib.ExitStack() as opened:
        for loader in job.loaders.values():
            opened.enter_context(loader)
        opened.enter_context(save_if_lost(state, folder, run.keep))
        log.start_clock(start)
        for step in range(start + 1, job.last + 1):
            kind = job.alternation.kind(step - 1)
            waiting = time.perf_counter()
            batches = stop.fetch(job.loaders[kind], optim.accumulate)
            if batches is None:
                break
            losses.add_data([bad for batch in batches for bad in batch.bad], time.perf_counter() - waiting)

            set_learning_rate(state.optimizer, job.schedule(step - 1))
            values = []
            for i, batch in enumerate(batches):
                with parallel.reduce_if(model, i == optim.accumulate - 1):
                    out = job.objective(kind, batch)
                    (out["loss"] / optim.accumulate).backward()
                values.append(out)
            norm = clip_gradients(state.model, optim.clip_grad)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            losses.add(step, values, norm, [path for batch in batches for path in batch.paths])
            state.advance(step_clips)
            log.advance()

            # once in a while
            if stop.requested():
                break
            if step % run.log_every == 0:
                report()
            if step % run.save_every == 0 or (step % run.log_every == 0 and state.save_due(run.save_minutes)):
                report()
                save()

        stop.settle()
        if state.step > start:
            report()
            save()
        if world.main and state.step > start:
            finish(log)
        ended = "done" if state.step >= job.total else "stopped"
        log.say(f"{ended} at step {state.step}: {state.last_saved or 'nothing to save'}")
    stop.raise_failure()
    return state.step >= job.last


def prepare(config: Stage2Config, world: World) -> Job:
    """Data, model, optimiser and log of a run, as they were when its last checkpoint was saved, if it has one."""
    run, data, optim, compute = config.run, config.data, config.optim, config.compute
    folder = run.folder / "checkpoints"
    lists, questions = read_lists(config)
    for listed in lists.values():
        listed.videos.limits = Limits.of(data)
    tokenizer = find_tokenizer(config, lists, world)
    config = dataclasses.replace(config, text=fit_text(config.text, tokenizer))
    found = checkpoint.find_checkpoint(folder, world, run.resume, say)
    if found is not None:
        checkpoint.check_same(found, config, FIXED)

    torch.manual_seed(run.seed)  # the same initial model on every rank
    model, notes = build_model(config, started=found is not None)
    model = model.to(world.device).train()
    bf16 = resolve_precision(compute.precision, world.device)
    attention, said = accelerate(config, world, model, bf16, found.attention if found is not None else {})
    wrapped = parallel.wrap(model, world, compute.parallel)
    optimizer = build_optimizer(model, optim, decay_scalars=True)
    torch.manual_seed(run.seed + 1 + world.rank)  # each rank draws its own visible sets, negatives and words

    step_clips = world.size * optim.batch_size * optim.accumulate
    alternation = Alternation({kind: len(listed) // step_clips for kind, listed in lists.items()}, run.seed)
    if not alternation.batches:
        counts = ", ".join(f"{len(listed)} {kind}s" for kind, listed in lists.items())
        raise ConfigError(f"{counts} do not fill one batch of {step_clips}; lower --optim.batch-size")
    total = optim.epochs * alternation.per_epoch
    warmup = optim.warmup_epochs * alternation.per_epoch
    plan = {f"list of {kind}s": listed.videos.digest() for kind, listed in lists.items()} | {"total_steps": total}
    state = TrainState(model, optimizer, world, config, plan, attention)
    notes += state.go_on(folder, found, step_clips)
    if world.main:
        tokenizer.write(run.folder / VOCABULARY)
    last = run.last_step(total)
    log = RunLog(run.folder, world, state.step, total, step_clips)
    log.say("\n".join((describe(config, world, bf16, lists, total, model), *notes, *said)))
    streams = {kind: make_stream(config, kind, lists[kind].videos) for kind in alternation.batches}
    loaders = {
        kind: open_loader(
            stream,
            world.device,
            log.say,
            start=alternation.count(kind, state.step) * step_clips,
            batches=(alternation.count(kind, max(last, state.step)) - alternation.count(kind, state.step))
            * optim.accumulate,
            batch_size=optim.batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        for kind, stream in streams.items()
    }
    if questions:
        objective = make_answering(config, wrapped, tokenizer, questions, bf16)
    else:
        objective = make_objective(config, wrapped, tokenizer, lists, streams, bf16)
    max_bad = data.max_bad_fraction * sum(listed.videos.count_distinct() for listed in lists.values())

    def schedule(step: int) -> float:
        return floored_cosine(step, total, warmup, optim.lr, optim.min_lr / optim.lr if optim.lr else 0.0)

    return Job(state, wrapped, alternation, loaders, objective, log, schedule, total, last, max_bad)


def read_lists(config: Stage2Config) -> tuple[dict[str, CaptionList], list[Question]]:
    """What the run visits, by kind in the published order; for questions a row of the list is one question."""
    data = config.data
    if config.job == "pretrain":
        sources = {"image": data.images, "video": data.videos}
        lists = {kind: captions.read_training(s, data.identity, data.read_timeout) for kind, s in sources.items() if s}
        if not lists:
            raise ConfigError("no training data: give --data.images and --data.videos lists with captions")
        for found in lists.values():
            captions.check_files(found.videos, found.starts)
        return lists, []
    if not data.videos or data.images:
        raise ConfigError(f"job = {config.job} takes --data.videos alone; pictures may be among them")
    if config.job == "retrieval":
        found = captions.read_retrieval_training(data.videos, data.join_captions, data.same_caption, data.read_timeout)
        captions.check_files(found.videos, found.starts)
        return {"video": found}, []
    asked = [captions.read_questions(source) for source in data.videos]
    questions = list(itertools.chain.from_iterable(asked))
    unanswered = next((question for question in questions if not question.answers), None)
    if unanswered is not None:
        raise ConfigError(f"question {unanswered.number} of {unanswered.path} has no answer to learn from")
    videos = VideoList.of_rows({"path": question.path, "caption": question.question} for question in questions)
    videos.read_timeout = data.read_timeout
    starts = itertools.accumulate(map(len, asked[:-1]), initial=0)
    captions.check_files(videos, zip(data.videos, starts, strict=True))
    return {"video": CaptionList(videos, np.arange(len(questions)))}, questions


def find_tokenizer(config: Stage2Config, lists: dict[str, CaptionList], world: World) -> Tokenizer:
    """The run's own vocabulary if it has one, else that of the BERT or checkpoint it starts from, else a new one."""
    closing, known = config.data.closing_sep, config.run.folder / VOCABULARY
    before = world.gather(known if known.exists() else None)[0]
    if before is not None:
        return Tokenizer.read(before, closing)
    if config.vocabulary:
        return Tokenizer.read(config.vocabulary, closing)
    if config.init:
        beside = (Path(config.init).expanduser().parent, Path(config.init).expanduser().parent.parent)
        for folder in beside:
            if (folder / VOCABULARY).exists():
                return Tokenizer.read(folder / VOCABULARY, closing)
    if config.bert != "random":
        return Tokenizer.read(weights.bert_folder(config.bert), closing)
    texts = (clean_text(video.caption or "") for found in lists.values() for video in found.videos)
    return Tokenizer(make_vocabulary(texts, config.text.vocab_size), closing)


def fit_text(text: TextConfig, tokenizer: Tokenizer) -> TextConfig:
    """The text encoder for a vocabulary."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id", "mask_id")}
    return dataclasses.replace(text, vocab_size=len(tokenizer.vocabulary), **ids)


def build_model(config: Stage2Config, started: bool) -> tuple[VideoTextModel | VideoQaModel, list[str]]:
    """The model with the weights it starts from, and lines that say which. A resumed run reads none of them."""
    model = VideoQaModel(config.video_text) if config.job == "qa" else VideoTextModel(config.video_text)
    if started:
        return model, []
    notes = []
    if isinstance(model, VideoTextModel) and model.clip_teacher is not None:
        if config.teacher_weights != "random":
            weights.load_clip_teacher(model.clip_teacher, weights.read_weights(config.teacher_weights))
        notes.append(f"teacher: {_or_random(config.teacher_weights)}")
    state = weights.read_weights(config.init) if config.init else {}
    whole = any(key.startswith("vision_encoder.") for key in state)
    if config.bert != "random" and not whole and isinstance(model, VideoTextModel):
        weights.load_bert(model, weights.read_bert(config.bert))
        notes.append(f"text encoder: {config.bert}; its cross-attention starts random")
    elif not whole:
        notes.append(f"text encoder: {_or_random('random')}")
    if whole:
        left = weights.load_video_text(model, state)
        parts = sorted({".".join(key.split(".")[:2]) for key in left})
        notes.append(f"start: {config.init}" + (f", without its {', '.join(parts)}" if left else ""))
    elif state:
        weights.load_stage1(model, state)
        notes.append(f"video encoder: {config.init}")
    elif config.job == "pretrain":
        notes.append(f"video encoder: {_or_random('random')}; give --init a stage-1 checkpoint")
    else:
        raise ConfigError(f"job = {config.job} fine-tunes a stage-2 checkpoint; give it with --init")
    return model, notes


def _or_random(source: str) -> str:
    return "RANDOM weights" if source == "random" else source


def accelerate(
    config: Stage2Config, world: World, model: VideoTextModel | VideoQaModel, bf16: bool, stored: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Give the model the run's attention, recomputation and compilation. Returns as `run.compute.accelerate`."""
    vision, compute, clips = config.student, config.compute, config.optim.batch_size
    visible = masking.count_visible(vision.patches, config.objective.video_mask_ratio)
    teacher = model.clip_teacher
    masked = teacher is not None and config.objective.uta > 0
    seen = vision.frames * visible if masked else vision.tokens
    uses = {"student": Use(clips, seen, seen, vision.heads, vision.width // vision.heads, True)}
    if teacher is not None:
        heads = (config.teacher.heads, config.teacher.width // config.teacher.heads, False)
        frames, keys = clips * vision.frames, vision.patches + 1
        uses |= {"teacher": Use(frames, keys, keys, *heads), "teacher's last block": Use(frames, visible, keys, *heads)}
    dtype = torch.bfloat16 if bf16 else torch.float32
    chosen, said = choose_attention(compute, uses, world, dtype, stored)
    model.set_attention(chosen["student"], chosen["student"])
    if teacher is not None:
        teacher.set_attention(chosen["teacher"], chosen["teacher's last block"])
    if compute.recompute != "none":
        model.set_recompute(compute.recompute, compute.recompute)
        said.append(f"recompute: {compute.recompute}")
    if compute.compile:
        # Texts differ in length from batch to batch, so the text encoder runs as it is.
        model.vision_encoder.compile()
        if teacher is not None:
            teacher.encode = torch.compile(teacher.encode)  # type: ignore[method-assign]
            teacher.targets = torch.compile(teacher.targets)  # type: ignore[method-assign]
        said.append("torch.compile: video encoder and teacher; the first steps take minutes")
    return {name: backend.name for name, backend in chosen.items()}, said


def make_stream(config: Stage2Config, kind: str, videos: VideoList) -> ClipStream:
    data, frames, side = config.data, 1 if kind == "image" else config.student.frames, config.student.image_size
    return ClipStream(
        videos,
        data,
        frames,
        side,
        config.run.seed,
        sampling=IntervalSampling(frames, training=True, last=data.last_frames, max_seconds=data.max_seconds),
        transform=PairTransform(frames, side, training=True, antialias=data.antialias, flip=data.flip),
    )


def make_objective(
    config: Stage2Config,
    model: nn.Module,
    tokenizer: Tokenizer,
    lists: dict[str, CaptionList],
    streams: dict[str, ClipStream],
    bf16: bool,
) -> Callable[[str, Batch], dict[str, Tensor]]:
    """A batch of clips or pictures -> the four losses and, as `loss`, their sum."""
    data, device = config.data, next(model.parameters()).device

    def objective(kind: str, batch: Batch) -> dict[str, Tensor]:
        texts = [video.caption or "" for video in batch.videos]
        if data.replaced_captions == "published" and kind == "video":
            # A broken video's place is taken by another one, but its own caption stays.
            asked = [next(streams[kind].attempts(video.visit))[0] for video in batch.videos]
            videos = lists[kind].videos
            texts = [
                text if row == video.row else videos[row].caption or ""
                for text, row, video in zip(texts, asked, batch.videos, strict=True)
            ]
        ids, mask = tokenizer([clean_text(text) for text in texts], data.max_words)
        idx = torch.from_numpy(lists[kind].idx[batch.rows])
        clip = batch.clip.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = video_text_step(model, clip, ids, mask, idx, objective=config.objective)
        return {"loss": out.total, "uta": out.uta, "vtc": out.vtc, "vtm": out.vtm, "mlm": out.mlm}

    return objective


def make_answering(
    config: Stage2Config, model: nn.Module, tokenizer: Tokenizer, questions: list[Question], bf16: bool
) -> Callable[[str, Batch], dict[str, Tensor]]:
    """A batch of questions about clips -> the likelihood of their answers, weighted by the votes for each."""
    data, device = config.data, next(model.parameters()).device

    def objective(_kind: str, batch: Batch) -> dict[str, Tensor]:
        votes = [count_votes(questions[row].answers) for row in batch.rows]
        texts = [f"{answer} [SEP]" for answers in votes for answer in answers]
        shares = torch.tensor([share for answers in votes for share in answers.values()])
        ids, mask = tokenizer([clean_text(questions[row].question) for row in batch.rows], data.max_words)
        answer_ids, answer_mask = tokenizer(texts, data.max_answer_words)
        counts = torch.tensor([len(answers) for answers in votes])
        clip, ids, mask = (x.to(device, non_blocking=True) for x in (batch.clip, ids, mask))
        answer_ids, answer_mask, shares = (x.to(device) for x in (answer_ids, answer_mask, shares))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return {"loss": answering_loss(model, clip, ids, mask, answer_ids, answer_mask, counts, shares)}

    return objective


def count_votes(answers: tuple[str, ...]) -> dict[str, float]:
    """Share of the votes of each distinct answer."""
    return {answer: answers.count(answer) / len(answers) for answer in dict.fromkeys(answers)}


def describe(
    config: Stage2Config, world: World, bf16: bool, lists: dict[str, CaptionList], total: int, model: nn.Module
) -> str:
    """The lines at the top of a run: what is computed, with what, on what."""
    optim, vision, text = config.optim, config.student, config.text
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    used = ", ".join(f"{name} {value}" for name, value in in_use(world.device, "pyav").items())
    counts = " and ".join(f"{len(found)} {kind}s" for kind, found in lists.items())
    return "\n".join(
        (
            f"umt-fast {umt_fast.__version__}  {used}, precision {'bf16 autocast' if bf16 else 'float32'}",
            f"{config.job}: video {vision.width} x {vision.depth} at {vision.frames} frames, text {text.width} x "
            f"{text.depth} of {text.vocab_size} words, {trained / 1e6:.1f} M trained parameters",
            f"{counts}, {optim.epochs} epochs = {total} steps of {world.size} x {optim.batch_size} x "
            f"{optim.accumulate}, peak lr {optim.lr:.3g}",
        )
    )


def finish(log: RunLog) -> None:
    """Leave the picture of the loss."""
    from umt_fast.run.pictures import draw_loss_curve

    metrics = read_metrics(log.metrics_path)
    draw_loss_curve(metrics, log.folder / "loss.png")
    if len(metrics) > 1:
        log.say(f"loss {metrics[0]['loss']:.4f} -> {metrics[-1]['loss']:.4f}; picture and metrics in {log.folder}")
    log.say(f"waited for data {log.stall:.1%} of the time")


def main(arguments: list[str] | None = None) -> None:
    with launch.one_line_errors():
        config, named = launch.read_settings(Stage2Config, RECIPES, "5m_b16", "train.stage2", __doc__ or "", arguments)
        if named.dry_run:
            raise ConfigError("--dry-run is for train.pretrain; stage 2 has no plan of its costs")
        launch.run(config, train)


if __name__ == "__main__":
    main()

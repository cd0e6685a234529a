"""Test a stage-2 model: retrieval, multiple choice, question answering. `train.evaluate --job` starts it.

    python -m train.evaluate --job retrieval --checkpoint stage2.pth --data.test msrvtt_1k.json=/data --frames 4
    torchrun --nproc-per-node 8 -m train.evaluate --job qa --checkpoint qa.pth --data.test q.json --data.answers a.json

Writes the figures (JSON), the scores or answers, and for retrieval a page of pictures into the run's folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from umt_fast.config import ComputeConfig, ConfigError, DataConfig, RunConfig
from umt_fast.config.base import check_at_least
from umt_fast.data.captions import check_files, read_answers, read_questions, read_retrieval
from umt_fast.data.index import VideoList
from umt_fast.evaluation import video_text_report as report
from umt_fast.evaluation.qa import FirstToken
from umt_fast.evaluation.retrieval import PUBLISHED_K, RECALLS
from umt_fast.evaluation.video_text import EmbedSettings, Loaded, load_model
from umt_fast.files import write_whole
from umt_fast.models import attention
from umt_fast.run import launch
from umt_fast.run.hardware import describe, resolve_precision
from umt_fast.run.log import say
from umt_fast.run.progress import OnProgress, Progress, silent
from umt_fast.run.world import World
from umt_fast.weights import WeightsError, read_model, section_of

KEPT = frozenset(("max_words", "max_answer_words", "join_captions", "max_seconds", "antialias"))
"""Data settings that a test takes from the checkpoint, unless a flag sets them."""
VideoTextTestJob = Literal["retrieval", "multiple_choice", "qa"]


@dataclass(frozen=True)
class TestDataConfig(DataConfig):
    """The list of a test."""

    test: str = ""
    """LIST or LIST=ROOT: captions, or questions for qa (docs/stage2.md)."""
    answers: str = ""
    """Questions: a JSON list of the answers to choose from."""
    max_words: int = 32
    """Longest text or question, in tokens."""
    max_answer_words: int = 5
    """Longest answer, in tokens."""
    join_captions: bool = False
    """All captions of an entry are one text (DiDeMo, ActivityNet)."""
    max_seconds: float | None = None
    """Read only this many seconds from the beginning of a video (DiDeMo: 30)."""
    antialias: bool = False
    """Antialias when frames are made smaller; the published code does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "data", max_words=3, max_answer_words=3, max_seconds=0)

    __test__ = False  # pytest would collect it where it is imported


@dataclass(frozen=True)
class VideoTextTestConfig:
    """A test of one stage-2 checkpoint."""

    job: VideoTextTestJob = "retrieval"
    """The test to run: retrieval, qa or multiple_choice."""
    checkpoint: str = ""
    """A stage-2 or fine-tuned file, ours or a published one."""
    vocabulary: str = ""
    """vocab.txt or BERT folder; empty: the vocab.txt of the run that wrote the checkpoint."""
    frames: int | None = None
    """Frames of a clip; None: as in training. Published: 4 for zero-shot, 12 after fine-tuning."""
    k: int = PUBLISHED_K
    """Candidates that the fusion layers score."""
    first_token: FirstToken = "twice"
    """Questions: the published score counts the likelihood of an answer's first word twice; `once` is correct."""
    batch_size: int = 8
    """Videos at once."""
    data: TestDataConfig = field(default_factory=TestDataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(name="evaluate"))

    def __post_init__(self) -> None:
        if self.k < 1 or self.batch_size < 1:
            raise ConfigError(f"k = {self.k}, batch_size = {self.batch_size}: give 1 or more")


def main(arguments: list[str]) -> None:
    launch.run(read_settings(arguments), evaluate)


def read_settings(arguments: list[str]) -> VideoTextTestConfig:
    """The settings of the flags; their defaults are the data settings of the checkpoint."""
    import tyro

    checkpoint, _ = launch.read_flag(arguments, "--checkpoint", "")
    default = VideoTextTestConfig()
    if checkpoint:
        trained = section_of(read_model(checkpoint)[1], "data")
        try:
            default = VideoTextTestConfig(
                data=TestDataConfig(**{name: trained[name] for name in KEPT & trained.keys()})
            )
        except TypeError as error:
            raise WeightsError(f"{checkpoint}: its data settings cannot be used: {error}") from None
    config = tyro.cli(
        VideoTextTestConfig, args=arguments, default=default, prog="python -m train.evaluate", description=__doc__
    )
    if not config.checkpoint or not config.data.test:
        raise ConfigError("give --checkpoint a stage-2 model and --data.test a list")
    return config


def evaluate(config: VideoTextTestConfig, world: World) -> bool:
    """Run the test, print its figures and write its report."""
    bf16 = resolve_precision(config.compute.precision, world.device)
    loaded = load_model(
        config.checkpoint, config.vocabulary, config.frames, device=world.device, answers=config.job == "qa"
    )
    if config.compute.attention != "auto":
        backend = attention.load(config.compute.attention)
        loaded.model.set_attention(backend, backend)
    vision = loaded.model.config.vision
    if world.main:
        say(describe(world.device, bf16, config.data.decoder))
        say(
            "\n".join(
                (f"{config.job}: {vision.frames} frames of {vision.image_size} px, {config.checkpoint}", *loaded.notes)
            )
        )
    data = config.data
    settings = EmbedSettings(config.batch_size, data.max_words, data.max_seconds, data.antialias, bf16)
    run = {"retrieval": retrieve, "multiple_choice": choose, "qa": ask}[config.job]
    lines, bad = run(config, loaded, settings, world)
    if world.main:
        for name, reason in bad:
            say(f"could not be read: {name}: {reason}")
        say("\n".join((*lines, f"report in {config.run.folder}")))
    return True


def retrieve(
    config: VideoTextTestConfig, loaded: Loaded, settings: EmbedSettings, world: World
) -> tuple[list[str], list[tuple[str, str]]]:
    found = read_retrieval(config.data.test, config.data.join_captions, config.data.read_timeout)
    check_files(found.videos, [(config.data.test, 0)])
    about: dict[str, Any] = {"checkpoint": config.checkpoint, "list": config.data.test, "chance": report.chance(found)}
    about |= {"frames": loaded.model.config.vision.frames, "k": config.k}
    result, bad = report.run_retrieval(
        loaded, found, config.run.folder, settings, config.data, config.k, about, say if world.main else _say_nothing
    )
    lines = [f"{len(found.videos)} videos, {len(found.texts)} texts"]
    if config.k < min(max(RECALLS), len(found.videos), len(found.texts)):
        lines.append(f"note: only {config.k} candidates are re-ranked; R@10 also counts others, in the list's order")
    return [*lines, report.recall_table(result.recalls, result.coarse_recalls, about["chance"])], bad


def choose(
    config: VideoTextTestConfig, loaded: Loaded, settings: EmbedSettings, world: World
) -> tuple[list[str], list[tuple[str, str]]]:
    questions = report.read_choices(config.data.test)
    check_files(VideoList.of_paths(question.path for question in questions), [(config.data.test, 0)])
    chosen, bad = report.choose_options(loaded, questions, settings, config.data, _progress(world))
    right = report.choice_accuracy(chosen, questions)
    write(config, world, {"accuracy": round(right, 2), "chosen": chosen})
    return [f"accuracy {right:.2f}% of {len(questions)} videos"], bad


def ask(
    config: VideoTextTestConfig, loaded: Loaded, settings: EmbedSettings, world: World
) -> tuple[list[str], list[tuple[str, str]]]:
    if not config.data.answers:
        raise ConfigError("give --data.answers a JSON list of answers to choose from")
    questions, answers = read_questions(config.data.test), read_answers(config.data.answers)
    check_files(VideoList.of_paths(question.path for question in questions), [(config.data.test, 0)])
    said, bad = report.answer_questions(
        loaded,
        questions,
        answers,
        settings,
        config.data,
        config.k,
        config.first_token,
        config.data.max_answer_words,
        _progress(world, "questions"),
    )
    known = [question for question in questions if question.answers]
    content: dict[str, Any] = {"answers": said}
    lines = [f"{len(said)} of {len(questions)} questions answered from a list of {len(answers)}"]
    if known:
        content["accuracy"] = round(report.question_accuracy(said, known), 2)
        lines.append(f"accuracy {content['accuracy']:.2f}% of {len(known)} questions with known answers")
    write(config, world, content)
    return lines, bad


def _progress(world: World, unit: str = "videos") -> OnProgress:
    return Progress("test", unit, say) if world.main else silent


def _say_nothing(line: str) -> None:
    """What the other ranks print."""


def write(config: VideoTextTestConfig, world: World, content: dict[str, Any]) -> None:
    if world.main:
        config.run.folder.mkdir(parents=True, exist_ok=True)
        about = {"checkpoint": config.checkpoint, "list": config.data.test}
        text = json.dumps({**content, **about}, indent=2, ensure_ascii=False) + "\n"
        write_whole(config.run.folder / f"{config.job}.json", text.encode("utf-8", "replace"))

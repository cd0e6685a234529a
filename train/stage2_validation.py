"""Validation of a stage-2 run after every epoch, and the best checkpoint of a fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from umt_fast import weights
from umt_fast.config import ConfigError, Stage2Config
from umt_fast.data.captions import RetrievalSet, Source, check_files, read_answers, read_questions, read_retrieval
from umt_fast.data.index import VideoList
from umt_fast.data.tokens import Tokenizer
from umt_fast.evaluation import retrieval
from umt_fast.evaluation import video_text_report as report
from umt_fast.evaluation.qa import PUBLISHED_K
from umt_fast.evaluation.video_text import EmbedSettings, Loaded, embed_set
from umt_fast.models.video_text import VideoQaModel, VideoTextModel
from umt_fast.run.checkpoint import write_tensors
from umt_fast.run.progress import Progress
from umt_fast.run.train_state import TrainState

BEST = "best.pth"
Bad = list[tuple[str, str]]
Test = Callable[[Loaded, Callable[[str], None]], tuple[float, str, dict[str, Any], Bad]]
"""Model, and a function that prints a line -> the score that selects the best checkpoint, a line of the log, all
figures, and the unreadable videos."""


class Validation:
    """Tests the model of a run on `data.validation` after every epoch, without changing the run's random state.

    best.pth keeps the weights of a fine-tuning's best epoch by the mean of the six recalls, or by accuracy, as
    published. Pre-training only reports: its result is the last checkpoint.
    """

    def __init__(
        self, config: Stage2Config, state: TrainState, tokenizer: Tokenizer, epoch_steps: int, total: int, bf16: bool
    ) -> None:
        """Reads the list at once, so that an unusable list ends the run before its first step."""
        self._config, self._state, self._tokenizer = config, state, tokenizer
        self._epoch_steps, self._total = epoch_steps, total
        data = config.data
        self._settings = EmbedSettings(config.optim.batch_size, data.max_words, data.max_seconds, data.antialias, bf16)
        self._test = self._read() if data.validation else None
        state.plan |= {"best": -1.0, "validated": 0}

    def due(self, step: int) -> bool:
        """Whether validation follows a step: the last one of an epoch, or of the run."""
        return self._test is not None and step > 0 and (step % self._epoch_steps == 0 or step == self._total)

    def missed(self) -> bool:
        """Whether a signal came between the last step and its validation."""
        return self.due(self._state.step) and self._state.plan["validated"] != self._state.step

    def run(self, say: Callable[[str], None]) -> None:
        """Test the model as it is; every process calls it."""
        state, test = self._state, self._test
        assert test is not None
        model = state.model
        assert isinstance(model, VideoTextModel | VideoQaModel)
        state.plan["validated"] = state.step
        device = state.world.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), retrieval.evaluating(model):
            score, line, figures, bad = test(Loaded(model, self._tokenizer, ""), say)
        unread = f"; {len(bad)} could not be read, the first one {bad[0][0]}: {bad[0][1]}" if bad else ""
        say(f"validation after step {state.step}: {line}{unread}")
        score = state.world.gather(score)[0]  # all ranks save, or none
        if self._config.job != "pretrain" and score > state.plan["best"]:
            state.plan["best"] = score
            self._save_best(figures)

    def _save_best(self, figures: dict[str, Any]) -> None:
        """Write best.pth. Raises OSError, on every rank, for a disk that is full."""
        state, problem = self._state, None
        if state.world.main:
            content = {"model": weights.video_text_state_dict(state.model), "config": dataclasses.asdict(state.config)}
            facts = {"schedule": state.plan, "step": state.step, "validation": figures}
            try:
                write_tensors(self._config.run.folder / BEST, content | facts)
            except OSError as error:
                problem = error
        problem = state.world.gather(problem)[0]
        if problem is not None:
            raise problem

    def _read(self) -> Test:
        config, data = self._config, self._config.data
        source = Source.parse(data.validation)
        if config.job == "qa":
            if not data.answers:
                raise ConfigError("data.validation of questions needs data.answers: a JSON list to choose from")
            questions, answers = read_questions(data.validation), read_answers(data.answers)
            known = [question for question in questions if question.answers]
            if not known:
                raise ConfigError(f"no question of {source.path} has an answer to compare with")
            check_files(VideoList.of_paths(question.path for question in known), [(data.validation, 0)])

            def ask(loaded: Loaded, say: Callable[[str], None]) -> tuple[float, str, dict[str, Any], Bad]:
                said, bad = report.answer_questions(
                    loaded,
                    known,
                    answers,
                    self._settings,
                    data,
                    PUBLISHED_K,
                    max_answer_words=data.max_answer_words,
                    on_progress=Progress("validation", "questions", say),
                )
                right = report.question_accuracy(said, known)
                return right, f"accuracy {right:.2f}% of {len(known)} questions", {"accuracy": right}, bad

            return ask
        if data.validation_job == "multiple_choice":
            choices = report.read_choices(data.validation)
            check_files(VideoList.of_paths(one.path for one in choices), [(data.validation, 0)])

            def choose(loaded: Loaded, say: Callable[[str], None]) -> tuple[float, str, dict[str, Any], Bad]:
                on_progress = Progress("validation", say=say)
                chosen, bad = report.choose_options(loaded, choices, self._settings, data, on_progress)
                right = report.choice_accuracy(chosen, choices)
                return right, f"accuracy {right:.2f}% of {len(choices)} videos", {"accuracy": right}, bad

            return choose
        found = read_retrieval(data.validation, data.join_captions, data.read_timeout)
        check_files(found.videos, [(data.validation, 0)])

        def retrieve(loaded: Loaded, say: Callable[[str], None]) -> tuple[float, str, dict[str, Any], Bad]:
            recalls, bad = self._retrieve(loaded, found, say)
            text, video = (
                " / ".join(f"{recalls[f'{way}_r{n}']:.1f}" for n in retrieval.RECALLS) for way in ("img", "txt")
            )
            line = f"R@1 / 5 / 10 in percent, text to video {text}, video to text {video} of {len(found.videos)} videos"
            return recalls["r_mean"], line, recalls, bad

        return retrieve

    def _retrieve(
        self, loaded: Loaded, found: RetrievalSet, say: Callable[[str], None]
    ) -> tuple[dict[str, float], Bad]:
        world, model = self._state.world, loaded.model
        assert isinstance(model, VideoTextModel)
        on_progress = Progress("validation, embedding", say=say)
        data = self._config.data
        embedded, bad = embed_set(loaded, found, self._settings, data, world.rank, world.size, on_progress=on_progress)
        bad = [file for part in world.gather(bad) for file in part]
        with torch.no_grad(), torch.autocast(world.device.type, torch.bfloat16, enabled=self._settings.bf16):
            on_progress = Progress("validation, re-ranking", say=say)
            return retrieval.score(model, embedded, found.texts_of_videos, on_progress=on_progress).recalls, bad

"""Data of a stage-2 run: lists, vocabulary, clips, and the order of its batches of pictures and of videos."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from umt_fast import weights
from umt_fast.config import ConfigError, Stage2Config
from umt_fast.data import captions
from umt_fast.data.captions import CaptionList, Question
from umt_fast.data.clips import ClipStream
from umt_fast.data.index import VideoList
from umt_fast.data.pairs import IntervalSampling, PairTransform
from umt_fast.data.sampling import epoch_order
from umt_fast.data.tokens import Tokenizer, clean_text, make_vocabulary
from umt_fast.files import expand_home
from umt_fast.run.world import World

VOCABULARY = "vocab.txt"


class Alternation:
    """The kind of each step's batch, image or video. An epoch shuffles all full batches of both lists."""

    def __init__(self, batches: dict[str, int], seed: int) -> None:
        self.batches = {kind: count for kind, count in batches.items() if count}
        self.per_epoch = sum(self.batches.values())
        self._seed = seed
        self._known: tuple[int, list[str]] = (-1, [])

    def kind(self, step: int) -> str:
        """Kind of batch of step number `step`, from 0."""
        epoch, place = divmod(step, self.per_epoch)
        return self._epoch(epoch)[place]

    def count(self, kind: str, step: int) -> int:
        """Number of batches of a kind among the first `step` steps."""
        epoch, place = divmod(step, self.per_epoch)
        return epoch * self.batches[kind] + self._epoch(epoch)[:place].count(kind)

    def _epoch(self, epoch: int) -> list[str]:
        if self._known[0] != epoch:
            kinds = [kind for kind, count in self.batches.items() for _ in range(count)]
            self._known = (epoch, [kinds[i] for i in epoch_order(self._seed, epoch, len(kinds))])
        return self._known[1]


def read_lists(config: Stage2Config) -> tuple[dict[str, CaptionList], list[Question]]:
    """The run's lists by kind, in the published order; for question answering a row is one question."""
    data = config.data
    if config.job == "pretrain":
        sources = {"image": data.images, "video": data.videos}
        lists = {
            kind: captions.read_training(s, data.identity, data.read_timeout, data.same_caption)
            for kind, s in sources.items()
            if s
        }
        if not lists:
            raise ConfigError("no training data: give --data.images and --data.videos lists with captions")
        for found in lists.values():
            captions.check_files(found.videos, found.starts)
        return lists, []
    if not data.videos or data.images:
        raise ConfigError(f"job = {config.job} takes only --data.videos, which may contain pictures")
    if config.job == "retrieval":
        found = captions.read_retrieval_training(
            data.videos, data.join_captions, data.same_caption, data.read_timeout, data.identity
        )
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
    """The run's vocabulary if it has one, else that of its starting weights, else a new one from the captions."""
    closing, known = config.data.closing_sep, config.run.folder / VOCABULARY
    before = world.gather(known if known.exists() else None)[0]
    if before is not None:
        return Tokenizer.read(before, closing)
    if config.vocabulary:
        return Tokenizer.read(config.vocabulary, closing)
    if config.init:
        beside = (expand_home(config.init).parent, expand_home(config.init).parent.parent)
        for folder in beside:
            if (folder / VOCABULARY).exists():
                return Tokenizer.read(folder / VOCABULARY, closing)
    if config.bert != "random":
        return Tokenizer.read(weights.bert_folder(config.bert), closing)
    texts = (clean_text(video.caption or "") for found in lists.values() for video in found.videos)
    return Tokenizer(make_vocabulary(texts, config.text.vocab_size), closing)


def make_stream(config: Stage2Config, kind: str, videos: VideoList) -> ClipStream:
    """Training clips of a list. Pillow decodes pictures in the workers, with any `data.decoder`."""
    data, frames, side = config.data, 1 if kind == "image" else config.student.frames, config.student.image_size
    return ClipStream(
        videos,
        dataclasses.replace(data, decoder="pyav") if kind == "image" else data,
        frames,
        side,
        config.run.seed,
        sampling=IntervalSampling(frames, training=True, last=data.last_frames, max_seconds=data.max_seconds),
        transform=PairTransform(frames, side, training=True, antialias=data.antialias, flip=data.flip),
    )

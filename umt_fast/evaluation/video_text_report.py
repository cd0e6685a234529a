"""Tests of a stage-2 model on lists, and their reports: figures, scores, answers, pictures."""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from umt_fast.config import DataConfig
from umt_fast.data import open_loader
from umt_fast.data.captions import CaptionError, Question, RetrievalSet, Source, join_root, read_json_list
from umt_fast.data.clips import ClipStream
from umt_fast.data.index import VideoList
from umt_fast.data.pairs import IntervalSampling, PairTransform
from umt_fast.data.tokens import clean_text
from umt_fast.evaluation import retrieval
from umt_fast.evaluation.found import Hit, draw_found
from umt_fast.evaluation.qa import FirstToken, accuracy, rank_answers
from umt_fast.evaluation.retrieval import Retrieval, gather, rank_and_size
from umt_fast.evaluation.video_text import EmbedSettings, Loaded, digest_test, embed_set, keep_tensors
from umt_fast.files import write_whole
from umt_fast.models.video_text import VideoQaModel, VideoTextModel
from umt_fast.run.progress import OnProgress, Progress, silent

if TYPE_CHECKING:
    from jaxtyping import Float

    from umt_fast.data.batch import Batch

SHOWN = 8
"""Number of queries in the picture, evenly spread over the list."""
HITS = 5
SCORES = "scores.safetensors"
MATRICES = ("coarse_v2t", "rerank_v2t", "rerank_t2v")


def run_retrieval(
    loaded: Loaded,
    found: RetrievalSet,
    folder: Path,
    settings: EmbedSettings,
    data: DataConfig,
    k: int = retrieval.PUBLISHED_K,
    about: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Retrieval, list[tuple[str, str]]]:
    """Test retrieval in both directions; writes retrieval.json, scores.safetensors and retrieval.png to `folder`.

    With several processes each embeds a part of the videos; the result is the same, and rank 0 writes it. Embeddings
    and scores are cached in `folder`: a second test of the same model and list computes nothing, a test with another k
    decodes nothing. `say` gets lines on the progress. Returns the scores and the unreadable videos, which count as not
    found.
    """
    model = loaded.model
    assert isinstance(model, VideoTextModel)
    rank, world_size = rank_and_size()
    key = digest_test(loaded, found, settings, data, k, found.texts_of_videos)
    kept = gather(_read_scores(folder / SCORES, key) if rank == 0 else None)[0]
    if kept is not None:
        (coarse, v2t, t2v), bad = kept
        result = retrieval.judge(coarse, v2t, t2v, found.texts_of_videos)
    else:
        on_progress = Progress("embedding", say=say)
        embedded, bad = embed_set(loaded, found, settings, data, rank, world_size, folder, on_progress)
        bad = [file for part in gather(bad) for file in part]
        device = model.temp.device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            on_progress = Progress("re-ranking", say=say)
            result = retrieval.score(model, embedded, found.texts_of_videos, k, on_progress=on_progress)
    if rank == 0:
        _write(folder, found, result, bad, about or {}, key)
    return result, bad


def _read_scores(path: Path, key: str) -> tuple[tuple[Tensor, Tensor, Tensor], list[tuple[str, str]]] | None:
    """MATRICES and unreadable videos of an earlier test with this key; None for another test or a damaged file."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            bad = [(str(name), str(reason)) for name, reason in json.loads(about["bad"])]
            coarse, v2t, t2v = (file.get_tensor(name) for name in MATRICES)
            return (coarse, v2t, t2v), bad
    except Exception:  # a damaged file can raise any error: the scores are computed again
        return None


def _write(
    folder: Path, found: RetrievalSet, result: Retrieval, bad: list[tuple[str, str]], about: dict[str, Any], key: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "videos": len(found.videos),
        "texts": len(found.texts),
        "recalls": result.recalls,
        "coarse_recalls": result.coarse_recalls,
        "unreadable": [{"path": path, "reason": reason} for path, reason in bad],
        **about,
    }
    write_whole(folder / "retrieval.json", (json.dumps(content, indent=2) + "\n").encode("utf-8", "replace"))
    keep_tensors(folder / SCORES, {name: getattr(result, name) for name in MATRICES}, bad, key=key)
    draw_found(pick_queries(found, result), folder / "retrieval.png")


def pick_queries(found: RetrievalSet, result: Retrieval, count: int = SHOWN) -> list[tuple[str, list[Hit]]]:
    """Evenly spread texts, each with the rank of its video, its best videos and whether they are right."""
    texts = len(found.texts)
    chosen = sorted({texts * i // min(count, texts) for i in range(min(count, texts))})
    queries = []
    for text in chosen:
        scores = result.rerank_t2v[text]
        order = scores.argsort(descending=True, stable=True).tolist()
        right = [text in numbers for numbers in found.texts_of_videos]
        place = next(place for place, video in enumerate(order, 1) if right[video])
        hits = [Hit(found.videos[video], _label(found, video, scores), right[video]) for video in order[:HITS]]
        queries.append((f"{found.texts[text]}   (right at place {place} of {len(order)})", hits))
    return queries


def _label(found: RetrievalSet, video: int, scores: Float[Tensor, " v"]) -> str:
    score = float(scores[video])
    shown = "not re-ranked" if score == retrieval.NOT_RANKED else f"{score:.2f}"
    return f"{shown}  {posixpath.basename(found.videos[video].name)}"


def recall_table(recalls: dict[str, float], coarse: dict[str, float], chance: dict[str, float] | None = None) -> str:
    """A text table of the recalls of both scores, and of chance."""
    lines = [f"{'percent':16}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'mean':>8}"]
    for name, values in (("re-ranked", recalls), ("coarse", coarse)):
        for key, way in (("img", "text to video"), ("txt", "video to text")):
            figures = "".join(f"{values[f'{key}_{part}']:8.2f}" for part in ("r1", "r5", "r10", "r_mean"))
            lines.append(f"{way:16}{figures}  {name}")
    for key, way in (("img", "text to video"), ("txt", "video to text")) if chance else ():
        figures = "".join(f"{chance[f'{key}_r{n}']:8.2f}" for n in retrieval.RECALLS) if chance else ""
        lines.append(f"{way:16}{figures}{'':8}  chance")
    return "\n".join(lines)


def chance(found: RetrievalSet) -> dict[str, float]:
    """The recalls in percent of a model that ranks at random."""
    videos, texts = len(found.videos), len(found.texts)
    right: list[list[int]] = [[] for _ in range(texts)]
    for video, numbers in enumerate(found.texts_of_videos):
        for text in numbers:
            right[text].append(video)
    result: dict[str, float] = {}
    for name, counts, total in (
        ("txt", [len(numbers) for numbers in found.texts_of_videos], texts),
        ("img", [len(numbers) for numbers in right], videos),
    ):
        for n in retrieval.RECALLS:
            missed = [_none_of(total, count, n) for count in counts]
            result[f"{name}_r{n}"] = round(100 * (1 - sum(missed) / len(missed)), 2)
    return result


def _none_of(total: int, right: int, drawn: int) -> float:
    """Probability that none of `drawn` items, drawn from `total` without replacement, is one of the `right` ones."""
    share = 1.0
    for i in range(min(drawn, total)):
        share *= max(total - right - i, 0) / (total - i)
    return share


@dataclass(frozen=True)
class Choices:
    """A video with several captions, one of which is right (MSRVTT-MC)."""

    path: str
    captions: tuple[str, ...]
    answer: int


def read_choices(source: str) -> list[Choices]:
    """Read a JSON list of {"video", "caption": options, "answer": index of the right option}. Raises CaptionError."""
    parsed = Source.parse(source)
    found = []
    for place, entry in enumerate(read_json_list(parsed.path)):
        entry = entry if isinstance(entry, dict) else {}
        options, answer = entry.get("caption"), entry.get("answer")
        if not (
            isinstance(options, list)
            and all(isinstance(option, str) for option in options)
            and isinstance(entry.get("video"), str)
            and type(answer) is int
            and 0 <= answer < len(options)
        ):
            raise CaptionError(
                f"{parsed.path}, entry {place}: give a video, a list of captions and the place of the right one, from 0"
            )
        found.append(Choices(join_root(parsed.root, entry["video"]), tuple(options), answer))
    if not found:
        raise CaptionError(f"{parsed.path} lists nothing")
    if len({len(choices.captions) for choices in found}) > 1:
        raise CaptionError(f"{parsed.path}: every entry must have the same number of captions")
    return found


@torch.no_grad()
def choose_options(
    loaded: Loaded,
    questions: Sequence[Choices],
    settings: EmbedSettings,
    data: DataConfig,
    on_progress: OnProgress = silent,
) -> tuple[dict[int, int], list[tuple[str, str]]]:
    """The best option of each video, by its row in the list; and the unreadable videos.

    With several processes each computes a part; all ranks get all choices.
    """
    model = loaded.model
    assert isinstance(model, VideoTextModel)
    device = model.temp.device
    chosen: dict[int, int] = {}
    bad: list[tuple[str, str]] = []
    for batch in _batches(loaded, [question.path for question in questions], settings, data, on_progress):
        bad += batch.bad
        if len(batch.clip):
            texts = [clean_text(caption) for row in batch.rows for caption in questions[row].captions]
            ids, mask = (x.to(device) for x in loaded.tokenizer(texts, settings.max_words))
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                scores = retrieval.multiple_choice(model, batch.clip.to(device, non_blocking=True), ids, mask)
            chosen |= dict(zip(batch.rows, scores.argmax(1).tolist(), strict=True))
    everything = {row: option for part in gather(chosen) for row, option in part.items()}
    return everything, [file for part in gather(bad) for file in part]


def choice_accuracy(chosen: dict[int, int], questions: Sequence[Choices]) -> float:
    """Accuracy in percent; an unreadable video counts as wrong."""
    return 100 * sum(chosen.get(i) == question.answer for i, question in enumerate(questions)) / len(questions)


def _batches(
    loaded: Loaded, paths: Sequence[str], settings: EmbedSettings, data: DataConfig, on_progress: OnProgress
) -> Iterator[Batch]:
    """Clips of this rank's part of a list, in order; unreadable videos are left out."""
    rank, world_size = rank_and_size()
    rows = range(len(paths) * rank // world_size, len(paths) * (rank + 1) // world_size)
    if not rows:
        return
    vision = loaded.model.config.vision
    sampling = IntervalSampling(vision.frames, max_seconds=settings.max_seconds)
    transform = PairTransform(vision.frames, vision.image_size, antialias=settings.antialias)
    videos = VideoList.of_rows({"path": path} for path in paths)
    stream = ClipStream(
        videos, data, vision.frames, vision.image_size, 0, sampling, transform, shuffle=False, replace=False
    )
    batches = -(-len(rows) // settings.batch_size)
    device = loaded.model.vision_encoder.position.device
    options: dict[str, Any] = {"start": rows.start, "batches": batches, "batch_size": settings.batch_size}
    with open_loader(stream, device, end=rows.stop, **options) as loader:
        for done in range(1, batches + 1):
            yield next(loader)
            on_progress(len(paths) * done // batches, len(paths))


@torch.no_grad()
def answer_questions(
    loaded: Loaded,
    questions: Sequence[Question],
    answers: Sequence[str],
    settings: EmbedSettings,
    data: DataConfig,
    k: int = 128,
    first_token: FirstToken = "twice",
    max_answer_words: int = 5,
    on_progress: OnProgress = silent,
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The best answer of a list for each question, by the question's id; and the unreadable videos.

    With several processes each answers a part; all ranks get all answers. Raises CaptionError for a repeated id.
    """
    model = loaded.model
    assert isinstance(model, VideoQaModel)
    numbers = Counter(question.number for question in questions)
    twice = next((number for number, count in numbers.items() if count > 1), None)
    if twice is not None:
        raise CaptionError(f"{numbers[twice]} questions have the id {twice}; an answer is found by its id")
    device = model.vision_encoder.position.device
    listed = loaded.tokenizer([f"{answer} [SEP]" for answer in answers], max_answer_words)
    answer_ids, answer_mask = (x.to(device) for x in listed)
    said: dict[str, str] = {}
    bad: list[tuple[str, str]] = []
    for batch in _batches(loaded, [question.path for question in questions], settings, data, on_progress):
        bad += batch.bad
        if not len(batch.clip):
            continue
        asked = [questions[row] for row in batch.rows]
        texts = [clean_text(question.question) for question in asked]
        ids, mask = (x.to(device) for x in loaded.tokenizer(texts, settings.max_words))
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            clip = batch.clip.to(device, non_blocking=True)
            ranked = rank_answers(model, clip, ids, mask, answer_ids, answer_mask, k, first_token)
        best = ranked.answers[:, 0].tolist()
        said |= {question.number: answers[place] for question, place in zip(asked, best, strict=True)}
    everything = {number: answer for part in gather(said) for number, answer in part.items()}
    return everything, [file for part in gather(bad) for file in part]


def question_accuracy(said: dict[str, str], questions: Sequence[Question]) -> float:
    """Accuracy in percent; of several answers to a question, the most frequent one is right."""
    right = {question.number: max(question.answers, key=question.answers.count) for question in questions}
    return accuracy(said, right)

"""Losses of a stage-2 run on a batch of clips with captions or with questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from umt_fast.config import Stage2Config
from umt_fast.data.captions import CaptionList, Question
from umt_fast.data.clips import ClipStream
from umt_fast.data.tokens import Tokenizer, clean_text
from umt_fast.models.text import cut_padding
from umt_fast.objectives.answering import answering_loss
from umt_fast.objectives.video_text import video_text_step
from umt_fast.run import costs

if TYPE_CHECKING:
    from umt_fast.data.batch import Batch


class Work(NamedTuple):
    """Losses and arithmetic of one batch."""

    losses: dict[str, Tensor]
    """Losses by name; `loss` is the one to minimise."""
    flops: int
    """FLOP of the forward and backward pass."""


LossFunction = Callable[[str, "Batch"], Work]
"""A kind (image or video) and a batch of it -> its losses."""


def make_objective(
    config: Stage2Config,
    model: nn.Module,
    tokenizer: Tokenizer,
    lists: dict[str, CaptionList],
    streams: dict[str, ClipStream],
    bf16: bool,
    say: Callable[[str], None],
) -> LossFunction:
    """Returns (kind, batch with captions) -> the losses of `video_text_step` and, as `loss`, their weighted sum.

    A batch in which all samples match each other has no negatives: it trains without VTM, and `say` reports the first
    such batch.
    """
    data, device, sizes = config.data, next(model.parameters()).device, config.video_text
    reported: list[str] = []

    def objective(kind: str, batch: Batch) -> Work:
        texts = [video.caption or "" for video in batch.videos]
        rows = batch.rows
        if data.replaced_captions == "published" and kind == "video":
            # As published: a broken video is replaced, but its caption stays, and in retrieval its row number too.
            asked = [next(streams[kind].attempts(video.visit))[0] for video in batch.videos]
            videos = lists[kind].videos
            texts = [
                text if row == video.row else videos[row].caption or ""
                for text, row, video in zip(texts, asked, batch.videos, strict=True)
            ]
            rows = asked if config.job == "retrieval" else rows
        ids, mask = tokenizer([clean_text(text) for text in texts], data.max_words)
        idx = torch.from_numpy(lists[kind].idx[rows])
        clip = batch.clip.to(device, non_blocking=True)
        chosen, alone = config.objective, bool((idx == idx[0]).all())
        if alone and chosen.vtm > 0:
            chosen = dataclasses.replace(chosen, vtm=0.0)
            if not reported:
                say(f"note: all {len(idx)} samples of a batch match each other ({batch.paths[0]}); VTM skips it")
                reported.append(batch.paths[0])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = video_text_step(model, clip, ids, mask, idx, objective=chosen)
        losses = {"loss": out.total, **out.parts}
        if chosen is not config.objective:
            # DDP waits for the gradients of all parameters, also of the unused match head
            losses["loss"] = out.total + 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        lengths = mask.sum(1)
        size = (len(clip), clip.shape[1], int(lengths.max()), int(lengths.sum()))
        return Work(losses, costs.video_text_flops(sizes, chosen, *size))

    return objective


def make_answering(
    config: Stage2Config, model: nn.Module, tokenizer: Tokenizer, questions: list[Question], bf16: bool
) -> LossFunction:
    """Returns (kind, batch of questions) -> the negative log likelihood of the answers, weighted by their votes."""
    data, device, sizes = config.data, next(model.parameters()).device, config.video_text

    def objective(_kind: str, batch: Batch) -> Work:
        votes = [count_votes(questions[row].answers) for row in batch.rows]
        texts = [f"{answer} [SEP]" for answers in votes for answer in answers]
        shares = torch.tensor([share for answers in votes for share in answers.values()])
        ids, mask = tokenizer([clean_text(questions[row].question) for row in batch.rows], data.max_words)
        answer_ids, answer_mask = tokenizer(texts, data.max_answer_words)
        counts = torch.tensor([len(answers) for answers in votes])
        ids, mask = cut_padding(ids, mask)
        answer_ids, answer_mask = cut_padding(answer_ids, answer_mask)
        words = (ids.shape[1], answer_ids.shape[1])
        clip, ids, mask = (x.to(device, non_blocking=True) for x in (batch.clip, ids, mask))
        answer_ids, answer_mask, shares = (x.to(device, non_blocking=True) for x in (answer_ids, answer_mask, shares))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = answering_loss(model, clip, ids, mask, answer_ids, answer_mask, counts, shares)
        return Work({"loss": loss}, costs.answering_flops(sizes, len(clip), clip.shape[1], len(texts), *words))

    return objective


def count_votes(answers: tuple[str, ...]) -> dict[str, float]:
    """Share of the votes of each distinct answer."""
    return {answer: answers.count(answer) / len(answers) for answer in dict.fromkeys(answers)}

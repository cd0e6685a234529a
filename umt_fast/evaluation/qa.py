"""Answers to questions about videos, chosen from a list (UMT, arXiv 2303.16058, 4.3; ALBEF, arXiv 2107.07651)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from umt_fast.models.text import Context, Pairing, cut_padding
from umt_fast.models.video_text import VideoQaModel, bare_video_text, sequence_losses

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

PUBLISHED_K = 128
ANSWERS_AT_ONCE = 1024
"""Answers decoded in one call; at five tokens each, their logits over BERT's vocabulary take 0.6 GB."""
FirstToken = Literal["twice", "once"]


@dataclass
class Ranked:
    """The candidates of each question, best first."""

    answers: Int[Tensor, "b k"]
    """Indices into the list of answers."""
    probabilities: Float[Tensor, "b k"]
    """Probabilities among the candidates; they sum to 1."""


@torch.no_grad()
def rank_answers(
    model: torch.nn.Module,
    clip: Shaped[Tensor, "b ..."],
    question_ids: Int[Tensor, "b l"],
    question_mask: Int[Tensor, "b l"],
    answer_ids: Int[Tensor, "n a"],
    answer_mask: Int[Tensor, "n a"],
    k: int = PUBLISHED_K,
    first_token: FirstToken = "twice",
) -> Ranked:
    """Rank a list of n answers for each question, all tokenised as in training (`[CLS] words [SEP]`).

    The k answers with the most likely first word are scored in full; of a list shorter than k all are, where the
    published code fails. `first_token`: the published score counts the likelihood of the first word twice, alone and
    within the answer; "once" is the likelihood of the answer. Raises ValueError or TypeError.
    """
    if first_token not in ("twice", "once"):
        raise ValueError(f"first_token = {first_token!r}; give twice or once")
    if k < 1:
        raise ValueError(f"k = {k}: give the number of answers to score in full, 1 or more")
    model = bare_video_text(model)
    if not isinstance(model, VideoQaModel):
        raise TypeError(f"{type(model).__name__} retrieves; it does not answer questions")
    training = model.training
    model.eval()
    try:
        states = model.encode(clip, question_ids, question_mask)
        seen = question_mask.bool()[:, None, None]
        begin = answer_ids[:1, :1].expand(len(states), -1)
        logits = model.decode(begin, torch.ones_like(begin), Context(states, mask=seen))[:, 0].float()
        words = answer_ids[:, 1]
        k = min(k, len(answer_ids))
        candidates = logits.softmax(dim=1)[:, words].topk(k, dim=1).indices
        likely = logits.log_softmax(dim=1).gather(1, words[candidates])  # finite where the probability underflows
        scores = torch.empty_like(likely)
        for part in torch.arange(len(states)).split(max(ANSWERS_AT_ONCE // k, 1)):
            rows = candidates[part].flatten()
            ids, mask = cut_padding(answer_ids[rows], answer_mask[rows])
            logits = model.decode(ids, mask, Context(states[part], Pairing(((None, k),)), seen[part]))
            scores[part] = -sequence_losses(logits, ids, mask).view(-1, k)
    finally:
        model.train(training)
    if first_token == "twice":
        scores = likely + scores
    probabilities, order = scores.softmax(dim=1).sort(dim=1, descending=True, stable=True)
    return Ranked(candidates.gather(1, order), probabilities)


def accuracy(predicted: Mapping[str, str], right: Mapping[str, str]) -> float:
    """Percentage of questions, by id, whose predicted answer equals the right one; a missing answer is wrong."""
    if not right:
        raise ValueError("there are no questions with a right answer to compare with")
    return 100 * sum(predicted.get(question) == answer for question, answer in right.items()) / len(right)

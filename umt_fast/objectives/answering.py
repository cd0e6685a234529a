"""Question answering on videos: the likelihood of the answers that people gave (UMT, arXiv 2303.16058, 4.3)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_fast.models.text import Context, Pairing
from umt_fast.models.video_text import VideoQaModel, sequence_losses

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


def answering_loss(
    model: torch.nn.Module,
    clip: Shaped[Tensor, "b ..."],
    question_ids: Int[Tensor, "b l"],
    question_mask: Int[Tensor, "b l"],
    answer_ids: Int[Tensor, "n a"],
    answer_mask: Int[Tensor, "n a"],
    answers_per_question: Int[Tensor, " b"],
    weights: Float[Tensor, " n"],
) -> Float[Tensor, ""]:
    """Weighted negative log-likelihood of the answers, summed over words and answers, per question.

    The n answers are grouped by question, `answers_per_question[i]` for question i; an answer's weight is its share of
    the votes. `model` is a VideoQaModel, bare or wrapped. Raises ValueError if the counts do not add up to n.
    """
    if int(answers_per_question.sum()) != len(answer_ids) or len(weights) != len(answer_ids):
        raise ValueError(
            f"answers_per_question sums to {int(answers_per_question.sum())}, and there are {len(answer_ids)} answers "
            f"with {len(weights)} weights; give one of each per answer"
        )
    step = functools.partial(
        _step, clip, question_ids, question_mask, answer_ids, answer_mask, answers_per_question, weights
    )
    return model(step)


def _step(
    clip: Tensor,
    question_ids: Tensor,
    question_mask: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    answers_per_question: Tensor,
    weights: Tensor,
    model: VideoQaModel,
) -> Tensor:
    states = model.encode(clip, question_ids, question_mask)
    question = torch.arange(len(states), device=states.device).repeat_interleave(
        answers_per_question.to(states.device), output_size=len(answer_ids)
    )
    context = Context(states, Pairing(((question, 1),)), question_mask.bool()[:, None, None])
    losses = sequence_losses(model.decode(answer_ids, answer_mask, context), answer_ids, answer_mask)
    return (losses * weights).sum() / len(states)

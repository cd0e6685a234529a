"""Question answering against the recorded numbers of the published code (with its one-argument fix)."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import stage2_cases as stage2
import torch

from umt_fast import VideoQaModel, weights
from umt_fast.evaluation import qa
from umt_fast.models.text import Context
from umt_fast.models.video_text import sequence_losses
from umt_fast.objectives.answering import answering_loss


@pytest.fixture(scope="module")
def recorded():
    case = stage2.read("e_qa")
    model = VideoQaModel(stage2.video_text_config(case.config))
    assert weights.load_video_text(model, case.part("model.")) == []
    return case, model, [case["in.video"].transpose(1, 2), case["in.question_ids"], case["in.question_mask"]]


def test_loss_and_gradients_are_the_published_ones(recorded):
    case, model, question = recorded
    names = ("answer_ids", "answer_mask", "answers_per_question", "weights")
    loss = answering_loss(model, *question, *(case[f"in.{name}"] for name in names))
    assert abs(loss.detach() - case["loss.qa"]) < 1e-5 * case["loss.qa"]
    loss.backward()
    grads = case.part("grad.")
    own = dict(model.named_parameters())
    assert set(own) == set(grads)
    for key, expected in grads.items():
        grad = own[key].grad
        if not key.endswith(".key.bias"):  # their gradient is noise
            found = grad[: len(expected)]
            assert (found - expected).abs().max() < 1e-4 * grad.abs().max(), key


def test_answers_are_the_published_ones(recorded):
    case, model, question = recorded
    answers = case["rank.answer_ids"], case["rank.answer_mask"]
    found = qa.rank_answers(model, *question, *answers, k=case.config["k_test"])
    assert torch.equal(found.answers, case["rank.topk_ids"])
    assert (found.probabilities - case["rank.topk_probs"]).abs().max() < 1e-5
    chosen = [case.config["answer_list"][int(row[0])] for row in found.answers]
    assert chosen == case.config["chosen"]


def test_answers_are_decoded_in_parts(recorded, monkeypatch):
    case, model, question = recorded
    answers = case["rank.answer_ids"], case["rank.answer_mask"]
    whole = qa.rank_answers(model, *question, *answers, k=4)
    monkeypatch.setattr(qa, "ANSWERS_AT_ONCE", 8)  # two questions, then one
    parts = qa.rank_answers(model, *question, *answers, k=4)
    assert torch.equal(parts.answers, whole.answers)
    assert (parts.probabilities - whole.probabilities).abs().max() < 1e-6


def test_the_first_word_counts_once_where_asked(recorded):
    """Also, a list shorter than k is scored whole."""
    case, model, question = recorded
    ids, mask = case["rank.answer_ids"], case["rank.answer_mask"]
    found = qa.rank_answers(model, *question, ids, mask, first_token="once")
    assert found.answers.shape == (3, 12)
    with torch.no_grad():
        states = model.encode(*question)
        for row in range(3):
            context = Context(
                states[row : row + 1].expand(12, -1, -1), mask=question[2][row].bool().expand(12, 1, 1, -1)
            )
            likelihood = (-sequence_losses(model.decode(ids, mask, context), ids, mask)).softmax(0)
            assert torch.equal(found.answers[row], likelihood.argsort(descending=True))
            assert (found.probabilities[row] - likelihood.sort(descending=True).values).abs().max() < 1e-5
    with pytest.raises(ValueError, match="first_token = 'thrice'; give twice or once"):
        qa.rank_answers(model, *question, ids, mask, first_token="thrice")


def test_answers_whose_first_words_underflow_are_ranked(recorded):
    case, model, question = recorded
    answers = case["rank.answer_ids"], case["rank.answer_mask"]
    unlikely = copy.deepcopy(model)
    with torch.no_grad():
        unlikely.text_decoder.cls.predictions.bias[answers[0][:, 1]] -= 200
    found = qa.rank_answers(unlikely, *question, *answers)
    assert found.probabilities.isfinite().all()
    assert torch.allclose(found.probabilities.sum(1), torch.ones(len(found.probabilities)))


def test_accuracy_counts_missing_answers_as_wrong():
    assert qa.accuracy({"1": "cat", "2": "dog", "9": "cow"}, {"1": "cat", "2": "Dog", "3": "ox", "4": "ox"}) == 25
    with pytest.raises(ValueError, match="no questions"):
        qa.accuracy({}, {})


def test_numbers_that_do_not_fit_are_refused(recorded):
    case, model, question = recorded
    answers = case["in.answer_ids"], case["in.answer_mask"]
    with pytest.raises(ValueError, match="sums to 5, and there are 6 answers"):
        answering_loss(model, *question, *answers, torch.tensor([2, 2, 1]), case["in.weights"])
    config = replace(stage2.SMALL, teacher=None)
    with pytest.raises(ValueError, match=r"vision.width = 16 and text.width = 12"):
        VideoQaModel(config)

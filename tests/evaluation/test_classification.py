from __future__ import annotations

import pytest
import torch

from umt_fast.evaluation.classification import confusion, merge_views, ranked, score


def test_merges_as_published(recorded):
    case = recorded("d_merge")
    t, order = case.tensors, case.tensors["sampler_row"]
    views = case.config["test_num_segment"] * case.config["test_num_crop"]
    merged = merge_views(t["logits"][order], t["row_video"][order], views)
    assert torch.equal(merged, t["merged_probs"])
    assert torch.equal(ranked(merged, 1)[:, 0], t["merged_pred"])
    scores = score(merged, t["labels"])
    assert (scores.top1, scores.top5) == (case.config["final_top1"], case.config["final_top5"])
    other = score(merge_views(t["logits"], t["row_video"], views, merge="logits"), t["labels"])
    assert other.top1 == case.config["top1_if_logits_were_averaged"]


def test_numbered_views_merge_alike_in_any_order_and_count_once(recorded):
    t = recorded("d_merge").tensors
    numbers = t["row_chunk"] * 3 + t["row_split"]
    merged = merge_views(t["logits"], t["row_video"], numbers)
    assert torch.allclose(merged, t["merged_probs"], rtol=0, atol=1e-15)
    order = torch.cat((torch.randperm(len(numbers)), torch.arange(7)))
    assert torch.equal(merge_views(t["logits"][order], t["row_video"][order], numbers[order]), merged)


@pytest.mark.parametrize(
    ("rows", "views", "says"),
    [([0, 0, 1], 2, "video 1 has 1 views, not 2"), ([0, 0], 1, "rows"), ([0, 0, 1], torch.tensor([0, 1]), "views")],
)
def test_refuses_views_that_do_not_add_up(rows, views, says):
    with pytest.raises(ValueError, match=says):
        merge_views(torch.randn(3, 4), torch.tensor(rows), views)


def test_scores_of_known_predictions():
    probabilities = torch.eye(6, dtype=torch.float64)[[0, 1, 2, 2]] * 0.9 + 0.1 / 6
    labels = torch.tensor([0, 1, 1, 5])
    scores = score(probabilities, labels)
    assert scores.top1 == 50
    assert scores.top5 == 75  # of equal probabilities the lower class is first, so 5 is the sixth
    assert scores.mean_class == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    right, wrong = 0.9 + 0.1 / 6, 0.1 / 6
    assert scores.loss == pytest.approx(-torch.tensor([right, right, wrong, wrong]).double().log().mean().item())
    assert confusion(labels, ranked(probabilities, 1)[:, 0], 6)[1].tolist() == [0, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="for 6 classes"):
        score(probabilities, labels + 1)

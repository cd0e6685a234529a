"""Counts, distributions and errors of visible sets."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from umt_fast import masking
from umt_fast.config import Masking, PixelMasking

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def indicators(drawn: Tensor, patches: int) -> Tensor:
    """Drawn ids [R, n] -> float64 [R, P], 1 where drawn."""
    return torch.zeros(len(drawn), patches, dtype=torch.float64).scatter_(1, drawn, 1)


def p_value(included: Tensor, expected: Tensor, covariance: Tensor) -> float:
    """Hotelling's test of mean inclusions without the last one, which the others determine."""
    difference = (included.mean(0) - expected)[:-1]
    statistic = difference @ torch.linalg.solve(covariance[:-1, :-1], difference)
    chi2 = pytest.importorskip("scipy.stats").chi2
    return float(chi2.sf(float(statistic), len(difference)))


@pytest.mark.parametrize(
    ("tokens", "ratio", "count"), [(196, 0.8, 40), (1568, 0.8, 314), (16, 0.75, 4), (10, 0.0, 10), (16, 0.8, 4)]
)
def test_count_visible(tokens, ratio, count):
    assert masking.count_visible(tokens, ratio) == count


@pytest.mark.parametrize("num_visible", [3, 8])
def test_draw_by_score_follows_multinomial(num_visible):
    batch, frames, patches = 8000, 2, 12
    scores = torch.rand(frames, patches, generator=generator(9)) ** 2 + 0.01
    ours = masking.draw_by_score(scores.expand(batch, -1, -1), num_visible, generator(1))
    assert ours.shape == (batch, frames, num_visible)
    assert ours.dtype == torch.int64
    assert (ours[..., 1:] > ours[..., :-1]).all()
    for frame in range(frames):
        rows = scores[frame].expand(batch, -1).contiguous()
        theirs = indicators(torch.multinomial(rows, num_visible, generator=generator(2)), patches)
        included = indicators(ours[:, frame], patches)
        covariance = (torch.cov(included.T) + torch.cov(theirs.T)) / batch
        assert p_value(included, theirs.mean(0), covariance) > 1e-3


def test_draw_by_score_takes_each_frames_own_scores():
    scores = torch.zeros(2, 3, 16)
    wanted = torch.rand(2, 3, 16, generator=generator()).topk(4).indices.sort().values
    scores.scatter_(2, wanted, 1.0)
    assert torch.equal(masking.draw_by_score(scores, 4), wanted)


def test_attention_waits_for_the_teacher():
    assert masking.draw_blind("attention", 2, 8, 196, 0.8, CPU) is None


def test_random_is_over_the_whole_clip():
    visible = masking.draw_blind("random", 64, 8, 196, 0.8, CPU, generator())
    assert visible.shape == (64, 1, 1568 - int(1568 * 0.8))
    assert (visible[..., 1:] > visible[..., :-1]).all()
    assert visible.min() >= 0
    assert visible.max() < 1568
    per_frame = torch.stack([(visible // 196 == t).sum(-1) for t in range(8)])
    assert per_frame.unique().numel() > 5  # frames get different counts
    assert len(torch.unique(visible, dim=0)) == 64


def test_tube_is_the_same_in_all_frames():
    visible = masking.draw_blind("tube", 64, 8, 196, 0.8, CPU, generator())
    assert visible.shape == (64, 8, 40)
    assert (visible == visible[:, :1]).all()
    assert (visible[..., 1:] > visible[..., :-1]).all()
    assert visible.max() < 196
    assert len(torch.unique(visible[:, 0], dim=0)) == 64


@pytest.mark.parametrize("rule", ["random", "tube"])
def test_blind_draws_are_uniform(rule):
    batch, frames, patches = 8000, 2, 8
    visible = masking.draw_blind(rule, batch, frames, patches, 0.75, CPU, generator(3))
    tokens = frames * patches if rule == "random" else patches
    share = visible.shape[2] / tokens
    included = indicators(visible[:, 0], tokens)
    # inclusion of n of N drawn uniformly: variance s (1 - s), covariance -s (1 - s) / (N - 1)
    covariance = share * (1 - share) * (tokens * torch.eye(tokens, dtype=torch.float64) - 1) / (tokens - 1) / batch
    assert p_value(included, torch.full((tokens,), share, dtype=torch.float64), covariance) > 1e-3


@pytest.mark.parametrize("rule", ["random", "tube"])
def test_the_generator_decides_a_blind_draw(rule):
    def draw(seed: int) -> Tensor:
        return masking.draw_blind(rule, 4, 2, 16, 0.5, CPU, generator(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids(dtype):
    visible = torch.tensor([[[0, 3], [1, 2]], [[2, 3], [0, 1]]], dtype=dtype)
    assert masking.token_ids(visible, 8).tolist() == [[0, 3, 5, 6], [2, 3, 4, 5]]
    whole = torch.tensor([[[0, 5, 7]]], dtype=dtype)
    assert masking.token_ids(whole, 8).tolist() == [[0, 5, 7]]


@pytest.mark.parametrize(
    "visible",
    [torch.tensor([[[0, 15], [3, 4]]]), torch.tensor([[[0, 31]]]), torch.tensor([[[0], [1]]], dtype=torch.int32)],
)
def test_good_visible_sets_pass(visible):
    masking.check_visible(visible, 1, 2, 16)


@pytest.mark.parametrize(
    ("visible", "error", "words"),
    [
        (torch.tensor([[[0, 1], [2, 16]]]), ValueError, ["visible[0, 1, 1] = 16", "a frame has 16 patches"]),
        (torch.tensor([[[0, -1], [2, 3]]]), ValueError, ["visible[0, 0, 1] = -1", "16 patches"]),
        (torch.tensor([[[0, 1, 32]]]), ValueError, ["visible[0, 0, 2] = 32", "a clip has 32 tokens"]),
        (torch.tensor([[0, 1]]), ValueError, ["[1, 2]", "[1, 2, n]", "[1, 1, n]"]),
        (torch.zeros(2, 2, 3, dtype=torch.int64), ValueError, ["[2, 2, 3]", "[1, 2, n]"]),
        (torch.zeros(1, 3, 3, dtype=torch.int64), ValueError, ["[1, 3, 3]", "[1, 2, n]"]),
        (torch.zeros(1, 2, 16, dtype=torch.bool), TypeError, ["torch.bool", "not a mask"]),
        (torch.zeros(1, 2, 3), TypeError, ["torch.float32", "int64"]),
    ],
)
def test_bad_visible_sets_are_named(visible, error, words):
    with pytest.raises(error) as caught:
        masking.check_visible(visible, 1, 2, 16)
    for word in words:
        assert word in str(caught.value)


def test_mae_st_rounds_down():
    assert masking.count_seen("random", 8, 196, 0.9) == 157
    assert masking.count_seen("mae_st", 8, 196, 0.9) == 156
    assert masking.draw_blind("mae_st", 2, 8, 196, 0.9, CPU, generator()).shape == (2, 1, 156)


def test_frame_hides_whole_frames():
    visible = masking.draw_blind("frame", 256, 8, 196, 0.75, CPU, generator())
    assert visible.shape == (256, 1, 392)
    frames = visible[:, 0] // 196
    assert all(len(row.unique()) == 2 for row in frames)
    shares = torch.stack([(frames == t).any(1).float().mean() for t in range(8)])
    assert (shares - 0.25).abs().max() < 0.1
    trimmed = masking.draw_blind("frame", 4, 8, 196, 0.9, CPU, generator())
    assert trimmed.shape == (4, 1, 157)
    assert all(len(row.unique()) == 1 for row in trimmed[:, 0] // 196)
    assert len(trimmed[:, 0].remainder(196).unique(dim=0)) == 4


def test_the_names_of_the_settings_are_those_of_the_table():
    stage1, pixels = set(get_args(Masking)), set(get_args(PixelMasking))
    assert stage1 | pixels == set(masking.RULES)
    assert stage1 == {name for name, rule in masking.RULES.items() if rule.needs in ("nothing", "teacher")}
    assert pixels == {name for name, rule in masking.RULES.items() if rule.needs != "teacher"}


@pytest.mark.parametrize("rule", [name for name, rule in masking.RULES.items() if rule.choose is None])
def test_a_rule_of_the_models_step_does_not_draw_from_scores(rule):
    with pytest.raises(ValueError, match="the step of its model chooses"):
        masking.draw_scored(rule, torch.ones(1, 2, 4), 0.5)


@pytest.mark.parametrize("rule", [name for name, rule in masking.RULES.items() if rule.choose is not None])
def test_every_rule_draws_what_it_counts(rule):
    scores = torch.rand(3, 4, 16, generator=generator()).round() + 0.5
    visible = masking.draw_scored(rule, scores, 0.7, generator())
    masking.check_visible(visible, 3, 4, 16)
    assert visible.shape[1] * visible.shape[2] == masking.count_seen(rule, 4, 16, 0.7)
    assert (visible[..., 1:] > visible[..., :-1]).all()

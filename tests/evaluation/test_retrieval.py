"""Retrieval against the published evaluation, and against pairs scored one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import stage2_cases as stage2
import stage2_reference as reference
import torch

from umt_fast import VideoTextModel, weights
from umt_fast.evaluation import retrieval
from umt_fast.models.text import Context


def texts_of_videos(video_of_text: list[int]) -> list[list[int]]:
    count = max(video_of_text) + 1
    return [[text for text, video in enumerate(video_of_text) if video == number] for number in range(count)]


def test_recalls_of_the_published_scores_are_the_published_recalls():
    case = stage2.read("d_retrieval")
    right = texts_of_videos(case["in.txt2vid"].tolist())
    for kind, name in (("rerank", "test/"), ("coarse", "test_emb/")):
        found = retrieval.recalls(case[f"out.{kind}_v2t"], case[f"out.{kind}_t2v"], right)
        assert found == case.config["recalls"][name]


def test_coarse_scores_of_the_published_projections():
    case = stage2.read("d_retrieval")
    video = torch.nn.functional.normalize(case["out.vision_proj"], dim=-1).mean(1)
    text = torch.nn.functional.normalize(case["out.text_proj"], dim=-1)
    assert (video @ text.T - case["out.coarse_v2t"]).abs().max() < 1e-6


@stage2.whole
def test_matrices_are_the_published_ones():
    case = stage2.read("d_retrieval", full=True)
    model = VideoTextModel(stage2.video_text_config(case.config))
    assert weights.load_video_text(model, case.part("model.")) == []
    texts = case["in.input_ids"], case["in.attention_mask"]
    right = texts_of_videos(case["in.txt2vid"].tolist())
    found = retrieval.evaluate(model, case["in.videos"].transpose(1, 2), *texts, right, case.config["k_test"])
    for name in ("coarse_v2t", "coarse_t2v", "rerank_v2t", "rerank_t2v"):
        assert (getattr(found, name) - case[f"out.{name}"]).abs().max() < 2e-6, name
    assert found.recalls == case.config["recalls"]["test/"]
    assert found.coarse_recalls == case.config["recalls"]["test_emb/"]


@stage2.whole
def test_multiple_choice_is_the_published_one():
    case = stage2.read("g_multiple_choice", full=True)
    model = VideoTextModel(stage2.video_text_config(case.config))
    weights.load_video_text(model, case.part("model."))
    found = retrieval.multiple_choice(
        model, case["in.videos"].transpose(1, 2), case["in.input_ids"], case["in.attention_mask"]
    )
    assert (found - case["out.scores"]).abs().max() < 2e-6
    assert torch.equal(found.argmax(1), case["out.predicted"])


@pytest.fixture
def model() -> VideoTextModel:
    model = VideoTextModel(replace(stage2.SMALL, teacher=None))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.temp.data.fill_(0.2)
    return model


CLIPS = torch.randint(0, 256, (5, 2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RIGHT = [[0, 1], [2], [3], [4, 5, 6], [7]]


@pytest.mark.parametrize("k", [1, 3, 128])
def test_ranked_pairs_are_scored_as_each_by_itself(model, k):
    ids, mask = stage2.some_texts(8)
    found = retrieval.evaluate(model, CLIPS, ids, mask, RIGHT, k)
    assert model.training  # as before
    assert torch.equal(found.coarse_v2t, found.coarse_t2v.T)
    alone = torch.zeros(5, 8)
    with torch.no_grad():
        for video in range(5):
            for text in range(8):
                hidden, words = model.embed_text(ids[text : text + 1], mask[text : text + 1])
                tokens, pooled = model.embed_video(CLIPS[video : video + 1])
                alone[video, text] = model.match(hidden, mask[text : text + 1], Context(tokens))[0, 1]
                assert abs(pooled[0] @ words[0] - found.coarse_v2t[video, text]) < 1e-6
    for scores, coarse, pairs in (
        (found.rerank_v2t, found.coarse_v2t, alone),
        (found.rerank_t2v, found.coarse_t2v, alone.T),
    ):
        chosen = torch.zeros(scores.shape, dtype=torch.bool)
        chosen.scatter_(1, coarse.topk(min(k, coarse.shape[1]), 1).indices, True)
        assert (scores[~chosen] == retrieval.NOT_RANKED).all()
        assert (scores[chosen] - pairs[chosen]).abs().max() < 1e-5


def test_batches_of_clips_and_padding_change_nothing(model):
    ids, mask = stage2.some_texts(8)
    whole = retrieval.evaluate(model, CLIPS, ids, mask, RIGHT)
    padded = [torch.nn.functional.pad(x, (0, 4)) for x in (ids, mask)]
    parts = retrieval.evaluate(model, iter(CLIPS.split([2, 3])), *padded, RIGHT)
    assert (whole.rerank_v2t - parts.rerank_v2t).abs().max() < 1e-5
    assert whole.recalls == parts.recalls


def test_recalls_take_the_best_right_answer_and_equal_scores_in_order():
    v2t = torch.tensor([[0.1, 0.9, 0.8], [0.5, 0.5, 0.5]])
    assert retrieval.best_ranks(v2t, torch.tensor([[True, False, True], [False, True, False]])).tolist() == [1, 1]
    found = retrieval.recalls(v2t, v2t.T, [[0, 2], [1, 2]])
    assert found["txt_r1"] == 0
    assert found["txt_r5"] == 100
    assert found["img_r1"] == pytest.approx(100 / 3, abs=0.01)  # text 2 finds video 0; 0 and 1 find the wrong one


def test_an_unreadable_video_is_not_found_and_hides_no_other(model):
    """For both scores and both directions, also in a list shorter than ten; it does not change other rows."""
    ids, mask = stage2.some_texts(8)
    with torch.no_grad(), retrieval.evaluating(model):
        embedded = retrieval.embed(model, CLIPS, ids, mask)
        embedded.tokens[1], embedded.video[1] = 0, 0
        found = retrieval.score(model, embedded, RIGHT)
    for scores in (found.coarse_v2t[1], found.coarse_t2v[:, 1], found.rerank_v2t[1], found.rerank_t2v[:, 1]):
        assert (scores == retrieval.NOT_RANKED).all()
    for recalls in (found.recalls, found.coarse_recalls):
        assert recalls["txt_r10"] == 80  # four of five videos find a text, seven of eight texts their video
        assert recalls["img_r10"] == 87.5
    kept = [0, 2, 3, 4]
    plain = retrieval.evaluate(model, CLIPS, ids, mask, RIGHT)
    assert (found.rerank_v2t[kept] - plain.rerank_v2t[kept]).abs().max() < 1e-6


def test_a_frame_is_a_video(model):
    ids, mask = stage2.some_texts(8)
    assert retrieval.evaluate(model, CLIPS[:, :1], ids, mask, RIGHT).coarse_v2t.shape == (5, 8)


class Wrapper(torch.nn.Module):
    """Wraps a model like DDP."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrapped_models_and_odd_arguments(model):
    """Text numbers as tensors, k above the number of videos, uneven counts, and one text of two videos."""
    ids, mask = stage2.some_texts(8)
    plain = retrieval.evaluate(model, CLIPS, ids, mask, RIGHT, k=1000)
    wrapped = Wrapper(model).train()
    found = retrieval.evaluate(wrapped, CLIPS, ids, mask, [torch.tensor(numbers) for numbers in RIGHT], k=1000)
    assert wrapped.training
    assert model.training
    assert torch.equal(found.rerank_t2v, plain.rerank_t2v)
    assert found.recalls == plain.recalls
    assert (found.rerank_v2t > retrieval.NOT_RANKED).all()
    shared = retrieval.evaluate(model, CLIPS, ids, mask, [[0, 1], [2, 0], [3], [4, 5, 6], [7]])
    assert torch.equal(shared.coarse_v2t, plain.coarse_v2t)
    best = shared.coarse_t2v[0].argsort(descending=True)[0]
    assert (retrieval.best_ranks(shared.coarse_t2v[:1], torch.tensor([[True, True, False, False, False]])) == 0) == (
        best < 2
    )
    choices = retrieval.multiple_choice(Wrapper(model), CLIPS[:4], ids, mask)
    assert torch.equal(choices, retrieval.multiple_choice(model, CLIPS[:4], ids, mask))
    with pytest.raises(ValueError, match="k = 0: give the number of candidates"):
        retrieval.evaluate(model, CLIPS, ids, mask, RIGHT, k=0)
    with pytest.raises(TypeError, match="Linear is not a VideoTextModel"):
        retrieval.evaluate(torch.nn.Linear(1, 1), CLIPS, ids, mask, RIGHT)


@pytest.mark.parametrize("frames", [1, 2])
def test_scores_are_those_of_a_plain_writing_in_float64(model, frames):
    ids, mask = stage2.some_texts(8)
    clips = torch.randn(5, 3, frames, 32, 32)
    found = retrieval.evaluate(model, clips, ids, mask, RIGHT)
    state = {key: value.double() for key, value in model.state_dict().items()}
    seen = [reference.vision(state, model.config, clip.transpose(0, 1).double(), None) for clip in clips]
    texts = [reference.text(state, model.config, *one) for one in zip(ids, mask, strict=True)]
    coarse = reference.similarity(state, [pooled for _, pooled, _ in seen], texts, 1.0)
    assert (found.coarse_v2t - coarse).abs().max() < 2e-6
    for video, (tokens, _, _) in enumerate(seen):
        for text in range(8):
            fused = reference.fuse(state, model.config, texts[text], mask[text], tokens)
            match = reference.linear(fused[0], state, "itm_head")[1]
            assert abs(found.rerank_v2t[video, text] - match) < 2e-6


@pytest.mark.parametrize(
    ("right", "says"),
    [
        ([[0, 1], [2], [3], [4, 5, 6, 7]], "has 4 rows, but there are 5 videos"),
        ([[0, 1], [], [2, 3], [4, 5, 6], [7]], r"texts_of_videos\[1\] is empty"),
        ([[0, 1], [2], [3], [4, 5, 6], [8]], "has text 8, but there are 8 texts"),
        ([[0, 1], [2], [3], [4, 5, 6], [6]], "text 7 belongs to no video"),
    ],
)
def test_answers_that_do_not_fit_are_named(model, right, says):
    with pytest.raises(ValueError, match=says):
        retrieval.evaluate(model, CLIPS, *stage2.some_texts(8), right)

"""Stage 2 against the recorded numbers of the published code, and its own properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import stage2_cases as stage2
import stage2_reference as reference
import torch
import torch.nn.functional as F

from umt_fast import VideoTextModel, video_text_step, weights
from umt_fast.config import OptimConfig, VideoTextObjective
from umt_fast.models.text import ONE_TO_ONE, Context, padding_mask
from umt_fast.objectives.contrast import contrastive_loss, unit_mean
from umt_fast.objectives.video_text import (
    IGNORED,
    Draws,
    apply_words,
    draw_negatives,
    mask_words,
    negative_weights,
)
from umt_fast.run.optim import build_optimizer, floored_cosine

LOSSES = ("uta", "vtc", "vtm", "mlm")


def model_of(case: stage2.Case) -> VideoTextModel:
    model = VideoTextModel(stage2.video_text_config(case.config))
    assert weights.load_video_text(model, case.part("model.")) == []
    return model


def recorded_words(case: stage2.Case, prefix: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    t, config = case.part(f"{prefix}draw.mlm_"), stage2.video_text_config(case.config).text
    drawn = [t[name].bool() for name in ("select", "replace", "random")]
    return apply_words(case[f"{prefix}in.input_ids"], *drawn, t["words"], config)


def step_of(model: VideoTextModel, case: stage2.Case, prefix: str = ""):
    draws = case.draws(prefix)
    draws.mlm_input_ids, draws.mlm_labels = recorded_words(case, prefix)
    inputs = [case[f"{prefix}in.{name}"] for name in ("input_ids", "attention_mask", "idx")]
    return video_text_step(model, case[f"{prefix}in.video"].transpose(1, 2), *inputs, draws)


@stage2.whole
@pytest.mark.parametrize("name", ["a_pretrain_video", "b_pretrain_image"])
def test_a_step_has_the_published_losses_and_gradients(name):
    case = stage2.read(name, full=True)
    model = model_of(case)
    out = step_of(model, case)
    for loss in (*LOSSES, "total"):
        assert abs(getattr(out, loss).detach() - case[f"loss.{loss}"]) < 1e-5 * max(1, case[f"loss.{loss}"]), loss
    out.total.backward()
    grads = case.part("grad.")
    own = dict(model.named_parameters())
    assert set(grads) == {key for key, value in own.items() if value.requires_grad}
    for key, expected in grads.items():
        if not key.endswith(".key.bias"):  # their gradient is noise
            assert (own[key].grad - expected).abs().max() < 1e-4 * expected.abs().max(), key


@pytest.mark.usefixtures("one_thread")
def test_five_steps_of_video_and_image_follow_the_published_trajectory():
    case = stage2.read("c_trajectory")
    model = model_of(case)
    settings = case.config["optimizer"]
    optim = OptimConfig(lr=settings["lr"], betas=tuple(settings["opt_betas"]), weight_decay=settings["weight_decay"])
    optimizer = build_optimizer(model, optim, decay_scalars=True)
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    own = dict(model.named_parameters())
    for group in case.config["groups"]:
        names = {key for key in group["params"] if not key.startswith("clip_teacher.")}
        assert {id(own[key]) for key in names} == groups[group["weight_decay"]]
    schedule = case.config["scheduler"]
    for step, rate in enumerate(case.config["lr_per_step"]):
        total, warmup = schedule["num_training_steps"], schedule["num_warmup_steps"]
        found = floored_cosine(step, total, warmup, settings["lr"], schedule["min_lr_multi"])
        assert found == pytest.approx(rate, rel=1e-9)
        for group in optimizer.param_groups:
            group["lr"] = found
        out = step_of(model, case, f"step{step}.")
        for loss in LOSSES:
            assert abs(getattr(out, loss).detach() - case[f"step{step}.loss.{loss}"]) < 2e-5, (step, loss)
        out.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, expected in case.part("final.").items():
        limit = 3e-3 if key.endswith(".key.bias") else 2e-6
        found = own[key].detach()
        assert ((found[: len(expected)] if found.dim() else found) - expected).abs().max() < limit, key
    for moment in ("exp_avg", "exp_avg_sq"):
        for key, expected in case.part(f"adam.{moment}.").items():
            found = optimizer.state[own[key]][moment]
            found = found[: len(expected)] if found.dim() else found
            assert (found - expected).abs().max() < max(1e-4 * float(expected.abs().max()), 1e-6), (moment, key)


@pytest.mark.parametrize("name", ["a_pretrain_video", "b_pretrain_image"])
def test_each_loss_has_the_published_value_from_what_goes_into_it(name):
    case = stage2.read(name)
    temperature = case["model.temp"].clamp(0.001, 0.5)
    assert temperature == case["out.temp_after_clamp"]
    video, text = unit_mean(case["out.vision_proj"]), unit_mean(case["out.text_proj"][:, None])
    vtc = contrastive_loss(video, text, temperature, case["in.idx"])
    assert abs(vtc - case["loss.vtc"]) < 1e-6
    similarity = video @ text.T / temperature
    assert (similarity - case["out.sim_v2t"]).abs().max() < 2e-5
    for matrix, recorded in ((similarity, "v2t"), (similarity.T, "t2v")):
        expected = case[f"out.vtm_weights_{recorded}"]
        found = negative_weights(matrix, case["in.idx"])
        assert (found - expected / expected.sum(1, keepdim=True)).abs().max() < 2e-6
    ids, labels = recorded_words(case)
    assert torch.equal(ids, case["out.mlm_input_ids"])
    assert torch.equal(labels, case["out.mlm_labels"])
    mlm = F.cross_entropy(case["out.mlm_logits"].flatten(0, 1), labels.flatten())
    assert abs(mlm - case["loss.mlm"]) < 1e-5


VARIED = {
    "as recorded": ({}, {}, {}),
    "texts meet the video at once": ({"fusion_layer": 0}, {}, {}),
    "one fusion layer": ({"depth": 4, "fusion_layer": 3}, {}, {}),
    "an image": ({}, {}, {"frames": 1}),
    "aligned blocks apart": ({}, {"depth": 5, "align_interval": 2}, {"teacher": {"depth": 4, "align_interval": 1.5}}),
    "one aligned block": ({}, {"align_layers": 1}, {"teacher": {"align_layers": 1}}),
    "a hot temperature": ({}, {}, {"temperature": 0.8}),
    "a cold temperature": ({}, {}, {"temperature": 1e-4}),
    "all match but one": ({}, {}, {"idx": [7, 7, 7, 7, 2]}),
    "pairs that match": ({}, {}, {"idx": [4, 9, 4, 9, 1]}),
    "a batch of two": ({}, {}, {"idx": [1, 0]}),
    "words of one token": ({}, {}, {"length": 1}),
    "no padding": ({}, {}, {"full": True}),
    "a resized teacher": ({}, {}, {"teacher": {"image_size": 28, "patch_size": 14, "input_size": 32}}),
    "fine-tuning": ({}, {"frames": 3}, {"teacher": None}),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", VARIED)
def test_other_sizes_equal_a_plain_writing_in_float64(name):
    text, vision, other = VARIED[name]
    other = dict(other)
    teacher = other.pop("teacher", {})
    config = replace(
        stage2.SMALL,
        text=replace(stage2.SMALL.text, **text),
        vision=replace(stage2.SMALL.vision, **vision),
        teacher=None if teacher is None else replace(stage2.SMALL.teacher, **teacher),
    )
    torch.manual_seed(5)
    model = VideoTextModel(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.temp.data.fill_(other.get("temperature", 0.3))
    model.load_state_dict(model.state_dict())  # the teacher folds its resize into a kernel when it is loaded
    idx = torch.tensor(other.get("idx", [0, 1, 2, 3, 4]))
    batch, frames = len(idx), other.get("frames", config.vision.frames)
    ids, mask = (x[:, : other.get("length")] for x in stage2.some_texts(batch, 7))
    if other.get("full"):
        mask[:] = 1
        ids[ids == 0] = 6
    clip = torch.randn(batch, 3, frames, 32, 32)
    out = video_text_step(model, clip, F.pad(ids, (0, 2)), F.pad(mask, (0, 2)), idx)
    out.total.backward()
    state = {key: value.double() for key, value in model.state_dict().items()}
    state["temp"] = torch.tensor(other.get("temperature", 0.3), dtype=torch.float64)
    trained = {key for key, value in model.named_parameters() if value.grad is not None}
    state = {key: value.requires_grad_(key in trained) for key, value in state.items()}
    draws, length = out.draws, ids.shape[1]
    words = () if draws.mlm_labels is None else (draws.mlm_input_ids[:, :length], draws.mlm_labels[:, :length])
    drawn = (draws.visible, draws.negative_videos, draws.negative_texts, *words)
    expected = reference.step(state, config, clip.transpose(1, 2).double(), ids, mask, idx, *drawn)
    for loss in (*LOSSES, "total"):
        assert abs(getattr(out, loss).detach() - expected[loss]) < 1e-5 * max(1, expected[loss]), loss
    expected["total"].backward()
    for key, parameter in model.named_parameters():
        if key in trained and not key.endswith(".key.bias"):  # their gradient is 0
            wanted = torch.zeros(()) if state[key].grad is None else state[key].grad
            assert (parameter.grad - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-9, key
    if draws.visible is not None:
        for video, shown in zip(clip.transpose(1, 2).double(), draws.visible, strict=True):
            attention = reference.teacher(state, config, video)[1].detach()
            found = model.clip_teacher.encode(video.float().transpose(0, 1)[None]).scores[0]
            assert (found - attention).abs().max() < 1e-6
            assert (shown[:, 1:] > shown[:, :-1]).all()


@pytest.fixture
def model() -> VideoTextModel:
    model = VideoTextModel(stage2.SMALL)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(rows: int = 4, frames: int = 2):
    clip = torch.randint(0, 256, (rows, frames, 32, 32, 3), dtype=torch.uint8)
    return clip, *stage2.some_texts(rows), torch.arange(rows)


@pytest.mark.parametrize("frames", [1, 2])
def test_a_step_equals_the_step_written_out_pair_by_pair(model, frames):
    """Shared passes, cut padding and shared keys do not change the result."""
    clip, ids, mask, idx = batch(frames=frames)
    ids, mask = F.pad(ids, (0, 3)), F.pad(mask, (0, 3))
    out = video_text_step(model, clip, ids, mask, idx)
    draws = out.draws
    assert draws.visible.shape == (4, frames, 2 if frames == 1 else 1)
    assert draws.mlm_labels.shape == draws.mlm_input_ids.shape
    again = video_text_step(model, clip, ids, mask, idx, draws)
    for loss in (*LOSSES, "total"):
        assert torch.equal(getattr(again, loss), getattr(out, loss))
    token_ids = (draws.visible + 4 * torch.arange(frames)[:, None]).flatten(1)
    seen = model.vision_encoder(clip, token_ids, aligned=True)
    words = F.pad(draws.mlm_input_ids, (0, ids.shape[1] - draws.mlm_input_ids.shape[1]))
    losses, logits = [], []
    for video, text, right in [
        *((i, i, 1) for i in range(4)),
        *((int(draws.negative_videos[i]), i, 0) for i in range(4)),
        *((i, int(draws.negative_texts[i]), 0) for i in range(4)),
    ]:
        logits.append(fused(model, seen, video, ids[text], mask[text])[:, 0])
        losses.append(F.cross_entropy(model.itm_head(logits[-1]), torch.tensor([right])))
    assert torch.allclose(torch.stack(losses).mean(), out.vtm, atol=1e-6)
    hidden = torch.cat([fused(model, seen, i, words[i], mask[i]) for i in range(4)])[:, : draws.mlm_labels.shape[1]]
    mlm = F.cross_entropy(
        model.text_encoder.logits(hidden).flatten(0, 1), draws.mlm_labels.flatten(), ignore_index=IGNORED
    )
    assert torch.allclose(mlm, out.mlm, atol=1e-6)


def fused(model, seen, video, ids, mask):
    mask = padding_mask(mask[None])
    hidden = model.bert.text(ids[None], mask)
    return model.bert.fuse(hidden, mask, Context(seen.tokens[video : video + 1], ONE_TO_ONE))


def test_fine_tuning_pools_frame_by_frame_and_has_no_alignment_nor_words():
    model = VideoTextModel(replace(stage2.SMALL, teacher=None))
    assert not len(model.vision_encoder.clip_decoder)
    out = video_text_step(model, *batch())
    assert out.uta == out.mlm == 0
    assert out.draws.visible is None
    assert model.vision_encoder(batch()[0]).pooled.shape == (4, 2, 16)
    out.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_draws_are_as_long_as_the_texts_and_used_as_given(model):
    """Draws include padding that is cut off, as published."""
    clip, ids, mask, idx = batch()
    ids, mask = (F.pad(x[:, :5], (0, 6)) for x in (ids, mask))
    torch.manual_seed(1)
    out = video_text_step(model, clip, ids, mask, idx)
    assert out.draws.mlm_input_ids.shape == out.draws.mlm_labels.shape == ids.shape
    torch.manual_seed(1)
    drawn = [torch.full(ids.shape, p).bernoulli().bool() for p in (0.5, 0.8, 0.5)]
    words = torch.randint(30, ids.shape)
    assert torch.equal(out.draws.mlm_input_ids, apply_words(ids, *drawn, words, stage2.SMALL.text)[0])
    as_int32 = replace(out.draws, mlm_labels=out.draws.mlm_labels.int(), visible=out.draws.visible.flip(-1))
    again = video_text_step(model, clip, ids.int(), mask.bool(), idx.int(), as_int32)
    assert torch.equal(again.total, out.total)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"negative_videos": torch.tensor([1, 0, 3])}, r"draws.negative_videos has shape \[3\]; give \[4\]"),
        ({"negative_texts": torch.tensor([1, 0, 3, 4])}, "draws.negative_texts has 4, but the batch has 4 samples"),
        ({"mlm_labels": None}, "only one of mlm_input_ids and mlm_labels"),
        ({"mlm_labels": torch.zeros(4, 3).long()}, r"draws.mlm_labels is \[4, 3\]; give \[4, 8\], as input_ids"),
        ({"visible": torch.zeros(4, 3, 1).long()}, "visible"),
    ],
)
def test_draws_that_do_not_fit_are_named(model, change, says):
    inputs = batch()
    draws = video_text_step(model, *inputs).draws
    with pytest.raises(ValueError, match=says):
        video_text_step(model, *inputs, replace(draws, **change))


def test_a_weight_of_0_leaves_its_loss_out(model):
    inputs = batch()
    for loss in LOSSES:
        out = video_text_step(model, *inputs, objective=VideoTextObjective(**{loss: 0.0}))
        assert getattr(out, loss) == 0
        others = [getattr(out, name) for name in LOSSES if name != loss]
        assert min(others) > 0
        assert torch.allclose(sum(others), out.total)


def test_the_temperature_is_clamped_before_the_step(model):
    with torch.no_grad():
        model.temp.fill_(0.6)
    video_text_step(model, *batch())
    assert model.temp == 0.5


def test_negatives_follow_the_softmax_and_are_never_matches():
    similarity = torch.tensor([[0.0, 1.0, 2.0], [9.0, 0.0, 0.0], [500.0, -500.0, 1000.0]])
    idx = torch.tensor([0, 1, 2])
    drawn = torch.stack([draw_negatives(similarity, idx) for _ in range(4000)])
    shares = torch.stack([(drawn == column).float().mean(0) for column in range(3)], dim=1)
    expected = torch.tensor([[0, 0.2689, 0.7311], [0.9999, 0, 0.0001], [1, 0, 0]])
    assert (shares - expected).abs().max() < 0.03  # the last row's softmax underflows: the published code stops there
    assert (draw_negatives(similarity[:2, :2], torch.tensor([5, 6])) == torch.tensor([1, 0])).all()


def test_uniform_negatives_do_not_follow_the_contrast(model):
    """At the lowest temperature some hard negatives are nearly always the same; uniform ones are equally likely."""
    clip, ids, mask, idx = batch(6)
    with torch.no_grad():
        model.temp.fill_(0.001)
    most = {}
    for negatives in ("hard", "uniform"):
        objective = VideoTextObjective(uta=0, vtc=0, mlm=0, negatives=negatives)
        draws = [video_text_step(model, clip, ids, mask, idx, objective=objective).draws for _ in range(100)]
        drawn = torch.stack([torch.cat((one.negative_videos, one.negative_texts)) for one in draws])
        assert (drawn != idx.repeat(2)).all()
        most[negatives] = torch.stack([(drawn == place).float().mean(0) for place in range(6)]).amax(0)
    assert most["hard"].max() > 0.8
    assert most["uniform"].max() < 0.5


def test_words_are_hidden_by_the_published_shares():
    config = stage2.SMALL.text
    ids, _ = stage2.some_texts(4000)
    hidden, labels = mask_words(ids, config, 0.5)
    chosen = labels != IGNORED
    maskable = (ids != config.pad_id) & (ids != config.cls_id)
    assert not (chosen & ~maskable).any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert abs(chosen[maskable].float().mean() - 0.5) < 0.02
    kept, masked = hidden[chosen] == ids[chosen], hidden[chosen] == config.mask_id
    assert abs(masked.float().mean() - 0.8 - 0.1 / 30) < 0.02
    assert abs(kept.float().mean() - 0.1 - 0.1 / 30) < 0.02


def test_a_text_in_which_no_word_is_hidden_gives_no_loss(model):
    clip, ids, mask, idx = batch()
    out = video_text_step(model, clip, ids, mask, idx, Draws(None, None, None, ids, torch.full_like(ids, IGNORED)))
    assert out.mlm == 0
    out.total.backward()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: (b[0][:1], b[1][:1], b[2][:1], b[3][:1]), "a batch of one sample has no negatives"),
        (lambda b: (b[0], b[1], b[2], torch.full((4,), 7)), "all 4 samples of the batch have idx = 7"),
        (lambda b: (b[0], b[1][:3], b[2][:3], b[3]), r"give both as \[4, L\]"),
        (lambda b: (b[0], b[1], b[2], b[3][:2]), r"idx has shape \[2\]; give \[4\]"),
        (lambda b: (b[0][:, :, :16], *b[1:]), "clip is"),
        (lambda b: (b[0], b[1] + 30, *b[2:]), "but the text encoder knows 30 words, from 0 on"),
        (lambda b: (b[0], F.pad(b[1], (0, 9), value=1), F.pad(b[2], (0, 9), value=1), b[3]), "has 12 positions"),
    ],
)
def test_errors_name_the_value_and_the_place(model, change, says):
    with pytest.raises(ValueError, match=says):
        video_text_step(model, *change(batch()))


def test_two_rows_of_one_number_are_positives_and_no_negatives(model):
    clip, ids, mask, _ = batch()
    idx = torch.tensor([3, 3, 3, 5])
    for _ in range(20):
        draws = video_text_step(model, clip, ids, mask, idx).draws
        assert (draws.negative_videos[:3] == 3).all()
        assert (draws.negative_texts[:3] == 3).all()
        assert draws.negative_texts[3] != 3


def test_special_tokens_outside_of_the_vocabulary_are_refused(model):
    config = replace(stage2.SMALL.text, mask_id=103)
    with pytest.raises(ValueError, match="a special token has id 103, but vocab_size = 30"):
        mask_words(torch.zeros(2, 3, dtype=torch.long), config, 0.5)


def test_dropout_and_recomputation(model):
    """Dropout is active in training; recomputing activations changes neither losses nor gradients."""
    model = VideoTextModel(replace(stage2.SMALL, text=replace(stage2.SMALL.text, dropout=0.3)))
    inputs = batch()
    draws = video_text_step(model, *inputs).draws
    results = []
    for recompute in ("none", "full", "selective"):
        model.set_recompute(recompute, recompute)
        torch.manual_seed(1)
        out = video_text_step(model, *inputs, draws)
        out.total.backward()
        results.append((out.total.detach(), model.bert.embeddings.word_embeddings.weight.grad.clone()))
        model.zero_grad()
    for total, grad in results[1:]:
        assert torch.equal(total, results[0][0])
        assert torch.allclose(grad, results[0][1], atol=1e-7)
    assert video_text_step(model, *inputs, draws).total != results[0][0]
    model.eval()
    assert torch.equal(*(video_text_step(model, *inputs, draws).total for _ in range(2)))

"""The stage-2 models: positions, pooling, loading and saving under the published names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import stage2_cases as stage2
import torch
import torch.nn.functional as F

from umt_fast import (
    ClipTeacher,
    StudentConfig,
    TeacherConfig,
    TextConfig,
    VideoQaModel,
    VideoTextConfig,
    VideoTextModel,
)
from umt_fast.config import ConfigError
from umt_fast.models.attention import MATMUL, attention, load
from umt_fast.models.positions import sinusoid_positions, video_positions
from umt_fast.models.text import Bert, BertWithHead, Context, Pairing, padding_mask
from umt_fast.weights import WeightsError, load_bert, load_stage1, load_video_text, read_bert, video_text_state_dict

NOISE = 4e-6
"""Float32 rounding error here; a wrong epsilon gives an error of at least 1.2e-5."""


def stage1_to_stage2(frames: int, position_frames: int | None = None) -> VideoTextModel:
    case = stage2.read("f_stage1_to_stage2")
    sizes, teacher = case.config["stage2"], case.config["teacher"]
    layers, width = sizes["clip_return_layer"], sizes["clip_output_dim"]
    vision = StudentConfig(
        image_size=sizes["img_size"],
        patch_size=sizes["patch"],
        frames=frames,
        width=sizes["width"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        align_layers=layers,
        target_width=width,
    )
    clip = TeacherConfig(
        image_size=32, patch_size=8, width=32, depth=teacher["layers"], heads=2, target_width=width, align_layers=layers
    )
    model = VideoTextModel(VideoTextConfig(vision, clip, stage2.SMALL.text, 8, position_frames=position_frames))
    assert load_stage1(model, {"model": case.part("stage1.")}) == []
    for name, expected in case.part("stage2.").items():
        assert torch.equal(model.vision_encoder.state_dict()[name], expected), name
    return model.eval()


def ids_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask == 0).nonzero()[:, 1].view(len(mask), -1)


@torch.no_grad()
def test_stage_1_weights_give_the_published_stage_2_outputs():
    case = stage2.read("f_stage1_to_stage2")
    model, video = stage1_to_stage2(4).vision_encoder, case["in.video"]
    masks = {"masked": (video, case["in.mask"]), "image_masked": (video[:, :, :1], case["in.mask"][:, :16])}
    for name, (clip, mask) in masks.items():
        seen = model(clip, ids_of(mask), aligned=True)
        assert (seen.tokens - case[f"out.{name}.tokens"]).abs().max() < NOISE
        assert (seen.pooled - case[f"out.{name}.pooled"]).abs().max() < NOISE
        assert (seen.predictions.normed(1e-5) - case[f"out.{name}.student"]).abs().max() < NOISE
    for name, clip, pooled in (("video", video, "video.pooled_frames"), ("image", video[:, :, :1], "image.pooled")):
        seen = model(clip)
        assert (seen.tokens - case[f"out.{name}.tokens"]).abs().max() < NOISE
        assert (seen.pooled - case[f"out.{pooled}"]).abs().max() < NOISE
    model = stage1_to_stage2(12, position_frames=4).vision_encoder
    seen = model(case["in.video12"])
    assert (seen.tokens - case["out.video12_ckpt4.tokens"]).abs().max() < NOISE
    assert (seen.pooled - case["out.video12_ckpt4.pooled_frames"]).abs().max() < NOISE
    seen = stage1_to_stage2(8).vision_encoder(case["in.video8"], ids_of(case["in.mask8"]), aligned=True)
    assert (seen.predictions.normed(1e-5) - case["out.stage2_frames8.student"]).abs().max() < NOISE
    unit = F.normalize(seen.predictions.normed(1e-6), dim=-1)
    assert (unit - case["out.stage1.student_l2"]).abs().max() < NOISE


def test_position_tables_are_the_published_ones():
    case = stage2.read("f_stage1_to_stage2")
    tables = {key: value[0] for key, value in case.tensors.items() if key.startswith("tables.")}
    assert len(tables) >= 16
    for key, expected in tables.items():
        name, table = key.split(".")[1:]
        frames, made_for = (int(part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in name.split("_"))
        if "img" in table:
            frames, made_for = 1, -1
        found = video_positions(frames, 16, 48, None if made_for < 0 else made_for)
        assert torch.equal(found, expected), key
    assert torch.equal(video_positions(4, 9, 16), sinusoid_positions(36, 16))


def test_published_checkpoints_load_and_save_with_unchanged_keys():
    for name, kind in (("c_trajectory", VideoTextModel), ("e_qa", VideoQaModel)):
        case = stage2.read(name)
        state = case.part("model.")
        model = kind(stage2.video_text_config(case.config))
        for form in (state, {"model": state}, {"module": {f"module.{key}": x for key, x in state.items()}}):
            assert load_video_text(model, form) == []
        saved = video_text_state_dict(model)
        assert set(saved) == set(state)
        assert all(torch.equal(saved[key], state[key]) for key in state)
        assert [key for key in saved if not key.endswith(("position_ids", "decoder.weight", "decoder.bias"))] == list(
            model.state_dict()
        )


@pytest.mark.parametrize("job", ["retrieval", "qa"])
def test_stage_2_checkpoints_start_fine_tuning_as_published(job):
    recorded = json.loads((stage2.GOLDEN / "k_checkpoint_mapping.json").read_text())
    sizes, mapping = recorded["sizes"], recorded[job]["target_from_source"]
    kind = VideoTextModel if job == "retrieval" else VideoQaModel
    special = {"pad": 0, "cls": 2, "sep": 3, "mask": 4}
    model = kind(stage2.video_text_config({**sizes, "special_ids": special}))
    wanted = video_text_state_dict(model)
    assert set(wanted) - set(mapping) <= {key for key in wanted if key.endswith("position_ids")}
    shapes = {source: wanted[target].shape for target, source in mapping.items()}
    source = {key: torch.full(shapes.get(key, (1,)), float(i)) for i, key in enumerate(recorded[job]["source_keys"])}
    source["text_encoder.cls.predictions.decoder.bias"] = source["text_encoder.cls.predictions.bias"]
    words = source["text_encoder.bert.embeddings.word_embeddings.weight"]
    source["text_encoder.cls.predictions.decoder.weight"] = words
    assert sorted(load_video_text(model, source)) == sorted(recorded[job]["unexpected"])
    loaded = video_text_state_dict(model)
    for target, name in mapping.items():
        assert torch.equal(loaded[target], source[name]), target


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {}, "missing temp"),
        (lambda s: {"state_of_nothing": torch.ones(1)}, "missing temp"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("text_encoder.cls")}, "missing text_encoder.cls"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("clip_teacher.ln_post")}, "clip_teacher.ln_post"),
        (lambda s: {**s, "text_proj.weight": torch.ones(3, 3)}, r"text_proj.weight is \[3, 3\], this video-text model"),
        (lambda s: {**s, "momentum_queue": torch.ones(3)}, "unexpected momentum_queue"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(change, says):
    model = VideoTextModel(stage2.SMALL)
    with pytest.raises(WeightsError, match=says):
        load_video_text(model, change(video_text_state_dict(model)))


def test_stage_1_weights_that_do_not_fit_are_an_error():
    model = VideoTextModel(stage2.SMALL)
    state = {f"{key}": value for key, value in model.vision_encoder.state_dict().items() if "pool_norm" not in key}
    load_stage1(model, state)
    with pytest.raises(WeightsError, match="missing encoder"):
        load_stage1(model, {})
    fine = VideoTextModel(replace(stage2.SMALL, teacher=None))
    assert load_stage1(fine, state) == [key for key in state if key.startswith("clip_decoder.")]


def test_a_hugging_face_bert_gives_the_outputs_of_its_library(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=60, max_position_embeddings=16, **sizes)
    ).eval()
    theirs.cls.predictions.bias.data.normal_()
    theirs.save_pretrained(tmp_path)
    text = TextConfig(24, 3, 2, 2, 60, 16, 48, cls_id=2, sep_id=3, mask_id=4)
    model = VideoTextModel(replace(stage2.SMALL, text=text))
    load_bert(model, read_bert(tmp_path))
    ids, mask = stage2.some_texts(5, words=60)
    hidden = model.bert.text(ids, padding_mask(mask))
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert (hidden - expected.hidden_states[2])[mask.bool()].abs().max() < 1e-5
    assert (model.text_encoder.logits(expected.hidden_states[3]) - expected.logits).abs().max() < 1e-5
    with pytest.raises(WeightsError, match="do not fit the text encoder"):
        load_bert(VideoTextModel(stage2.SMALL), read_bert(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds neither"):
        read_bert(tmp_path)


@pytest.mark.parametrize("backend", ["matmul", "math", "efficient"])
def test_masked_attention_of_every_backend(backend):
    q, k, v = torch.randn(3, 2, 5, 3, 8).unbind()
    mask = torch.rand(2, 1, 1, 5) < 0.7
    mask[..., 0] = True
    scores = torch.einsum("blhd,bshd->bhls", q, k) / 8**0.5 + torch.where(mask, 0.0, -10000.0)
    expected = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)
    assert (attention(q, k, v, load(backend), mask) - expected).abs().max() < 1e-5
    dropped = torch.stack([attention(q, k, v, load(backend), mask, dropout=0.5) for _ in range(2000)])
    assert (dropped[0] - expected).abs().max() > 1e-3
    assert (dropped.mean(0) - expected).abs().max() < 0.2  # the rest is scaled to make up


def test_a_pairing_equals_pairs_one_by_one():
    bert = Bert(stage2.SMALL.text, 16)
    bert.set_attention(MATMUL)
    states, hidden = torch.randn(3, 6, 16), torch.randn(8, 5, 12)
    seen = torch.rand(3, 1, 1, 6) < 0.7
    seen[..., 0] = True
    pairing = Pairing(((None, 2), (torch.tensor([2, 0]), 1)))
    found = bert.fuse(hidden, None, Context(states, pairing, seen))
    for row, video in enumerate([0, 0, 1, 1, 2, 2, 2, 0]):
        one = slice(video, video + 1)
        alone = bert.fuse(hidden[row : row + 1], None, Context(states[one], mask=seen[one]))
        assert (found[row] - alone[0]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="8 texts do not fit a pairing of 3 rows"):
        bert.fuse(hidden, None, Context(states))


@pytest.mark.parametrize(("interval", "expected"), [(1, (2, 3)), (2, (1, 3)), (1.5, (2, 3)), (3, (0, 3))])
def test_aligned_blocks_are_counted_back_from_the_last(interval, expected):
    student = StudentConfig(32, 16, 1, 2, 16, 4, 2, align_layers=2, target_width=8, align_interval=interval)
    teacher = TeacherConfig(32, 16, 1, 32, 16, 4, 2, 8, 2, align_interval=interval)
    assert student.aligned_blocks == teacher.aligned_blocks == expected
    clip, ids = torch.randint(0, 256, (2, 2, 32, 32, 3), dtype=torch.uint8), torch.tensor([[0, 3, 5], [1, 2, 7]])
    model = VideoTextModel(VideoTextConfig(student, teacher, stage2.SMALL.text, 8))
    encoder = model.vision_encoder
    hidden = encoder.encoder.hidden_states(clip, encoder.position, ids, layers=expected)
    heads = zip(encoder.clip_decoder, hidden, strict=True)
    expected_hidden = torch.stack([head.head(encoder.encoder.norm(x) + encoder.position[ids]) for head, x in heads])
    assert (encoder(clip, ids, aligned=True).predictions.hidden - expected_hidden).abs().max() < 1e-5
    clip_teacher = ClipTeacher(teacher)
    state = clip_teacher.encode(clip)
    assert len(state.aligned) == 1
    with pytest.raises(ConfigError, match="align_interval = 5 does not give 2 different blocks of 4"):
        StudentConfig(depth=4, align_layers=2, align_interval=5)


def test_sizes_of_the_published_models():
    with torch.device("meta"):
        base, large = BertWithHead(TextConfig(), 768), Bert(TextConfig(1024, 24, 16, 19, mlp_width=4096), 1024)
    count = sum(p.numel() for p in base.bert.embeddings.parameters())
    assert count == (30522 + 512 + 2 + 2) * 768
    layer = 12 * 768**2 + 13 * 768
    cross = 4 * 768**2 + 6 * 768
    assert sum(p.numel() for p in base.bert.encoder.parameters()) == 12 * layer + 3 * cross
    assert len([1 for x in large.encoder.layer if hasattr(x, "crossattention")]) == 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TextConfig(fusion_layer=12), "fusion_layer = 12 is not in 0..depth - 1 = 11"),
        (lambda: TextConfig(width=10, heads=3), "width = 10 is not a positive multiple of heads = 3"),
        (lambda: TextConfig(dropout=1.0), r"dropout = 1.0: must be in \[0, 1\)"),
        (lambda: VideoTextConfig(temperature=0.0), "joint.temperature = 0.0: must be above 0"),
        (lambda: VideoTextConfig(teacher=replace(stage2.SMALL.teacher)), "differ in the clip's side"),
        (lambda: VideoTextConfig(StudentConfig(tubelet_size=2), None), "an image has one frame; use 1"),
    ],
)
def test_impossible_settings_are_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()

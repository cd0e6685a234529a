"""The video ViT and the student on it: sizes and names, chosen layers, stochastic depth, accepted inputs."""

from __future__ import annotations

import re

import pytest
import torch

from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step
from umt_fast.config import STUDENTS, VitConfig
from umt_fast.models.positions import sinusoid_positions
from umt_fast.models.vit import Block, VideoTransformer

SMALL = StudentConfig(image_size=32, frames=4, width=32, depth=3, heads=2, align_layers=2, target_width=16)


def small_student(config: StudentConfig = SMALL) -> VideoStudent:
    student = VideoStudent(config)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student


def on_meta(name: str) -> VideoStudent:
    with torch.device("meta"):
        return VideoStudent(STUDENTS[name])


@pytest.mark.parametrize(("name", "encoder", "heads"), [("umt_b16", 85.8e6, 2.37e6), ("umt_l16", 303.3e6, 4.73e6)])
def test_parameter_counts(name, encoder, heads):
    student = on_meta(name)
    config = student.config
    counts = {part: sum(p.numel() for p in getattr(student, part).parameters()) for part in ("encoder", "clip_decoder")}
    assert counts["encoder"] == pytest.approx(encoder, rel=2e-3)
    assert counts["clip_decoder"] == pytest.approx(heads, rel=2e-3)
    d, c = config.width, config.target_width
    block = 12 * d * d + 4 * d + 2 * d + d + 4 * d + d  # weights; norms; q, v; proj; fc1; fc2
    assert counts["encoder"] == 3 * 16 * 16 * d + d + config.depth * block + 2 * d
    assert counts["clip_decoder"] == config.align_layers * (d * c + 3 * c)


def test_key_names_and_shapes_of_umt_b16():
    state = on_meta("umt_b16").state_dict()
    block = {
        "norm1.weight": [768],
        "norm1.bias": [768],
        "attn.q_bias": [768],
        "attn.v_bias": [768],
        "attn.qkv.weight": [2304, 768],
        "attn.proj.weight": [768, 768],
        "attn.proj.bias": [768],
        "norm2.weight": [768],
        "norm2.bias": [768],
        "mlp.fc1.weight": [3072, 768],
        "mlp.fc1.bias": [3072],
        "mlp.fc2.weight": [768, 3072],
        "mlp.fc2.bias": [768],
    }
    expected = {"encoder.patch_embed.proj.weight": [768, 3, 1, 16, 16], "encoder.patch_embed.proj.bias": [768]}
    expected |= {f"encoder.blocks.{i}.{key}": shape for i in range(12) for key, shape in block.items()}
    expected |= {"encoder.norm.weight": [768], "encoder.norm.bias": [768]}
    for j in range(6):
        expected |= {f"clip_decoder.{j}.head.weight": [512, 768], f"clip_decoder.{j}.head.bias": [512]}
        expected |= {f"clip_decoder.{j}.norm.weight": [512], f"clip_decoder.{j}.norm.bias": [512]}
    assert {key: list(value.shape) for key, value in state.items()} == expected
    assert "encoder.blocks.11.attn.q_bias" in state
    assert not any("k_bias" in key for key in state)


def test_attention_written_out_with_biases_on_q_and_v():
    attention = small_student().encoder.blocks[0].attn
    x = torch.randn(2, 5, 32)
    q, k, v = (x @ w.T for w in attention.qkv.weight.chunk(3))
    q, v = q + attention.q_bias, v + attention.v_bias
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k, v))
    out = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
    expected = out.transpose(1, 2).flatten(2) @ attention.proj.weight.T + attention.proj.bias
    assert (attention(x) - expected).abs().max() < 1e-5


def test_layer_norms_have_the_published_epsilon():
    norms = [module for module in small_student().modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 2 * SMALL.depth + 1 + SMALL.align_layers
    assert {norm.eps for norm in norms} == {1e-6}


def test_drop_path_grows_linearly():
    student = VideoStudent(StudentConfig(32, 16, 1, 2, 32, 5, 2, 0.2, 2, 16))
    rates = [block.drop_path for block in student.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert [block.drop_path for block in on_meta("umt_l16").encoder.blocks][-1] == 0.2


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    keep, samples = 0.75, 20_000
    block = Block(8, 2, drop_path=1 - keep)
    torch.nn.init.normal_(block.attn.proj.bias)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)  # leaves the attention branch alone
    x = torch.randn(1, 3, 8).expand(samples, -1, -1)
    with torch.no_grad():
        branch = block.eval()(x) - x
        ratio = (block.train()(x) - x) / branch
    assert branch[0].abs().min() > 1e-3
    dropped = ratio.abs() < 1e-3
    assert torch.equal(dropped.all((1, 2)), dropped.any((1, 2)))  # a sample whole or not at all
    assert (ratio[~dropped] - 1 / keep).abs().max() < 1e-2
    share = 1 - float(dropped[:, 0, 0].float().mean())
    assert abs(share - keep) < 4 * (keep * (1 - keep) / samples) ** 0.5
    assert abs(float(ratio.mean()) - 1) < 0.02


def test_both_branches_are_dropped_independently():
    block = Block(8, 2, drop_path=0.5).train()
    torch.nn.init.ones_(block.attn.proj.bias)
    torch.nn.init.zeros_(block.attn.proj.weight)
    torch.nn.init.constant_(block.mlp.fc2.bias, 10.0)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    with torch.no_grad():
        added = block(torch.zeros(4000, 1, 8))[:, 0, 0]
    shares = [float((added == value).float().mean()) for value in (0, 2, 20, 22)]
    assert sum(shares) == pytest.approx(1)
    assert all(abs(share - 0.25) < 0.03 for share in shares)


def test_drop_path_is_off_in_evaluation():
    with_drop = small_student(StudentConfig(32, 16, 1, 4, 32, 3, 2, 0.5, 2, 16))
    without = VideoStudent(SMALL)
    without.load_state_dict(with_drop.state_dict())
    clip, ids = torch.randn(2, 3, 4, 32, 32), torch.tensor([[0, 5, 9], [1, 2, 15]])
    assert torch.equal(with_drop.eval()(clip, ids).hidden, without(clip, ids).hidden)
    assert not torch.equal(with_drop.train()(clip, ids).hidden, without(clip, ids).hidden)


def test_only_visible_tokens_matter():
    student = small_student()
    clip, ids = torch.randn(1, 3, 4, 32, 32), torch.tensor([[0, 5, 10]])
    changed = clip.clone()
    changed[:, :, 3] += 100  # tokens 12..15
    assert torch.equal(student(changed, ids).normed(), student(clip, ids).normed())
    changed[:, :, 0, :16, :16] += 1  # token 0
    assert not torch.equal(student(changed, ids).normed(), student(clip, ids).normed())


def test_predictions_follow_the_order_of_ids():
    student = small_student()
    clip, ids = torch.randn(1, 3, 4, 32, 32), torch.tensor([[0, 5, 10, 15]])
    order = [2, 0, 3, 1]
    assert (student(clip, ids[:, order]).normed() - student(clip, ids).normed()[:, :, order]).abs().max() < 1e-5
    assert (student(clip, ids.int()).normed() - student(clip, ids).normed()).abs().max() == 0


def test_uint8_and_normalised_float_agree():
    student = small_student()
    pixels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    clip = ((pixels / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    ids = torch.tensor([[0, 5, 9], [1, 2, 15]])
    assert (student(pixels, ids).normed() - student(clip, ids).normed()).abs().max() < 1e-4


@pytest.mark.parametrize("masking", ["frame", "clip"])
def test_tubelets_of_two_frames(masking):
    student = small_student(StudentConfig(32, 16, 2, 4, 32, 2, 2, 0.0, 2, 16))
    teacher = ClipTeacher(TeacherConfig(32, 16, 2, None, 32, 2, 2, 16, 2))
    assert student.config.tokens == 8
    clip = torch.randint(0, 256, (3, 4, 32, 32, 3), dtype=torch.uint8)
    visible = None if masking == "frame" else torch.tensor([[[0, 6, 7]]]).expand(3, -1, -1)
    out = alignment_step(student, teacher, clip, 2, visible)
    tokens = 4 if masking == "frame" else 3
    assert out.scores.shape == (3, 2, 4)
    assert out.visible.shape == ((3, 2, 2) if masking == "frame" else (3, 1, 3))
    assert out.targets.shape == out.predictions.shape == (2, 3, tokens, 16)
    out.loss.backward()
    weight = student.encoder.patch_embed.proj.weight
    assert weight.shape == (32, 3, 2, 16, 16)
    assert (weight.grad.abs().amax((0, 1, 3, 4)) > 0).all()  # both frames of a tubelet


@pytest.mark.parametrize(
    ("clip", "shape"),
    [
        (torch.zeros(2, 3, 4, 32, 48), "[2, 3, 4, 32, 48]"),
        (torch.zeros(2, 3, 3, 32, 32), "[2, 3, 3, 32, 32]"),
        (torch.zeros(2, 4, 32, 32, 3), "[2, 4, 32, 32, 3]"),
        (torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8), "[2, 3, 4, 32, 32]"),
        (torch.zeros(2, 5, 32, 32, 3, dtype=torch.uint8), "[2, 5, 32, 32, 3]"),
        (torch.zeros(2, 4, 32, 32, 3, dtype=torch.int64), "[2, 4, 32, 32, 3]"),
        (torch.zeros(3, 4, 32, 32), "[3, 4, 32, 32]"),
    ],
)
def test_a_clip_that_does_not_fit_is_named(clip, shape):
    ids = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the words follow
        small_student()(clip, ids)
    assert shape in str(caught.value)
    assert "32, 32, 3]" in str(caught.value)


def test_a_clip_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match=r"torch\.int32"):
        small_student()(torch.zeros(2, 3, 4, 32, 32, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int64))


VIT = VitConfig(image_size=32, frames=4, width=32, depth=3, heads=2)


def small_vit(seed: int = 0, config: VitConfig = VIT) -> tuple[VideoTransformer, torch.Tensor]:
    torch.manual_seed(seed)
    return VideoTransformer(config), sinusoid_positions(config.tokens, config.width)


def test_no_ids_means_all_tokens():
    model, position = small_vit()
    clip = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    ids = torch.arange(VIT.tokens).expand(2, -1)
    (every,), (named,) = model.hidden_states(clip, position), model.hidden_states(clip, position, ids)
    assert every.shape == (2, VIT.tokens, 32)
    assert (every - named).abs().max() < 1e-5


def test_layers_come_in_the_order_asked_for_and_only_as_deep_as_needed():
    model, position = small_vit()
    clip = torch.randn(1, 3, 4, 32, 32)
    seen = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _block, _inputs, _output, index=index: seen.append(index))
    last, first, second = model.hidden_states(clip, position, layers=(-1, 0, 1))
    assert torch.equal(model.hidden_states(clip, position, layers=[1])[0], second)
    assert seen == [0, 1, 2, 0, 1]
    assert torch.equal(model.blocks[1](first), second)
    assert torch.equal(model.blocks[2](second), last)


@pytest.mark.parametrize(("tubelet", "frames"), [(1, 1), (1, 7), (2, 6)])
def test_any_number_of_frames_that_the_tubelet_divides(tubelet, frames):
    model, _ = small_vit(config=VitConfig(32, 16, tubelet, 4, 32, 3, 2))
    tokens = frames // tubelet * 4
    clip = torch.randint(0, 256, (1, frames, 32, 32, 3), dtype=torch.uint8)
    assert model.hidden_states(clip, sinusoid_positions(tokens, 32))[0].shape == (1, tokens, 32)


def test_errors_name_inputs_that_do_not_fit_the_encoder():
    model, position = small_vit()
    clip = torch.randn(2, 3, 4, 32, 32)
    for arguments, words in (
        ((clip[:, :, :3], position), "position has 16 rows, but a clip of 3 frames has 12 tokens"),
        ((clip, position, torch.zeros(3, 1, dtype=torch.int64)), "3 rows, which is not a multiple of 2 clips"),
        ((clip, position, None, (3,)), "layers = [3], but the model has 3 blocks, 0 to 2"),
        ((clip, position, None, (-4,)), "layers = [-4]"),
        ((clip, position, None, ()), "layers is empty"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            model.hidden_states(*arguments)
    tubes, table = small_vit(config=VitConfig(32, 16, 2, 4, 32, 3, 2))
    with pytest.raises(ValueError, match=r"clip has 3 frames, .* tubelet, 2"):
        tubes.hidden_states(clip[:, :, :3], table)

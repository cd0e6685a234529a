"""The teacher against Hugging Face's CLIP, and its shortcuts against the full computation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from umt_kernels import patch_embed

from umt_fast import ClipTeacher, TeacherConfig
from umt_fast.checkpoint import load_clip_teacher

SMALL = TeacherConfig(image_size=64, width=48, depth=4, heads=3, target_width=20, align_layers=3)


def perturb(module: torch.nn.Module, scale: float = 0.1) -> None:
    """Add noise to every parameter: initial LayerNorms and biases would hide an omission."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)


def small_teacher(config: TeacherConfig = SMALL) -> ClipTeacher:
    teacher = ClipTeacher(config)
    perturb(teacher)
    teacher.load_state_dict(teacher.state_dict())  # folds the patch weights anew
    return teacher


def all_patches(batch: int, frames: int, patches: int) -> Tensor:
    return torch.arange(patches).expand(batch, frames, -1)


def random_visible(batch: int, frames: int, patches: int, count: int) -> Tensor:
    return torch.rand(batch, frames, patches).topk(count).indices.sort().values


@pytest.fixture(params=["quick_gelu", "gelu"])
def hugging_face(request: pytest.FixtureRequest) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=SMALL.width,
        intermediate_size=4 * SMALL.width,
        projection_dim=SMALL.target_width,
        num_hidden_layers=SMALL.depth,
        num_attention_heads=SMALL.heads,
        image_size=SMALL.image_size,
        patch_size=SMALL.patch_size,
        hidden_act=request.param,
        attn_implementation="eager",
    )
    model = CLIPVisionModelWithProjection(config).eval()
    perturb(model)
    return model


def test_matches_hugging_face(hugging_face):
    teacher = ClipTeacher(replace(SMALL, activation=hugging_face.config.hidden_act))
    load_clip_teacher(teacher, hugging_face.state_dict())
    clip = torch.randn(2, 3, 3, 64, 64)
    frames = clip.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        theirs = hugging_face(pixel_values=frames, output_hidden_states=True, output_attentions=True)
        norm, project = hugging_face.vision_model.post_layernorm, hugging_face.visual_projection
        expected = torch.stack([project(norm(x))[:, 1:] for x in theirs.hidden_states[-SMALL.align_layers :]])
    expected = expected.unflatten(1, (2, 3)).flatten(2, 3)  # [K, B, T*P, C]
    state = teacher.encode(clip)
    targets = teacher.targets(state, all_patches(2, 3, 16))
    assert targets.shape == expected.shape == (3, 2, 48, 20)
    assert (targets - expected).abs().max() < 1e-4
    assert (targets - expected).norm() < 1e-6 * expected.norm()
    scores = theirs.attentions[-1].mean(1)[:, 0, 1:].view(2, 3, 16)
    assert state.scores.std() > 1e-3
    assert (state.scores - scores).abs().max() < 1e-6


@pytest.mark.parametrize("align_layers", [1, 3, 4])
def test_finishing_visible_tokens_equals_finishing_all(align_layers):
    config = TeacherConfig(image_size=64, width=48, depth=4, heads=3, target_width=20, align_layers=align_layers)
    teacher = small_teacher(config)
    state = teacher.encode(torch.randn(2, 3, 3, 64, 64))
    whole = teacher.targets(state, all_patches(2, 3, 16)).unflatten(2, (3, 16))
    visible = random_visible(2, 3, 16, 5)
    targets = teacher.targets(state, visible)
    index = visible[None, ..., None].expand(align_layers, -1, -1, -1, 20)
    assert targets.shape == (align_layers, 2, 15, 20)
    assert (targets - whole.gather(3, index).flatten(2, 3)).abs().max() < 1e-5


def test_the_lean_last_block_is_the_block():
    teacher = small_teacher()
    last = teacher.transformer.resblocks[-1]
    x = torch.randn(3, 17, 48)
    k, v = last.attn.key_value(last.ln_1(x))
    row_ids = torch.tensor([[1, 5, 16], [0, 2, 3], [7, 8, 9]])
    rows = sum(last.rows(x, k, v, row_ids))
    expected = torch.stack([y[i] for y, i in zip(sum(last(x, last.ln_1(x))), row_ids, strict=True)])
    assert (rows - expected).abs().max() < 1e-5


def test_a_visible_set_of_the_clip_equals_that_of_its_frames():
    teacher = small_teacher()
    state = teacher.encode(torch.randn(2, 3, 3, 64, 64))
    visible = random_visible(2, 3, 16, 5)
    within_clip = (visible + 16 * torch.arange(3)[:, None]).flatten(1)[:, None]
    assert (teacher.targets(state, within_clip) - teacher.targets(state, visible)).abs().max() < 1e-5


def test_a_visible_set_of_the_clip_may_be_uneven():
    teacher = small_teacher()
    state = teacher.encode(torch.randn(1, 3, 3, 64, 64))
    whole = teacher.targets(state, all_patches(1, 3, 16))
    uneven = torch.tensor([[[0, 1, 2, 3, 15, 47]]])  # none of frame 1
    assert (teacher.targets(state, uneven) - whole[:, :, uneven[0, 0]]).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 5)])
def test_visible_may_be_int32(shape):
    teacher = small_teacher()
    state = teacher.encode(torch.randn(2, 3, 3, 64, 64))
    visible = random_visible(shape[0], shape[1], 16, shape[2])
    assert torch.equal(teacher.targets(state, visible.int()), teacher.targets(state, visible))


def test_frames_are_encoded_independently():
    teacher = small_teacher()
    clip = torch.randn(1, 3, 4, 64, 64)
    together = teacher.encode(clip)
    for t in range(4):
        alone = teacher.encode(clip[:, :, t : t + 1])
        assert (alone.scores[0, 0] - together.scores[0, t]).abs().max() < 1e-6


@pytest.mark.parametrize(("source", "target"), [(16, 14), (16, 12), (14, 16), (16, 16), (8, 6)])
def test_the_folded_resize_is_the_resize(source, target):
    grid = 3  # the middle patch touches no border, the others do
    config = TeacherConfig(
        image_size=grid * target,
        patch_size=target,
        input_size=grid * source,
        width=8,
        depth=1,
        heads=1,
        target_width=4,
        align_layers=1,
    )
    teacher = ClipTeacher(config).double()
    state = teacher.state_dict()
    state["conv1.weight"] = torch.randn_like(state["conv1.weight"])
    teacher.load_state_dict(state)
    clip = torch.randn(2, 3, 2, grid * source, grid * source, dtype=torch.float64)
    resized = F.interpolate(
        clip.transpose(1, 2).flatten(0, 1), size=(grid * target, grid * target), mode="bicubic", align_corners=False
    )
    expected = F.conv2d(resized, state["conv1.weight"][:, :, 0], stride=target).flatten(2).transpose(1, 2)
    embedded = patch_embed(clip, teacher.patch_weight, None, config.clip_patch_size).view(4, grid**2, 8)
    assert (embedded - expected).abs().max() < 1e-10


def test_the_folded_kernel_follows_a_load_and_is_not_saved():
    teacher = ClipTeacher(TeacherConfig(56, 14, 1, 64, 32, 2, 2, 16, 2))
    assert teacher.patch_weight.shape == (32, 3, 1, 18, 18)
    assert "patch_weight" not in teacher.state_dict()
    before = teacher.patch_weight.clone()
    state = {key: 2 * value for key, value in teacher.state_dict().items()}
    load_clip_teacher(teacher, state)
    assert torch.allclose(teacher.patch_weight, 2 * before, atol=1e-6)


@pytest.mark.parametrize("input_size", [None, 32])
def test_tubelets_see_the_frame_that_inflation_keeps(input_size):
    """With weights inflated from an image model, a tubelet gives the result of its middle frame."""
    flat = TeacherConfig(image_size=32 if input_size is None else 28, patch_size=16 if input_size is None else 14)
    sizes = {"width": 32, "depth": 2, "heads": 2, "target_width": 16, "align_layers": 2, "input_size": input_size}
    image = small_teacher(TeacherConfig(flat.image_size, flat.patch_size, **sizes))
    video = ClipTeacher(TeacherConfig(flat.image_size, flat.patch_size, 2, **sizes))
    state = dict(image.state_dict())
    state["conv1.weight"] = state["conv1.weight"][:, :, 0]
    load_clip_teacher(video, state)
    clip = torch.randn(2, 3, 6, 32, 32)
    expected, got = image.encode(clip[:, :, 1::2]), video.encode(clip)
    assert got.scores.shape == (2, 3, 4)
    assert (got.scores - expected.scores).abs().max() < 1e-6
    visible = all_patches(2, 3, 4)
    assert (video.targets(got, visible) - image.targets(expected, visible)).abs().max() < 1e-5


def test_uint8_and_normalised_float_agree():
    teacher = small_teacher()
    pixels = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    clip = ((pixels / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    one, two = teacher.encode(pixels), teacher.encode(clip)
    assert (one.scores - two.scores).abs().max() < 1e-5
    visible = all_patches(2, 3, 16)
    assert (teacher.targets(one, visible) - teacher.targets(two, visible)).abs().max() < 1e-4


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_weights_rounded_once_give_the_same_bits_as_autocast(activation):
    teacher = small_teacher(replace(TeacherConfig(56, 14, 1, 64, 48, 4, 3, 20, 3), activation=activation))
    clip = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    visible = random_visible(2, 3, 16, 5)

    def run() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            state = teacher.encode(clip)
            return state.scores, teacher.targets(state, visible)

    expected = run()
    bytes_before = sum(p.nbytes for p in teacher.parameters())
    teacher.store_matmul_weights(torch.bfloat16)
    assert sum(p.nbytes for p in teacher.parameters()) < 0.65 * bytes_before
    for got, want in zip(run(), expected, strict=True):
        assert torch.equal(got, want)


def test_the_teacher_is_frozen():
    teacher = small_teacher()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    state = teacher.encode(torch.randn(1, 3, 2, 64, 64, requires_grad=True))
    assert not state.scores.requires_grad
    assert not teacher.targets(state, all_patches(1, 2, 16)).requires_grad


@pytest.mark.parametrize(
    ("clip", "shape"),
    [
        (torch.zeros(1, 3, 2, 32, 64), "[1, 3, 2, 32, 64]"),
        (torch.zeros(1, 2, 64, 64, 3), "[1, 2, 64, 64, 3]"),
        (torch.zeros(1, 3, 2, 64, 64, dtype=torch.uint8), "[1, 3, 2, 64, 64]"),
        (torch.zeros(3, 2, 64, 64), "[3, 2, 64, 64]"),
    ],
)
def test_a_clip_that_does_not_fit_is_named(clip, shape):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the words follow
        small_teacher().encode(clip)
    assert shape in str(caught.value)
    assert "64, 64, 3]" in str(caught.value)


def test_frames_that_tubelets_do_not_divide_are_named():
    teacher = small_teacher(TeacherConfig(32, 16, 2, None, 32, 2, 2, 16, 2))
    with pytest.raises(ValueError, match="T = 3"):
        teacher.encode(torch.zeros(1, 3, 3, 32, 32))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_bf16_residual_stream_stays_near_float32(activation):
    """As deep as CLIP-B/16, because rounding errors of the stream add up over the blocks."""
    teacher = small_teacher(TeacherConfig(64, 16, 1, None, 96, 12, 3, 32, 6, activation=activation))
    clip = torch.randint(0, 256, (2, 2, 64, 64, 3), dtype=torch.uint8)
    exact = teacher.encode(clip)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = teacher.encode(clip)
        targets = teacher.targets(rounded, all_patches(2, 2, 16))
    assert {x.dtype for x in (rounded.x, *rounded.aligned, rounded.k, targets)} == {torch.bfloat16}
    cosine = F.cosine_similarity(targets.float(), teacher.targets(exact, all_patches(2, 2, 16)), dim=-1)
    off = (rounded.scores - exact.scores).abs().max() / exact.scores.max()
    print(
        f"bf16 residual, {activation}: cosine mean {cosine.mean():.6f}, least {cosine.min():.6f}; scores off {off:.2%}"
    )
    assert cosine.mean() > 0.999
    assert cosine.min() > 0.998
    assert off < 0.05

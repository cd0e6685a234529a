"""alignment_step, from clip to loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step

BATCH, FRAMES, PATCHES, LAYERS, WIDTH = 2, 3, 16, 2, 16


@pytest.fixture
def models() -> tuple[VideoStudent, ClipTeacher]:
    student = VideoStudent(StudentConfig(64, 16, 1, FRAMES, 32, 3, 2, 0.0, LAYERS, WIDTH))
    teacher = ClipTeacher(TeacherConfig(56, 14, 1, 64, 32, 3, 2, WIDTH, LAYERS))
    with torch.no_grad():
        for parameter in (*student.parameters(), *teacher.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    teacher.load_state_dict(teacher.state_dict())
    return student, teacher


@pytest.fixture
def clip() -> Tensor:
    return torch.randint(0, 256, (BATCH, FRAMES, 64, 64, 3), dtype=torch.uint8)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_visible(count: int = 4) -> Tensor:
    return torch.rand(BATCH, FRAMES, PATCHES).topk(count).indices.sort().values


def test_shapes_and_ranges_of_the_outputs(models, clip):
    student, teacher = models
    out = alignment_step(student, teacher, clip, 4)
    assert out.visible.shape == (BATCH, FRAMES, 4)
    assert (out.visible[..., 1:] > out.visible[..., :-1]).all()
    assert out.visible.min() >= 0
    assert out.visible.max() < PATCHES
    assert out.scores.shape == (BATCH, FRAMES, PATCHES)
    assert (out.scores > 0).all()
    assert (out.scores.sum(-1) < 1).all()
    shape = (LAYERS, BATCH, FRAMES * 4, WIDTH)
    assert (
        out.targets.shape == out.predictions.shape == out.raw_targets.shape == out.raw_predictions.hidden.shape == shape
    )
    for rows in (out.targets, out.predictions):
        assert (rows.norm(dim=-1) - 1).abs().max() < 1e-6
    targets, predictions = out.raw_targets.double(), out.raw_predictions.normed().double()
    cosine = (targets * predictions).sum(-1) / targets.norm(dim=-1) / predictions.norm(dim=-1)
    assert abs(out.loss - (2 - 2 * cosine).mean()) < 1e-6


def test_drawn_tokens_are_those_of_the_same_given_set(models, clip):
    student, teacher = models
    drawn = alignment_step(student, teacher, clip, 4)
    given = alignment_step(student, teacher, clip, None, drawn.visible)
    assert torch.equal(given.targets, drawn.targets)
    assert torch.equal(given.predictions, drawn.predictions)
    assert torch.equal(given.visible, drawn.visible)


def test_targets_and_predictions_belong_to_the_same_token(models, clip):
    """Changing one patch of the clip changes this token's row most, in the student and in the teacher."""
    student, teacher = models
    visible = some_visible()
    before = alignment_step(student, teacher, clip, None, visible)
    frame, slot = 1, 2
    row, column = divmod(int(visible[0, frame, slot]), 4)
    changed = clip.clone()
    changed[0, frame, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] ^= 255
    after = alignment_step(student, teacher, changed, None, visible)
    pairs = {
        "targets": (after.raw_targets, before.raw_targets),
        "predictions": (after.raw_predictions.hidden, before.raw_predictions.hidden),
    }
    for name, (new, old) in pairs.items():
        moved = (new - old).norm(dim=-1).sum(0)
        assert int(moved[0].argmax()) == 4 * frame + slot, name
        assert (moved[1] == 0).all(), name


def test_the_generator_decides_the_draw(models, clip):
    student, teacher = models
    draws = [alignment_step(student, teacher, clip, 4, generator=generator(seed)).visible for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_order_and_integer_type_of_a_given_set_do_not_matter(models, clip):
    student, teacher = models
    visible = some_visible()
    loss = alignment_step(student, teacher, clip, 4, visible).loss
    assert abs(alignment_step(student, teacher, clip, 4, visible.flip(-1)).loss - loss) < 1e-6
    assert alignment_step(student, teacher, clip, 4, visible.int()).loss == loss


def test_a_set_of_the_clip_equals_that_of_its_frames(models, clip):
    student, teacher = models
    visible = some_visible()
    within_clip = (visible + PATCHES * torch.arange(FRAMES)[:, None]).flatten(1)[:, None]
    one, two = (alignment_step(student, teacher, clip, None, v) for v in (visible, within_clip))
    assert (one.targets - two.targets).abs().max() < 1e-6
    assert (one.predictions - two.predictions).abs().max() < 1e-6


def test_uint8_and_normalised_float_agree(models, clip):
    student, teacher = models
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((clip / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    visible = some_visible()
    one, two = (alignment_step(student, teacher, c, None, visible) for c in (clip, normalised))
    assert abs(one.loss - two.loss) < 1e-5
    assert (one.scores - two.scores).abs().max() < 1e-5


def test_gradient_reaches_every_student_parameter_and_no_teacher_parameter(models, clip):
    student, teacher = models
    alignment_step(student, teacher, clip, 4).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_bf16_autocast_stays_near(models, clip):
    student, teacher = models
    visible = some_visible()
    exact = alignment_step(student, teacher, clip, None, visible).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = alignment_step(student, teacher, clip, None, visible)
    assert rounded.loss.dtype == torch.float32
    assert rounded.scores.dtype == torch.float32
    assert abs(rounded.loss - exact) < 0.02
    rounded.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_a_wrapped_student_is_called_through_its_wrapper(models, clip):
    student, teacher = models

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = student
            self.calls = 0

        def forward(self, clip: Tensor, ids: Tensor) -> Tensor:
            self.calls += 1
            return self.module(clip, ids)

    wrapper, visible = Wrapper(), some_visible()
    wrapped = alignment_step(wrapper, teacher, clip, None, visible)
    assert wrapped.loss == alignment_step(student, teacher, clip, None, visible).loss
    assert wrapper.calls == 1


@pytest.mark.parametrize(
    ("num_visible", "visible", "words"),
    [
        (None, None, ["num_visible is None"]),
        (17, None, ["num_visible = 17", "16"]),
        (0, None, ["num_visible = 0"]),
        (None, torch.full((BATCH, FRAMES, 4), 16), ["visible[0, 0, 0] = 16", "a frame has 16 patches"]),
        (None, torch.full((BATCH, 1, 4), 48), ["visible[0, 0, 0] = 48", "a clip has 48 tokens"]),
        (None, torch.zeros(BATCH, 4, dtype=torch.int64), ["visible has shape [2, 4]"]),
    ],
)
def test_errors_name_the_value_and_the_place(models, clip, num_visible, visible, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the words follow
        alignment_step(*models, clip, num_visible, visible)
    for word in words:
        assert word in str(caught.value)


def test_a_given_visible_set_is_used_whatever_num_visible_says_and_comes_back_ascending(models, clip):
    visible = some_visible()
    expected = alignment_step(*models, clip, None, visible)
    given = visible.flip(-1).int()
    out = alignment_step(*models, clip, 7, given)
    assert torch.equal(out.visible, visible)
    assert torch.equal(out.targets, expected.targets)


def test_models_that_do_not_fit_each_other_are_refused(models, clip):
    student, _ = models
    other = ClipTeacher(TeacherConfig(64, 32, 1, 64, 32, 2, 2, WIDTH, LAYERS))
    with pytest.raises(ValueError, match="patches along a side"):
        alignment_step(student, other, clip, 2)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32, 3), (2, 4, 64, 64, 3), (2, 64, 64, 3)])
def test_a_clip_that_does_not_fit_the_models_is_named(models, shape):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the words follow
        alignment_step(*models, torch.zeros(shape, dtype=torch.uint8), 4)
    assert str(list(shape)) in str(caught.value)

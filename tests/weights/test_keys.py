"""Key names with wrappers' prefixes."""

from __future__ import annotations

import re

import pytest
import torch

from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent
from umt_fast.config import TEACHERS, check_fit
from umt_fast.models.heads import bare_student
from umt_fast.weights import WeightsError, keys, load_clip_teacher, load_umt_student, strip_wrappers

CONFIG = TeacherConfig(image_size=32, width=32, depth=2, heads=2, target_width=16, align_layers=2)
STUDENT = StudentConfig(image_size=32, frames=2, width=32, depth=2, heads=2, align_layers=2, target_width=16)

PREFIXES = ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model._orig_mod.module.", "net.model."]


@pytest.mark.parametrize("prefix", [*PREFIXES, "student.", "module.student._orig_mod."])
def test_student_keys_in_wrappers(prefix):
    student, other = VideoStudent(STUDENT), VideoStudent(STUDENT)
    load_umt_student(other, {"model": {prefix + key: value for key, value in student.state_dict().items()}})
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in student.state_dict().items())


def test_wrappers_within_a_key():
    """From FSDP and torch.compile on each block."""
    student, other = VideoStudent(STUDENT), VideoStudent(STUDENT)
    names = {key: key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._orig_mod.") for key in student.state_dict()}
    load_umt_student(other, {names[key]: value for key, value in student.state_dict().items()})
    assert torch.equal(bare_student(other).encoder.blocks[1].mlp.fc1.weight, student.encoder.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("inner", ["", "module.", "_orig_mod.model."])
@pytest.mark.parametrize("outer", ["", "clip.", *PREFIXES])
def test_teacher_keys_in_wrappers(outer, inner):
    prefix = f"{outer}visual.{inner}"
    teacher, other = ClipTeacher(CONFIG), ClipTeacher(CONFIG)
    text = {f"{outer}transformer.resblocks.0.ln_1.weight": torch.zeros(8)}
    load_clip_teacher(other, {prefix + key: value for key, value in teacher.state_dict().items()} | text)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("twice", [("module.a", "a"), ("model.a", "module.a"), ("model.model.a", "_orig_mod.a")])
def test_two_models_in_one_file_are_refused(twice):
    with pytest.raises(WeightsError, match="hold a twice"):
        strip_wrappers(dict.fromkeys(twice, torch.ones(1)))


def test_two_students_in_one_file_are_refused():
    state = VideoStudent(STUDENT).state_dict()
    both = {f"{owner}.{key}": value for owner in ("student", "ema") for key, value in state.items()}
    with pytest.raises(WeightsError, match=r"several models: student\., ema\."):
        load_umt_student(VideoStudent(STUDENT), both)


def test_a_refusal_shows_an_unexpected_key_beside_a_missing_one():
    state = {f"backbone_{key}": value for key, value in ClipTeacher(CONFIG).state_dict().items()}
    with pytest.raises(WeightsError, match=r"missing class_embedding \[32\]; unexpected backbone_class_embedding"):
        load_clip_teacher(ClipTeacher(CONFIG), state)


def test_part_of_a_hugging_face_attention_is_named():
    state = {
        "vision_model.embeddings.patch_embedding.weight": torch.ones(32, 3, 16, 16),
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(32, 32),
    }
    with pytest.raises(WeightsError, match=r"missing vision_model\.encoder\.layers\.0\.self_attn\.k_proj\.weight"):
        load_clip_teacher(ClipTeacher(CONFIG), state)


def test_vit_h14_has_its_own_width_and_grid():
    teacher = TEACHERS["open_clip_h14"]
    assert (teacher.width, teacher.heads, teacher.grid, teacher.target_width, teacher.activation) == (
        1280,
        16,
        16,
        1024,
        "gelu",
    )
    check_fit(StudentConfig(patch_size=14, target_width=1024), teacher)


SHAPES = ((), (7,), (3, 5), (1, 2, 3), (2, 3, 1, 2, 2), (0,), (10**9, 0))


def hugging_face(tower):
    """The tower's tensors under the names of Hugging Face's CLIP."""
    state = {}
    for key, value in tower.items():
        name = key
        for theirs, ours in keys._HUGGING_FACE_NAMES.items():
            name = name.replace(ours, theirs)
        found = re.fullmatch(r"(.*)attn\.in_proj_(weight|bias)", name)
        if key == "proj":
            state["visual_projection.weight"] = value.T
        elif found:
            parts = zip("qkv", value.chunk(3), strict=True)
            state |= {f"vision_model.{found[1]}self_attn.{part}_proj.{found[2]}": rows for part, rows in parts}
        else:
            state[f"vision_model.{name}"] = value
    return state


def timm(tower):
    state = {"cls_token": tower["class_embedding"][None, None], "pos_embed": tower["positional_embedding"][None]}
    for key, value in tower.items():
        name = key
        for theirs, ours in keys._TIMM_NAMES.items():
            name = name.replace(ours, theirs, 1)
        if key not in ("class_embedding", "positional_embedding", "proj"):
            state[name] = value
    return {**state, "head.weight": tower["proj"].T}


@pytest.mark.parametrize("form", [dict, hugging_face, timm])
def test_tensors_of_another_shape_are_refused_in_one_line(form):
    config = TeacherConfig(image_size=32, width=32, depth=1, heads=2, target_width=16, align_layers=1)
    teacher = ClipTeacher(config)
    state = form(teacher.state_dict())
    load_clip_teacher(teacher, state)
    for key in state:
        for shape in SHAPES:
            with pytest.raises(WeightsError):
                load_clip_teacher(teacher, {**state, key: torch.zeros(shape)})

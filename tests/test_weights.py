"""Teacher and student weights in all supported names and formats."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent
from umt_fast.checkpoint import load_clip_teacher, load_umt_student, umt_state_dict
from umt_fast.weights import WeightsError, clip_image_tower, inflate, read_weights, resample_positions, write_weights

CONFIG = TeacherConfig(image_size=64, width=32, depth=2, heads=2, target_width=16, align_layers=2)
WIDTH = CONFIG.width

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

Tower = dict[str, Tensor]


@pytest.fixture
def tower() -> Tower:
    """An image tower under OpenAI's names with 2-D patch weights; float16 can represent every value."""
    state = {key: torch.randn_like(value).half().float() for key, value in ClipTeacher(CONFIG).state_dict().items()}
    state["conv1.weight"] = state["conv1.weight"][:, :, 0].contiguous()
    return state


def text_tower() -> Tower:
    """Part of CLIP's text tower: some of its names equal the image tower's names without `visual.`."""
    return {
        "positional_embedding": torch.randn(77, 24),
        "text_projection": torch.randn(24, 16),
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": torch.randn(50, 24),
        "ln_final.weight": torch.randn(24),
        "transformer.resblocks.0.ln_1.weight": torch.randn(24),
        "transformer.resblocks.0.attn.in_proj_weight": torch.randn(72, 24),
    }


def targets(teacher: ClipTeacher) -> Tensor:
    clip = torch.randn(1, 3, 2, 64, 64, generator=torch.Generator().manual_seed(7))
    state = teacher.encode(clip)
    patches = state.scores.shape[-1]
    return teacher.targets(state, torch.arange(patches).expand(*state.scores.shape[:2], -1))


def teacher_with(state: dict[str, Any], config: TeacherConfig = CONFIG) -> ClipTeacher:
    teacher = ClipTeacher(config)
    load_clip_teacher(teacher, state)
    return teacher


class Names(nn.Module):
    """A tree of modules whose state dict has the given names."""

    def __init__(self, state: Tower) -> None:
        super().__init__()
        for key, value in state.items():
            first, _, rest = key.partition(".")
            if not rest:
                self.register_parameter(first, nn.Parameter(value, requires_grad=False))
            elif first not in self._modules:
                prefix = f"{first}."
                below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                self.add_module(first, Names(below))

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def visual(tower: Tower) -> Tower:
    return {f"visual.{key}": value for key, value in tower.items()}


def umt_pth(tower: Tower, folder: Path) -> Path:
    torch.save(tower, folder / "vit_b16.pth")
    return folder / "vit_b16.pth"


def openai_archive(tower: Tower, folder: Path) -> Path:
    half = {key: value.half() for key, value in {**visual(tower), **text_tower()}.items()}
    torch.jit.trace(Names(half), torch.zeros(1)).save(folder / "ViT-B-16.pt")
    return folder / "ViT-B-16.pt"


def hugging_face_vision(tower: Tower) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=CONFIG.target_width,
        num_hidden_layers=CONFIG.depth,
        num_attention_heads=CONFIG.heads,
        image_size=CONFIG.image_size,
        patch_size=CONFIG.patch_size,
        hidden_act="quick_gelu",
    )
    model = CLIPVisionModelWithProjection(config)
    vision = model.vision_model
    with torch.no_grad():
        vision.embeddings.class_embedding.copy_(tower["class_embedding"])
        vision.embeddings.patch_embedding.weight.copy_(tower["conv1.weight"])
        vision.embeddings.position_embedding.weight.copy_(tower["positional_embedding"])
        model.visual_projection.weight.copy_(tower["proj"].T)
        pairs = [(vision.pre_layrnorm, "ln_pre"), (vision.post_layernorm, "ln_post")]
        for index, layer in enumerate(vision.encoder.layers):
            block = f"transformer.resblocks.{index}"
            pairs += [
                (layer.layer_norm1, f"{block}.ln_1"),
                (layer.layer_norm2, f"{block}.ln_2"),
                (layer.self_attn.out_proj, f"{block}.attn.out_proj"),
                (layer.mlp.fc1, f"{block}.mlp.c_fc"),
                (layer.mlp.fc2, f"{block}.mlp.c_proj"),
            ]
            for part, name in enumerate("qkv"):
                linear = getattr(layer.self_attn, f"{name}_proj")
                for kind in ("weight", "bias"):
                    getattr(linear, kind).copy_(tower[f"{block}.attn.in_proj_{kind}"].chunk(3)[part])
        for module, name in pairs:
            module.weight.copy_(tower[f"{name}.weight"])
            module.bias.copy_(tower[f"{name}.bias"])
    return model


def hugging_face_vision_folder(tower: Tower, folder: Path) -> Path:
    hugging_face_vision(tower).save_pretrained(folder / "vision")
    return folder / "vision"


def hugging_face_whole_folder(tower: Tower, folder: Path) -> Path:
    vision = hugging_face_vision(tower)
    text = CLIPTextConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=8,
        projection_dim=CONFIG.target_width,
        bos_token_id=0,
        eos_token_id=1,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.config.to_dict(), projection_dim=CONFIG.target_width
    )
    whole = CLIPModel(config)
    whole.load_state_dict(vision.state_dict(), strict=False)
    whole.save_pretrained(folder / "whole")
    return folder / "whole"


def hugging_face_bin_folder(tower: Tower, folder: Path) -> Path:
    """As in older releases: a pickle, with a buffer of position ids."""
    state = {**hugging_face_vision(tower).state_dict(), "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    (folder / "old").mkdir()
    torch.save(state, folder / "old" / "pytorch_model.bin")
    (folder / "old" / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "quick_gelu"}}))
    return folder / "old"


def open_clip_safetensors(tower: Tower, folder: Path) -> Path:
    save_file({**visual(tower), **text_tower()}, folder / "open_clip_model.safetensors")
    return folder / "open_clip_model.safetensors"


def open_clip_training_checkpoint(tower: Tower, folder: Path) -> Path:
    state = {f"module.{key}": value for key, value in {**visual(tower), **text_tower()}.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, folder / "epoch_3.pt")
    return folder / "epoch_3.pt"


def deepspeed(tower: Tower, folder: Path) -> Path:
    torch.save({"module": tower, "global_steps": 5}, folder / "states.pt")
    return folder / "states.pt"


FORMATS = [
    umt_pth,
    openai_archive,
    hugging_face_vision_folder,
    hugging_face_whole_folder,
    hugging_face_bin_folder,
    open_clip_safetensors,
    open_clip_training_checkpoint,
    deepspeed,
]


@pytest.mark.parametrize("save", FORMATS)
def test_every_format_gives_the_same_teacher(tower, tmp_path, save: Callable[[Tower, Path], Path]):
    teacher = teacher_with(read_weights(save(tower, tmp_path)))
    assert teacher.proj.dtype == torch.float32
    loaded = teacher.state_dict()
    for key, value in tower.items():
        assert torch.equal(loaded[key].squeeze(2) if key == "conv1.weight" else loaded[key], value), key
    assert torch.equal(targets(teacher), targets(teacher_with(tower)))
    assert torch.equal(teacher.patch_weight, loaded["conv1.weight"])


def test_the_openai_archive_is_an_archive_of_torchscript(tower, tmp_path):
    loaded = torch.jit.load(openai_archive(tower, tmp_path))
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in loaded.state_dict()
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float16}


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (3, 3)])
def test_positions_of_another_grid_are_resampled(tower, old, new):
    positions = torch.randn(1 + old**2, WIDTH)
    image = positions[1:].view(1, old, old, WIDTH).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    expected = torch.cat((positions[:1], image.permute(0, 2, 3, 1).reshape(-1, WIDTH)))
    assert torch.allclose(resample_positions(positions, new), expected, atol=1e-6)
    config = TeacherConfig(new * 16, 16, 1, None, WIDTH, 2, 2, 16, 2)
    teacher = teacher_with({**tower, "positional_embedding": positions}, config)
    assert torch.allclose(teacher.positional_embedding, expected, atol=1e-6)


def test_positions_of_the_same_grid_are_untouched(tower):
    assert torch.equal(teacher_with(tower).positional_embedding, tower["positional_embedding"])


@pytest.mark.parametrize(("frames", "middle"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_flat_patch_weights_go_on_the_middle_frame(tower, frames, middle):
    teacher = teacher_with(tower, TeacherConfig(64, 16, frames, None, WIDTH, 2, 2, 16, 2))
    weight = teacher.conv1.weight
    assert weight.shape == (WIDTH, 3, frames, 16, 16)
    assert torch.equal(weight[:, :, middle], tower["conv1.weight"])
    assert (weight[:, :, [t for t in range(frames) if t != middle]] == 0).all()
    assert torch.equal(teacher.patch_weight, weight)
    assert inflate(weight, frames) is weight


def test_names_of_an_image_tower_stay(tower):
    assert clip_image_tower(tower).keys() == tower.keys()
    assert clip_image_tower({**visual(tower), **text_tower()}).keys() == tower.keys()


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(WeightsError) as caught:
        read_weights(tmp_path / "nowhere.pt")
    for words in (str(tmp_path / "nowhere.pt"), "ViT-B-16.pt", "vit_b16.pth", "openai/clip-vit-base-patch16"):
        assert words in str(caught.value)


def test_a_repo_out_of_reach_says_how_to_get_weights():
    with pytest.raises(WeightsError) as caught:
        read_weights("umt-fast-tests/no-such-repo")
    assert "umt-fast-tests/no-such-repo" in str(caught.value)
    assert "ViT-B-16.pt" in str(caught.value)


@pytest.mark.parametrize("save", [umt_pth, openai_archive, open_clip_safetensors])
@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(tower, tmp_path, save, left):
    path = save(tower, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(WeightsError, match="cannot read weights from") as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


def test_a_web_page_in_place_of_weights_is_named(tmp_path):
    path = tmp_path / "ViT-B-16.pt"
    path.write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(WeightsError, match=r"cannot read weights from .*ViT-B-16\.pt: it is not a file of weights$"):
        read_weights(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"model": {"epoch": 3}}, 5])
def test_a_file_without_tensors_is_named(tmp_path, content):
    torch.save(content, tmp_path / "log.pth")
    with pytest.raises(WeightsError, match=r"log\.pth holds no tensors"):
        read_weights(tmp_path / "log.pth")


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"holds none of model\.safetensors"):
        read_weights(tmp_path)


def test_a_clip_trained_with_gelu_is_refused(tower, tmp_path):
    folder = hugging_face_whole_folder(tower, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"config\.json: this CLIP was trained with GELU"):
        teacher_with(read_weights(folder))
    folder = hugging_face_vision_folder(tower, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(WeightsError, match="this CLIP was trained with GELU"):
        teacher_with(read_weights(folder))


def test_a_broken_config_of_a_folder_is_named(tower, tmp_path):
    folder = hugging_face_vision_folder(tower, tmp_path)
    (folder / "config.json").write_text('{"hidden_act": ')
    with pytest.raises(WeightsError, match=r"config\.json"):
        read_weights(folder)


def test_errors_name_the_keys_of_weights_of_another_depth(tower):
    deeper = TeacherConfig(64, 16, 1, None, WIDTH, 3, 2, 16, 2)
    with pytest.raises(WeightsError, match=r"do not fit the teacher: missing transformer\.resblocks\.2\."):
        teacher_with(tower, deeper)
    shallower = TeacherConfig(64, 16, 1, None, WIDTH, 1, 2, 16, 1)
    with pytest.raises(WeightsError, match=r"unexpected transformer\.resblocks\.1\."):
        teacher_with(tower, shallower)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TeacherConfig(64, 16, 1, None, 48, 2, 2, 16, 2), "class_embedding is [32], this teacher has [48]"),
        (TeacherConfig(64, 16, 1, None, 32, 2, 2, 8, 2), "proj is [32, 16], this teacher has [32, 8]"),
        (TeacherConfig(32, 8, 1, None, 32, 2, 2, 16, 2), "conv1.weight is [32, 3, 1, 16, 16]"),
    ],
)
def test_errors_name_the_keys_of_weights_of_another_shape(tower, config, words):
    with pytest.raises(WeightsError) as caught:
        teacher_with(tower, config)
    assert words in str(caught.value)


def test_error_names_the_missing_projection(tower):
    state = {k: v for k, v in hugging_face_vision(tower).state_dict().items() if "visual_projection" not in k}
    with pytest.raises(WeightsError, match=r"missing proj \[32, 16\]"):
        teacher_with(state)


def test_error_names_positions_that_are_not_a_square_grid(tower):
    """For example a text tower, with 77 positions."""
    with pytest.raises(WeightsError, match="positional_embedding"):
        teacher_with({**tower, "positional_embedding": torch.randn(77, WIDTH)})


def test_a_refused_load_changes_nothing(tower):
    teacher = ClipTeacher(CONFIG)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    with pytest.raises(WeightsError):
        load_clip_teacher(teacher, {key: value for key, value in tower.items() if key != "proj"})
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


STUDENT = StudentConfig(image_size=32, frames=2, width=32, depth=2, heads=2, align_layers=2, target_width=16)


@pytest.mark.parametrize("name", ["student.pth", "student.safetensors"])
def test_student_round_trip(tmp_path, name):
    student, other = VideoStudent(STUDENT), VideoStudent(STUDENT)
    write_weights(tmp_path / name, umt_state_dict(student))
    state = read_weights(tmp_path / name)
    assert state.keys() == umt_state_dict(student).keys()
    load_umt_student(other, state)
    for key, value in other.state_dict().items():
        assert torch.equal(value, student.state_dict()[key]), key


def test_student_file_has_the_published_top_key(tmp_path):
    student = VideoStudent(STUDENT)
    write_weights(tmp_path / "student.pth", umt_state_dict(student))
    content = torch.load(tmp_path / "student.pth", weights_only=True)
    assert list(content) == ["model"]
    assert content["model"].keys() == student.state_dict().keys()
    load_umt_student(VideoStudent(STUDENT), content)


def test_student_weights_of_ddp_load(tmp_path):
    student, other = VideoStudent(STUDENT), VideoStudent(STUDENT)
    torch.save({"module": {f"module.{k}": v for k, v in student.state_dict().items()}}, tmp_path / "ddp.pt")
    load_umt_student(other, read_weights(tmp_path / "ddp.pt"))
    assert torch.equal(other.encoder.norm.weight, student.encoder.norm.weight)
    assert torch.equal(other.encoder.blocks[1].mlp.fc1.weight, student.encoder.blocks[1].mlp.fc1.weight)


def test_a_checkpoint_of_umts_own_trainer_loads(tmp_path):
    """Its `save_model` saves the command line with the weights, as an argparse.Namespace."""
    student, other = VideoStudent(STUDENT), VideoStudent(STUDENT)
    args = argparse.Namespace(model="pretrain_umt_base_patch16_224", lr=1.5e-4, opt_betas=[0.9, 0.95], resume="")
    content = {"model": student.state_dict(), "epoch": 199, "scaler": {"scale": 65536.0}, "args": args}
    torch.save(content, tmp_path / "checkpoint-199.pth")
    load_umt_student(other, read_weights(tmp_path / "checkpoint-199.pth"))
    assert torch.equal(other.encoder.blocks[1].mlp.fc1.weight, student.encoder.blocks[1].mlp.fc1.weight)


def test_error_names_the_keys_of_student_weights_that_do_not_fit():
    state = umt_state_dict(VideoStudent(STUDENT))
    state["encoder.norm.weight"] = torch.zeros(5)
    del state["encoder.blocks.1.attn.q_bias"]
    with pytest.raises(WeightsError) as caught:
        load_umt_student(VideoStudent(STUDENT), {**state, "head.weight": torch.zeros(1)})
    for words in (
        "the student",
        "missing encoder.blocks.1.attn.q_bias [32]",
        "unexpected head.weight",
        "encoder.norm.weight is [5], this student has [32]",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("drop", [0, 3])
def test_many_problems_are_counted(drop):
    state = list(umt_state_dict(VideoStudent(STUDENT)).items())
    with pytest.raises(WeightsError, match=f"and {len(state) - drop - 4} more"):
        load_umt_student(VideoStudent(STUDENT), dict(state[:drop]))

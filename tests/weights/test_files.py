"""Weight files of every kind, including hostile ones."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from train import evaluate
from umt_fast import ClassifierConfig, ClipTeacher, TeacherConfig, VideoClassifier, load_encoder
from umt_fast.errors import RunError
from umt_fast.weights import (
    WeightsError,
    load_classifier,
    load_clip_teacher,
    load_exactly,
    read_bert,
    read_model,
    read_weights,
)
from umt_fast.weights.files import find_not_finite

CONFIG = TeacherConfig(image_size=32, width=32, depth=2, heads=2, target_width=16, align_layers=2)
GELU = TeacherConfig(image_size=32, width=32, depth=2, heads=2, target_width=16, align_layers=2, activation="gelu")

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def tower() -> dict[str, Tensor]:
    return {f"visual.{key}": value for key, value in ClipTeacher(CONFIG).state_dict().items()}


class Hostile(nn.Module):
    """Writes a file when TorchScript loads it."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.target = target

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str, bool]:
        return self.weight, self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.weight, self.target, self.training = state
        torch.save(state[0], state[1])

    def forward(self, x: Tensor) -> Tensor:
        return x


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 2)
        self.proj.weight.data = torch.arange(6.0).view(3, 2).T  # not contiguous
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
        self.register_buffer("halves", torch.ones(3, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def test_the_code_of_a_torchscript_archive_is_not_run(tmp_path):
    written = tmp_path / "written"
    torch.jit.script(Hostile(str(written))).save(tmp_path / "hostile.pt")
    torch.jit.load(tmp_path / "hostile.pt")  # the attack works
    written.unlink()
    with pytest.raises(WeightsError, match="no tensors"):
        read_weights(tmp_path / "hostile.pt")
    assert not written.exists()


def test_torchscript_is_read_as_torch_reads_it(tmp_path):
    torch.jit.script(Plain()).save(tmp_path / "plain.pt")
    expected = torch.jit.load(tmp_path / "plain.pt").state_dict()
    found = read_weights(tmp_path / "plain.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())


def archive(path: Path, content: bytes, data: bytes = bytes(64)) -> Path:
    """A TorchScript archive around a pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", content)
        file.writestr("a/code/__torch__.py", "")
        file.writestr("a/data/0", data)
    return path


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def tensor_pickle(offset: int, size: int, stride: int = 1) -> bytes:
    """A pickled module with one attribute `w`, in a storage of 64 bytes."""

    def code(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]  # without PROTO and STOP

    storage = b"(" + code("storage") + b"ctorch\nFloatStorage\n" + code("0") + code("cpu") + code(16) + b"tQ"
    place = code(offset) + code((size,)) + code((stride,))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + b"\x89}tR"
    return b"\x80\x02c__torch__\nM\n)\x81}" + code("w") + tensor + b"sb."


def test_the_archives_of_these_tests_are_read(tmp_path):
    assert read_weights(archive(tmp_path / "a.pt", tensor_pickle(4, 8)))["w"].tolist() == [0.0] * 8


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(Call(exec, "raise SystemExit"), 2), "no tensors"),
        (pickle.dumps(Call(print, "executed"), 4), "STACK_GLOBAL|FRAME|SHORT_BINUNICODE"),
        (b"\x80\x02N" + b"r\xff\xff\xff\x7f" + b".", "damaged"),  # 2^31 places in the unpickler's memory
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "cannot read"),  # a byte array of 1 TB
        (tensor_pickle(12, 8), "does not fit"),
        (tensor_pickle(0, 1 << 40), "does not fit"),
        (tensor_pickle(0, 2, 1 << 40), "does not fit"),
        (tensor_pickle(-1, 2), "does not fit"),
        (b"", "cannot read"),
        (b"\x80\x02}", "cannot read"),
    ],
)
def test_a_hostile_pickle_in_torchscript_is_refused(tmp_path, capsys, content, words):
    with pytest.raises(WeightsError, match=words):
        read_weights(archive(tmp_path / "a.pt", content))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["a/data/0", "a/data.pkl", "a/code/x.py"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_zip_bomb_is_refused(tmp_path, name, suffix):
    with zipfile.ZipFile(tmp_path / f"bomb{suffix}", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, bytes(80 << 20))
    with pytest.raises(WeightsError, match="unpack to 83886080 bytes"):
        read_weights(tmp_path / f"bomb{suffix}")


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("magic", [b"PK\1\2", b"PK\3\4"])
def test_a_zip_with_a_damaged_directory_is_refused(tmp_path, magic, suffix):
    """Found by fuzzing."""
    path = tmp_path / f"a{suffix}"
    torch.save({"w": torch.ones(1)}, path)
    path.write_bytes(path.read_bytes().replace(magic, b"XX\1\2"))
    with pytest.raises(WeightsError, match="cannot read weights"):
        read_weights(path)


EXTRAS = {
    "numpy_scalar": np.float64(0.5),
    "numpy_array": np.arange(3),
    "path": pathlib.PurePosixPath("a/b"),
    "here": Path("a/b"),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_harmless_objects_beside_the_weights_are_allowed(tmp_path, name):
    torch.save({"model": {"w": torch.ones(2)}, "other": [EXTRAS[name]]}, tmp_path / "s.pth")
    assert read_weights(tmp_path / "s.pth")["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("other", [nn.Linear(1, 1), {"model": {"w": torch.zeros(1)}, "call": Call(print, "executed")}])
def test_other_objects_are_refused_in_one_line(tmp_path, capsys, other):
    torch.save(other, tmp_path / "s.pth")
    with pytest.raises(WeightsError) as caught:
        read_weights(tmp_path / "s.pth")
    message = str(caught.value)
    assert "\n" not in message
    assert "executed" not in capsys.readouterr().out
    assert ("torch.nn.modules.linear.Linear" if isinstance(other, nn.Module) else "print") in message


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(1).expand(10**9, 4), r"w is \[1000000000, 4\], but the file holds fewer values"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(3, dtype=torch.complex64), "complex"),
    ],
)
def test_tensors_that_no_model_has_are_refused(tmp_path, tensor, says):
    torch.save({"model": {"w": tensor}}, tmp_path / "w.pth")
    for read in (read_weights, read_model):
        with pytest.raises(WeightsError, match=says):
            read(tmp_path / "w.pth")


def test_values_that_are_not_finite_are_not_loaded():
    for module in (nn.Linear(2, 2), ClipTeacher(CONFIG)):
        state = {key: value.clone() for key, value in module.state_dict().items()}
        name = next(iter(state))
        state[name].flatten()[0] = float("nan")
        with pytest.raises(WeightsError, match=f"{name} holds values that are not finite"):
            load_exactly(module, state, "model")
    classifier = VideoClassifier(ClassifierConfig(image_size=32, frames=2, width=64, depth=1, heads=1, num_classes=3))
    spoiled = {**classifier.state_dict(), "head.bias": torch.full((3,), float("inf"))}
    with pytest.raises(WeightsError, match=r"head\.bias holds values that are not finite"):
        load_classifier(classifier, spoiled)


@pytest.mark.parametrize(
    "extra",
    [
        {"config": {"classifier": 3, "data": 5, "test": [1], "student": "x"}},
        {"config": {"classifier": {"frames": "x", "heads": []}}},
        {"config": {"student": {"image_size": {}, "frames": -1}}},
        {"config": {}, "schedule": {"classes": [1, 2, 3]}},
        {"args": argparse.Namespace(num_frames="x", data_set=5, sampling_rate="a", test_num_segment=-3, model=7)},
    ],
)
def test_settings_of_other_types_are_left_out_or_refused(tmp_path, extra):
    sizes = ClassifierConfig(image_size=32, frames=2, width=64, depth=1, heads=1, num_classes=3)
    torch.save({"model": VideoClassifier(sizes).state_dict(), **extra}, tmp_path / "w.pth")
    assert not read_model(tmp_path / "w.pth")[1].get("classes")
    for read in (
        lambda path: load_encoder(path, frames=2, image_size=32),
        lambda path: evaluate.read_settings(["--checkpoint", path]),
    ):
        with contextlib.suppress(RunError):
            read(str(tmp_path / "w.pth"))


def test_the_command_of_the_advice_works(tmp_path):
    """A file whose key `model` is a whole module, with other keys."""
    torch.save({"model": nn.Linear(2, 2), "epoch": 1}, tmp_path / "s.pth")
    with pytest.raises(WeightsError) as caught:
        read_weights(tmp_path / "s.pth")
    code = str(caught.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert read_weights(tmp_path / "weights.pth").keys() == {"weight", "bias"}


def test_top_keys_in_any_nesting(tmp_path):
    torch.save({"state_dict": {"module": {"model": {"w": torch.ones(1)}}}, "epoch": 1}, tmp_path / "s.pth")
    assert list(read_weights(tmp_path / "s.pth")) == ["w"]


@pytest.mark.parametrize("source", ["https://host/w.pth", "reference://a/b", "simplecache::https://host/w.pth"])
def test_urls_are_not_opened(source):
    for read in (read_weights, read_model):
        with pytest.raises(WeightsError, match="download it first"):
            read(source)
    with pytest.raises(WeightsError, match="no folder"):
        read_bert(source)


def shards(folder: Path, state: dict[str, Tensor], kind: str) -> None:
    keys = list(state)
    suffix = ".safetensors" if kind == "model.safetensors" else ".bin"
    names = [f"{kind.removesuffix(suffix)}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for name, half in zip(names, halves, strict=True):
        part = {key: state[key].contiguous() for key in half}
        save_file(part, folder / name) if suffix == ".safetensors" else torch.save(part, folder / name)
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_weights(tmp_path, kind):
    state = tower()
    shards(tmp_path, state, kind)
    found = read_weights(tmp_path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"w": "../model.safetensors"}, r"'\.\./model\.safetensors', which is not a weight file of this folder"),
        ({"w": "/etc/passwd"}, "not a weight file of this folder"),
        ({"w": 5}, "not a weight file of this folder"),
        ({"w": "model-2.safetensors"}, "names model-2.safetensors, which is missing"),
        ([], "no weight_map"),
    ],
)
def test_an_index_of_shards_that_lies_is_refused(tmp_path, places, words):
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(WeightsError, match=words):
        read_weights(tmp_path / "in")


def test_a_deeply_nested_config_is_an_error_of_one_line(tmp_path):
    save_file(tower(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(WeightsError, match=r"config\.json"):
        read_weights(tmp_path)


OPEN_CLIP = {"model_cfg": {"embed_dim": 16, "vision_cfg": {}}}


def test_the_right_file_of_a_timm_repo_is_read(tmp_path):
    """timm's CLIP repos have timm's image tower and open_clip's whole model."""
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_clip_224"}))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    save_file(to_timm(ClipTeacher(GELU).state_dict()), tmp_path / "model.safetensors")
    state = tower()
    save_file(state, tmp_path / "open_clip_model.safetensors")
    teacher = ClipTeacher(GELU)
    load_clip_teacher(teacher, read_weights(tmp_path))
    assert torch.equal(teacher.proj, state["visual.proj"])


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"head.bias": torch.zeros(state["proj"].shape[1])}
    pairs = {
        "ln_pre": "norm_pre",
        "ln_post": "norm",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "transformer.resblocks": "blocks",
    }
    pairs |= {
        "attn.in_proj_": "attn.qkv.",
        "attn.out_proj": "attn.proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for key, value in state.items():
        if key == "proj":
            found["head.weight"] = value.T.contiguous()
        elif key == "class_embedding":
            found["cls_token"] = value[None, None]
        elif key == "positional_embedding":
            found["pos_embed"] = value[None]
        elif key == "conv1.weight":
            found["patch_embed.proj.weight"] = value.squeeze(2)
        else:
            for ours, theirs in pairs.items():
                key = key.replace(ours, theirs)
            found[key] = value
    return found


@pytest.mark.parametrize("prefix", ["", "visual.trunk.", "module.visual.trunk."])
def test_timms_image_tower_is_converted(tmp_path, prefix):
    state = ClipTeacher(GELU).state_dict()
    save_file({prefix + key: value for key, value in to_timm(state).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_clip_224"}))
    teacher = ClipTeacher(GELU)
    load_clip_teacher(teacher, read_weights(tmp_path))
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "config_name", "config", "activation"),
    [
        ("open_clip_model.safetensors", "open_clip_config.json", OPEN_CLIP, "gelu"),
        ("open_clip_model.safetensors", "open_clip_config.json", {"model_cfg": {"quick_gelu": True}}, "quick_gelu"),
        ("weights.safetensors", "open_clip_config.json", OPEN_CLIP, "gelu"),
        ("model.safetensors", "config.json", {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}, "gelu"),
        ("model.safetensors", "config.json", {"model_type": "clip_vision_model"}, "quick_gelu"),
        ("model.safetensors", "config.json", {"model_type": "bert", "hidden_act": "gelu"}, None),
        ("model.safetensors", "config.json", {"architecture": "vit_base_patch16_clip_quickgelu_224"}, "quick_gelu"),
        ("model.safetensors", "notes.json", {}, None),
    ],
)
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_clip_runs_with_its_own_activation_alone(tmp_path, capsys, name, config_name, config, activation, as_folder):
    if as_folder and name == "weights.safetensors":
        pytest.skip("not a name that a folder is searched for")
    save_file(tower(), tmp_path / name)
    (tmp_path / config_name).write_text(json.dumps(config))
    weights = read_weights(tmp_path if as_folder else tmp_path / name)
    assert weights.activation == activation
    for own in (CONFIG, GELU):
        if activation in (None, own.activation):
            load_clip_teacher(ClipTeacher(own), weights)
            said = capsys.readouterr().err
            assert (f"--teacher.activation {own.activation}" in said) == (activation is None)
        else:
            with pytest.raises(WeightsError, match=f"set --teacher.activation {activation}"):
                load_clip_teacher(ClipTeacher(own), weights)


@pytest.mark.timeout(30)
def test_a_dictionary_that_holds_itself_is_not_unwrapped_without_end(tmp_path):
    state = {"x": torch.zeros(2)}
    state["model"] = state
    torch.save(state, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").keys() == {"x"}


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_weights_of_eight_bits_are_checked_as_others(value):
    found = find_not_finite({"x": torch.full((3,), value).to(torch.float8_e4m3fn)})
    assert found == (None if value == 1 else "x")


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/x.pth", "a\nb.pth"])
def test_impossible_names_are_refused_in_one_line(name):
    with pytest.raises(WeightsError, match="no weights at"):
        read_weights(name)

"""Reading and writing weight files. Files are not trusted: nothing in them is executed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from umt_fast.config import Activation
from umt_fast.errors import RunError
from umt_fast.files import expand_home, read_small, replacing
from umt_fast.weights.torchscript import is_torchscript, read_torchscript, refuse_bomb

T = TypeVar("T")
TensorDict = dict[str, Tensor]

HOW_TO_GET_CLIP = """Give --teacher-weights one of:
  ViT-B-16.pt or ViT-L-14.pt            OpenAI's archives, as `clip.load` downloads them
  vit_b16.pth or vit_l14.pth            the image tower extracted by the Unmasked Teacher authors
  openai/clip-vit-base-patch16          a Hugging Face repo id (needs network and `pip install huggingface_hub`),
  path/to/clip-vit-base-patch16         or a folder with its config.json and model.safetensors
  path/to/open_clip_model.safetensors   open_clip weights, with their open_clip_config.json beside them"""

_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_LARGEST_JSON = 64 << 20
"""Largest config or index of shards, bytes; a real index has some hundred kilobytes."""


class WeightsError(RunError, ValueError):
    """Weights cannot be found, read or used."""


class Weights(TensorDict):
    """Tensors by key, and facts about the model from the files beside them."""

    def __init__(self, tensors: TensorDict, origin: Path, config: Path | None = None) -> None:
        """Raises WeightsError for a config that cannot be read."""
        super().__init__(tensors)
        self.activation: Activation | None = "quick_gelu" if is_torchscript(origin) else None
        """The activation that a CLIP was trained with; None if no config says so. TorchScript archives are OpenAI's,
        which use QuickGELU."""
        self.origin = origin
        """The config that names the activation, else the file of the tensors."""
        self.config = config
        """The config.json or open_clip_config.json beside the tensors, if there is one."""
        if config is not None and (stated := _activation_in(config)):
            self.activation, self.origin = stated, config


def read_weights(source: str | Path) -> Weights:
    """Tensors of a weight file, a folder (Hugging Face, open_clip, timm) or a repo id, by key.

    Files: .safetensors; PyTorch's .pt/.pth/.bin, unpickled with weights_only, from under top keys `model`,
    `state_dict`, `module` or `model_state` in any nesting; TorchScript archives (OpenAI's CLIP), whose code is not
    run. In folders and repos the weights may be sharded. Raises WeightsError.
    """
    if not source:
        raise WeightsError(f"no teacher weights are named.\n{HOW_TO_GET_CLIP}")
    if "://" in str(source) or "::" in str(source):
        raise WeightsError(f"{source}: weights are read from files, folders and Hugging Face repos; download it first")
    path = expand_home(source)
    if os.path.isdir(path):  # False for a name that is too long, where pathlib raises
        return _read_set(lambda name: path / name if (path / name).is_file() else None, f"{path}")
    if os.path.isfile(path):
        return Weights(_read_file(path), path, _config_beside(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in _SUFFIXES:
        return _read_repo(str(source))
    raise WeightsError(f"no weights at {source}: no such file or folder.\n{HOW_TO_GET_CLIP}")


def read_model(source: str | Path) -> tuple[TensorDict, dict[str, Any]]:
    """The tensors of `read_weights`, and the settings that the file holds, by name; {} if it has none.

    Settings are the `config` of our checkpoints, for classifiers with the class names under `classes`; the argument
    object of published checkpoints; or the config.json of Hugging Face's VideoMAE. Raises WeightsError.
    """
    path = expand_home(source)
    if os.path.isfile(path) and path.suffix != ".safetensors" and not is_torchscript(path):
        content = _load_content(path)
        settings = content.get("config", content.get("args")) if isinstance(content, dict) else None
        if isinstance(settings, argparse.Namespace):
            settings = vars(settings)
        if isinstance(settings, dict) and isinstance(content.get("schedule"), dict):
            names = content["schedule"].get("classes")
            named = isinstance(names, list) and all(isinstance(name, str) for name in names)
            settings = {**settings, "classes": names if named else None}
        return _tensors_of(content, path), settings if isinstance(settings, dict) else {}
    try:
        weights = read_weights(source)
    except WeightsError as error:  # removes the advice on CLIP weights
        raise WeightsError(str(error).removesuffix(HOW_TO_GET_CLIP).rstrip()) from None
    return weights, {} if weights.config is None else videomae_settings(_read_json(weights.config))


def videomae_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Convert the config.json of Hugging Face's VideoMAE to the settings of our checkpoints; {} for other models.

    Raises WeightsError for a size that is not a positive integer, such as that of clips that are not square.
    """
    if config.get("model_type") != "videomae":
        return {}
    sizes = {ours: config.get(theirs, default) for ours, (theirs, default) in _VIDEOMAE_SIZES.items()}
    if wrong := [f"{name} = {value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]:
        raise WeightsError(f"config.json of a VideoMAE: {wrong[0]}; give an integer >= 1")
    settings: dict[str, Any] = {
        "classifier": {**sizes, "positions": "direct"},
        "data": {"rule": "strided", "rate": 4.0},
        "test": {"segments": 5, "crops": 3},
    }
    labels = config.get("id2label")
    if isinstance(labels, dict) and all(str(number) in labels for number in range(len(labels))):
        settings["classes"] = [str(labels[str(number)]) for number in range(len(labels))]
    return settings


_VIDEOMAE_SIZES = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "frames": ("num_frames", 16),
    "tubelet_size": ("tubelet_size", 2),
    "heads": ("num_attention_heads", 12),
}
"""Our name of each size of a VideoMAE -> Hugging Face's name and its default."""


def section_of(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a file's settings; empty if it is missing or not a section."""
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def using_settings_of(source: str | Path) -> Iterator[None]:
    """Turn errors that settings of unexpected types cause into WeightsError."""
    try:
        yield
    except RunError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{source}: the settings in it cannot be used: {error}") from None


def find_not_finite(state: Mapping[str, Any]) -> str | None:
    """Name of the first tensor with a value that is not finite."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            plain = value.float() if value.itemsize == 1 else value  # torch has no `isfinite` for 8 bits
            if not bool(plain.isfinite().all()):
                return name
    return None


def write_weights(path: str | Path, state: TensorDict) -> None:
    """Write tensors as .safetensors, or as .pth under the top key `model`."""
    path = Path(path)
    if path.suffix == ".safetensors":
        save_safetensors(path, state)
    else:
        torch.save({"model": state}, path)


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file atomically, and make its folder. Raises OSError, such as for a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path, locked=False) as aside:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}, is the disk full? {error}") from None


def _read_file(path: Path) -> TensorDict:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _or_refuse(path, lambda: load_file(path))
    if is_torchscript(path):
        return _or_refuse(path, lambda: read_torchscript(path))
    return _tensors_of(_load_content(path), path)


def _load_content(path: Path) -> Any:
    """Content of a PyTorch file; nothing in it is executed."""

    def load() -> Any:
        if zipfile.is_zipfile(path):
            refuse_bomb(path)
        with torch.serialization.safe_globals(_ALLOWED_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)

    return _or_refuse(path, load)


def _or_refuse(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:  # every reader has its own error classes
        raise WeightsError(f"cannot read weights from {path}: {_reason(error, path)}") from error


def _tensors_of(content: Any, path: Path) -> TensorDict:
    """The tensors by name, below top keys in any nesting. Raises WeightsError."""
    for _ in range(_MOST_NESTED):  # a dictionary may contain itself
        top = content if isinstance(content, dict) else {}
        inner = next((top[key] for key in _TOP_KEYS if isinstance(top.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no tensors by name")
    found = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    refuse_odd_tensors(found, path)
    return found


def refuse_odd_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise WeightsError unless all hold real numbers, each one in its own place."""
    for key, value in tensors.items():
        if value.is_nested or value.is_meta or value.layout != torch.strided or value.is_quantized:
            raise WeightsError(f"{path}: {key} is a sparse, nested or quantized tensor, or one without values")
        if value.is_complex():
            raise WeightsError(f"{path}: {key} holds complex numbers, which no model here has")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # or a huge model follows
            raise WeightsError(f"{path}: {key} is {list(value.shape)}, but the file holds fewer values")


_MOST_NESTED = 16
_TOP_KEYS = ("model", "state_dict", "module", "model_state")


class _Ignored:
    """Replaces objects that trainers store beside the weights; it accepts any arguments and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


_ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,  # UMT's trainer stores its command line
    *(
        (_Ignored, f"{module}.{name}")
        for module, names in {
            "numpy": "dtype ndarray",
            "numpy.core.multiarray": "scalar _reconstruct",
            "numpy._core.multiarray": "scalar _reconstruct",
            "pathlib": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
            "pathlib._local": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",  # Python 3.13
        }.items()
        for name in names.split()
    ),
]


def _reason(error: Exception, path: Path) -> str:
    """The reason in one line, without torch's long advice to turn off the protection."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        command = (
            f"import torch; c = torch.load({str(path)!r}, weights_only=False); "
            "c = c.get('model', c.get('state_dict', c)) if isinstance(c, dict) else c; "
            "torch.save({'model': c if isinstance(c, dict) else c.state_dict()}, 'weights.pth')"
        )
        return (
            f"it holds objects of {found[1]} besides tensors, which are not loaded here because that can run any code. "
            f'If you trust the file, save its tensors alone: python -c "{command}"'
        )
    if "Weights only load failed" in str(error):
        return "it is not a file of weights"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# The first file that exists is read: a folder may have the same model under several of these names.
_HUGGING_FACE = ("model.safetensors", "model.safetensors.index.json")
_HUGGING_FACE_OLD = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_CANDIDATES = (*_HUGGING_FACE, *_OPEN_CLIP, *_HUGGING_FACE_OLD)


def _read_set(fetch: Callable[[str], Path | None], where: str) -> Weights:
    """Read the weights in a folder or repo; `fetch` returns the local path of a file, or None. Raises WeightsError."""
    config = fetch("config.json")
    # timm's repos have timm's own image tower as model.safetensors, and the original model beside it.
    is_timm = config is not None and "architecture" in _read_json(config)
    for name in (*_OPEN_CLIP, *_HUGGING_FACE, *_HUGGING_FACE_OLD) if is_timm else _CANDIDATES:
        path = fetch(name)
        if path is None:
            continue
        beside = fetch("open_clip_config.json") if name in _OPEN_CLIP else config
        if not name.endswith(".index.json"):
            return Weights(_read_file(path), path, beside)
        state: TensorDict = {}
        for shard in _shards_in(path):
            shard_path = fetch(shard)
            if shard_path is None:
                raise WeightsError(f"{path} names {shard}, which is missing")
            state.update(_read_file(shard_path))
        return Weights(state, path, beside)
    raise WeightsError(f"{where} holds none of {', '.join(_CANDIDATES)}\n{HOW_TO_GET_CLIP}")


def _shards_in(path: Path) -> list[str]:
    """File names of an index of sharded weights. Raises WeightsError for one outside the index's folder."""
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise WeightsError(f"cannot read {path}: no weight_map")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(_SUFFIXES):
            raise WeightsError(f"{path} names the shard {name!r}, which is not a weight file of this folder")
    return list(dict.fromkeys(shards.values()))


def _config_beside(path: Path) -> Path | None:
    """The config in the folder of a weight file."""
    names = ["open_clip_config.json", "config.json"]
    for name in names if path.name.startswith("open_clip") else reversed(names):
        if (path.parent / name).is_file():
            return path.parent / name
    return None


def _activation_in(path: Path) -> Activation | None:
    """Activation function of the CLIP that a config describes; None for another kind of model. Raises WeightsError."""
    config = _read_json(path)
    try:
        if "model_cfg" in config:  # open_clip's
            return "quick_gelu" if config["model_cfg"].get("quick_gelu", False) else "gelu"
        if "architecture" in config:  # timm's
            name = f"{config['architecture']}.{config.get('pretrained_cfg', {}).get('tag', '')}"
            return "quick_gelu" if "quickgelu" in name or name.endswith(".openai") else "gelu"
        if not str(config.get("model_type", "clip")).startswith("clip"):
            return None
        stated = config.get("vision_config", config).get("hidden_act", "quick_gelu")
    except (AttributeError, TypeError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    known: dict[str, Literal["gelu", "quick_gelu"]] = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
    if not isinstance(stated, str) or stated not in known:
        raise WeightsError(f"{path}: hidden_act = {str(stated)[:100]!r}; the teacher computes quick_gelu or gelu")
    return known[stated]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small(path, _LARGEST_JSON))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    return found


def _read_repo(repo: str) -> Weights:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise WeightsError(
            f"no file or folder {repo}; to fetch it as a Hugging Face repo: pip install huggingface_hub.\n"
            f"{HOW_TO_GET_CLIP}"
        ) from None

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, name))  # uses the local cache
        except LocalEntryNotFoundError:  # the hub cannot be reached
            raise
        except EntryNotFoundError:  # the repo has no such file
            return None

    try:
        return _read_set(fetch, f"the Hugging Face repo {repo}")
    except WeightsError:
        raise
    except Exception as error:  # offline, missing, gated: the hub has many classes for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"cannot fetch {repo} from the Hugging Face hub: {reason}\n{HOW_TO_GET_CLIP}") from error

"""Weight files: reading the formats in use, and CLIP's image tower under any of its key names."""

from __future__ import annotations

import argparse
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import VitConfig
from umt_fast.errors import RunError
from umt_fast.models.classifier import VideoClassifier
from umt_fast.models.clip_vision import ClipTeacher
from umt_fast.models.heads import bare_student
from umt_fast.models.positions import resize_positions
from umt_fast.models.video_text import VideoQaModel, VideoTextModel, bare_video_text

T = TypeVar("T")
TensorDict = dict[str, Tensor]

HOW_TO_GET_CLIP = """Give --teacher-weights one of:
  ViT-B-16.pt or ViT-L-14.pt            OpenAI's archives, as `clip.load` downloads them
  vit_b16.pth or vit_l14.pth            the image tower extracted by the Unmasked Teacher authors
  openai/clip-vit-base-patch16          a Hugging Face repo id (needs network and `pip install huggingface_hub`),
  path/to/clip-vit-base-patch16         or a folder with its config.json and model.safetensors
  path/to/open_clip_model.safetensors   open_clip weights of a QuickGELU model"""


class WeightsError(RunError, ValueError):
    """Weights that cannot be found, read or used."""


def read_weights(source: str | Path) -> TensorDict:
    """Tensors of a weight file, a Hugging Face folder or a repo id, by key.

    Files: .safetensors; PyTorch's .pt/.pth/.bin, unpickled with weights_only, from under a top key `model`,
    `state_dict` or `module` if there is one; TorchScript archives (OpenAI's CLIP). Raises WeightsError.
    """
    if not source:
        raise WeightsError(f"no teacher weights are named.\n{HOW_TO_GET_CLIP}")
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in (".pt", ".pth", ".bin", ".safetensors"):
        return _read_repo(str(source))
    raise WeightsError(f"no weights at {source}: no such file or folder.\n{HOW_TO_GET_CLIP}")


def read_model(source: str | Path) -> tuple[TensorDict, dict[str, Any]]:
    """As `read_weights`, with the settings that the file holds beside them, by name; {} where there are none.

    They are the `config` of a checkpoint of ours, or the argument object of a published one.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix != ".safetensors" and not _is_torchscript(path):
        content = _load_content(path)
        settings = content.get("config", content.get("args")) if isinstance(content, dict) else None
        if isinstance(settings, argparse.Namespace):
            settings = vars(settings)
        return _tensors_of(content, path), settings if isinstance(settings, dict) else {}
    return read_weights(source), {}


def write_weights(path: str | Path, state: TensorDict) -> None:
    """Write tensors as .safetensors, or as .pth under the top key `model`."""
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"model": state}, path)


def _read_file(path: Path) -> TensorDict:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _or_refuse(path, lambda: load_file(path))
    if _is_torchscript(path):
        return _or_refuse(path, lambda: dict(torch.jit.load(path, map_location="cpu").state_dict()))
    return _tensors_of(_load_content(path), path)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _load_content(path: Path) -> Any:
    """What a file of PyTorch holds; nothing in it is executed."""
    # UMT's trainer stores its command line, a Namespace, beside the model.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return _or_refuse(path, lambda: torch.load(path, map_location="cpu", weights_only=True))


def _or_refuse(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:  # every reader has its own; all mean the same to the caller
        raise WeightsError(f"cannot read weights from {path}: {error}") from error


def _tensors_of(content: Any, path: Path) -> TensorDict:
    for key in ("model", "state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no tensors by name")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


_FOLDER_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


def _read_folder(path: Path) -> TensorDict:
    for name in ("config.json", "open_clip_config.json"):
        if (path / name).is_file():
            _check_activation(path / name)
    for name in _FOLDER_FILES:
        if (path / name).is_file():
            return _read_file(path / name)
    raise WeightsError(f"{path} holds none of {', '.join(_FOLDER_FILES)}")


def _check_activation(path: Path) -> None:
    """Refuse CLIPs trained with GELU: the teacher computes QuickGELU and its outputs would be silently wrong."""
    try:
        config = json.loads(path.read_text())
        if path.name.startswith("open_clip"):
            quick = config.get("model_cfg", config).get("quick_gelu", False)
        else:
            quick = config.get("vision_config", config).get("hidden_act", "quick_gelu") == "quick_gelu"
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    if not quick:
        raise WeightsError(f"{path}: this CLIP was trained with GELU; the teacher needs one with QuickGELU")


def _read_repo(repo: str) -> TensorDict:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise WeightsError(
            f"no file or folder {repo}; to fetch it as a Hugging Face repo: pip install huggingface_hub.\n"
            f"{HOW_TO_GET_CLIP}"
        ) from None
    folder = None
    try:
        for name in ("config.json", "open_clip_config.json", *_FOLDER_FILES):
            try:
                folder = Path(hf_hub_download(repo, name)).parent  # from the cache where it is there
            except LocalEntryNotFoundError:  # the hub is out of reach
                raise
            except EntryNotFoundError:  # the repo has no such file
                continue
            if name in _FOLDER_FILES:
                break
    except Exception as error:  # offline, missing, gated: the hub has many classes for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"cannot fetch {repo} from the Hugging Face hub: {reason}\n{HOW_TO_GET_CLIP}") from error
    if folder is None:
        raise WeightsError(f"the Hugging Face repo {repo} has none of {', '.join(_FOLDER_FILES)}\n{HOW_TO_GET_CLIP}")
    return _read_folder(folder)


def clip_image_tower(state: TensorDict) -> TensorDict:
    """The image tower of a CLIP state dict under OpenAI's visual key names; other towers are dropped.

    Understands OpenAI and open_clip (`visual.*`), UMT's extraction (bare names) and Hugging Face (`vision_model.*`).
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("visual.") for key in state):
        return {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    if any(key.startswith("vision_model.") for key in state):
        return _from_hugging_face(state)
    return state


_HUGGING_FACE_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",  # the library's own spelling
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _from_hugging_face(state: TensorDict) -> TensorDict:
    tower: TensorDict = {}
    for key, value in state.items():
        if key == "visual_projection.weight":
            tower["proj"] = value.T
        if not key.startswith("vision_model.") or key.endswith("position_ids"):
            continue
        name = key.removeprefix("vision_model.")
        for theirs, ours in _HUGGING_FACE_NAMES.items():
            name = name.replace(theirs, ours)
        if match := re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            tower[f"{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            tower[name] = value
    return tower


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """Class and patch positions [1 + g^2, D] resampled bicubically to a `grid` x `grid` frame, as UMT does."""
    cls, patches = positions[:1], positions[1:]
    side = math.isqrt(len(patches))
    if side**2 != len(patches):
        raise WeightsError(f"positional_embedding {list(positions.shape)} is no class token and square of patches")
    if side == grid:
        return positions
    image = patches.float().T.reshape(1, -1, side, side)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((cls, image.flatten(2)[0].T.to(cls.dtype)))


def inflate(weight: Tensor, frames: int) -> Tensor:
    """A 2-D kernel [D,3,p,p] as [D,3,frames,p,p]: on the middle frame, zero on the others, as UMT does."""
    if weight.dim() == 5:
        return weight
    inflated = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    inflated[:, :, frames // 2] = weight
    return inflated


def umt_state_dict(student: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the student on the CPU under UMT's checkpoint keys. Published files hold them under `model`."""
    return {key: value.detach().to("cpu", copy=True) for key, value in bare_student(student).state_dict().items()}


def load_umt_student(student: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load UMT's checkpoint keys, bare or under `model`. Raises WeightsError naming what is missing or misshapen."""
    state = state_dict.get("model", state_dict)
    _load(bare_student(student), {key.removeprefix("module."): value for key, value in state.items()}, "student")


def load_clip_teacher(teacher: ClipTeacher, state_dict: Mapping[str, Any]) -> None:
    """Load a CLIP image tower under OpenAI's, open_clip's, UMT's or Hugging Face's keys.

    Positions of another grid are resampled bicubically and 2-D patch weights inflated in time, as UMT does. Raises
    WeightsError naming what is missing or misshapen.
    """
    state = clip_image_tower(dict(state_dict))
    if "positional_embedding" in state:
        state["positional_embedding"] = resample_positions(state["positional_embedding"], teacher.config.grid)
    if "conv1.weight" in state:
        state["conv1.weight"] = inflate(state["conv1.weight"], teacher.config.tubelet_size)
    _load(teacher, state, "teacher")


def _load(module: torch.nn.Module, state: Mapping[str, Any], name: str) -> None:
    own = module.state_dict()
    problems = [f"missing {key} {list(own[key].shape)}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {list(state[key].shape)}, this {name} has {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise WeightsError(f"these weights do not fit the {name}: {shown}")
    module.load_state_dict(state)


@dataclass
class LoadReport:
    """What became of a state dict's keys, named as the model's."""

    loaded: list[str]
    missing: list[str]
    """In the model alone: these keep their values."""
    unexpected: list[str]
    """In the file alone."""
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """In both, with the file's shape and the model's: these keep the model's values."""

    def lines(self) -> list[str]:
        """Each key that was not loaded and why, for people."""
        lines = [f"not in the file, starts anew: {key}" for key in self.missing]
        lines += [f"not in the model, left out: {key}" for key in self.unexpected]
        return lines + [
            f"of another shape, starts anew: {key}, {list(file)} in the file, {list(model)} in the model"
            for key, (file, model) in self.other_shape.items()
        ]

    def unforeseen(self) -> list[str]:
        """Lines of the keys that fine-tuning does not leave out by design.

        By design the head, the norm before it and positions may start anew, and what follows the blocks of a
        pre-trained model is left out. Everything else, a block of another width say, is a mistake.
        """
        ours, theirs = ("head.", "fc_norm.", "norm.", "pos_embed"), ("norm.", "fc_norm.", "clip_decoder.", "head.")
        return LoadReport(
            [],
            [key for key in self.missing if not key.startswith(ours)],
            [key for key in self.unexpected if not key.startswith(theirs)],
            {key: shapes for key, shapes in self.other_shape.items() if not key.startswith("head.")},
        ).lines()


def load_classifier(
    model: VideoClassifier,
    state_dict: Mapping[str, Any],
    *,
    delete_head: bool = False,
    class_map: Sequence[int] | None = None,
    frames: int | None = None,
) -> LoadReport:
    """Load a pre-trained or fine-tuned state dict by the published rules, and say what was not loaded. Never raises
    for a key that does not fit; `LoadReport.unforeseen` tells the mistakes from what is meant.

    A head of 710 classes (K710) gives its first 400 rows to a model of 400, or the rows `class_map`. Prefixes of
    wrappers are removed. Positions of another number of frames or grid are resampled; `frames` is how many token
    frames the file has, where its settings say so. Without, they are taken to be the published 8 frames where that
    fits, else as many as the model's grid makes them. A pre-trained `encoder.norm` is not put into `fc_norm`.
    """
    state = _unwrapped(state_dict)
    weight = state.get("head.weight")
    if delete_head:
        state = {key: value for key, value in state.items() if key not in ("head.weight", "head.bias")}
    elif weight is not None and (class_map is not None or (len(weight) == 710 and model.config.num_classes == 400)):
        rows = torch.as_tensor(range(400) if class_map is None else class_map)
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= len(weight)):
            raise WeightsError(
                f"the class map names rows {int(rows.min())} to {int(rows.max())} of a head of {len(weight)} classes"
            )
        state = {**state, "head.weight": weight[rows], "head.bias": state["head.bias"][rows]}
    state = _encoder_names(state)
    if "pos_embed" in state:
        state["pos_embed"] = fit_positions(state["pos_embed"], model.config, frames)
    own = model.state_dict()
    fits = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    model.load_state_dict(fits, strict=False)
    return LoadReport(
        [key for key in own if key in fits],
        [key for key in own if key not in state],
        [key for key in state if key not in own],
        {
            key: (tuple(value.shape), tuple(own[key].shape))
            for key, value in state.items()
            if key in own and key not in fits
        },
    )


def strip_prefixes(state_dict: Mapping[str, Any]) -> TensorDict:
    """Tensors under the names of the encoder itself: no top key, nothing of DDP, torch.compile or a wrapping model."""
    return _encoder_names(_unwrapped(state_dict))


def _encoder_names(state: TensorDict) -> TensorDict:
    """Each key less a leading `backbone.`, else a leading `encoder.`."""
    return {
        key.removeprefix("backbone." if key.startswith("backbone.") else "encoder."): value
        for key, value in state.items()
    }


def _unwrapped(state_dict: Mapping[str, Any]) -> TensorDict:
    """The tensors, from under a top key, without the prefixes of DDP and torch.compile."""
    state: Any = state_dict
    for key in ("model", "module", "state_dict", "model_state"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for prefix in ("module.", "_orig_mod.", "module."):
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def fit_positions(table: Tensor, config: VitConfig, frames: int | None) -> Tensor:
    """Positions [1,M,D] of a file for the model, from `frames` token frames; see `load_classifier`.

    Those that are not whole square grids are left as they are.
    """
    rows, new_frames = table.shape[1], config.token_frames
    guesses = [frames] if frames is not None else [8 // config.tubelet_size, rows // config.grid**2]
    if frames is None and rows == config.tokens:
        return table
    for guess in guesses:
        if guess and rows % guess == 0 and math.isqrt(rows // guess) ** 2 == rows // guess:
            return resize_positions(table[0].float(), guess, new_frames, config.grid, time_first=True)[None]
    return table


def video_text_state_dict(model: nn.Module) -> TensorDict:
    """A copy on the CPU of a stage-2 or question-answering model under its published keys, teacher included.

    Parameters that two names share are there under both, as in the published files, which hold them under `model`.
    """
    state: TensorDict = {}
    for key, value in bare_video_text(model).state_dict().items():
        copy = value.detach().to("cpu", copy=True)
        if key.endswith("embeddings.word_embeddings.weight"):
            positions = key.replace("word_embeddings", "position_embeddings")
            count = bare_video_text(model).get_parameter(positions).shape[0]
            state[key.replace("word_embeddings.weight", "position_ids")] = torch.arange(count)[None]
        state[key] = copy
        if key.endswith("cls.predictions.transform.LayerNorm.bias"):
            head = key.removesuffix("transform.LayerNorm.bias")
            text = head.removesuffix("cls.predictions.")
            state[f"{head}decoder.weight"] = state[f"{text}bert.embeddings.word_embeddings.weight"]
            state[f"{head}decoder.bias"] = state[f"{head}bias"]
    return state


def load_video_text(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Load published stage-2 or fine-tuned keys, bare or under `model`; questions start as published.

    The text encoder's `bert.` comes and goes as the model needs it, and the answer decoder of a model that has none in
    the file is made of the fusion layers. Returns the keys that have no place in the model: the teacher, alignment
    heads and language head in fine-tuning, for questions also the projections. Raises WeightsError for anything else
    that is missing, misshapen or left over: nothing is skipped in silence.
    """
    own = bare_video_text(model)
    wanted = own.state_dict()
    given = _unwrap(state_dict)
    source = {key: value for key, value in given.items() if not key.endswith(_COPIES)}
    for key in [key for key in given if key.endswith("cls.predictions.decoder.bias")]:
        source.setdefault(key.replace("decoder.bias", "bias"), given[key])
    if own.clip_teacher is not None and f"clip_teacher.{_POSITIONS}" in source:
        grid = own.clip_teacher.config.grid
        source[f"clip_teacher.{_POSITIONS}"] = resample_positions(source[f"clip_teacher.{_POSITIONS}"], grid)
    decodes = any(key.startswith("text_decoder.") for key in source)
    state, used = {}, set()
    for key in wanted:
        name = key
        if key.startswith("text_decoder.") and not decodes:
            name = re.sub(
                r"\.layer\.(\d+)\.",
                lambda found: f".layer.{int(found[1]) + own.config.text.fusion_layer}.",
                key.replace("text_decoder.", "text_encoder."),
            )
        for candidate in (name, name.replace("text_encoder.bert.", "text_encoder."), _with_bert(name)):
            if candidate in source:
                state[key] = source[candidate]
                used.add(candidate)
                break
    left = [key for key in source if key not in used]
    unwanted: tuple[str, ...] = ("clip_teacher.", "vision_encoder.clip_decoder.") if own.clip_teacher is None else ()
    if isinstance(own, VideoQaModel):
        unwanted += ("text_encoder.cls.", *_UNUSED_FOR_ANSWERS)
    elif not own.config.has_language_head:
        unwanted += ("text_encoder.cls.",)
    state |= {key: source[key] for key in left if not key.startswith(unwanted)}
    _load(own, state, "video-text model")
    head = "text_encoder.cls.predictions."
    copied = {f"{head}decoder.weight", f"{head}decoder.bias"} if f"{head}bias" in used else set()
    return [
        key for key in given if key in left or (key not in source and key not in copied and key.startswith(unwanted))
    ]


def load_stage1(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Start the video encoder of stage 2 or of question answering from a stage-1 checkpoint, bare or under `model`.

    Only the pooling norm is not in there and stays as it is. Returns the alignment heads' keys if the model has none.
    Raises WeightsError naming what is missing, misshapen or left over.
    """
    vision = bare_video_text(model).vision_encoder
    state = _unwrap(state_dict)
    left = [] if len(vision.clip_decoder) else [key for key in state if key.startswith("clip_decoder.")]
    state = {key: value for key, value in state.items() if key not in left}
    own = vision.state_dict()
    _load(vision, state | {key: own[key] for key in own if key.startswith("pool_norm.")}, "video encoder")
    return left


def load_bert(model: VideoTextModel, state_dict: Mapping[str, Any]) -> None:
    """Start the text encoder from a Hugging Face BERT, with its language head if the model has one.

    Cross-attention is not in there and stays as it is; the pooler and the next-sentence head are dropped. Raises
    WeightsError naming what is missing or misshapen.
    """
    state = {
        key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight").replace(".beta", ".bias"): value
        for key, value in _unwrap(state_dict).items()
    }
    dropped = ("pooler.", "cls.seq_relationship.", *(() if model.config.has_language_head else ("cls.",)))
    named = {}
    for key, value in state.items():
        if not key.startswith(dropped) and not key.endswith(_COPIES):
            named[key if key.startswith("cls.") or model.bert is model.text_encoder else f"bert.{key}"] = value
    own = model.text_encoder.state_dict()
    named |= {key: own[key] for key in own if ".crossattention." in key}
    _load(model.text_encoder, named, "text encoder")


def bert_folder(source: str | Path) -> Path:
    """The folder of a Hugging Face BERT with its weights and vocabulary, fetched if `source` is a repo id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise WeightsError(f"no folder {source}; give a Hugging Face folder of a BERT, or a repo id")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), allow_patterns=["config.json", "vocab.txt", *_FOLDER_FILES]))
    except ImportError:
        raise WeightsError(f"no folder {source}; to fetch it as a repo: pip install huggingface_hub") from None
    except Exception as error:  # offline, missing, gated: the hub has many classes for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"cannot fetch {source} from the Hugging Face hub: {reason}") from error


def read_bert(source: str | Path) -> TensorDict:
    """Tensors of a Hugging Face BERT, by key; `source` as of `bert_folder`. Raises WeightsError."""
    folder = bert_folder(source)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _read_file(folder / name)
    raise WeightsError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


_POSITIONS = "positional_embedding"
_COPIES = ("embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
"""Keys whose content is there under another, or is no parameter."""
_UNUSED_FOR_ANSWERS = ("temp", "vision_proj.", "text_proj.", "itm_head.", "vision_encoder.pool_norm.")


def _unwrap(state_dict: Mapping[str, Any]) -> TensorDict:
    """The tensors from under a top key `model` or `module`, and without DDP's prefix."""
    state: Mapping[str, Any] = state_dict
    for key in ("model", "module"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def _with_bert(key: str) -> str:
    """The key of a bare text encoder as it is where there is a language head."""
    inner = key.removeprefix("text_encoder.")
    return key if inner == key or inner.startswith(("bert.", "cls.")) else f"text_encoder.bert.{inner}"

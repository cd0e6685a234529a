"""Keys of video-text models: stage 2, retrieval and question answering."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from umt_fast.files import expand_home
from umt_fast.models.video_text import VideoQaModel, VideoTextModel, bare_video_text
from umt_fast.weights.files import TensorDict, WeightsError, read_weights
from umt_fast.weights.keys import load_exactly, resample_positions, strip_wrappers


def video_text_state_dict(model: nn.Module) -> TensorDict:
    """A copy of a stage-2 or question-answering model's tensors on the CPU under the published keys, with the teacher.

    Shared parameters appear under both names, as in the published files, which have all keys below `model`.
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
    """Load published stage-2 or fine-tuned keys, bare or below `model`.

    The prefix `bert.` of the text encoder is added or removed as the model needs it. If the file has no answer decoder,
    it is made from the fusion layers, as published. Returns the keys that the model does not have: teacher, alignment
    heads and language head in fine-tuning, for question answering also the projections. Raises WeightsError for any
    other missing, misshapen or unexpected key.
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
    load_exactly(own, state, "video-text model")
    head = "text_encoder.cls.predictions."
    copied = {f"{head}decoder.weight", f"{head}decoder.bias"} if f"{head}bias" in used else set()
    return [
        key for key in given if key in left or (key not in source and key not in copied and key.startswith(unwanted))
    ]


def load_stage1(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Load a stage-1 checkpoint, bare or below `model`, into the video encoder of stage 2 or of question answering.

    The pooling norm, which is not in the file, keeps its values. Returns the keys of alignment heads that the model
    does not have. Raises WeightsError that lists keys that do not fit.
    """
    vision = bare_video_text(model).vision_encoder
    state = _unwrap(state_dict)
    left = [] if len(vision.clip_decoder) else [key for key in state if key.startswith("clip_decoder.")]
    state = {key: value for key, value in state.items() if key not in left}
    own = vision.state_dict()
    load_exactly(vision, state | {key: own[key] for key in own if key.startswith("pool_norm.")}, "video encoder")
    return left


def load_bert(model: VideoTextModel, state_dict: Mapping[str, Any]) -> None:
    """Load a Hugging Face BERT into the text encoder, with its language head if the model has one.

    Cross-attention, which is not in the file, keeps its values; pooler and next-sentence head are dropped. Raises
    WeightsError that lists keys that do not fit.
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
    load_exactly(model.text_encoder, named, "text encoder")


def bert_folder(source: str | Path) -> Path:
    """The folder of a Hugging Face BERT, downloaded if `source` is a repo id. Raises WeightsError."""
    path = expand_home(source)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise WeightsError(f"no folder {source}; give a Hugging Face folder of a BERT, or a repo id")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), allow_patterns=list(_BERT_FILES)))
    except ImportError:
        raise WeightsError(f"no folder {source}; to fetch it as a repo: pip install huggingface_hub") from None
    except Exception as error:  # offline, missing, gated: the hub has many classes for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"cannot fetch {source} from the Hugging Face hub: {reason}; without a network, give --bert a folder"
        ) from error


def read_bert(source: str | Path) -> TensorDict:
    """Tensors of a Hugging Face BERT, by key; `source` as in `bert_folder`. Raises WeightsError."""
    folder = bert_folder(source)
    names = ("model.safetensors", "pytorch_model.bin")
    if not any((folder / f"{name}{ending}").is_file() for name in names for ending in ("", ".index.json")):
        raise WeightsError(f"{folder} holds neither {' nor '.join(names)}")
    return read_weights(folder)


_BERT_FILES = ("config.json", "vocab.txt", "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
_POSITIONS = "positional_embedding"
_COPIES = ("embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
"""Keys to skip: copies of other keys, and a table of indices."""
_UNUSED_FOR_ANSWERS = ("temp", "vision_proj.", "text_proj.", "itm_head.", "vision_encoder.pool_norm.")


def _unwrap(state_dict: Mapping[str, Any]) -> TensorDict:
    """The tensors below a top key `model` or `module`, without the prefixes of wrappers."""
    state: Mapping[str, Any] = state_dict
    for key in ("model", "module"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    return strip_wrappers({key: value for key, value in state.items() if isinstance(value, Tensor)})


def _with_bert(key: str) -> str:
    """The key of a bare text encoder, renamed as in a model with a language head."""
    inner = key.removeprefix("text_encoder.")
    return key if inner == key or inner.startswith(("bert.", "cls.")) else f"text_encoder.bert.{inner}"

"""Key names of weights: removal of wrappers' prefixes, names of CLIP's image tower, loading into stage 1's models."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast.models.clip_vision import ClipTeacher
from umt_fast.models.heads import bare_student
from umt_fast.weights.files import TensorDict, Weights, WeightsError, find_not_finite

# Parts of keys that wrappers add: torch.compile, DDP, FSDP, activation checkpointing, Fabric.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_WRAPPER = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(_WRAPPERS)})\.")
_ATTRIBUTE = re.compile(r"^(?:model|net|network)\.")
"""Usual names of the model in a Lightning module."""


def strip_wrappers(state: Mapping[str, Any]) -> TensorDict:
    """The tensors without the parts that DDP, FSDP, torch.compile and Lightning add to their keys.

    Raises WeightsError if two keys become equal, such as those of a model and of its moving average.
    """
    found: TensorDict = {}
    for key, value in state.items():
        name, before = key, ""
        while name != before:
            before = name
            name = _ATTRIBUTE.sub("", _WRAPPER.sub("", name))
        if name in found:
            raise WeightsError(f"these weights hold {name} twice, once as {key}; save only one model")
        found[name] = value
    return found


def _below(state: TensorDict, anchor: str) -> TensorDict:
    """The tensors with the prefix of the key `anchor`, without this prefix. Raises WeightsError if several match."""
    prefixes = [key.removesuffix(anchor) for key in state if key.endswith(f".{anchor}")]
    if anchor in state or not prefixes:
        return state
    if len(prefixes) > 1:
        raise WeightsError(f"these weights hold several models: {', '.join(prefixes)}; save only one")
    return {key.removeprefix(prefixes[0]): value for key, value in state.items() if key.startswith(prefixes[0])}


def clip_image_tower(state: Mapping[str, Any]) -> TensorDict:
    """The image tower of a CLIP state dict under OpenAI's visual key names; other towers are dropped.

    Accepts the names of OpenAI and open_clip (`visual.*`), UMT's extraction (bare names), Hugging Face
    (`vision_model.*`) and timm (`blocks.*`, also as `visual.trunk.*`), each with wrappers' prefixes.
    """
    state = strip_wrappers(state)
    for tower in ("visual.trunk.", "visual.", "vision_model."):
        found = [key.rpartition(tower) for key in state if tower in key]
        # The key of the patch embedding shows the tower's prefix: the CLIP may be an attribute of another module.
        begins = [before for before, _, name in found if name.removeprefix("model.") in _PATCH_EMBEDDINGS]
        if begins:
            clip = {key.removeprefix(begins[0]): value for key, value in state.items() if key.startswith(begins[0])}
            if tower == "vision_model.":
                return _from_hugging_face(clip)
            state = {key.removeprefix(tower): value for key, value in clip.items() if key.startswith(tower)}
            state = strip_wrappers(state)
            break
    return _from_timm(state) if "patch_embed.proj.weight" in state else state


_PATCH_EMBEDDINGS = ("conv1.weight", "patch_embed.proj.weight", "embeddings.patch_embedding.weight")

_TIMM_NAMES = {
    "patch_embed.proj.weight": "conv1.weight",
    "norm_pre.": "ln_pre.",
    "norm.": "ln_post.",
    "blocks.": "transformer.resblocks.",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".attn.in_proj_",
    ".attn.proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def _from_timm(state: TensorDict) -> TensorDict:
    """timm's CLIP image towers: the projection is a linear head, whose zero bias is dropped."""
    tower: TensorDict = {}
    for key, value in state.items():
        if key == "cls_token":
            tower["class_embedding"] = value.flatten()
        elif key == "pos_embed" and value.dim() > 1:
            tower["positional_embedding"] = value.flatten(0, -2)
        elif key == "head.weight":
            tower["proj"] = value.mT if value.dim() == 2 else value
        elif key == "head.bias" and not value.any():
            continue
        else:
            name = key
            for theirs, ours in _TIMM_NAMES.items():
                if name.startswith(theirs) or (theirs.startswith(".") and theirs in name):
                    name = name.replace(theirs, ours, 1)
            tower[name] = value
    return tower


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
            tower["proj"] = value.mT if value.dim() == 2 else value
        if not key.startswith("vision_model.") or key.endswith("position_ids"):
            continue
        name = key.removeprefix("vision_model.")
        for theirs, ours in _HUGGING_FACE_NAMES.items():
            name = name.replace(theirs, ours)
        if match := re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name):
            keys = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            tower[f"{match[1]}.attn.in_proj_{match[2]}"] = stack_rows(state, keys)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            tower[name] = value
    return tower


def stack_rows(state: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
    """Concatenate the rows of query, key and value. Raises WeightsError for missing keys or different shapes."""
    if missing := [key for key in keys if key not in state]:
        raise WeightsError(f"these weights are not whole: missing {missing[0]}")
    first = state[keys[0]]
    for key in keys:
        if not first.dim() or state[key].shape != first.shape:
            raise WeightsError(f"{key} is {list(state[key].shape)}, but {keys[0]} is {list(first.shape)}")
    return torch.cat([state[key] for key in keys])


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """Resample class and patch positions [1 + g^2, D] bicubically to a `grid` x `grid` frame, as UMT does."""
    patches = positions[1:] if positions.dim() == 2 else positions.new_empty(0)
    side = math.isqrt(len(patches))
    if not side or side**2 != len(patches):
        raise WeightsError(
            f"positional_embedding {list(positions.shape)} "
            "does not consist of one class token and a square grid of patches"
        )
    if side == grid:
        return positions
    cls, image = positions[:1], patches.float().T.reshape(1, -1, side, side)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((cls, image.flatten(2)[0].T.to(cls.dtype)))


def inflate(weight: Tensor, frames: int) -> Tensor:
    """Inflate a 2-D kernel [D,3,p,p] to [D,3,frames,p,p]: the middle frame gets it, the others 0, as in UMT."""
    if weight.dim() != 4:
        return weight
    inflated = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    inflated[:, :, frames // 2] = weight
    return inflated


def umt_state_dict(student: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the student's tensors on the CPU under UMT's keys. Published files have them below a key `model`."""
    return {key: value.detach().to("cpu", copy=True) for key, value in bare_student(student).state_dict().items()}


def load_umt_student(student: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load UMT's checkpoint keys, bare or below `model`. Raises WeightsError that lists keys that do not fit."""
    state = state_dict.get("model", state_dict)
    load_exactly(bare_student(student), _below(strip_wrappers(state), "encoder.patch_embed.proj.weight"), "student")


def load_clip_teacher(teacher: ClipTeacher, state_dict: Mapping[str, Any]) -> None:
    """Load a CLIP image tower under OpenAI's, open_clip's, UMT's, timm's or Hugging Face's keys.

    Positions of another grid are resampled bicubically and 2-D patch weights inflated in time, as in UMT. Raises
    WeightsError that lists keys that do not fit, or for weights that were trained with another activation.
    """
    if isinstance(state_dict, Weights):
        _check_activation(state_dict, teacher.config.activation)
    state = clip_image_tower(state_dict)
    if "positional_embedding" in state:
        state["positional_embedding"] = resample_positions(state["positional_embedding"], teacher.config.grid)
    if "conv1.weight" in state:
        state["conv1.weight"] = inflate(state["conv1.weight"], teacher.config.tubelet_size)
    load_exactly(teacher, state, "teacher")


def _check_activation(weights: Weights, activation: str) -> None:
    """Check the activation: weights for GELU and QuickGELU have the same shapes, but outputs differ by some percent."""
    found = weights.activation
    if found is None:
        if not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            print(
                f"note: nothing beside {weights.origin} says which activation this CLIP was trained with; assuming "
                f"{'QuickGELU' if activation == 'quick_gelu' else 'GELU'} (--teacher.activation {activation})",
                file=sys.stderr,
                flush=True,
            )
    elif found != activation:
        spelled = "GELU" if found == "gelu" else "QuickGELU"
        raise WeightsError(
            f"{weights.origin}: this CLIP was trained with {spelled}; set --teacher.activation {found} "
            f"(it is {activation})"
        )


def load_exactly(module: torch.nn.Module, state: Mapping[str, Any], name: str) -> None:
    """Load a state dict that must fit exactly. WeightsError lists missing, unexpected and misshapen keys."""
    own = module.state_dict()
    missing = [f"missing {key} {list(own[key].shape)}" for key in own if key not in state]
    unexpected = [f"unexpected {key}" for key in state if key not in own]
    misshapen = [
        f"{key} is {list(state[key].shape)}, this {name} has {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    # Show one problem of each kind first: a missing and an unexpected key together show how the names differ.
    problems = [kind[0] for kind in (missing, unexpected, misshapen) if kind]
    problems += [*missing[1:], *unexpected[1:], *misshapen[1:]]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise WeightsError(f"these weights do not fit the {name}: {shown}")
    if (bad := find_not_finite({key: state[key] for key in own})) is not None:
        raise WeightsError(f"these weights cannot be used for the {name}: {bad} holds values that are not finite")
    module.load_state_dict(state)

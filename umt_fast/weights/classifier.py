"""Loading fine-tuning models by the published rules: keys that fit are loaded, the others are reported."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from umt_fast.config import VitConfig
from umt_fast.files import expand_home, read_small
from umt_fast.models.classifier import Classifier
from umt_fast.models.positions import resize_positions
from umt_fast.weights.files import TensorDict, WeightsError, find_not_finite
from umt_fast.weights.keys import strip_wrappers
from umt_fast.weights.videomae import published_videomae_names


@dataclass
class LoadReport:
    """What happened to each key of a state dict; keys are named as in the model."""

    loaded: list[str]
    missing: list[str]
    """Keys only in the model, which keep their values."""
    unexpected: list[str]
    """Keys only in the file."""
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Keys with different shapes in the file and in the model, which keep the model's values."""

    def lines(self) -> list[str]:
        """A line for each key that was not loaded, with the reason."""
        lines = [f"not in the file, gets new values: {key}" for key in self.missing]
        lines += [f"not in the model, left out: {key}" for key in self.unexpected]
        return lines + [
            f"of another shape, gets new values: {key}, {list(file)} in the file, {list(model)} in the model"
            for key, (file, model) in self.other_shape.items()
        ]

    def unforeseen(self) -> list[str]:
        """Lines about the keys that should have been loaded.

        The head, the norm before it and positions may get new values, and the layers after the blocks of a pre-trained
        model are left out. Everything else, such as a block of another width, is a mistake.
        """
        ours = ("head.", "fc_norm.", "norm.", "pos_embed")
        theirs = ("norm.", "fc_norm.", "head.", *_AFTER_THE_ENCODER)
        return LoadReport(
            [],
            [key for key in self.missing if not key.startswith(ours)],
            [key for key in self.unexpected if not key.startswith(theirs)],
            {key: shapes for key, shapes in self.other_shape.items() if not key.startswith("head.")},
        ).lines()


_AFTER_THE_ENCODER = (
    "clip_decoder.",  # UMT
    *("encoder_to_decoder.", "mask_token", "decoder."),  # VideoMAE
    *("pos_embed_probs", "get_token_probs."),  # AdaMAE
    *("decoder_embed.", "decoder_blocks.", "decoder_norm.", "decoder_pred.", "decoder_cls_token", "decoder_pos_embed"),
)
"""Prefixes of pre-training keys that a classifier does not use; the last line is MAE-ST's."""


def load_classifier(
    model: Classifier,
    state_dict: Mapping[str, Any],
    *,
    delete_head: bool = False,
    class_map: Sequence[int] | None = None,
    frames: int | None = None,
) -> LoadReport:
    """Load a pre-trained or fine-tuned state dict by the published rules; keys that do not fit are only reported.

    class_map  rows of the file's head to use; without it, a model of 400 classes gets the first 400 rows of a head of
               710 classes (K710).
    frames     token frames of the file, if known. Otherwise the published 8 frames are assumed if they fit the position
               table, else the number that fits the model's grid, else that of 224 pixels. Positions are resampled.
    A pre-trained `encoder.norm` is not loaded into `fc_norm`. Wrappers' prefixes are removed. Raises WeightsError for
    an invalid head or class map, and for values that are not finite.
    """
    state = _unwrapped(state_dict)
    weight = state.get("head.weight")
    if weight is not None and weight.dim() != 2:
        raise WeightsError(f"head.weight is {list(weight.shape)}, not a row for each class")
    if weight is not None and "head.bias" in state and state["head.bias"].shape != weight.shape[:1]:
        raise WeightsError(f"head.bias is {list(state['head.bias'].shape)}, but head.weight {list(weight.shape)}")
    if delete_head:
        state = {key: value for key, value in state.items() if key not in ("head.weight", "head.bias")}
    elif weight is not None and (class_map is not None or (len(weight) == 710 and len(model.head.weight) == 400)):
        rows = torch.as_tensor(range(400) if class_map is None else class_map)
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= len(weight)):
            raise WeightsError(
                f"the class map names rows {int(rows.min())} to {int(rows.max())} of a head of {len(weight)} classes"
            )
        state = {key: value[rows] if key in ("head.weight", "head.bias") else value for key, value in state.items()}
    state = _encoder_names(state)
    if "pos_embed" in state:
        state["pos_embed"] = fit_positions(state["pos_embed"], model.config, frames)
    own = model.state_dict()
    fits = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    if (bad := find_not_finite(fits)) is not None:
        raise WeightsError(f"these weights cannot be used: {bad} holds values that are not finite")
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
    """Tensors under the encoder's own names, without top keys and prefixes of wrappers and enclosing models."""
    return _encoder_names(_unwrapped(state_dict))


def _encoder_names(state: TensorDict) -> TensorDict:
    """Remove a leading `backbone.`, else a leading `encoder.`, from each key."""
    return {
        key.removeprefix("backbone." if key.startswith("backbone.") else "encoder."): value
        for key, value in state.items()
    }


def _unwrapped(state_dict: Mapping[str, Any]) -> TensorDict:
    """The tensors below a top key, without the prefixes of wrappers."""
    state: Any = state_dict
    for key in ("model", "module", "state_dict", "model_state"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = strip_wrappers({key: value for key, value in state.items() if isinstance(value, Tensor)})
    tensors = {re.sub(r"^head\.projection\.", "head.", key): value for key, value in tensors.items()}  # PySlowFast's
    return published_videomae_names(tensors)


def fit_positions(table: Tensor, config: VitConfig, frames: int | None) -> Tensor:
    """Resample positions [1,M,D] of a file with `frames` token frames for the model; see `load_classifier`.

    A table that is not made of square grids is returned unchanged.
    """
    if table.dim() != 3 or 0 in table.shape:
        return table
    rows, new_frames = table.shape[1], config.token_frames
    base = 224 // config.patch_size
    guesses = [8 // config.tubelet_size, rows // config.grid**2, rows // base**2] if frames is None else [frames]
    if frames is None and rows == config.tokens:
        return table
    for guess in guesses:
        if guess and rows % guess == 0 and math.isqrt(rows // guess) ** 2 == rows // guess:
            return resize_positions(table[0].float(), guess, new_frames, config.grid, time_first=True)[None]
    return table


def read_class_map(path: str, classes: int) -> list[int]:
    """The published JSON list of head rows. Raises WeightsError for anything else."""
    try:
        rows = json.loads(read_small(expand_home(path)).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"cannot read the class map {path}: {error}") from None
    if not isinstance(rows, list) or not all(type(row) is int for row in rows) or len(rows) != classes:
        raise WeightsError(f"the class map {path} is not a list of {classes} numbers, one for each class")
    return rows

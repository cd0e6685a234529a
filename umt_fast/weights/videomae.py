"""Keys of masked autoencoders: VideoMAE's, AdaMAE's and MAE-ST's published names, and Hugging Face's for VideoMAE."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from umt_fast.config import MLP_RATIO
from umt_fast.models.classifier import VideoClassifier
from umt_fast.models.pixels import MaskedAutoencoder, VideoMae
from umt_fast.models.token_sampler import AdaMae
from umt_fast.models.vit import LAYER_NORM_EPS
from umt_fast.weights.files import TensorDict, WeightsError, write_weights
from umt_fast.weights.keys import load_exactly, stack_rows, strip_wrappers

_TO_PUBLISHED = (
    (r"^videomae\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^encoder\.layer\.", "encoder.blocks."),
    (r"^layernorm\.", "encoder.norm."),
    (r"^decoder\.decoder_layers\.", "decoder.blocks."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.([qv])_bias$", r".attn.\1_bias"),
    (r"\.attention\.attention\.query\.bias$", ".attn.q_bias"),  # in memory, since version 5 of the library
    (r"\.attention\.attention\.value\.bias$", ".attn.v_bias"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_TO_HUGGING_FACE = (
    (r"^(encoder\.)?patch_embed\.proj\.", "videomae.embeddings.patch_embeddings.projection."),
    (r"^(encoder\.)?blocks\.", "videomae.encoder.layer."),
    (r"^(encoder\.)?norm\.", "videomae.layernorm."),
    (r"^decoder\.blocks\.", "decoder.decoder_layers."),
    (r"^head\.", "classifier."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.([qv]_bias)$", r".attention.attention.\1"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_PARTS = ("query", "key", "value")
_PART = re.compile(r"\.attention\.attention\.(query|key|value)\.weight$")


def published_videomae_names(state: Mapping[str, Tensor]) -> TensorDict:
    """Rename the tensors of Hugging Face's VideoMAE as in the published files; other files are returned unchanged.

    Query, key and value become the rows of one `qkv.weight`. Raises WeightsError if one of the three is missing.
    """
    if not any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state):
        return dict(state)
    found: TensorDict = {}
    for key, value in state.items():
        part = _PART.search(key)
        if part is None:
            found[_renamed(key, _TO_PUBLISHED)] = value
        elif part[1] == "query":
            names = [_PART.sub(f".attention.attention.{name}.weight", key) for name in _PARTS]
            stem = _renamed(key[: part.start()] + ".", _TO_PUBLISHED)
            found[f"{stem}attn.qkv.weight"] = stack_rows(state, names)
    return found


def hugging_face_videomae_names(state: Mapping[str, Tensor]) -> TensorDict:
    """The inverse: published names to those of `VideoMAEForPreTraining` and `VideoMAEForVideoClassification`, which
    have separate weights for query, key and value."""
    found: TensorDict = {}
    for key, value in state.items():
        name = _renamed(key, _TO_HUGGING_FACE)
        if not name.endswith(".attn.qkv.weight"):
            found[name] = value
            continue
        stem = name.removesuffix(".attn.qkv.weight")
        for part, rows in zip(_PARTS, value.chunk(3), strict=True):
            found[f"{stem}.attention.attention.{part}.weight"] = rows.contiguous()
    return found


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key


def load_autoencoder(model: MaskedAutoencoder, state_dict: Mapping[str, Any]) -> None:
    """Load a pre-training file of the model's method under published or Hugging Face's names; top keys and wrappers'
    prefixes are removed. Raises WeightsError that lists keys that do not fit."""
    state: Any = state_dict
    for key in ("model", "module", "model_state"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = strip_wrappers({key: value for key, value in state.items() if isinstance(value, Tensor)})
    load_exactly(model, published_videomae_names(tensors), type(model).__name__)


def save_hugging_face_videomae(model: VideoMae | VideoClassifier, folder: str | Path) -> None:
    """Write model.safetensors and config.json, which `from_pretrained` of Hugging Face's VideoMAE classes reads.

    Hugging Face's library computes the decoder's norm and fc_norm with eps 1e-5, the published code with 1e-6. Raises
    WeightsError for a model that the library does not support: AdaMAE, or a classifier without mean pooling and direct
    positions.
    """
    sizes = model.config
    if isinstance(model, AdaMae):
        raise WeightsError("Hugging Face's library has no AdaMAE; save the encoder under its published names")
    if isinstance(model, VideoClassifier) and (
        model.config.pool != "mean" or model.config.positions != "direct" or model.config.learnable_positions
    ):
        raise WeightsError("Hugging Face's VideoMAE pools the mean and has direct positions; this classifier does not")
    mlp_width = sizes.mlp_width or MLP_RATIO * sizes.width
    config: dict[str, Any] = {
        "model_type": "videomae",
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "num_frames": sizes.frames,
        "tubelet_size": sizes.tubelet_size,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": mlp_width,
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
    }
    if isinstance(model, VideoMae):
        own = model.config
        config |= {
            "architectures": ["VideoMAEForPreTraining"],
            "use_mean_pooling": False,  # so the library keeps the encoder's last norm
            "decoder_hidden_size": own.decoder_width,
            "decoder_num_hidden_layers": own.decoder_depth,
            "decoder_num_attention_heads": own.decoder_heads,
            "decoder_intermediate_size": own.decoder_mlp_width,
            "norm_pix_loss": own.normalise_targets,
        }
    else:
        classes = model.config.num_classes
        config |= {
            "architectures": ["VideoMAEForVideoClassification"],
            "use_mean_pooling": True,
            "id2label": {str(number): f"LABEL_{number}" for number in range(classes)},
            "label2id": {f"LABEL_{number}": number for number in range(classes)},
        }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu() for key, value in model.state_dict().items() if key != "pos_embed"}
    write_weights(folder / "model.safetensors", hugging_face_videomae_names(state))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

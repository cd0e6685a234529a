"""The video ViT with one linear classifier on its pooled tokens, as UMT and VideoMAE fine-tune it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from umt_fast.config import ClassifierConfig, MaeStConfig, VitConfig
from umt_fast.models.pixels import MaeStClassifier
from umt_fast.models.positions import resize_positions, sinusoid_positions
from umt_fast.models.vit import LAYER_NORM_EPS, VideoTransformer, check_clip

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

INIT_SCALE = 0.001
"""Factor of a fresh head's weight and bias, the published default."""
_BASE_FRAMES = 8
"""Token frames of the published position table."""


def classifier_positions(config: VitConfig) -> Float[Tensor, "n d"]:
    """Sinusoid table of the published fine-tuning code: made for 8 x 14 x 14 tokens and resized to the model's.

    Models with patches of 14 pixels start from 8 x 16 x 16 tokens. Space is resized first (bicubic), then time
    (linear), without antialiasing. Only at the base size does it equal `sinusoid_positions`, the table of pre-training.
    """
    side = 224 // 14 if config.patch_size == 14 else 224 // 16
    table = sinusoid_positions(_BASE_FRAMES * side**2, config.width)
    return resize_positions(table, _BASE_FRAMES, config.token_frames, config.grid).contiguous()


class VideoClassifier(VideoTransformer):
    """UMT's fine-tuned ViT (arXiv 2303.16058, section 4.2): all tokens, pooled, one linear classifier.

    Parameter names are the published ones. Positions get no gradient. As in the published code, `pos_embed` is in the
    state dict only if positions are learnable or the clip does not have the base size of 8 x 14 x 14 tokens.
    """

    pos_embed: Tensor

    def __init__(self, config: ClassifierConfig, init_scale: float = INIT_SCALE) -> None:
        super().__init__(config, config.drop_path, config.mlp_width)
        self.config = config
        direct = config.positions == "direct"
        table = (sinusoid_positions(config.tokens, config.width) if direct else classifier_positions(config))[None]
        if config.learnable_positions:
            table = nn.init.trunc_normal_(torch.empty_like(table), std=0.02)
        base = _BASE_FRAMES * (16 if config.patch_size == 14 else 14) ** 2
        if config.learnable_positions or (config.tokens != base and not direct):
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        else:
            self.register_buffer("pos_embed", table, persistent=False)
        if config.pool == "mean":
            self.fc_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        else:
            self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(config.width, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)

    def features(self, clip: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """Input of the classification head. Raises ValueError for a clip of another size or number of frames."""
        check_clip(clip, self.config.image_size, self.config.frames)
        (x,) = self.hidden_states(clip, self.pos_embed[0])
        return self.fc_norm(x.mean(1)) if self.config.pool == "mean" else self.norm(x[:, 0])

    def forward(self, clip: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b k"]:
        """Logits. clip is uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W]."""
        return self.head(self.dropout(self.features(clip)))


Classifier = VideoClassifier | MaeStClassifier


def build_classifier(config: ClassifierConfig, init_scale: float = INIT_SCALE) -> Classifier:
    """The model that `config.architecture` names. MAE-ST's head ignores `init_scale`: it has its own initial scale."""
    if config.architecture == "umt":
        return VideoClassifier(config, init_scale)
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(VitConfig)}
    mae_st = MaeStConfig(**sizes, target_frames=config.token_frames)
    return MaeStClassifier(mae_st, config.num_classes, config.head_dropout, config.drop_path)

"""A trained video encoder without its head: clip -> tokens, or one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from umt_fast.config import VitConfig
from umt_fast.models.positions import resize_positions, sinusoid_positions
from umt_fast.models.vit import LAYER_NORM_EPS, VideoTransformer

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

Pool = Literal["tokens", "mean", "first"]
"""Pooling. tokens: mean of the normed tokens (pre-training); mean: norm of the mean token (fine-tuning); first: the
first token, normed (fine-tuning with `--use_cls`)."""


class VideoEncoder(VideoTransformer):
    """Patch embedding, positions, blocks and last norm: the parts that pre-training and fine-tuning share."""

    position: Tensor

    def __init__(
        self,
        config: VitConfig,
        pool: Pool = "tokens",
        position: Float[Tensor, "n d"] | None = None,
        mlp_width: int | None = None,
    ) -> None:
        """`position`: table of the config's tokens; None: the sinusoids of pre-training. `mlp_width`: width of the
        MLPs' hidden layer; None: 4 x width."""
        super().__init__(config, hidden=mlp_width)
        self.config = config
        self.pool = pool
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        table = sinusoid_positions(config.tokens, config.width) if position is None else position
        self.register_buffer("position", table, persistent=False)

    def hidden(self, clip: Shaped[Tensor, "b ..."], layers: Sequence[int] = (-1,)) -> list[Float[Tensor, "b n d"]]:
        """Outputs of the blocks `layers`, not normalised. The clip may have any number of frames."""
        frames = (clip.shape[1] if clip.dtype == torch.uint8 else clip.shape[2]) // self.config.tubelet_size
        table = self.position
        if 0 < frames != self.config.token_frames:
            table = resize_positions(table, self.config.token_frames, frames, self.config.grid)
        return self.hidden_states(clip, table, layers=layers)

    def forward(self, clip: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b n d"]:
        """Tokens after the last norm, in (t, h, w) order. clip: uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W]."""
        return self.norm(self.hidden(clip)[0])

    def pooled(self, clip: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """One vector for each clip: what the classifier's head sees, or the mean of a pre-trained encoder's tokens."""
        return self.pool_tokens(self.hidden(clip)[0])

    def pool_tokens(self, hidden: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """Pool a block's outputs to one vector per clip, as `pool` says."""
        if self.pool == "mean":
            return self.norm(hidden.mean(1))
        return self.norm(hidden[:, 0]) if self.pool == "first" else self.norm(hidden).mean(1)

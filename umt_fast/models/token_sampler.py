"""AdaMAE (arXiv 2211.09120): a small network that learns which tokens the encoder should see."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from umt_kernels import patch_embed

from umt_fast.config import VideoMaeConfig
from umt_fast.masking import hidden_ids
from umt_fast.models.attention import SDPA, self_attention
from umt_fast.models.heads import NormedTransformer
from umt_fast.models.pixels import VideoMae, init_linear, take_rows
from umt_fast.models.vit import Mlp, check_clip

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

SAMPLER_HEADS = 8
SAMPLER_DROPOUT = 0.1


class _SamplerAttention(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        qkv = self.qkv(x).unflatten(-1, (3, SAMPLER_HEADS, -1))
        return self.dropout(self.proj(self_attention(qkv, SDPA).flatten(2)))


class _SamplerBlock(nn.Module):
    """A block as the published code builds it: PyTorch's default LayerNorm eps, no biases on q and v, dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _SamplerAttention(width, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Sampled(NamedTuple):
    """Predictions of AdaMae, the probability of each token to be visible, and the draw."""

    predictions: Float[Tensor, "b s f"]
    """Pixels of the tokens `hidden`."""
    probabilities: Float[Tensor, "b n"]
    visible: Int[Tensor, "b v"]
    hidden: Int[Tensor, "b s"]


class SamplingTransformer(NormedTransformer):
    """The encoder with the network that scores its tokens, under AdaMAE's published names."""

    def __init__(self, config: VideoMaeConfig, dropout: float) -> None:
        super().__init__(config, config.drop_path, config.mlp_width)
        self.pos_embed_probs = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.get_token_probs = nn.Sequential(_SamplerBlock(config.width, dropout), nn.Linear(config.width, 1))

    def probabilities(self, embedded: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
        """Probability of each token to be drawn first; they sum to 1 over a clip."""
        scores = self.get_token_probs(embedded + self.pos_embed_probs.to(embedded.dtype))
        return F.softmax(scores[..., 0].float().nan_to_num(), dim=-1)


class AdaMae(VideoMae):
    """VideoMAE whose visible tokens are drawn from a learned distribution (arXiv 2211.09120)."""

    encoder: SamplingTransformer

    def __init__(self, config: VideoMaeConfig, dropout: float = SAMPLER_DROPOUT) -> None:
        super().__init__(config)
        self.encoder = SamplingTransformer(config, dropout)
        init_linear(self.encoder)

    def forward(  # type: ignore[override]
        self,
        clip: Shaped[Tensor, "b ..."],
        num_visible: int,
        visible: Int[Tensor, "b v"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Sampled:
        """Draw `num_visible` tokens, unless `visible` is given, and predict the pixels of the others.

        clip is uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W]. All patches are embedded: the sampler reads them.
        """
        check_clip(clip, self.config.image_size, self.config.frames)
        conv = self.encoder.patch_embed.proj
        embedded = patch_embed(clip, conv.weight, conv.bias, self.config.patch_size)
        p = self.encoder.probabilities(embedded)
        if visible is None:
            visible = torch.multinomial(p.detach(), num_visible, generator=generator)
        visible = visible.sort(dim=1).values
        hidden = hidden_ids(visible, self.config.tokens)
        x = take_rows(embedded + self.position.to(embedded.dtype), visible)
        for block in self.encoder.blocks:
            x = self.encoder.run_block(block, x)
        x = self.decoder_input(self.encoder.norm(x), visible, hidden)
        return Sampled(self.decoder(x, hidden.shape[1]), p, visible, hidden)

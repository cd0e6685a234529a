"""Alignment heads, and the student: the video ViT with these heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from umt_kernels import gather_layer_norm

from umt_fast.config import Recompute, StudentConfig, VitConfig
from umt_fast.models.attention import Backend
from umt_fast.models.positions import sinusoid_positions
from umt_fast.models.vit import LAYER_NORM_EPS, VideoTransformer, check_clip, init_linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


class NormedTransformer(VideoTransformer):
    """The video ViT with a final LayerNorm under its published name. `hidden_states` does not apply the norm."""

    def __init__(self, config: VitConfig, drop_path: float, hidden: int | None = None) -> None:
        super().__init__(config, drop_path, hidden)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)


class AlignmentHead(nn.Module):
    """Linear layer into the teacher's output space, and its LayerNorm, which the loss applies."""

    def __init__(self, width: int, target_width: int, eps: float = LAYER_NORM_EPS) -> None:
        super().__init__()
        self.head = nn.Linear(width, target_width)
        self.norm = nn.LayerNorm(target_width, eps=eps)


class Predictions(NamedTuple):
    """Student outputs at the visible tokens, before each layer's LayerNorm, which the loss applies."""

    hidden: Float[Tensor, "k b m c"]
    weight: Float[Tensor, "k c"]
    bias: Float[Tensor, "k c"]

    def normed(self, eps: float = LAYER_NORM_EPS) -> Float[Tensor, "k b m c"]:
        """Predictions after the LayerNorm; not L2-normalised."""
        plain = F.layer_norm(self.hidden.float(), self.hidden.shape[-1:], eps=eps)
        return plain * self.weight[:, None, None] + self.bias[:, None, None]


def predict_aligned(
    norm: nn.LayerNorm,
    heads: nn.ModuleList,
    hidden: list[Float[Tensor, "b m d"]],
    position: Float[Tensor, "n d"],
    token_ids: Int[Tensor, "b m"],
) -> Predictions:
    """For each aligned block: apply the encoder's `norm`, add the tokens' positions, then the block's head."""
    features = [
        gather_layer_norm(x, norm.weight, norm.bias, norm.eps, position=position, position_ids=token_ids)
        for x in hidden
    ]
    aligned = [head for head in heads if isinstance(head, AlignmentHead)]
    return Predictions(
        torch.stack([head.head(x) for head, x in zip(aligned, features, strict=True)]),
        torch.stack([head.norm.weight for head in aligned]),
        torch.stack([head.norm.bias for head in aligned]),
    )


class VideoStudent(nn.Module):
    """UMT's pre-training ViT (arXiv 2303.16058); parameter names and initialisation are those of its checkpoints."""

    position: Tensor

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = NormedTransformer(config, config.drop_path)
        self.clip_decoder = nn.ModuleList(
            AlignmentHead(config.width, config.target_width) for _ in range(config.align_layers)
        )
        # Encoder and decoder use the same fixed table.
        self.register_buffer("position", sinusoid_positions(config.tokens, config.width), persistent=False)
        init_linear(self)

    def set_attention(self, backend: Backend) -> None:
        """Use `backend` in every block. Call this before torch.compile, which makes the choice part of the graph."""
        self.encoder.set_attention(backend)

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what the backward pass recomputes instead of keeping.

        Call this before torch.compile, which makes the choice part of the graph.
        """
        self.encoder.set_recompute(recompute)

    def forward(self, clip: Shaped[Tensor, "b ..."], token_ids: Int[Tensor, "r m"]) -> Predictions:
        """Predictions for the tokens `token_ids` of each clip, layers from shallow to deep.

        clip is uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W]; ids index the flattened (t, h, w) grid. With
        r = M * B rows of ids, rows M i to M (i + 1) are visible sets of clip i. Raises ValueError for a clip of
        another size, or a number of rows that is not a multiple of the number of clips.
        """
        check_clip(clip, self.config.image_size, self.config.frames)
        hidden = self.encoder.hidden_states(clip, self.position, token_ids, self.config.aligned_blocks)
        return predict_aligned(self.encoder.norm, self.clip_decoder, hidden, self.position, token_ids)


def bare_student(student: nn.Module) -> VideoStudent:
    """The student without the wrappers of DDP and torch.compile. Raises TypeError."""
    while not isinstance(student, VideoStudent):
        for name in ("module", "_orig_mod"):
            if isinstance(inner := getattr(student, name, None), nn.Module):
                student = inner
                break
        else:
            raise TypeError(f"{type(student).__name__} is not a VideoStudent nor wraps one")
    return student

"""The models of stage 2 (UMT, arXiv 2303.16058, section 3.2): video and text, and question answering.

Parameters are named and ordered as in the published files, which `umt_fast.weights` reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import ConfigError, Recompute, TextConfig, VideoTextConfig
from umt_fast.models.attention import Backend
from umt_fast.models.clip_vision import ClipTeacher
from umt_fast.models.heads import AlignmentHead, NormedTransformer, Predictions, predict_aligned
from umt_fast.models.positions import video_positions
from umt_fast.models.text import Bert, BertWithHead, Context, causal_mask, padding_mask
from umt_fast.models.vit import LAYER_NORM_EPS, check_clip, init_linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

T = TypeVar("T")


@dataclass
class Seen:
    """Outputs of the video encoder for a batch of clips."""

    tokens: Float[Tensor, "b m d"]
    """The visible tokens after the last norm, to which texts attend."""
    pooled: Float[Tensor, "b f d"]
    """Mean of the tokens of each frame, normed again. With hidden tokens f = 1: the mean of all visible tokens."""
    predictions: Predictions | None = None
    """Predictions of the teacher's outputs at the visible tokens."""


class VisionEncoder(nn.Module):
    """Stage 1's student with any number of frames, pooling and, with a teacher, alignment heads."""

    position: Tensor
    image_position: Tensor

    def __init__(self, config: VideoTextConfig, pools: bool = True) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.encoder = NormedTransformer(vision, vision.drop_path)
        self.pool_norm = nn.LayerNorm(vision.width, eps=LAYER_NORM_EPS) if pools else None
        layers = 0 if config.teacher is None else vision.align_layers
        self.clip_decoder = nn.ModuleList(
            AlignmentHead(vision.width, vision.target_width, config.align_eps) for _ in range(layers)
        )
        patches = vision.grid**2
        table = video_positions(vision.frames, patches, vision.width, config.position_frames)
        self.register_buffer("position", table, persistent=False)
        self.register_buffer("image_position", video_positions(1, patches, vision.width), persistent=False)
        init_linear(self)

    def forward(
        self, clip: Shaped[Tensor, "b ..."], token_ids: Int[Tensor, "b m"] | None = None, aligned: bool = False
    ) -> Seen:
        """clip is uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W] with T = 1 or the configured number of frames.

        token_ids are the visible tokens, in the flattened (t, h, w) grid; None: all. Raises ValueError.
        """
        vision, encoder = self.config.vision, self.encoder
        frames = clip.shape[1] if clip.dtype == torch.uint8 else clip.shape[2]
        frames = 1 if frames == 1 else vision.frames
        check_clip(clip, vision.image_size, frames)
        position = self.image_position if frames == 1 else self.position
        norm = encoder.norm
        if not aligned:
            hidden = encoder.hidden_states(clip, position, token_ids)
        else:
            hidden = encoder.hidden_states(clip, position, token_ids, layers=vision.aligned_blocks)
        tokens = norm(hidden[-1])
        groups = 1 if token_ids is not None else frames
        predictions = self._predict(hidden, position, token_ids) if aligned else None
        if self.pool_norm is None:
            return Seen(tokens, tokens.new_empty(len(clip), 0, vision.width), predictions)
        pooled = self.pool_norm(tokens.unflatten(1, (groups, -1)).mean(dim=2))
        return Seen(tokens, pooled, predictions)

    def _predict(self, hidden: list[Tensor], position: Tensor, token_ids: Tensor | None) -> Predictions:
        if token_ids is None:
            token_ids = torch.arange(len(position), device=position.device).expand(len(hidden[0]), -1)
        return predict_aligned(self.encoder.norm, self.clip_decoder, hidden, position, token_ids)


class _VideoAndText(nn.Module):
    """Base of both models."""

    config: VideoTextConfig
    vision_encoder: VisionEncoder
    clip_teacher: ClipTeacher | None

    def set_attention(self, vision: Backend, text: Backend) -> None:
        """Set the backends of video encoder and cross-attention. Call this before torch.compile."""
        self.vision_encoder.encoder.set_attention(vision)
        for module in self.modules():
            if isinstance(module, Bert):
                module.set_attention(text)

    def set_recompute(self, vision: Recompute, text: Recompute) -> None:
        """Choose what the backward pass recomputes. Call this before torch.compile."""
        self.vision_encoder.encoder.set_recompute(vision)
        for module in self.modules():
            if isinstance(module, Bert):
                module.set_recompute(text)

    def compile_text(self, **options: Any) -> None:
        """Compile each text layer for any number and length of texts; `options` are torch.compile's."""
        for module in self.modules():
            if isinstance(module, Bert):
                for layer in module.encoder.layer:
                    layer.compile(dynamic=True, **options)

    def forward(self, step: Callable[[nn.Module], T]) -> T:
        """`step(self)`, so that a wrapper such as DDP sees a whole training step as one call of the model."""
        return step(self)


class VideoTextModel(_VideoAndText):
    """Video encoder, text encoder, their projections, the match head and the temperature.

    With a teacher this is the pre-training model. Without one it is the retrieval model, which has no alignment heads
    and by default no language head. A new teacher is random; `umt_fast.weights.load_clip_teacher` loads a checkpoint.
    """

    def __init__(self, config: VideoTextConfig) -> None:
        super().__init__()
        self.config = config
        vision, text = config.vision, config.text
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.clip_teacher = None if config.teacher is None else ClipTeacher(config.teacher)
        self.vision_encoder = VisionEncoder(config)
        kind = BertWithHead if config.has_language_head else Bert
        self.text_encoder = kind(text, vision.width)
        self.vision_proj = nn.Linear(vision.width, config.joint_width)
        self.text_proj = nn.Linear(text.width, config.joint_width)
        self.itm_head = nn.Linear(text.width, 2)

    @property
    def bert(self) -> Bert:
        encoder = self.text_encoder
        return encoder.bert if isinstance(encoder, BertWithHead) else encoder

    def embed_video(self, clip: Shaped[Tensor, "b ..."]) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b e"]]:
        """Tokens of unmasked clips, and the mean over frames of their normalised projections."""
        seen = self.vision_encoder(clip)
        return seen.tokens, F.normalize(self.vision_proj(seen.pooled).float(), dim=-1).mean(dim=1)

    def embed_text(
        self, input_ids: Int[Tensor, "r l"], attention_mask: Int[Tensor, "r l"]
    ) -> tuple[Float[Tensor, "r l h"], Float[Tensor, "r e"]]:
        """Hidden states below the fusion layers, and normalised projections."""
        hidden = self.bert.text(input_ids, padding_mask(attention_mask))
        return hidden, F.normalize(self.text_proj(hidden[:, 0]).float(), dim=-1)

    def match(
        self, hidden: Float[Tensor, "r l h"], attention_mask: Int[Tensor, "r l"], context: Context
    ) -> Float[Tensor, "r 2"]:
        """Logits of (no match, match) for pairs of video and text; `hidden` comes from `embed_text`."""
        fused = self.bert.fuse(hidden, padding_mask(attention_mask), context)
        return self.itm_head(fused[:, 0]).float()


class VideoQaModel(_VideoAndText):
    """Video encoder, question encoder that attends to the video, and answer decoder that attends to the question.

    The decoder has as many layers as the text encoder has fusion layers. As published, its cross-attention reads the
    question's states but expects the width of the video, so both widths must be equal. Raises ConfigError if not.
    """

    def __init__(self, config: VideoTextConfig) -> None:
        super().__init__()
        vision, text = config.vision, config.text
        if vision.width != text.width:
            raise ConfigError(f"vision.width = {vision.width} and text.width = {text.width} must be equal to answer")
        self.config = config = replace(config, teacher=None)
        self.clip_teacher = None
        self.vision_encoder = VisionEncoder(config, pools=False)
        self.text_encoder = Bert(text, vision.width)
        self.text_decoder = BertWithHead(decoder_config(text), vision.width)

    def encode(
        self, clip: Shaped[Tensor, "b ..."], question_ids: Int[Tensor, "b l"], question_mask: Int[Tensor, "b l"]
    ) -> Float[Tensor, "b l h"]:
        """States of the questions after the fusion layers."""
        tokens = self.vision_encoder(clip).tokens
        return self.text_encoder(question_ids, padding_mask(question_mask), Context(tokens))

    def decode(
        self, answer_ids: Int[Tensor, "r l"], answer_mask: Int[Tensor, "r l"], context: Context
    ) -> Float[Tensor, "r l w"]:
        """Logits of the next word at each word of the answers."""
        hidden = self.text_decoder.bert(answer_ids, causal_mask(answer_mask), context)
        return self.text_decoder.logits(hidden)


def decoder_config(text: TextConfig) -> TextConfig:
    """Settings of the answer decoder: as many layers as `text` has fusion layers, all with cross-attention."""
    return replace(text, depth=text.depth - text.fusion_layer, fusion_layer=0)


def bare_video_text(model: nn.Module) -> VideoTextModel | VideoQaModel:
    """The model without the wrappers of DDP and torch.compile. Raises TypeError."""
    while not isinstance(model, VideoTextModel | VideoQaModel):
        for name in ("module", "_orig_mod"):
            if isinstance(inner := getattr(model, name, None), nn.Module):
                model = inner
                break
        else:
            raise TypeError(f"{type(model).__name__} is not a VideoTextModel or VideoQaModel, nor wraps one")
    return model


def sequence_losses(
    logits: Float[Tensor, "r l w"], ids: Int[Tensor, "r l"], mask: Int[Tensor, "r l"]
) -> Float[Tensor, " r"]:
    """Negative log-likelihood of each text after its first token, summed over its tokens, in float32."""
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses.view(len(ids), -1) * mask[:, 1:]).sum(dim=1)

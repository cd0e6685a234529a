"""Masked autoencoders of video: an encoder of visible tokens and a decoder that predicts the pixels of hidden ones."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from umt_kernels import patch_embed

from umt_fast.config import MAE_ST_STATISTICS, MaeStConfig, Recompute, VideoMaeConfig
from umt_fast.models.attention import Backend
from umt_fast.models.heads import NormedTransformer
from umt_fast.models.positions import sinusoid_positions
from umt_fast.models.recompute import RUN_BLOCK
from umt_fast.models.vit import (
    LAYER_NORM_EPS,
    Attention,
    Block,
    PatchEmbed,
    SeparateAttention,
    VideoTransformer,
    check_clip,
    init_linear,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

MAE_ST_MEAN, MAE_ST_STD = MAE_ST_STATISTICS


def take_rows(x: Float[Tensor, "b l d"], ids: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


class MaskedAutoencoder(nn.Module):
    """Base of both families: sets the attention backend and the recomputation of all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.run_block = RUN_BLOCK["none"]

    def set_attention(self, encoder: Backend, decoder: Backend | None = None) -> None:
        """Use these backends in the blocks of either part; None: the encoder's for both.

        Call this before torch.compile, which makes the choice part of the graph.
        """
        for name, module in self.named_modules():
            if isinstance(module, (Attention, SeparateAttention)):
                module.backend = decoder if decoder is not None and name.startswith("decoder") else encoder

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what the backward pass recomputes instead of keeping.

        Call this before torch.compile, which makes the choice part of the graph.
        """
        for module in self.modules():
            if isinstance(module, (MaskedAutoencoder, VideoTransformer, PixelDecoder)):
                module.run_block = RUN_BLOCK[recompute]


class PixelDecoder(nn.Module):
    """Blocks over visible and mask tokens; norm and head run only for the tokens in the loss.

    Nothing reads the last block's outputs at visible tokens, so there they are only keys and values.
    """

    def __init__(self, config: VideoMaeConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(config.decoder_width, config.decoder_heads, 0.0, config.decoder_mlp_width)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(config.decoder_width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.decoder_width, 3 * config.tubelet_size * config.patch_size**2)
        self.run_block = RUN_BLOCK["none"]

    def forward(
        self, x: Float[Tensor, "b n e"], last: int, scored: Int[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s f"]:
        """Pixels of the `last` tokens; if `scored` is given, only at these indices among them."""
        for block in self.blocks[:-1]:
            x = self.run_block(block, x)
        x = self.run_block(functools.partial(self.blocks[-1], last=last), x)
        if scored is not None:
            x = take_rows(x, scored)
        return self.head(self.norm(x))


class VideoMae(MaskedAutoencoder):
    """VideoMAE (arXiv 2203.12602) and, with a decoder mask, VideoMAE V2 (arXiv 2303.16727).

    Parameter names and initialisation are the published ones. Positions are fixed and not in the checkpoint.
    """

    position: Tensor
    decoder_position: Tensor

    def __init__(self, config: VideoMaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = NormedTransformer(config, config.drop_path, config.mlp_width)
        self.encoder_to_decoder = nn.Linear(config.width, config.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        self.decoder = PixelDecoder(config)
        self.register_buffer("position", sinusoid_positions(config.tokens, config.width), persistent=False)
        decoder_position = sinusoid_positions(config.tokens, config.decoder_width)
        self.register_buffer("decoder_position", decoder_position, persistent=False)
        init_linear(self.encoder)
        init_linear(self.decoder)  # encoder_to_decoder keeps torch's default, as published
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def encode(self, clip: Shaped[Tensor, "b ..."], visible: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The visible tokens after the encoder's last norm."""
        check_clip(clip, self.config.image_size, self.config.frames)
        (x,) = self.encoder.hidden_states(clip, self.position, visible)
        return self.encoder.norm(x)

    def decoder_input(
        self, encoded: Float[Tensor, "b n d"], visible: Int[Tensor, "b n"], decoded: Int[Tensor, "b m"]
    ) -> Float[Tensor, "b n+m e"]:
        """Visible tokens, then a mask token for each id of `decoded`, each plus the position of its id."""
        x = self.encoder_to_decoder(encoded)
        x = x + self.decoder_position[visible].to(x.dtype)
        masks = self.mask_token.to(x.dtype) + self.decoder_position[decoded].to(x.dtype)
        return torch.cat((x, masks), dim=1)

    def forward(
        self,
        clip: Shaped[Tensor, "b ..."],
        visible: Int[Tensor, "b n"],
        decoded: Int[Tensor, "b m"],
        scored: Int[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s f"]:
        """Predicted pixels of the tokens `decoded`, f = tubelet * patch^2 * 3 in the order (time, row, column, colour).

        clip     uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W].
        visible  ids of the tokens that the encoder sees; decoded: ids of the tokens that the decoder predicts. They
                 may overlap, as in VideoMAE V2.
        scored   indices into `decoded` to predict; None: all of it.
        """
        x = self.decoder_input(self.encode(clip, visible), visible, decoded)
        return self.decoder(x, decoded.shape[1], scored)


class MaeStEncoder(MaskedAutoencoder):
    """The encoder of MAE-ST (arXiv 2205.09113), with learned positions, under its published parameter names."""

    def __init__(self, config: MaeStConfig, drop_path: float = 0.0) -> None:
        """`drop_path` is the stochastic depth of the last block; it grows linearly from 0 at the first."""
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = self._make_blocks(config.depth, config.width, config.heads, drop_path)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self._add_positions("", config.width)

    def _make_blocks(self, depth: int, width: int, heads: int, drop_path: float = 0.0) -> nn.ModuleList:
        bias, steps = self.config.qkv_bias, max(depth - 1, 1)
        return nn.ModuleList(
            Block(width, heads, drop_path * index / steps, attention=SeparateAttention(width, heads, bias))
            for index in range(depth)
        )

    def _add_positions(self, prefix: str, width: int) -> None:
        config = self.config
        extra = int(config.class_token)
        if config.class_token:
            setattr(self, f"{prefix}cls_token", nn.Parameter(torch.zeros(1, 1, width)))
        if config.separable_positions:
            tables = {"spatial": config.patches, "temporal": config.token_frames} | ({"class": 1} if extra else {})
            for name, rows in tables.items():
                setattr(self, f"{prefix}pos_embed_{name}", nn.Parameter(torch.zeros(1, rows, width)))
        else:
            setattr(self, f"{prefix}pos_embed", nn.Parameter(torch.zeros(1, config.tokens + extra, width)))

    def _init_weights(self) -> None:
        init_linear(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        for name, parameter in self.named_parameters():
            if "pos_embed" in name or name == "cls_token":
                nn.init.trunc_normal_(parameter, std=0.02)

    def positions(self, prefix: str = "") -> tuple[Float[Tensor, "n d"], Float[Tensor, "1 1 d"] | None]:
        """The learned table of all tokens, and the class token with its position if there is one."""
        config = self.config
        if config.separable_positions:
            spatial = getattr(self, f"{prefix}pos_embed_spatial")[0]
            temporal = getattr(self, f"{prefix}pos_embed_temporal")[0]
            table = (temporal[:, None] + spatial[None]).flatten(0, 1)
            class_position = getattr(self, f"{prefix}pos_embed_class") if config.class_token else None
        else:
            joint = getattr(self, f"{prefix}pos_embed")
            extra = int(config.class_token)
            table, class_position = joint[0, extra:], joint[:, :extra]
        if not config.class_token:
            return table, None
        return table, getattr(self, f"{prefix}cls_token") + class_position

    def last_block(
        self, clip: Shaped[Tensor, "b ..."], visible: Int[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Outputs of the last block at the tokens `visible` (all if None), the class token first if there is one."""
        check_clip(clip, self.config.image_size, self.config.frames)
        conv = self.patch_embed.proj
        mean, std = (MAE_ST_MEAN, MAE_ST_STD) if clip.dtype == torch.uint8 else (None, None)
        x = patch_embed(clip, conv.weight, conv.bias, self.config.patch_size, token_ids=visible, mean=mean, std=std)
        table, class_token = self.positions()
        x = x + (table if visible is None else table[visible]).to(x.dtype)
        if class_token is not None:
            x = torch.cat((class_token.expand(len(x), -1, -1).to(x.dtype), x), dim=1)
        for block in self.blocks:
            x = self.run_block(block, x)
        return x


class MaeSt(MaeStEncoder):
    """MAE-ST's autoencoder: the decoder works on all tokens, in the order of their ids."""

    def __init__(self, config: MaeStConfig) -> None:
        super().__init__(config)
        width = config.decoder_width
        self.decoder_embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self._add_positions("decoder_", width)
        self.decoder_blocks = self._make_blocks(config.decoder_depth, width, config.decoder_heads)
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        frames_per_token = config.target_frames // config.token_frames
        self.decoder_pred = nn.Linear(width, 3 * frames_per_token * config.patch_size**2)
        self._init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def encode(self, clip: Shaped[Tensor, "b ..."], visible: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The visible tokens after the encoder's last norm, without the class token."""
        return self.norm(self.last_block(clip, visible))[:, int(self.config.class_token) :]

    def forward(
        self, clip: Shaped[Tensor, "b ..."], visible: Int[Tensor, "b n"], scored: Int[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s f"]:
        """Predicted pixels of the tokens `scored` (None: all), f in the order (time, row, column, colour).

        clip is uint8 [B,T,H,W,3] or float [B,3,T,H,W], normalised with mean 0.45 and standard deviation 0.225.
        """
        x = self.decoder_embed(self.encode(clip, visible))
        masks = self.mask_token.to(x.dtype).expand(len(x), self.config.tokens, -1)
        x = masks.scatter(1, visible[..., None].expand_as(x), x)
        table, class_token = self.positions("decoder_")
        x = x + table.to(x.dtype)
        if class_token is not None:
            x = torch.cat((class_token.expand(len(x), -1, -1).to(x.dtype), x), dim=1)
        for block in self.decoder_blocks:
            x = self.run_block(block, x)
        x = x[:, int(self.config.class_token) :]
        if scored is not None:
            x = take_rows(x, scored)
        return self.decoder_pred(self.decoder_norm(x))


class MaeStClassifier(MaeStEncoder):
    """MAE-ST's fine-tuned model: the mean of all tokens but the class token, the encoder's norm, one linear layer."""

    def __init__(self, config: MaeStConfig, num_classes: int, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(config.width, num_classes)
        self._init_weights()
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def features(self, clip: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """Input of the classification head, before dropout. clip as for `MaeSt`."""
        return self.norm(self.last_block(clip)[:, int(self.config.class_token) :].mean(1))

    def forward(self, clip: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b k"]:
        """Logits. clip as for `MaeSt`."""
        return self.head(self.dropout(self.features(clip)))

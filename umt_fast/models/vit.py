"""The video ViT: hidden states of chosen layers for given tokens. Callers add positions, last norm and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from umt_kernels import add_layer_norm, patch_embed

from umt_fast.config import MLP_RATIO, Recompute, VitConfig
from umt_fast.models.attention import SDPA, Backend, attention, self_attention
from umt_fast.models.recompute import RUN_BLOCK

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Self-attention with biases on q and v but not on k, which softmax would cancel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend = SDPA
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b m d"], last: int | None = None) -> Float[Tensor, "b n d"]:
        """Outputs at the `last` rows (None: all rows); every row is a key."""
        if last is not None:
            return self._attend_last(x, last)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if type(self.qkv) is nn.Linear:
            qkv = F.linear(x, self.qkv.weight, bias)
        else:  # a float8 layer has its own matmul
            qkv = self.qkv(x)
            qkv = qkv + bias.to(qkv.dtype)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        return self.proj(self_attention(qkv, self.backend).flatten(2))

    def _attend_last(self, x: Float[Tensor, "b m d"], last: int) -> Float[Tensor, "b n d"]:
        width = len(self.q_bias)
        weight, bias = self.qkv.weight, torch.cat((torch.zeros_like(self.q_bias), self.v_bias))
        q = F.linear(x[:, -last:], weight[:width], self.q_bias).unflatten(-1, (self.heads, -1))
        k, v = F.linear(x, weight[width:], bias).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.proj(attention(q, k, v, self.backend).flatten(2))


class SeparateAttention(nn.Module):
    """Self-attention with separate q, k and v layers, as in MAE-ST's checkpoints; still computed by one matmul."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.backend = SDPA
        self.q, self.k, self.v = (nn.Linear(width, width, bias) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        layers = (self.q, self.k, self.v)
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if self.q.bias is None else torch.cat([layer.bias for layer in layers])
        qkv = F.linear(x, weight, bias).unflatten(-1, (3, self.heads, -1))
        return self.proj(self_attention(qkv, self.backend).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. `hidden` is the width of the MLP's hidden layer, by default 4 x width."""

    def __init__(
        self, width: int, heads: int, drop_path: float, hidden: int | None = None, attention: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads) if attention is None else attention
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, hidden or MLP_RATIO * width)

    def _draw(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, " b"] | None:
        """Stochastic depth (arXiv 1603.09382): factor of each sample's branch, 0 or 1 / (1 - drop_path)."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        return (torch.rand(len(x), device=x.device) < keep).float() / keep

    def forward(self, x: Float[Tensor, "b m d"], last: int | None = None) -> Float[Tensor, "b n d"]:
        """The block's outputs at the `last` rows (None: all rows)."""
        norm = self.norm2
        if last is None:
            branch = self.attn(self.norm1(x))
        else:
            branch, x = self.attn(self.norm1(x), last), x[:, -last:]
        x, normed = add_layer_norm(
            x, branch, norm.weight, norm.bias, norm.eps, scale=self._draw(x), out_dtype=branch.dtype
        )
        branch, scale = self.mlp(normed), self._draw(x)
        return x + (branch if scale is None else branch * scale.to(branch.dtype)[:, None, None])


class PatchEmbed(nn.Module):
    """Holds the Conv3d's parameters under their published name; `patch_embed` computes it as a matmul."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.width, kernel, stride=kernel)


class VideoTransformer(nn.Module):
    """Patch embedding and pre-norm blocks (UMT, arXiv 2303.16058), under their published parameter names."""

    def __init__(self, config: VitConfig, drop_path: float = 0.0, hidden: int | None = None) -> None:
        """`drop_path` is the stochastic depth of the last block; it grows linearly from 0 at the first. `hidden` is the
        width of the MLPs' hidden layer, by default 4 x width."""
        super().__init__()
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.patch_embed = PatchEmbed(config)
        steps = max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, drop_path * index / steps, hidden) for index in range(config.depth)
        )
        self.run_block = RUN_BLOCK["none"]

    def hidden_states(
        self,
        clip: Shaped[Tensor, "b ..."],
        position: Float[Tensor, "n d"],
        token_ids: Int[Tensor, "r m"] | None = None,
        layers: Sequence[int] = (-1,),
    ) -> list[Float[Tensor, "r m d"]]:
        """Outputs of the blocks `layers` (negative ones count from the end), in that order, not normalised.

        clip       uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W], any T that the tubelet divides.
        position   table of the clip's N tokens in (t, h, w) order, added to the embeddings.
        token_ids  tokens that enter the blocks; None: all. Of r = M * B rows, clip i has the M rows from M * i on.

        Raises ValueError for a clip of another size, a table of another length, r that is not a multiple of B, or a
        block that does not exist.
        """
        check_clip(clip, self.image_size)
        conv = self.patch_embed.proj
        frames = clip.shape[1] if clip.dtype == torch.uint8 else clip.shape[2]
        tokens = frames // conv.kernel_size[0] * (self.image_size // self.patch_size) ** 2
        if frames % conv.kernel_size[0]:
            raise ValueError(f"clip has {frames} frames, which is not a multiple of the tubelet, {conv.kernel_size[0]}")
        if len(position) != tokens:
            raise ValueError(f"position has {len(position)} rows, but a clip of {frames} frames has {tokens} tokens")
        of_clip = None
        if token_ids is not None:
            if len(token_ids) % len(clip):
                raise ValueError(f"token_ids has {len(token_ids)} rows, which is not a multiple of {len(clip)} clips")
            of_clip = token_ids.view(len(clip), -1)
        x = patch_embed(clip, conv.weight, conv.bias, self.patch_size, token_ids=of_clip, position=position)
        if token_ids is not None:
            x = x.view(*token_ids.shape, -1)
        wanted = self._layer_indices(layers)
        kept = {}
        for index, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = self.run_block(block, x)
            if index in wanted:
                kept[index] = x
        return [kept[layer] for layer in wanted]

    def _layer_indices(self, layers: Sequence[int]) -> list[int]:
        depth = len(self.blocks)
        if not layers:
            raise ValueError("layers is empty; name at least one block, -1 for the last")
        if not all(-depth <= layer < depth for layer in layers):
            raise ValueError(f"layers = {list(layers)}, but the model has {depth} blocks, 0 to {depth - 1}")
        return [layer % depth for layer in layers]

    def set_attention(self, backend: Backend) -> None:
        """Use `backend` in every block. Call this before torch.compile, which makes the choice part of the graph."""
        for module in self.modules():
            if isinstance(module, (Attention, SeparateAttention)):
                module.backend = backend

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what the backward pass recomputes instead of keeping.

        Call this before torch.compile, which makes the choice part of the graph.
        """
        self.run_block = RUN_BLOCK[recompute]


def check_clip(clip: Tensor, side: int, frames: int | None = None) -> None:
    """Raise unless `clip` is [B,T,side,side,3] uint8 or [B,3,T,side,side] float (with `frames` frames, if given)."""
    uint8 = clip.dtype == torch.uint8
    wanted = f"uint8 [B, {frames or 'T'}, {side}, {side}, 3] or float [B, 3, {frames or 'T'}, {side}, {side}]"
    if clip.dim() != 5 or len(clip) == 0:
        raise ValueError(f"clip has shape {list(clip.shape)}; give {wanted}")
    got_frames, height, width, channels = (clip if uint8 else clip.permute(0, 2, 3, 4, 1)).shape[1:]
    if (height, width, channels) != (side, side, 3) or (frames is not None and got_frames != frames):
        raise ValueError(f"clip is {clip.dtype} {list(clip.shape)}; give {wanted}")


def init_linear(module: nn.Module) -> None:
    """Xavier's weights and zero biases for every linear layer."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

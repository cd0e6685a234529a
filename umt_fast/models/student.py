"""The student: a video ViT that sees only the visible tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from umt_kernels import gather_layer_norm, patch_embed

from umt_fast.config import Recompute, StudentConfig
from umt_fast.models.attention import SDPA, Backend, self_attention
from umt_fast.models.patches import sinusoid_positions
from umt_fast.models.recompute import RUN_BLOCK

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

LAYER_NORM_EPS = 1e-6
MLP_RATIO = 4


class Attention(nn.Module):
    """Self-attention with biases on q and v but not on k."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend = SDPA
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if type(self.qkv) is nn.Linear:
            qkv = F.linear(x, self.qkv.weight, bias)
        else:  # in float8 the layer multiplies by itself
            qkv = self.qkv(x)
            qkv = qkv + bias.to(qkv.dtype)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        return self.proj(self_attention(qkv, self.backend).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def _maybe_drop(self, branch: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """Stochastic depth (arXiv 1603.09382): a sample's branch is dropped whole, the others scaled to make up."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * (torch.rand(len(branch), 1, 1, device=branch.device) < keep).to(branch.dtype) / keep

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        x = x + self._maybe_drop(self.attn(self.norm1(x)))
        return x + self._maybe_drop(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Holder of the Conv3d's parameters under their published name; `patch_embed` runs them as a GEMM."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.width, kernel, stride=kernel)


class Encoder(nn.Module):
    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.align_layers = config.align_layers
        self.patch_embed = PatchEmbed(config)
        steps = max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.drop_path * index / steps) for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.run_block = RUN_BLOCK["none"]

    def forward(
        self, clip: Shaped[Tensor, "b ..."], token_ids: Int[Tensor, "b m"], position: Float[Tensor, "n d"]
    ) -> list[Float[Tensor, "b m d"]]:
        """Outputs of the last `align_layers` blocks, shallow to deep, normalised, each with its token's position.

        Several visible sets of a clip are rows of `token_ids` next to each other; the clip is not repeated for them.
        """
        conv = self.patch_embed.proj
        of_clip = token_ids.view(len(clip), -1)
        x = patch_embed(clip, conv.weight, conv.bias, self.patch_size, token_ids=of_clip, position=position)
        x = x.view(*token_ids.shape, -1)
        aligned = []
        for index, block in enumerate(self.blocks):
            x = self.run_block(block, x)
            if index >= len(self.blocks) - self.align_layers:
                norm = self.norm
                aligned.append(
                    gather_layer_norm(x, norm.weight, norm.bias, norm.eps, position=position, position_ids=token_ids)
                )
        return aligned


class AlignmentHead(nn.Module):
    """Linear into the teacher's output space, and the LayerNorm that the loss applies to it."""

    def __init__(self, width: int, target_width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, target_width)
        self.norm = nn.LayerNorm(target_width, eps=LAYER_NORM_EPS)


class Predictions(NamedTuple):
    """What the student says of the visible tokens, before each layer's own LayerNorm: the loss takes that in."""

    hidden: Float[Tensor, "k b m c"]
    weight: Float[Tensor, "k c"]
    bias: Float[Tensor, "k c"]

    def normed(self) -> Float[Tensor, "k b m c"]:
        """After the LayerNorm; not L2-normalised."""
        plain = F.layer_norm(self.hidden.float(), self.hidden.shape[-1:], eps=LAYER_NORM_EPS)
        return plain * self.weight[:, None, None] + self.bias[:, None, None]


class VideoStudent(nn.Module):
    """UMT's pre-training ViT (arXiv 2303.16058); parameter names and initialisation are those of its checkpoints."""

    position: Tensor

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.clip_decoder = nn.ModuleList(
            AlignmentHead(config.width, config.target_width) for _ in range(config.align_layers)
        )
        # Encoder and decoder use the same fixed table.
        self.register_buffer("position", sinusoid_positions(config.tokens, config.width), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_attention(self, backend: Backend) -> None:
        """Use `backend` in every block; before torch.compile, which takes it in."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def set_recompute(self, recompute: Recompute) -> None:
        """What the backward pass computes again instead of keeping it; before torch.compile, which takes it in."""
        self.encoder.run_block = RUN_BLOCK[recompute]

    def forward(self, clip: Shaped[Tensor, "b ..."], token_ids: Int[Tensor, "r m"]) -> Predictions:
        """Predictions for the tokens `token_ids` of each clip, layers from shallow to deep.

        clip is uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W]; ids index the flattened (t, h, w) grid. With
        r = M * B rows of ids, rows M i to M (i + 1) are visible sets of clip i. Raises ValueError for a clip of
        another size, or a number of rows that is no multiple of the clips.
        """
        check_clip(clip, self.config.image_size, self.config.frames)
        if len(token_ids) % len(clip):
            raise ValueError(f"token_ids has {len(token_ids)} rows, which is no multiple of {len(clip)} clips")
        features = self.encoder(clip, token_ids, self.position)
        heads = [head for head in self.clip_decoder if isinstance(head, AlignmentHead)]
        return Predictions(
            torch.stack([head.head(x) for head, x in zip(heads, features, strict=True)]),
            torch.stack([head.norm.weight for head in heads]),
            torch.stack([head.norm.bias for head in heads]),
        )


def check_clip(clip: Tensor, side: int, frames: int | None = None) -> None:
    """Raise unless `clip` is [B,T,side,side,3] uint8 or [B,3,T,side,side] float (with `frames` frames, if given)."""
    uint8 = clip.dtype == torch.uint8
    wanted = f"uint8 [B, {frames or 'T'}, {side}, {side}, 3] or float [B, 3, {frames or 'T'}, {side}, {side}]"
    if clip.dim() != 5 or len(clip) == 0:
        raise ValueError(f"clip has shape {list(clip.shape)}; give {wanted}")
    got_frames, height, width, channels = (clip if uint8 else clip.permute(0, 2, 3, 4, 1)).shape[1:]
    if (height, width, channels) != (side, side, 3) or (frames is not None and got_frames != frames):
        raise ValueError(f"clip is {clip.dtype} {list(clip.shape)}; give {wanted}")


def bare_student(student: nn.Module) -> VideoStudent:
    """The student inside DDP and torch.compile."""
    while not isinstance(student, VideoStudent):
        for name in ("module", "_orig_mod"):
            if isinstance(inner := getattr(student, name, None), nn.Module):
                student = inner
                break
        else:
            raise TypeError(f"{type(student).__name__} is not a VideoStudent nor wraps one")
    return student

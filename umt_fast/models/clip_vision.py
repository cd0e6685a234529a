"""The teacher: a frozen CLIP image ViT whose last block is computed in full only for the visible tokens.

`encode` runs all blocks but the last, and computes keys, values and the class token's query of the last block, which
give the scores. `targets` then finishes the last block for the visible tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from umt_kernels import EightBit, add_layer_norm, cls_scores, gather_layer_norm, patch_embed

from umt_fast.config import MLP_RATIO, Activation, TeacherConfig
from umt_fast.models.attention import SDPA, Backend, attention, self_attention
from umt_fast.models.positions import bicubic_window
from umt_fast.models.vit import check_clip

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

LAYER_NORM_EPS = 1e-5
QUICK = 1.702
"""The factor of QuickGELU."""


Normed = Tensor | EightBit
"""Input of a block's attention: normalised rows; EightBit in a quantised block."""


class Projection(nn.Module):
    """Holds the weights of the patch embedding, inflated in time. CLIP's patch embedding has no bias."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        shape = (config.width, 3, config.tubelet_size, config.patch_size, config.patch_size)
        self.weight = nn.Parameter(torch.empty(shape))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend = SDPA
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def query(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... h e"]:
        width = x.shape[-1]
        return F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width]).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Float[Tensor, "r l d"]) -> tuple[Float[Tensor, "r l h e"], Float[Tensor, "r l h e"]]:
        width = x.shape[-1]
        both = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:])
        k, v = both.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return k, v

    def forward(self, x: Float[Tensor, "r l d"]) -> Float[Tensor, "r l d"]:
        # Autocast does not cast for quantised weights, so the input is cast to the dtype that they report.
        x = x.to(self.in_proj_weight.dtype)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        return self.out_proj(self_attention(qkv, self.backend).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, MLP_RATIO * width)
        self.c_proj = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Float[Tensor, "r l d"]) -> Float[Tensor, "r l d"]:
        """QuickGELU, x sigmoid(1.702 x), equals silu(1.702 x) / 1.702. The matmul does the division, so the wide hidden
        layer is read and written twice instead of three times. In place, since a frozen model needs no gradient.
        """
        hidden = self.c_fc(x.to(self.c_fc.weight.dtype))
        weight, bias = self.c_proj.weight, self.c_proj.bias
        if self.activation == "gelu":
            hidden = F.gelu(hidden)
            plain = type(weight) is nn.Parameter
            return F.linear(hidden, weight, bias.to(weight.dtype)) if plain else self.c_proj(hidden)
        hidden = F.silu(hidden.mul_(QUICK), inplace=True)
        if type(weight) is not nn.Parameter:  # torchao's matmul takes no factor; torch.compile fuses this product
            return self.c_proj(hidden.mul_(1 / QUICK))
        rows = torch.addmm(bias.to(weight.dtype), hidden.flatten(0, -2), weight.T, alpha=1 / QUICK)
        return rows.unflatten(0, x.shape[:-1])


class Block(nn.Module):
    """Pre-norm block. It returns residual and MLP branch unadded: the next norm adds them in the same pass."""

    def __init__(self, width: int, heads: int, activation: Activation) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, activation)

    def enter(self, x: Float[Tensor, "r l d"], branch: Float[Tensor, "r l d"] | None = None) -> tuple[Tensor, Normed]:
        """This block's input, x + branch, and its norm, which the attention reads."""
        return (x, self.ln_1(x)) if branch is None else add_norm(x, branch, self.ln_1)

    def forward(self, x: Float[Tensor, "r l d"], normed: Normed) -> tuple[Tensor, Tensor]:
        """Takes the outputs of `enter`; returns residual and branch, whose sum is this block's output."""
        assert isinstance(normed, Tensor)
        x, normed = add_norm(x, self.attn(normed), self.ln_2)
        return x, self.mlp(normed)

    def rows(
        self,
        x: Float[Tensor, "r l d"],
        k: Float[Tensor, "r l h e"],
        v: Float[Tensor, "r l h e"],
        row_ids: Int[Tensor, "r n"],
    ) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
        """`forward` for the rows `row_ids`, from the keys and values of all rows."""
        attended = attention(self.queries(x, row_ids), k, v, self.attn.backend).flatten(2)
        kept, normed = add_norm(x, self.attn.out_proj(attended), self.ln_2, row_ids)
        return kept, self.mlp(normed)

    def queries(self, x: Float[Tensor, "r l d"], row_ids: Int[Tensor, "r n"]) -> Float[Tensor, "r n h e"]:
        norm = self.ln_1
        return self.attn.query(gather_layer_norm(x, norm.weight, norm.bias, norm.eps, row_ids=row_ids))


def add_norm(
    x: Float[Tensor, "r l d"],
    branch: Float[Tensor, "r n d"],
    norm: nn.LayerNorm,
    row_ids: Int[Tensor, "r n"] | None = None,
) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
    """The new residual x + branch (of the rows `row_ids`), and its norm, both in the dtype of the branch."""
    return add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, row_ids=row_ids, out_dtype=branch.dtype)


class Transformer(nn.Module):
    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(config.width, config.heads, config.activation) for _ in range(config.depth)
        )


@dataclass
class TeacherState:
    """Intermediate results of the teacher. r = B * T frames of tokens, each of l = 1 + P rows."""

    scores: Float[Tensor, "b t p"]
    """Attention of the class token to each patch in the last block, averaged over heads."""
    aligned: list[Float[Tensor, "r l d"]]
    """Outputs of the aligned blocks before the last, shallow to deep."""
    x: Float[Tensor, "r l d"]
    """Input of the last block."""
    k: Float[Tensor, "r l h e"]
    v: Float[Tensor, "r l h e"]


class ClipTeacher(nn.Module):
    """CLIP's image ViT (arXiv 2103.00020) on each frame; parameter names are those of OpenAI's checkpoints.

    If the clip's side is not the teacher's, the patch embedding includes the bicubic resize: the resize is linear and
    repeats with the patches, so both are one convolution with a wider kernel (18 x 18 with stride 16 for CLIP-L/14 at
    196 px on 224 px clips).

    A new teacher has random weights; `umt_fast.weights.load_clip_teacher` loads a checkpoint.
    """

    patch_weight: Tensor

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = Projection(config)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + config.grid**2, width))
        self.ln_pre = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.proj = nn.Parameter(torch.empty(width, config.target_width))
        self._init_weights()
        self.requires_grad_(False)
        self.register_buffer("patch_weight", self._fold_resize(), persistent=False)
        self.register_load_state_dict_post_hook(ClipTeacher._fold_after_load)

    def _init_weights(self) -> None:
        """CLIP's initialisation (arXiv 2103.00020, released code)."""
        width, depth = self.config.width, self.config.depth
        scale = width**-0.5
        nn.init.normal_(self.conv1.weight, std=self.conv1.weight[0].numel() ** -0.5)
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=scale)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=scale)
            nn.init.normal_(block.attn.out_proj.weight, std=scale * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=scale * (2 * depth) ** -0.5)
            for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(layer.bias)

    def _fold_resize(self) -> Float[Tensor, "d 3 t k k"]:
        """`conv1` and the resize before it as one kernel."""
        weight = self.conv1.weight
        if self.config.clip_patch_size == self.config.patch_size:
            return weight.detach().clone()
        resize = bicubic_window(self.config.clip_patch_size, self.config.patch_size)[0].to(weight.device)
        return torch.einsum("dctij,ip,jq->dctpq", weight.detach().double(), resize, resize).to(weight.dtype)

    @staticmethod
    def _fold_after_load(module: nn.Module, _incompatible: object) -> None:
        assert isinstance(module, ClipTeacher)
        with torch.no_grad():
            module.patch_weight.copy_(module._fold_resize())

    def set_attention(self, backend: Backend, last: Backend) -> None:
        """Use `backend` in every block and `last` in the last one.

        Call this before torch.compile, which makes the choice part of the graph.
        """
        blocks = [block for block in self.transformer.resblocks if isinstance(block, Block)]
        for block in blocks:
            block.attn.backend = backend
        blocks[-1].attn.backend = last

    def store_matmul_weights(self, dtype: torch.dtype) -> None:
        """Store the weights of all matmuls in autocast's dtype, so that they are rounded once and not in every step.
        The results are bit for bit the same."""
        blocks = [block for block in self.transformer.resblocks if isinstance(block, Block)]
        layers = [layer for block in blocks for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj)]
        held: list[Tensor] = [x for block in blocks for x in (block.attn.in_proj_weight, block.attn.in_proj_bias)]
        held += [layer.weight for layer in layers]
        held += [bias for block in blocks for bias in (block.attn.out_proj.bias, block.mlp.c_fc.bias)]
        for tensor in (*held, self.proj, self.patch_weight):
            tensor.data = tensor.data.to(dtype)

    @torch.no_grad()
    def encode(self, clip: Shaped[Tensor, "b ..."]) -> TeacherState:
        """Scores of every patch, and the intermediate results that `targets` needs.

        clip is uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W]; raises ValueError for another size.
        """
        config = self.config
        check_clip(clip, config.clip_size)
        patches = config.grid**2
        x = patch_embed(clip, self.patch_weight, None, config.clip_patch_size)
        frames = x.shape[1] // patches
        x = rearrange(x, "b (t p) d -> (b t) p d", p=patches)  # every frame is an image of its own
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        # The residual stream has the dtype of the matmuls, as in the published teacher under autocast.
        x = self.ln_pre(torch.cat((cls, x), dim=1) + self.positional_embedding).to(x.dtype)
        blocks = [block for block in self.transformer.resblocks if isinstance(block, Block)]
        aligned = []
        x, normed = blocks[0].enter(x)
        for index, block in enumerate(blocks[:-1]):
            x, branch = block(x, normed)
            x, normed = blocks[index + 1].enter(x, branch)
            if index in config.aligned_blocks:
                aligned.append(x)
        last = blocks[-1]
        assert isinstance(normed, Tensor)
        k, v = last.attn.key_value(normed)
        scores = cls_scores(last.attn.query(normed[:, 0]), k.transpose(1, 2))
        return TeacherState(scores.unflatten(0, (clip.shape[0], frames)), aligned, x, k, v)

    @torch.no_grad()
    def targets(self, state: TeacherState, visible: Int[Tensor, "r g n"]) -> Float[Tensor, "k r m c"]:
        """Outputs of the aligned blocks at the visible tokens, in output space, shallow to deep; not L2-normalised.

        With r = M * B visible sets, sets M i to M (i + 1) are of clip i.
        """
        batch, frames, patches = state.scores.shape
        last = self.transformer.resblocks[-1]
        assert isinstance(last, Block)
        within_frames = visible.shape[1] == frames
        if within_frames:
            wanted = rearrange(visible, "(b s) t n -> (b t) (s n)", b=batch)
        else:  # the number of visible patches differs between frames: finish every patch, select at the end
            wanted = torch.arange(patches, device=visible.device).expand(batch * frames, -1)
        row_ids = wanted + 1  # row 0 is the class token
        norm = self.ln_post
        outputs = [
            gather_layer_norm(x, norm.weight, norm.bias, norm.eps, row_ids=row_ids) @ self.proj for x in state.aligned
        ]
        outputs.append(add_norm(*last.rows(state.x, state.k, state.v, row_ids), norm)[1] @ self.proj)
        if within_frames:
            return rearrange(outputs, "k (b t) (s n) c -> k (b s) (t n) c", b=batch, n=visible.shape[2])
        targets = rearrange(outputs, "k (b t) p c -> k b (t p) c", b=batch)
        chosen = visible.view(batch, -1)[None, ..., None].expand(len(targets), -1, -1, targets.shape[-1])
        return targets.gather(2, chosen).unflatten(2, (-1, visible.shape[2])).flatten(1, 2)

"""A block of the teacher whose matmuls run in int8 or float8 with the kernels of umt_kernels.

The norms write 8-bit rows with one scale per row. The first matmul of the MLP writes the hidden layer in 8 bits, with a
scale for every 128 columns of a row. Only the attention's output needs a pass of its own for rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from umt_kernels import EightBit, add_layer_norm_8bit, linear_8bit, quantize_rows

from umt_fast.models.attention import attention, self_attention
from umt_fast.models.clip_vision import Block, ClipTeacher, Normed

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from umt_fast.config import Activation


class Linear8(nn.Module):
    """A frozen linear layer: 8-bit weights with a scale for each output channel."""

    values: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        values, scale = quantize_rows(weight.detach(), dtype)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias.detach().float())

    def forward(
        self, x: EightBit, activation: Activation | None = None, out_dtype: torch.dtype = torch.bfloat16
    ) -> Tensor | EightBit:
        weight = EightBit(self.values, self.scale)
        return linear_8bit(x, weight, self.bias, activation=activation, out_dtype=out_dtype)


class EightBitBlock(Block):
    """An 8-bit copy of a `Block`. The last block keeps exact queries, keys and values: the scores depend on them."""

    def __init__(self, block: Block, dtype: torch.dtype, last: bool) -> None:
        nn.Module.__init__(self)
        self.dtype = dtype
        self.last = last
        self.ln_1, self.ln_2, self.attn = block.ln_1, block.ln_2, block.attn
        self.activation = block.mlp.activation
        self.out_proj = Linear8(self.attn.out_proj.weight, self.attn.out_proj.bias, dtype)
        self.c_fc = Linear8(block.mlp.c_fc.weight, block.mlp.c_fc.bias, dtype)
        self.c_proj = Linear8(block.mlp.c_proj.weight, block.mlp.c_proj.bias, dtype)
        del self.attn.out_proj
        if not last:
            self.qkv = Linear8(self.attn.in_proj_weight, self.attn.in_proj_bias, dtype)
            del self.attn.in_proj_weight, self.attn.in_proj_bias

    def enter(self, x: Float[Tensor, "r l d"], branch: Float[Tensor, "r l d"] | None = None) -> tuple[Tensor, Normed]:
        if self.last:
            return super().enter(x, branch)
        return self._norm(x, branch, self.ln_1)

    def forward(self, x: Float[Tensor, "r l d"], normed: Normed) -> tuple[Tensor, Tensor]:
        assert isinstance(normed, EightBit)
        qkv = self.qkv(normed).unflatten(-1, (3, self.attn.heads, -1))
        return self._finish(x, self_attention(qkv, self.attn.backend).flatten(2))

    def rows(
        self,
        x: Float[Tensor, "r l d"],
        k: Float[Tensor, "r l h e"],
        v: Float[Tensor, "r l h e"],
        row_ids: Int[Tensor, "r n"],
    ) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
        attended = attention(self.queries(x, row_ids), k, v, self.attn.backend).flatten(2)
        return self._finish(x.gather(1, row_ids[..., None].expand(-1, -1, x.shape[-1])), attended)

    def _finish(self, x: Float[Tensor, "r n d"], attended: Float[Tensor, "r n d"]) -> tuple[Tensor, Tensor]:
        branch = self.out_proj(quantize_rows(attended, self.dtype))
        x, rows = self._norm(x, branch, self.ln_2)
        hidden = self.c_fc(rows, activation=self.activation, out_dtype=self.dtype)
        return x, self.c_proj(hidden)

    def _norm(self, x: Tensor, branch: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, EightBit]:
        return add_layer_norm_8bit(x, branch, norm.weight, norm.bias, norm.eps, self.dtype)


def convert_blocks(teacher: ClipTeacher, dtype: torch.dtype) -> None:
    """Replace every block by an `EightBitBlock`. `dtype` is int8 or float8_e4m3fn."""
    blocks = teacher.transformer.resblocks
    for index, block in enumerate(blocks):
        assert isinstance(block, Block)
        blocks[index] = EightBitBlock(block, dtype, last=index == len(blocks) - 1)

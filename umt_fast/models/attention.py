"""The one attention function of both models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

BACKEND = "torch sdpa"


def attention(
    q: Float[Tensor, "b l h d"], k: Float[Tensor, "b s h d"], v: Float[Tensor, "b s h d"]
) -> Float[Tensor, "b l h d"]:
    """softmax(q k^T / sqrt(d)) v, every query over every key."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)

"""Fixed positions, and the resize that a patch embedding can take in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def sinusoid_positions(tokens: int, width: int) -> Float[Tensor, "tokens width"]:
    """Angle pos / 10000^(2 (j // 2) / width), its sine on even j and cosine on odd j (arXiv 1706.03762, 3.5)."""
    column = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def bicubic_window(source: int, target: int) -> tuple[Float[Tensor, "target window"], int]:
    """The piece of a bicubic resize that makes one patch: `target` pixels out of `source` and a halo on each side.

    Resizing by target / source repeats itself every `source` pixels, so each patch of the resized frame is this
    matrix times one window of the frame, borders replicated. Returns the float64 matrix, of `source + 2 halo`
    columns, and the halo. The weights are read off `torch.nn.functional.interpolate(mode="bicubic",
    align_corners=False)`, the resize of the published code.
    """
    repeats = 5  # the middle one is far from both borders: the taps reach at most two pixels out
    impulses = torch.eye(repeats * source, dtype=torch.float64)[:, None, :, None]
    size = (repeats * target, 1)
    response = F.interpolate(impulses, size=size, mode="bicubic", align_corners=False)[:, 0, :, 0]
    middle = response[:, 2 * target : 3 * target].T  # [target, repeats * source]
    used = middle.abs().amax(0).nonzero().flatten()
    first, last = int(used[0]), int(used[-1])
    halo = max(2 * source - first, last - (3 * source - 1), 0)
    return middle[:, 2 * source - halo : 3 * source + halo].contiguous(), halo

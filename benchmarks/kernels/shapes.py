"""Model sizes for the timed and reported kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from umt_fast.masking import count_visible
from umt_fast.models.positions import bicubic_window

MASK_RATIO = 0.8
"""Share of a frame's patches or a clip's tokens that is hidden (UMT, arXiv 2303.16058)."""


@dataclass(frozen=True)
class Shapes:
    """One model at one batch size: B clips, T frames, P patches, n visible, K layers, widths D and C."""

    model: str
    title: str
    batch: int = 64
    frames: int = 8
    side: int = 224
    patch: int = 16
    layers: int = 6
    width: int = 768
    target_width: int = 512
    heads: int = 12
    teacher_patch: int = 16
    """The teacher's own patch size; if it differs from `patch`, its resize is folded into a wider kernel."""
    dtype: torch.dtype = torch.bfloat16

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def tokens(self) -> int:
        return self.frames * self.patches

    @property
    def images(self) -> int:
        return self.batch * self.frames

    @property
    def num_visible(self) -> int:
        return count_visible(self.patches, MASK_RATIO)

    @property
    def kept(self) -> int:
        """Visible tokens of a clip."""
        return self.frames * self.num_visible

    @property
    def halo(self) -> int:
        return 0 if self.teacher_patch == self.patch else bicubic_window(self.patch, self.teacher_patch)[1]

    @property
    def teacher_side(self) -> int:
        return self.side // self.patch * self.teacher_patch


UMT_B = Shapes("umt_b16", "UMT-B/16")
UMT_L = Shapes("umt_l16", "UMT-L/16", width=1024, target_width=768, heads=16, teacher_patch=14)
VIT_H = Shapes("vit_h14", "ViT-H/14", width=1280, target_width=1024, heads=16, patch=14, teacher_patch=14)
TINY = Shapes("tiny", "tiny", 2, 2, 64, 16, 2, 32, 16, 2, 14, torch.float32)
"""For the CPU, in float32: rounding cannot hide a wrong formula."""

"""Random inputs for several cases."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.published import Inputs
from benchmarks.kernels.shapes import Shapes

IDS = 8
"""Bytes of an id: the models index with int64."""


def make_visible(s: Shapes, device: torch.device) -> Inputs:
    """Visible tokens of clips, n per frame: ids within frames, ids within the clip, and the published mask."""
    patch = torch.rand(s.images, s.patches, device=device).argsort(1)[:, : s.num_visible].sort(1).values
    hidden = torch.ones(s.images, s.patches, dtype=torch.bool, device=device).scatter_(1, patch, False)
    frame = torch.arange(s.frames, device=device)[:, None] * s.patches
    return {
        "patch_ids": patch,
        "token_ids": (patch.view(s.batch, s.frames, -1) + frame).flatten(1),
        "hidden": hidden.view(s.batch, -1),
    }


def make_clip(s: Shapes, device: torch.device) -> Tensor:
    return torch.randint(0, 256, (s.batch, s.frames, s.side, s.side, 3), dtype=torch.uint8, device=device)


def with_grad(x: Inputs, leaves: tuple[str, ...], backward: bool, output: tuple[int, ...] | None) -> Inputs:
    """`x`; for backward its leaves require grad, and x["grad"] is the output's gradient unless this is a scalar."""
    if not backward:
        return x
    for leaf in leaves:
        x[leaf] = x[leaf].detach().requires_grad_()
    if output is not None:
        x["grad"] = torch.randn(output, device=x[leaves[0]].device, dtype=x[leaves[0]].dtype)
    return x

"""The implicit GEMM against F.conv3d in float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD
from umt_kernels.backend import INTERPRETED

PATCH = 4

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a kernel without a reference of its own")


@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("halo", [0, 1])
def test_the_implicit_gemm_is_the_same_embedding(kind, halo):
    from benchmarks.kernels.implicit_patch_embed import implicit_patch_embed

    generator = torch.Generator().manual_seed(0)
    if kind == "uint8":
        clip = torch.randint(0, 256, (2, 4, 12, 8, 3), generator=generator, dtype=torch.uint8)
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (IMAGENET_MEAN, IMAGENET_STD))
        wide = ((clip.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    else:
        clip = torch.randn(2, 3, 4, 12, 8, generator=generator)
        wide = clip.double()
    window = PATCH + 2 * halo
    weight, bias = (torch.randn(*s, generator=generator) for s in ((5, 3, 2, window, window), (5,)))
    position = torch.randn(12, 5, generator=generator)
    token_ids = torch.tensor([[0, 11, 3], [8, 5, 2]])
    wide = F.pad(wide, (halo, halo, halo, halo, 0, 0), mode="replicate")
    tokens = F.conv3d(wide, weight.double(), bias.double(), stride=(2, PATCH, PATCH)).flatten(2).mT + position.double()
    expected = torch.stack([rows[ids] for rows, ids in zip(tokens, token_ids, strict=True)])
    embedded = implicit_patch_embed(clip, weight, bias, PATCH, token_ids, position, torch.float32)
    assert (embedded - expected).abs().max() < 1e-4

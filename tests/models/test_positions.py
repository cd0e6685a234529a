"""Patch embedding, positions and the resize matrix."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from umt_kernels import patch_embed

from umt_fast.models.positions import bicubic_window, sinusoid_positions


def test_sinusoid_table_is_the_formula():
    tokens, width = 20, 12
    table = sinusoid_positions(tokens, width)
    assert table.dtype == torch.float32
    for pos in range(tokens):
        for j in range(width):
            angle = pos / 10000 ** (2 * (j // 2) / width)
            expected = math.sin(angle) if j % 2 == 0 else math.cos(angle)
            assert abs(float(table[pos, j]) - expected) < 1e-7


def test_sinusoid_table_is_exact_at_the_end_of_a_long_clip():
    table = sinusoid_positions(1568, 768)
    assert abs(float(table[1567, 0]) - math.sin(1567)) < 1e-7
    assert abs(float(table[1567, 767]) - math.cos(1567 / 10000 ** (766 / 768))) < 1e-7


@pytest.mark.parametrize("tubelet", [1, 2])
def test_embedding_is_the_conv3d(tubelet):
    clip = torch.randn(2, 3, 4, 12, 12, dtype=torch.float64)
    weight = torch.randn(5, 3, tubelet, 4, 4, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)
    expected = F.conv3d(clip, weight, bias, stride=(tubelet, 4, 4)).flatten(2).transpose(1, 2)
    assert (patch_embed(clip, weight, bias, 4) - expected).abs().max() < 1e-12
    ids = torch.tensor([[3, 0], [8, 1]])
    chosen = torch.stack([expected[sample, ids[sample]] for sample in range(2)])
    assert (patch_embed(clip, weight, bias, 4, token_ids=ids) - chosen).abs().max() < 1e-12


def test_embedding_follows_autocast():
    clip = torch.randint(0, 256, (1, 2, 8, 8, 3), dtype=torch.uint8)
    weight = torch.randn(5, 3, 1, 4, 4)
    exact = patch_embed(clip, weight, None, 4)
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rounded = patch_embed(clip, weight, None, 4)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize(("source", "target"), [(16, 14), (16, 12), (14, 16), (16, 16), (8, 6), (4, 8), (8, 4), (3, 7)])
def test_bicubic_window_resizes_a_signal_patch_by_patch(source, target):
    patches = 4
    signal = torch.randn(patches * source, dtype=torch.float64)
    expected = F.interpolate(
        signal[None, None, :, None], size=(patches * target, 1), mode="bicubic", align_corners=False
    ).flatten()
    matrix, halo = bicubic_window(source, target)
    assert matrix.shape == (target, source + 2 * halo)
    assert matrix.dtype == torch.float64
    assert (matrix.sum(1) - 1).abs().max() < 1e-12
    padded = torch.cat((signal[:1].expand(halo), signal, signal[-1:].expand(halo)))
    resized = torch.cat([matrix @ window for window in padded.unfold(0, source + 2 * halo, source)])
    assert (resized - expected).abs().max() < 1e-12


def test_bicubic_window_of_the_published_pair_is_14_by_18():
    matrix, halo = bicubic_window(16, 14)
    assert (tuple(matrix.shape), halo) == ((14, 18), 1)


def test_bicubic_window_of_the_same_size_is_the_identity():
    matrix, halo = bicubic_window(16, 16)
    assert halo == 0
    assert torch.equal(matrix, torch.eye(16, dtype=torch.float64))

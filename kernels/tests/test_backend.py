"""Choice between kernels and reference, and assumptions of the other tests."""

from __future__ import annotations

import importlib

import pytest
import torch
from umt_kernels import (
    add_layer_norm,
    checks,
    cls_scores,
    cosine_alignment_loss,
    gather_layer_norm,
    gather_patches,
    patch_embed,
    reference,
    sample_visible,
)
from umt_kernels.backend import next_power_of_2, runs_triton


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fresh_memory_is_filled(device, dtype):
    x = torch.zeros(3, 5, dtype=dtype, device=device)
    for fresh in (
        torch.empty(3, 5, dtype=dtype, device=device),
        torch.empty_strided((3, 5), (1, 3), dtype=dtype, device=device),
        torch.empty_like(x),
        x.new_empty(3, 5),
        x.new_empty(3, 5, dtype=torch.float32),
    ):
        assert fresh.isnan().all()
    assert (x.new_empty(4, dtype=torch.int32) == 2**31 - 1).all()


def test_which_tensors_run_the_kernels(device, kernels):
    x = torch.zeros(1, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
        assert runs_triton(x.to(dtype), None) == kernels
    assert not runs_triton(x.double())
    assert not runs_triton(x, x.double())
    assert not runs_triton(x.to("meta"))


def test_no_op_falls_back_in_silence(device, needs_kernels, monkeypatch):
    ops = ("add_layer_norm", "gather_patches", "gather_layer_norm", "cls_scores", "sample_visible")
    for name in (*ops, "cosine_alignment_loss"):
        monkeypatch.setattr(reference, name, None)
    x = torch.rand(2, 3, 4, device=device)
    gather_patches(torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8, device=device), 4)
    add_layer_norm(x, x, x[0, 0], x[0, 0], 1e-6)
    gather_layer_norm(x, x[0, 0], x[0, 0], 1e-6)
    cls_scores(x, x[:, :, None])
    sample_visible(x[0], 2)
    cosine_alignment_loss(x[None], x[None])
    with pytest.raises(TypeError):  # the patch above has an effect
        sample_visible(x[0].double(), 2)


def test_too_many_keys_run_the_reference(device, monkeypatch, fresh_plans):
    q, k = torch.randn(2, 3, 4, device=device), torch.randn(2, 3, 9, 4, device=device)
    expected = reference.cls_scores(q.double(), k.double())
    module = importlib.import_module("umt_kernels.cls_scores")
    monkeypatch.setattr(module, "LONGEST", 8)
    monkeypatch.setattr(module._forward, "launch", None)
    assert (cls_scores(q, k) - expected).abs().max() < 1e-6


def test_the_debug_switch_looks_at_ids_on_any_device(device, monkeypatch):
    """UMT_KERNELS_CHECK_IDS=1 turns the switch on; on the CPU ids are always checked."""
    monkeypatch.setattr(checks, "EVERYWHERE", True)
    x, weight = torch.zeros(2, 5, 4, device=device), torch.zeros(4, device=device)
    ids = torch.tensor([[0, 1], [3, 5]], device=device)
    with pytest.raises(ValueError, match=r"row_ids\[1, 1\] = 5, but x has 5 rows"):
        gather_layer_norm(x, weight, weight, 1e-6, row_ids=ids)


def test_shapes_can_be_asked_for_on_the_meta_device():
    x = torch.empty(2, 5, 4, device="meta")
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    clip = torch.empty(2, 2, 8, 8, 3, dtype=torch.uint8, device="meta")
    assert [y.shape for y in add_layer_norm(x, x[:, :3], None, None, 1e-6, row_ids=ids)] == 2 * [(2, 3, 4)]
    assert gather_layer_norm(x, x[0, 0], x[0, 0], 1e-6, row_ids=ids).shape == (2, 3, 4)
    assert gather_patches(clip, 4, token_ids=ids).shape == (2, 3, 48)
    assert patch_embed(clip, x.new_empty(6, 3, 1, 4, 4), None, 4, token_ids=ids).shape == (2, 3, 6)
    assert cls_scores(x, x[:, :, None]).shape == (2, 0)
    assert sample_visible(x[0], 2).shape == (5, 2)
    assert cosine_alignment_loss(x[None], x[None]).shape == ()


def test_next_power_of_2():
    assert [next_power_of_2(n) for n in (1, 2, 3, 4, 5, 768, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 1024, 2048]

"""Offsets beyond 2^31 elements: the product of an id or a program's index with a stride must be an int64."""

from __future__ import annotations

import importlib
import mmap
import sys

import pytest
import torch
from torch import Tensor
from umt_kernels import (
    add_layer_norm,
    cls_scores,
    cosine_alignment_loss,
    gather_layer_norm,
    gather_patches,
    pixel_loss,
    sample_visible,
)
from umt_kernels.matmul import matmul

MAP_NORESERVE = 0x4000  # only since Python 3.13 in the mmap module
STRIDE = 2**30 + 64
"""Fits an int32, so that Triton passes an int32; three times this stride does not."""


def far_apart(x: Tensor, axis: int) -> Tensor:
    """`x` with STRIDE between its slices along `axis`, in virtual memory; only touched pages use real memory."""
    strides = list(x.contiguous().stride())
    strides[axis] = STRIDE
    length = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
    assert length > 2**31
    size = length * x.element_size()
    if x.is_cuda:
        if torch.cuda.mem_get_info()[0] < 1.1 * size:
            pytest.skip(f"{size / 2**30:.1f} GiB of GPU memory are not free")
        torch.utils.deterministic.fill_uninitialized_memory = False  # the fixture restores it
        memory = torch.empty(length, dtype=x.dtype, device=x.device)
    else:
        if sys.platform != "linux":
            pytest.skip("memory that is reserved but not there is asked for in Linux's way")
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=x.dtype)
        except OSError as error:
            pytest.skip(f"no {size / 2**30:.1f} GiB of virtual memory: {error}")
    view = memory.as_strided(x.shape, strides)
    view.copy_(x)
    return view


def randn(device: torch.device, *shape: int) -> Tensor:
    """float16, the smallest dtype that the kernels support."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("halo", [0, 1])
def test_gather_patches_of_bytes(device, axis, halo):
    clip = torch.arange(3 * 3 * 8 * 8 * 3).remainder(251).view(3, 3, 8, 8, 3).to(device, torch.uint8)
    expected = gather_patches(clip, 4, halo=halo)
    assert torch.equal(gather_patches(far_apart(clip, axis), 4, halo=halo), expected)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_gather_patches_of_floats(device, axis):
    clip = randn(device, 3, 3, 3, 4, 4)
    ids = torch.tensor([[2], [1], [2]], device=device)
    expected = gather_patches(clip, 4, token_ids=ids, halo=1)
    assert torch.equal(gather_patches(far_apart(clip, axis), 4, token_ids=ids, halo=1), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("with_ids", [False, True])
def test_gather_layer_norm(device, axis, with_ids):
    x, weight, upstream = randn(device, 3, 3, 8), torch.ones(8, device=device), randn(device, 3, 3, 8)
    ids = torch.tensor([[2, 0, 1], [0, 1, 2], [2, 1, 0]], device=device).int() if with_ids else None
    results = []
    for given, grad in ((x, upstream), (far_apart(x, axis), far_apart(upstream, axis))):
        given.requires_grad_()
        y = gather_layer_norm(given, weight, weight, 1e-6, row_ids=ids)
        results.append((y, *torch.autograd.grad(y, given, grad)))
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("with_ids", [False, True])
def test_gather_layer_norm_of_layers(device, axis, with_ids):
    x, upstream = randn(device, 3, 3, 3, 8), randn(device, 3, 3, 3, 8)
    ids = torch.tensor([[2, 0, 1], [0, 1, 2], [2, 1, 0]], device=device).int() if with_ids else None
    results = []
    for given, grad in ((x, upstream), (far_apart(x, axis), far_apart(upstream, axis))):
        given.requires_grad_()
        y = gather_layer_norm(given, None, None, 1e-6, row_ids=ids)
        results.append((y, *torch.autograd.grad(y, given, grad)))
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather_patches_of_planar_bytes(device, axis):
    clip = torch.arange(3 * 3 * 3 * 8 * 8).remainder(251).view(3, 3, 3, 8, 8).to(device, torch.uint8)
    expected = gather_patches(clip, 4, layout="BTCHW")
    assert torch.equal(gather_patches(far_apart(clip, axis), 4, layout="BTCHW"), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
def test_add_layer_norm(device, axis, with_ids, post_norm):
    weight, tensors = torch.ones(8, device=device), [randn(device, 3, 3, 8) + i for i in range(3)]
    ids = torch.tensor([[2, 0, 1], [0, 1, 2], [2, 1, 0]], device=device).int() if with_ids else None
    results = []
    for residual, branch, grad in (tensors, [far_apart(x, axis) for x in tensors]):
        given = residual.requires_grad_(), branch.requires_grad_()
        outputs = add_layer_norm(*given, weight, weight, 1e-6, row_ids=ids, post_norm=post_norm)
        results.append((*outputs, *torch.autograd.grad(outputs, given, (grad, grad))))
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))


@pytest.mark.parametrize("far", ["a", "b", "b transposed", "residual"])
def test_matmul(device, needs_kernels, far):
    a, b, residual = randn(device, 3, 8), randn(device, 4, 8), randn(device, 3, 4)
    if far == "b transposed":
        b = b.T.contiguous()[:4]
        a = a[:, :4].contiguous()
    given = {"a": a, "b": b, "residual": residual, "transposed": far == "b transposed", "out_dtype": torch.float16}
    expected = matmul(**given)[0]
    name = far.split()[0]
    assert torch.equal(matmul(**{**given, name: far_apart(given[name], 0)})[0], expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_cls_scores(device, needs_kernels, axis):
    q, k = randn(device, 3, 3, 8), randn(device, 3, 3, 4, 8)
    backward = importlib.import_module("umt_kernels.cls_scores")._backward
    far = far_apart(k, axis)
    assert torch.equal(cls_scores(q, far), cls_scores(q, k))
    grad = torch.linspace(-1, 1, 9, device=device).view(3, 3)
    for ours, theirs in zip(backward(grad, q, far, 1), backward(grad, q, k, 1), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_cosine_alignment_loss(device, axis):
    predictions, targets = randn(device, 3, 3, 3, 8), randn(device, 3, 3, 4, 8)
    ids = torch.tensor([[3, 0, 1], [0, 1, 3], [2, 1, 0]], device=device).int()
    results = []
    for x, t in ((predictions, targets), (far_apart(predictions, axis), far_apart(targets, axis))):
        x.requires_grad_()
        loss = cosine_alignment_loss(x, t, target_ids=ids)
        results.append((loss, *torch.autograd.grad(loss, x)))
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))


@pytest.mark.parametrize("far", [("clip", 0), ("clip", 1), ("clip", 2), ("predictions", 0), ("predictions", 1)])
def test_pixel_loss(device, needs_kernels, far):
    given = {
        "predictions": randn(device, 3, 3, 48),
        "clip": torch.arange(3 * 3 * 8 * 8 * 3).remainder(251).view(3, 3, 8, 8, 3).to(device, torch.uint8),
    }
    ids = torch.tensor([[11, 3, 8], [0, 10, 5], [9, 11, 7]], device=device)
    expected = pixel_loss(**given, token_ids=ids, patch_size=4, tubelet_size=1, reduction="none")
    name, axis = far
    given[name] = far_apart(given[name], axis)
    assert torch.equal(pixel_loss(**given, token_ids=ids, patch_size=4, tubelet_size=1, reduction="none"), expected)


def test_sample_visible(device):
    scores = randn(device, 3, 9).abs()
    near, far = (sample_visible(x, 4, torch.Generator(device).manual_seed(0)) for x in (scores, far_apart(scores, 0)))
    assert torch.equal(near, far)

"""autograd, torch.func and forward mode give the same results with the kernels as with the reference."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from umt_kernels import (
    add_layer_norm,
    alignment_loss,
    cls_scores,
    cosine_alignment_loss,
    dispatch,
    gather_layer_norm,
    gather_patches,
    gather_rms_norm,
    linear,
    mlp,
    patch_embed,
    pixel_loss,
    sample_visible,
)

IDS = torch.tensor([[1, 4, 0], [3, 2, 4]])
PLACES = torch.tensor([[0, 6, 6], [5, 2, 1]])
CLIP = torch.randint(0, 256, (2, 2, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def draw(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def cases(device: torch.device) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each op as a function of the tensors that get a gradient."""
    ids, places, clip = IDS.to(device), PLACES.to(device), CLIP.to(device)
    targets, upstream = draw(device, (2, 2, 7, 6), (2, 2, 3))
    return {
        "gather_layer_norm": (
            lambda x, w, b, p: gather_layer_norm(x, w, b, 1e-3, row_ids=ids, position=p, position_ids=places),
            draw(device, (2, 5, 6), (6,), (6,), (7, 6)),
        ),
        "gather_rms_norm": (
            lambda x, w: gather_rms_norm(x, w, 1e-3, row_ids=ids - 1, padded=True),
            draw(device, (2, 5, 6), (6,)),
        ),
        "add_layer_norm": (
            lambda x, y, w, b, s: torch.cat(
                add_layer_norm(x, y, w, b, 1e-3, branch_bias=s, scale=upstream[0, :, 0].to(x.dtype), row_ids=ids)
            ),
            draw(device, (2, 5, 6), (2, 3, 6), (6,), (6,), (6,)),
        ),
        "add_layer_norm of sets": (
            lambda x, y, w: torch.cat(add_layer_norm(x, y, w, None, 1e-3, row_ids=ids.repeat(2, 1) - 1, padded=True)),
            draw(device, (2, 5, 6), (4, 3, 6), (6,)),
        ),
        "add_layer_norm, post-norm": (
            lambda x, y, w: add_layer_norm(x, y, w, None, 1e-3, scale=0.5, post_norm=True)[0],
            draw(device, (2, 5, 6), (2, 5, 6), (6,)),
        ),
        "norm of add_layer_norm": (
            lambda x, y: add_layer_norm(x, y, None, None, 1e-3, rms=True)[1],
            draw(device, (2, 5, 6), (2, 5, 6)),
        ),
        "pixel_loss": (
            lambda x: pixel_loss(x, clip, ids, 4, 1, normalise="token", reduction="none"),
            draw(device, (2, 3, 48)),
        ),
        "pixel_loss of channels": (
            lambda x: pixel_loss(x, clip, ids, (4, 1), 1, layout="BTCHW", scale=(1 / 99, 1 / 50) * 4),
            draw(device, (2, 3, 32)),
        ),
        "cls_scores": (cls_scores, draw(device, (2, 3, 4), (2, 3, 5, 4))),
        "cosine_alignment_loss": (
            lambda x, w, b: cosine_alignment_loss(x, targets.to(x.dtype), target_ids=ids, weight=w, bias=b),
            draw(device, (2, 2, 3, 6), (2, 6), (2, 6)),
        ),
        "rows of cosine_alignment_loss": (
            lambda x: cosine_alignment_loss(
                x, targets.to(x.dtype), target_ids=ids, row_weights=upstream.to(x.dtype), reduction="none"
            ),
            draw(device, (2, 2, 3, 6)),
        ),
        "alignment_loss": (
            lambda x: alignment_loss(x, targets.to(x.dtype), "smooth_l1", target_ids=ids, beta=0.7, reduction="sum"),
            draw(device, (2, 2, 3, 6)),
        ),
        "linear": (
            lambda x, w, b, r: linear(x, w, b, activation="gelu", residual=r),
            draw(device, (2, 3, 6), (5, 6), (5,), (2, 3, 5)),
        ),
        "mlp": (
            lambda x, w1, b1, w2: mlp(x, w1, b1, w2, None, activation="quick_gelu", residual=x),
            draw(device, (2, 3, 6), (5, 6), (5,), (6, 5)),
        ),
        "patch_embed": (
            lambda w, b, p: patch_embed(clip, w, b, 4, token_ids=ids, position=p),
            draw(device, (5, 3, 1, 4, 4), (5,), (8, 5)),
        ),
    }


OPS = list(cases(torch.device("cpu")))


@pytest.fixture(autouse=True)
def _matmul_by_the_kernel_where_it_can(monkeypatch):
    monkeypatch.setattr(importlib.import_module("umt_kernels.matmul"), "FORCED", "triton")


def scalar(value: Tensor) -> Tensor:
    """Weighted sum of a value; each element gets another gradient."""
    return (value * torch.linspace(0.5, 2, value.numel(), device=value.device).view_as(value).to(value.dtype)).sum()


def widened(inputs: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in inputs]


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives(device, name, assert_near):
    function, inputs = cases(device)[name]

    def twice(inputs: list[Tensor]) -> list[Tensor]:
        inputs = [x.requires_grad_() for x in inputs]
        first = torch.autograd.grad(scalar(function(*inputs).square()), inputs, create_graph=True)
        penalty = sum(x.square().sum() for x in first)
        return list(torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True))

    for ours, theirs in zip(twice(inputs), twice(widened(inputs)), strict=True):
        assert_near(ours, theirs, 1e-4)


@pytest.mark.parametrize("name", OPS)
def test_torch_func_grad_and_vmap(device, name, assert_near):
    function, inputs = cases(device)[name]
    argnums = tuple(range(len(inputs)))

    def per_sample(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Gradients for three scaled copies of the inputs at once."""
        stacked = [torch.stack([x, 2 * x, 0.5 * x]) for x in inputs]
        gradient = torch.func.grad(lambda *inputs: scalar(function(*inputs)), argnums)
        return torch.func.vmap(gradient)(*stacked)

    for ours, theirs in zip(per_sample(inputs), per_sample(widened(inputs)), strict=True):
        assert_near(ours, theirs, 1e-4)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("way", ["torch.func.jvp", "forward_ad"])
def test_forward_mode(device, name, way, assert_near):
    function, inputs = cases(device)[name]

    def pushed(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        tangents = [x.flip(-1) for x in inputs]
        if way == "torch.func.jvp":
            return torch.func.jvp(function, tuple(inputs), tuple(tangents))
        with forward_ad.dual_level():
            dual = function(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
            return tuple(forward_ad.unpack_dual(dual))

    value, tangent = pushed(inputs)
    expected, expected_tangent = pushed(widened(inputs))
    assert_near(value, expected)
    assert tangent.abs().max() > 0
    assert_near(tangent, expected_tangent, 1e-4)


@pytest.mark.parametrize("name", OPS)
def test_jacobians_agree_with_autograd(device, name, assert_near):
    function, inputs = cases(device)[name]
    jacobian = torch.func.jacrev(function)(*inputs)
    value = function(inputs[0].requires_grad_(), *inputs[1:])
    (grad,) = torch.autograd.grad(scalar(value), inputs[0])
    weights = torch.linspace(0.5, 2, value.numel(), device=device)
    assert_near(grad, (weights @ jacobian.reshape(value.numel(), -1)).view_as(grad), 1e-5)


def test_ops_without_a_gradient_stay_without(device):
    clip, scores = CLIP.to(device), torch.rand(2, 5, device=device)
    with forward_ad.dual_level():
        rows = gather_patches(forward_ad.make_dual(clip.float().permute(0, 4, 1, 2, 3), torch.ones(2, 3, 2, 8, 8)), 4)
        assert forward_ad.unpack_dual(rows).tangent is None or not forward_ad.unpack_dual(rows).tangent.any()
        drawn = sample_visible(forward_ad.make_dual(scores, scores), 3)
    assert drawn.dtype == torch.int32


def test_a_level_without_dual_tensors_keeps_the_kernels(device, needs_kernels):
    x = torch.rand(2, 3, device=device)
    with forward_ad.dual_level():
        assert dispatch.runs_kernel("gather_layer_norm", x)
        assert not dispatch.runs_kernel("gather_layer_norm", forward_ad.make_dual(x, x))
    seen = []

    def look(row: Tensor) -> Tensor:
        seen.append(dispatch.runs_kernel("gather_layer_norm", row))
        return row

    torch.func.vmap(look)(x)
    assert seen == [False]


def test_a_backward_within_a_level_without_dual_tensors(device):
    """Plans are not kept there, so the custom op runs."""
    x = torch.rand(1, 2, 3, 4, device=device, requires_grad=True)
    gradients = []
    for level in (contextlib.nullcontext(), forward_ad.dual_level()):
        with level:
            loss = cosine_alignment_loss(x, torch.ones_like(x)) * 3
            gradients += torch.autograd.grad(loss, x)
    assert torch.equal(*gradients)


def test_private_parts_of_torch_are_where_they_were():
    """`dispatch` and the loss read three private attributes; a new PyTorch may move them."""
    assert torch._C._are_functorch_transforms_active() is False
    assert forward_ad._current_level == -1
    assert torch._C._autograd._get_current_graph_task_keep_graph() in (True, False)

"""mlp: a transformer's MLP as two matrix products with epilogues, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from umt_kernels import reference
from umt_kernels.linear import check_linear, compute_dtype
from umt_kernels.matmul import Activation, Backend, matmul, runs_here

if TYPE_CHECKING:
    from jaxtyping import Float


def mlp(
    x: Float[Tensor, "... d"],
    fc1_weight: Float[Tensor, "h d"],
    fc1_bias: Float[Tensor, " h"] | None,
    fc2_weight: Float[Tensor, "n h"],
    fc2_bias: Float[Tensor, " n"] | None,
    *,
    activation: Activation = "gelu",
    residual: Float[Tensor, "... n"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "... n"]:
    """activation(x @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias + residual.

    With "triton" no pass over the hidden layer remains: forward, the first product's epilogue applies the activation;
    backward, the epilogue of the product that gives the hidden layer's gradient multiplies by the activation's
    derivative and sums the columns, which are the gradient of `fc1_bias`. The layer is kept before and after the
    activation, as PyTorch does. `backend`, dtypes and errors are those of `umt_kernels.linear`.
    """
    check_linear(x, fc1_weight, fc1_bias, activation, None, "fc1_")
    if activation is None:
        raise ValueError('activation = None; give "gelu" or "quick_gelu"')
    hidden = x.new_empty(()).expand(*x.shape[:-1], fc1_weight.shape[0])
    check_linear(hidden, fc2_weight, fc2_bias, None, residual, "fc2_")
    dtype = compute_dtype(x)
    parameters = (fc1_weight.to(dtype), fc1_bias, fc2_weight.to(dtype), fc2_bias)
    if not runs_here("mlp", backend, x, *parameters, residual):
        return reference.mlp(x.to(dtype), *parameters, activation, residual)
    if residual is x:
        residual = x.view_as(x)  # torch.compile refuses an autograd.Function that gets one tensor twice
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters, residual))
    return _Mlp.apply(x.to(dtype), *parameters, residual, activation, keeps)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
                residual: Tensor | None, activation: str, keeps: bool) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        hidden, before, _, _ = matmul(rows, weight1, x.dtype, bias=bias1, activation=activation, keep_before=keeps)
        added = None if residual is None else residual.reshape(-1, weight2.shape[0])
        out_dtype = x.dtype if residual is None else residual.dtype
        out = matmul(hidden, weight2, out_dtype, bias=bias2, residual=added)[0]
        if keeps:
            ctx.save_for_backward(rows, weight1, weight2, before, hidden)
        ctx.activation, ctx.shape = activation, x.shape
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (bias1, bias2)]
        return out.view(*x.shape[:-1], weight2.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight1, weight2, before, hidden = ctx.saved_tensors
        wants_x, wants_weight1, wants_bias1, wants_weight2, wants_bias2, wants_residual = ctx.needs_input_grad[:6]
        flat = grad.reshape(-1, weight2.shape[0])
        narrow = flat.to(rows.dtype)
        grad_x = grad_weight1 = grad_bias1 = None
        if wants_x or wants_weight1 or wants_bias1:
            slope, _, sums, _ = matmul(
                narrow, weight2, rows.dtype, transposed=True, activation=ctx.activation, derivative_at=before,
                column_sums=wants_bias1,
            )  # fmt: skip
            grad_x = (slope @ weight1).view(ctx.shape) if wants_x else None
            grad_weight1 = slope.T @ rows if wants_weight1 else None
            grad_bias1 = sums.sum(0).to(ctx.bias_dtypes[0]) if wants_bias1 else None
        return (
            grad_x,
            grad_weight1,
            grad_bias1,
            narrow.T @ hidden if wants_weight2 else None,
            flat.sum(0, dtype=torch.float32).to(ctx.bias_dtypes[1]) if wants_bias2 else None,
            grad if wants_residual else None,
            None,
            None,
        )

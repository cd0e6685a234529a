"""mlp: a transformer's MLP as two matrix products with epilogues, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.dispatch import KernelOp, differentiate_reference
from umt_kernels.launch import PLANS, Plan, as_rows
from umt_kernels.linear import check_linear, compute_dtype, records
from umt_kernels.matmul import Activation, Backend, matmul, multiply, prepare, runs_here

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

    With "triton", epilogues of the products do all elementwise work. Forward, the first product's epilogue applies the
    activation. Backward, the epilogue of the product that gives the hidden layer's gradient multiplies by the
    activation's derivative and sums the columns for the gradient of `fc1_bias`. The hidden layer is saved before and
    after the activation, as in PyTorch. `backend`, dtypes and errors are those of `umt_kernels.linear`.
    """
    dtype = compute_dtype(x) if isinstance(x, Tensor) else None
    key = _mlp.key((x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual), (activation, backend, dtype))
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None:
        _check(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual)
    x = x if x.dtype == dtype else x.to(dtype)
    fc1_weight = fc1_weight if fc1_weight.dtype == dtype else fc1_weight.to(dtype)
    fc2_weight = fc2_weight if fc2_weight.dtype == dtype else fc2_weight.to(dtype)
    if plan is not None:
        return _mlp.planned(plan, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual)
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if not runs_here("mlp", backend, x, *parameters, residual):
        return reference.mlp(x, *parameters, activation, residual)
    return _mlp(x, *parameters, residual, activation, records(x, *parameters, residual), key=key)[0]


def _check(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str | None,
    residual: Tensor | None,
) -> None:  # fmt: skip
    check_linear(x, weight1, bias1, activation, None, "fc1_")
    if activation is None:
        raise ValueError('activation = None; give "gelu" or "quick_gelu"')
    hidden = x.new_empty(()).expand(*x.shape[:-1], weight1.shape[0])
    check_linear(hidden, weight2, bias2, None, residual, "fc2_")


def _prepare(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keeps: bool,
) -> Plan:
    """The plan of the first product; its only part is the plan of the second."""
    first = prepare(x, weight1, bias1, None, None, None, None, x.dtype, False, activation, keeps, False)
    hidden = x.new_empty(*x.shape[:-1], weight1.shape[0])
    out_dtype = x.dtype if residual is None else residual.dtype
    second = prepare(hidden, weight2, bias2, residual, None, None, None, out_dtype, False, None, False, False)
    first.parts = (second,)
    return first


def _launch(
    plan: Plan,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result [...,n]; if `keeps` the hidden layer before [m,h] and after the activation [...,h]."""
    hidden, before, _, _ = multiply(plan, x, weight1, bias1)
    out = multiply(plan.parts[0], hidden, weight2, bias2, residual)[0]
    return out, before, hidden if keeps else None  # type: ignore[return-value]


def _fake(x, weight1, bias1, weight2, bias2, residual, activation, keeps):
    lead, width = x.shape[:-1], weight1.shape[0]
    out = x.new_empty((*lead, weight2.shape[0]), dtype=x.dtype if residual is None else residual.dtype)
    if keeps:
        return out, x.new_empty(x.numel() // x.shape[-1], width), x.new_empty(*lead, width)
    return out, *(x.new_empty(0, dtype=torch.float32) for _ in range(2))


def _save(ctx, inputs, output):
    x, weight1, bias1, weight2, bias2, _, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weight1, bias1, weight2, bias2, *output[1:])


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    x, weight1, bias1, weight2, bias2, before, hidden = ctx.saved_tensors
    wants_x, wants_weight1, wants_bias1, wants_weight2, wants_bias2, wants_residual = ctx.needs_input_grad[:6]
    rows, flat = x.reshape(-1, x.shape[-1]), grad.reshape(-1, weight2.shape[0])
    narrow = flat.to(x.dtype)
    grad_x = grad_weight1 = grad_bias1 = None
    if wants_x or wants_weight1 or wants_bias1:
        slope, _, sums, _ = matmul(
            narrow, weight2, x.dtype, transposed=True, activation=ctx.activation, derivative_at=before,
            column_sums=wants_bias1,
        )  # fmt: skip
        grad_x = (slope @ weight1).view(x.shape) if wants_x else None
        grad_weight1 = slope.T @ rows if wants_weight1 else None
        grad_bias1 = sums.sum(0).to(bias1.dtype) if wants_bias1 else None
    return (
        grad_x,
        grad_weight1,
        grad_bias1,
        narrow.T @ hidden.view(len(rows), -1) if wants_weight2 else None,
        flat.sum(0, dtype=torch.float32).to(bias2.dtype) if wants_bias2 else None,
        grad if wants_residual else None,
        None,
        None,
    )


def _differentiate_again(ctx, grad):
    x, weight1, bias1, weight2, bias2, _, _ = ctx.saved_tensors

    def run(*inputs):
        return reference.mlp(*inputs, ctx.activation, None)

    gradients = differentiate_reference(run, (x, weight1, bias1, weight2, bias2), grad.to(x.dtype))
    return *gradients, grad if ctx.needs_input_grad[5] else None, None, None


_mlp = KernelOp(
    "mlp",
    _prepare,
    _launch,
    _fake,
    _save,
    _differentiate,
    _differentiate_again,
    strided=dict.fromkeys(("x", "weight1", "weight2", "residual"), as_rows),
)

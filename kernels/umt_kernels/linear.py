"""linear: a matrix product whose epilogue adds the bias, applies the activation and adds the residual."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from umt_kernels import reference
from umt_kernels.checks import check_floats, check_tensors
from umt_kernels.launch import PLANS, Plan
from umt_kernels.matmul import Activation, Backend, matmul, matmul_key, runs_here

if TYPE_CHECKING:
    from jaxtyping import Float


def linear(
    x: Float[Tensor, "... k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    activation: Activation | None = None,
    residual: Float[Tensor, "... n"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "... n"]:
    """activation(x @ weight.T + bias) + residual, in the dtype of the residual if there is one.

    activation  "gelu" (exact, arXiv 1606.08415) or "quick_gelu" (x sigmoid(1.702 x), arXiv 2103.00020).
    backend     "triton": one kernel, which writes the result once; "torch": PyTorch's matmul, then what torch.compile
                or the eager mode makes of the rest; "auto": the faster by measurement (`umt_kernels.matmul.FASTER`).

    Products are in autocast's dtype if that is on and else in that of x; sums and the epilogue are float32. Raises
    ValueError for shapes, devices or names that do not fit, TypeError for a dtype that does not.
    """
    dtype = compute_dtype(x) if isinstance(x, Tensor) else None
    key = matmul_key(x, weight, bias, residual, activation, backend, dtype)
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None:
        check_linear(x, weight, bias, activation, residual)
        if not runs_here("linear", backend, x, weight, bias, residual):
            return reference.linear(x.to(dtype), weight.to(dtype), bias, activation, residual)
    if residual is x:
        residual = x.view_as(x)  # torch.compile refuses an autograd.Function that gets one tensor twice
    tensors = (x.to(dtype), weight.to(dtype), bias, residual)
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _Linear.apply(*tensors, activation, keeps, key, plan)


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, name: str = ""
) -> None:
    """Raise unless the arguments fit. `name` goes before those of weight and bias in messages: `fc1_`."""
    given = {"x": x, f"{name}weight": weight, f"{name}bias": bias, "residual": residual}
    check_tensors(**given)
    check_floats(**given)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)}, {name}weight {list(weight.shape)}: give [..., k] and [n, k]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}bias has shape {list(bias.shape)}; give [{weight.shape[0]}]")
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(f"residual has shape {list(residual.shape)}; give {[*x.shape[:-1], weight.shape[0]]}")
    if activation not in (None, "gelu", "quick_gelu"):
        raise ValueError(f'activation = {activation!r}; give "gelu", "quick_gelu" or None')


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of a product of x: autocast's where that is on. It leaves float64 alone and knows no meta device."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def activation_backward(grad: Tensor, before: Tensor, activation: str | None) -> Tensor:
    """`grad` times the activation's derivative at `before`, in the dtype of `before`."""
    if activation is None:
        return grad.to(before.dtype)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad.to(before.dtype), before)
    gate = torch.sigmoid(reference.QUICK * before.float())
    return (grad * (gate * (1 + reference.QUICK * before * (1 - gate)))).to(before.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                activation: str | None, keeps: bool, key: tuple | None, plan: Plan | None) -> Tensor:  # fmt: skip
        out_dtype = x.dtype if residual is None else residual.dtype
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(-1, weight.shape[0])
        keep_before = keeps and activation is not None
        out, before, _, _ = matmul(
            rows, weight, out_dtype, bias=bias, activation=activation, residual=added, keep_before=keep_before,
            key=key, plan=plan,
        )  # fmt: skip
        ctx.save_for_backward(rows, weight, before)
        ctx.activation, ctx.shape = activation, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, before = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        flat = grad.reshape(-1, weight.shape[0])
        slope = flat if ctx.activation is None else activation_backward(flat, before, ctx.activation)
        slope = slope.to(rows.dtype)
        return (
            (slope @ weight).view(ctx.shape) if wants_x else None,
            slope.T @ rows if wants_weight else None,
            slope.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if wants_bias else None,
            grad if wants_residual else None,
            *(None,) * 4,
        )

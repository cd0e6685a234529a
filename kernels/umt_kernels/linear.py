"""linear: a matrix product whose epilogue adds the bias, applies the activation and adds the residual."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.checks import check_floats, check_tensors
from umt_kernels.dispatch import KernelOp, differentiate_reference
from umt_kernels.launch import PLANS, Plan, as_rows
from umt_kernels.matmul import Activation, Backend, check_activation, multiply, prepare, runs_here

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
    backend     "triton": one kernel, which writes the result once; "torch": PyTorch's matmul and other operations;
                "auto": the faster by measurement (`umt_kernels.matmul.FASTER`).

    Products are in autocast's dtype if it is on, else in that of x; sums and the epilogue are float32. Raises
    ValueError for shapes, devices or names that do not fit, TypeError for a dtype that does not.
    """
    dtype = compute_dtype(x) if isinstance(x, Tensor) else None
    key = _linear.key((x, weight, bias, residual), (activation, backend, dtype))
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None:
        check_linear(x, weight, bias, activation, residual)
        if not runs_here("linear", backend, x, weight, bias, residual):
            return reference.linear(x.to(dtype), weight.to(dtype), bias, activation, residual)
    tensors = (x if x.dtype == dtype else x.to(dtype), weight if weight.dtype == dtype else weight.to(dtype), bias)
    if plan is not None:
        return _linear.planned(plan, *tensors, residual)
    return _linear(*tensors, residual, activation, records(*tensors, residual), key=key)[0]


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, name: str = ""
) -> None:
    """Raise unless the arguments fit. In messages `name` precedes `weight` and `bias`, as in `fc1_weight`."""
    given = {"x": x, f"{name}weight": weight, f"{name}bias": bias, "residual": residual}
    check_tensors(**given)
    check_floats(**given)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)}, {name}weight {list(weight.shape)}: give [..., k] and [n, k]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}bias has shape {list(bias.shape)}; give [{weight.shape[0]}]")
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(f"residual has shape {list(residual.shape)}; give {[*x.shape[:-1], weight.shape[0]]}")
    check_activation(activation)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of a product of x: autocast's if it is on, except for float64 and on the meta device."""
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type  # the type's string costs 0.3 us
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def activation_backward(grad: Tensor, before: Tensor, activation: str | None) -> Tensor:
    """`grad` times the activation's derivative at `before`, in the dtype of `before`."""
    if activation is None:
        return grad.to(before.dtype)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad.to(before.dtype), before)
    scaled = reference.QUICK * before.float()  # the product can exceed float16's range
    gate = torch.sigmoid(scaled)
    return (grad * (gate * (1 + scaled * (1 - gate)))).to(before.dtype)


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    keeps: bool,
) -> Plan:
    out_dtype = x.dtype if residual is None else residual.dtype
    keep_before = keeps and activation is not None
    return prepare(x, weight, bias, residual, None, None, None, out_dtype, False, activation, keep_before, False)


def _launch(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """The result [...,n], and if `keeps` the activation's input [m,n]."""
    return multiply(plan, x, weight, bias, residual)[:2]


def _fake(x, weight, bias, residual, activation, keeps):
    shape, dtype = (*x.shape[:-1], weight.shape[0]), x.dtype if residual is None else residual.dtype
    out = x.new_empty(shape, dtype=dtype)
    if keeps and activation is not None:
        return out, x.new_empty(x.numel() // x.shape[-1], weight.shape[0], dtype=dtype)
    return out, x.new_empty(0, dtype=torch.float32)


def _save(ctx, inputs, output):
    x, weight, bias, _, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])


def _differentiate(ctx, grad, _grad_before=None):
    if grad is None:
        return (None,) * 6
    x, weight, bias, before = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
    rows, flat = x.reshape(-1, x.shape[-1]), grad.reshape(-1, weight.shape[0])
    slope = flat if ctx.activation is None else activation_backward(flat, before, ctx.activation)
    slope = slope.to(rows.dtype)
    return (
        (slope @ weight).view(x.shape) if wants_x else None,
        slope.T @ rows if wants_weight else None,
        slope.sum(0, dtype=torch.float32).to(bias.dtype) if wants_bias else None,
        grad if wants_residual else None,
        None,
        None,
    )


def _differentiate_again(ctx, grad):
    x, weight, bias, _ = ctx.saved_tensors

    def run(x, weight, bias):
        return reference.linear(x, weight, bias, ctx.activation, None)

    gradients = differentiate_reference(run, (x, weight, bias), grad.to(x.dtype))
    return *gradients, grad if ctx.needs_input_grad[3] else None, None, None


_linear = KernelOp(
    "linear",
    _prepare,
    _launch,
    _fake,
    _save,
    _differentiate,
    _differentiate_again,
    strided=dict.fromkeys(("x", "weight", "residual"), as_rows),
)

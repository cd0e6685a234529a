"""Inference in int8 or float8: rows with scales, written by a norm or by the epilogue of the preceding product.

    x, rows = add_layer_norm_8bit(x, branch, ...)                               one pass
    hidden = linear_8bit(rows, fc1, bias, activation="quick_gelu", out_dtype=torch.int8)
    branch = linear_8bit(hidden, fc2, bias)

Weights have a scale per output channel. Activations have one per row, or one per 128 columns if an epilogue writes
them, because it does not see the whole row. No function here has a gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import KERNEL_DTYPES, next_power_of_2, triton
from umt_kernels.checks import check_eps, check_floats, check_tensors
from umt_kernels.dispatch import KernelOp, runs_kernel
from umt_kernels.launch import PLANS, Plan, resident_programs, share
from umt_kernels.matmul import GROUP, LARGEST, Activation, check_activation, matmul

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

if triton is not None:
    import triton.language as tl

    from umt_kernels.reductions import largest_magnitudes


_RESULTS = frozenset((*LARGEST, *KERNEL_DTYPES))


class EightBit(NamedTuple):
    """The numbers values * scale, with a scale per row or per 128 columns of a row."""

    values: Shaped[Tensor, "... k"]
    """int8 or float8_e4m3fn."""
    scale: Tensor
    """float32 [m] for the m rows of `values`, or [k / 128, m]."""


def quantize_rows(x: Float[Tensor, "... k"], dtype: torch.dtype) -> EightBit:
    """x in int8 or float8_e4m3fn. Each row's scale maps its largest magnitude to the largest number of the dtype.

    Raises TypeError for another dtype.
    """
    inputs = (x, None, None, None, 0.0, dtype, False)
    key = _quantise.key(inputs[:4], inputs[4:])
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None:
        _check_dtype(dtype)
        check_tensors(x=x)
        check_floats(x=x)
        _check_width("x", x)
    _, values, scale = _run(inputs, key, plan)
    return EightBit(values, scale)


def add_layer_norm_8bit(
    residual: Float[Tensor, "... d"],
    branch: Float[Tensor, "... d"] | None,
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "... d"], EightBit]:
    """residual + branch in the residual's dtype, and `quantize_rows` of its LayerNorm. `branch` None: the residual
    itself.

    Raises ValueError for shapes or devices that do not fit, TypeError for a dtype that does not.
    """
    inputs = (residual, branch, weight, bias, eps, dtype, True)
    key = _quantise.key(inputs[:4], inputs[4:])
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None:
        _check_dtype(dtype)
        check_eps(eps)
        check_tensors(residual=residual, branch=branch, weight=weight, bias=bias)
        check_floats(residual=residual, branch=branch, weight=weight, bias=bias)
        if branch is not None and branch.shape != residual.shape:
            raise ValueError(f"branch has shape {list(branch.shape)}; give {list(residual.shape)}")
        _check_width("residual", residual)
        for name, vector in (("weight", weight), ("bias", bias)):
            if vector is None:
                raise TypeError(f"{name} is None; give a tensor [{residual.shape[-1]}], of ones or zeros")
            if vector.shape != residual.shape[-1:]:
                raise ValueError(f"{name} has shape {list(vector.shape)}; give [{residual.shape[-1]}]")
    x, values, scale = _run(inputs, key, plan)
    return residual if branch is None else x, EightBit(values, scale)


def linear_8bit(
    x: EightBit,
    weight: EightBit,
    bias: Float[Tensor, " n"] | None = None,
    *,
    activation: Activation | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor | EightBit:
    """activation(x @ weight.T + bias) from 8-bit operands. Sums are int32 for int8 and float32 for float8.

    weight     `quantize_rows` of the [n,k] matrix.
    out_dtype  int8 or float8_e4m3fn give an `EightBit` with a scale for every 128 columns of a row.

    Raises ValueError for shapes, devices or an activation that do not fit, TypeError for a dtype that does not.
    """
    for name, rows_of in (("x", x), ("weight", weight)):
        if not isinstance(rows_of, EightBit):
            raise TypeError(f"{name} is a {type(rows_of).__name__}; give an EightBit, as quantize_rows returns it")
    check_tensors(x=x.values, scale=x.scale, weight=weight.values, weight_scale=weight.scale, bias=bias)
    check_floats(bias=bias, scale=x.scale, weight_scale=weight.scale)
    check_activation(activation)
    _check_dtype(x.values.dtype)
    if out_dtype not in _RESULTS:
        raise TypeError(f"out_dtype = {out_dtype}; give bfloat16, float16, float32, int8 or float8_e4m3fn")
    if weight.values.dtype != x.values.dtype:
        raise TypeError(f"weight is {weight.values.dtype}, but x is {x.values.dtype}; quantise both alike")
    if weight.values.dim() != 2 or x.values.shape[-1] != weight.values.shape[1]:
        raise ValueError(f"x {list(x.values.shape)}, weight {list(weight.values.shape)}: give [..., k] and [n, k]")
    n, k = weight.values.shape
    rows = x.values.reshape(-1, k)
    groups = -(-k // GROUP)
    if x.scale.shape not in ((len(rows),), (groups, len(rows))) or weight.scale.shape != (n,):
        raise ValueError(
            f"scales {list(x.scale.shape)} of x, {list(weight.scale.shape)} of weight: "
            f"give [{len(rows)}] or [{groups}, {len(rows)}], and [{n}]"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {list(bias.shape)}; give [{n}]")
    if runs_kernel("eight_bit", x.scale, bias):
        out, _, _, scale = matmul(
            rows, weight.values, out_dtype, bias=bias, activation=activation, a_scale=x.scale, b_scale=weight.scale
        )
    else:
        out, scale = reference.linear_8bit(rows, x.scale, *weight, bias, activation, out_dtype, GROUP)
    out = out.view(*x.values.shape[:-1], n)
    return EightBit(out, scale) if out_dtype in LARGEST else out


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in LARGEST:
        raise TypeError(f"dtype = {dtype}; give torch.int8 or torch.float8_e4m3fn")


def _check_width(name: str, x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {list(x.shape)}; a row needs a number to have a scale")


def _run(inputs: tuple, key: tuple | None, plan: Plan | None) -> tuple[Tensor, Tensor, Tensor]:
    if plan is not None:
        return _quantise.planned(plan, *inputs[:4])
    if not runs_kernel("eight_bit", *inputs[:4]):
        return reference.quantize_rows(*inputs)
    return _quantise(*inputs, key=key)


def _prepare(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    norm: bool,
) -> Plan:
    shapes = _shapes(x, branch)
    rows, width = shapes[2][0], x.shape[-1]
    block = next_power_of_2(max(1, width))
    tile = max(1, 2048 // block)  # rows: eight numbers of each of two to a thread
    warps = 4 if block <= 2048 else 8
    per_program, programs = share(rows if width else 0, resident_programs(x.device, warps, REGISTERS), tile)
    settings = {
        "NORM": norm,
        "INTEGER": dtype == torch.int8,
        "LARGEST": LARGEST[dtype],
        "ROWS": tile,
        "BLOCK": block,
        "num_warps": warps,
    }
    outputs = zip(shapes, (x.dtype, dtype, torch.float32), strict=True)
    return Plan(_kernel, (programs,), (rows, width, per_program, float(eps)), settings, tuple(outputs))


REGISTERS = 80
"""Most registers per thread in the compiler's report at the models' widths; a test compares them."""


def _launch(
    plan: Plan,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + branch (empty without a branch), 8-bit values of this sum or of its norm, and their scales [rows]."""
    total, values, scale = plan.allocate(x.device)
    plan.launch((x, branch, weight, bias), (None if branch is None else total, values, scale))
    return total, values, scale


def _shapes(x: Tensor, branch: Tensor | None) -> tuple[tuple[int, ...], ...]:
    return (0,) if branch is None else x.shape, x.shape, (x.shape[:-1].numel(),)


def _fake(x, branch, weight, bias, eps, dtype, norm):
    of_total, of_values, of_scale = _shapes(x, branch)
    return x.new_empty(of_total), x.new_empty(of_values, dtype=dtype), x.new_empty(of_scale, dtype=torch.float32)


_quantise = KernelOp("quantize_rows", _prepare, _launch, _fake, visible=3)


if triton is not None:

    @triton.jit
    def _kernel(
        x_ptr,  # [rows, D], as are the branch, the total and the values
        branch_ptr,  # or None
        w_ptr,  # [D]
        b_ptr,
        total_ptr,  # x + branch, or None
        values_ptr,  # 8 bits
        scale_ptr,  # [rows]
        rows,
        width,
        rows_per_program,
        eps,
        NORM: tl.constexpr,
        INTEGER: tl.constexpr,
        LARGEST: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        column = tl.arange(0, BLOCK)
        inside = column < width
        first = tl.program_id(0).to(tl.int64) * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)  # the interpreter's range gives an int32
            here = row < rows
            mask = here[:, None] & inside[None, :]
            place = (row * width)[:, None] + column[None, :]
            x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
            if branch_ptr is not None:
                x += tl.load(branch_ptr + place, mask=mask, other=0.0).to(tl.float32)
                total = x.to(total_ptr.dtype.element_ty)
                tl.store(total_ptr + place, total, mask=mask)
                x = total.to(tl.float32)
            if NORM:
                centred = tl.where(mask, x - (tl.sum(x, axis=1) / width)[:, None], 0.0)
                x = centred / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)[:, None]
                w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
                x = x * w[None, :] + tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            scale = tl.maximum(largest_magnitudes(x), 1e-12) / LARGEST
            x = x / scale[:, None]
            if INTEGER:
                x = tl.floor(x + 0.5)
            tl.store(values_ptr + place, x.to(values_ptr.dtype.element_ty), mask=mask)
            tl.store(scale_ptr + row, scale, mask=here)

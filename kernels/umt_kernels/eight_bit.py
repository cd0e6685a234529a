"""Inference in int8 or float8: rows with scales, written by a norm or by the epilogue of the product before.

    x, rows = add_layer_norm_8bit(x, branch, ...)                               one pass
    hidden = linear_8bit(rows, fc1, bias, activation="quick_gelu", out_dtype=torch.int8)
    branch = linear_8bit(hidden, fc2, bias)

Weights have a scale per output channel, activations one per row, or per 128 columns of a row where an epilogue writes
them: it does not see the whole row. Nothing here has a gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import next_power_of_2, on_its_device, runs_triton, triton
from umt_kernels.checks import check_eps, check_floats, check_tensors
from umt_kernels.launch import resident_programs
from umt_kernels.matmul import GROUP, LARGEST, Activation, matmul

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

if triton is not None:
    import triton.language as tl


class EightBit(NamedTuple):
    """values * scale, where a scale is of a row, or of 128 columns of a row."""

    values: Shaped[Tensor, "... k"]
    """int8 or float8_e4m3fn."""
    scale: Tensor
    """float32 [m] for the m rows of `values`, or [k / 128, m]."""


def quantize_rows(x: Float[Tensor, "... k"], dtype: torch.dtype) -> EightBit:
    """x in int8 or float8_e4m3fn, the largest number of each row at the end of the dtype's range.

    Raises TypeError for another dtype.
    """
    _check_dtype(dtype)
    check_tensors(x=x)
    check_floats(x=x)
    _, values, scale = _quantize(x, None, None, None, 0.0, dtype, False)
    return EightBit(values, scale)


def add_layer_norm_8bit(
    residual: Float[Tensor, "... d"],
    branch: Float[Tensor, "... d"] | None,
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "... d"], EightBit]:
    """residual + branch in the dtype of the residual, and `quantize_rows` of its LayerNorm. No branch: residual itself.

    Raises ValueError for shapes or devices that do not fit, TypeError for a dtype that does not.
    """
    _check_dtype(dtype)
    check_eps(eps)
    check_tensors(residual=residual, branch=branch, weight=weight, bias=bias)
    check_floats(residual=residual, branch=branch, weight=weight, bias=bias)
    if branch is not None and branch.shape != residual.shape:
        raise ValueError(f"branch has shape {list(branch.shape)}; give {list(residual.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != residual.shape[-1:]:
            raise ValueError(f"{name} has shape {list(vector.shape)}; give [{residual.shape[-1]}]")
    x, values, scale = _quantize(residual, branch, weight, bias, eps, dtype, True)
    return residual if branch is None else x, EightBit(values, scale)


def linear_8bit(
    x: EightBit,
    weight: EightBit,
    bias: Float[Tensor, " n"] | None = None,
    *,
    activation: Activation | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor | EightBit:
    """activation(x @ weight.T + bias), products in 8 bits: int8 sums are int32, float8 sums float32.

    weight     `quantize_rows` of the [n,k] matrix.
    out_dtype  int8 or float8_e4m3fn give an `EightBit` with a scale for every 128 columns of a row.

    Raises ValueError for shapes or devices that do not fit, TypeError for a dtype that does not.
    """
    check_tensors(x=x.values, scale=x.scale, weight=weight.values, weight_scale=weight.scale, bias=bias)
    check_floats(bias=bias)
    _check_dtype(x.values.dtype)
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
    if runs_triton(x.scale, bias):
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


def _quantize(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if runs_triton(x, branch, weight, bias):
        return _launch(x, branch, weight, bias, eps, dtype, norm)
    return reference.quantize_rows(x, branch, weight, bias, eps, dtype, norm)


@torch.library.custom_op("umt_kernels::quantize_rows", mutates_args=())
@on_its_device
def _launch(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + branch (empty without a branch), 8-bit values of it or of its norm, and their scales [rows]."""
    outputs = total, values, scale = _outputs(x, branch, dtype)
    rows, width = scale.numel(), x.shape[-1]
    if rows == 0:
        return outputs
    block = next_power_of_2(width)
    tile = max(1, 2048 // block)  # rows: eight numbers of each of two to a thread
    warps = 4 if block <= 2048 else 8
    per_program = triton.cdiv(triton.cdiv(rows, resident_programs(x.device, warps, 80)), tile) * tile
    _kernel[(triton.cdiv(rows, per_program),)](
        x.contiguous(),
        None if branch is None else branch.contiguous(),
        weight,
        bias,
        None if branch is None else total,
        values,
        scale,
        rows,
        width,
        per_program,
        eps,
        NORM=norm,
        INTEGER=dtype == torch.int8,
        LARGEST=LARGEST[dtype],
        ROWS=tile,
        BLOCK=block,
        num_warps=warps,
    )
    return outputs


def _outputs(x: Tensor, branch: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(0 if branch is None else x.shape),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[:-1].numel(), dtype=torch.float32),
    )


@_launch.register_fake
def _(x, branch, weight, bias, eps, dtype, norm):
    return _outputs(x, branch, dtype)


if triton is not None:

    @triton.jit
    def _kernel(
        x_ptr,  # [rows, D], as all of that size
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
            scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-12) / LARGEST
            x = x / scale[:, None]
            if INTEGER:
                x = tl.floor(x + 0.5)
            tl.store(values_ptr + place, x.to(values_ptr.dtype.element_ty), mask=mask)
            tl.store(scale_ptr + row, scale, mask=here)

"""Backward of add_layer_norm, in one pass over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from umt_kernels.backend import triton
from umt_kernels.dispatch import KernelOp
from umt_kernels.gather_layer_norm_backward import BACKWARD_REGISTERS, backward_config
from umt_kernels.launch import Plan, last_contiguous, resident_programs, share
from umt_kernels.reductions import add_up, plan_sums

if triton is not None:
    import triton.language as tl

    from umt_kernels.reductions import two_sums


def _prepare(
    grad_y: Tensor,
    grad_x: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_ids: Tensor | None,
    statistics: Tensor,
    residual_shape: list[int],
    branch_dtype: torch.dtype,
    rms: bool,
    post_norm: bool,
    factor: float,
) -> Plan:
    batch, kept, width = grad_y.shape
    rows = batch * kept if width else 0
    config = backward_config(width)
    programs = resident_programs(x.device, config["num_warps"], BACKWARD_REGISTERS)
    per_program, programs = share(rows, programs, config["ROWS"])
    numbers: list[float] = [rows, kept, residual_shape[1], width, per_program]
    for tensor in (grad_y, grad_x, x, branch):
        numbers += (0, 0) if tensor is None else tensor.stride()[:2]
    settings = {
        "RMS": rms,
        "POST": post_norm,
        "WEIGHT_GRAD": weight is not None,
        "BIAS_GRAD": bias is not None,
        "BRANCH_BIAS_GRAD": branch_bias is not None,
        **config,
    }
    of_branch = _branch_shape(grad_y, x, scale, row_ids, branch_dtype, factor)
    sums = programs * config["ROWS"]
    outputs = ((residual_shape, x.dtype), (of_branch, branch_dtype), ((3, sums, width), torch.float32))
    return Plan(_kernel, (programs,), (*numbers, factor), settings, outputs, (plan_sums(sums, width),))


def _branch_shape(
    grad_y: Tensor, x: Tensor, scale: Tensor | None, row_ids: Tensor | None, branch_dtype: torch.dtype, factor: float
) -> tuple[int, ...]:
    """Shape of the branch's gradient; (0,) if it is the same tensor as the residual's."""
    same = scale is None and factor == 1 and row_ids is None and branch_dtype == x.dtype
    return (0,) if same else grad_y.shape


def _launch(
    plan: Plan,
    grad_y: Tensor,
    grad_x: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_ids: Tensor | None,
    statistics: Tensor,
    residual_shape: list[int],
    branch_dtype: torch.dtype,
    rms: bool,
    post_norm: bool,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, branch (empty if it equals the residual's), weight, bias and branch_bias.

    `x` is the new residual [b,m,d], or with `post_norm` the old one [b,l,d]: then the sum is computed again.
    """
    grad_residual, grad_branch, partial = plan.allocate(x.device)
    vectors = (weight, bias, branch_bias)
    if row_ids is not None or grad_y.numel() == 0:
        grad_residual.zero_()
    if grad_y.numel() == 0:
        nothing = [x.new_zeros(0) if p is None else torch.zeros_like(p) for p in vectors]
        return grad_residual, grad_branch, nothing[0], nothing[1], nothing[2]
    plan.launch(
        (grad_y, grad_x, x, branch, weight, branch_bias, scale, row_ids, statistics),
        (grad_residual, grad_branch if grad_branch.numel() else None, partial),
    )
    grad_weight, grad_bias, grad_branch_bias = add_up(plan.parts[0], partial, *vectors)
    return grad_residual, grad_branch, grad_weight, grad_bias, grad_branch_bias


def _fake(
    grad_y, grad_x, x, branch, weight, bias, branch_bias, scale, row_ids, statistics, residual_shape, branch_dtype,
    rms, post_norm, factor,
):  # fmt: skip
    of_branch = _branch_shape(grad_y, x, scale, row_ids, branch_dtype, factor)
    vectors = [x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias, branch_bias)]
    return x.new_empty(residual_shape), x.new_empty(of_branch, dtype=branch_dtype), *vectors


backward = KernelOp(
    "add_layer_norm_backward",
    _prepare,
    _launch,
    _fake,
    strided=dict.fromkeys(("grad_y", "grad_x", "x", "branch"), last_contiguous),
)


if triton is not None:

    @triton.jit
    def _kernel(
        gy_ptr,  # [B, M, D]
        gx_ptr,  # [B, M, D]; None is zeros
        x_ptr,  # [B, M, D], or with POST the old residual [B, L, D]
        branch_ptr,  # [B, M, D] with POST
        w_ptr,
        branch_bias_ptr,
        scale_ptr,
        row_ids_ptr,
        statistics_ptr,  # [2, B, M]
        dresidual_ptr,  # [B, L, D], contiguous, zero where no row is kept
        dbranch_ptr,  # [B, M, D], contiguous; None if it is dresidual
        partial_ptr,  # [3, programs * ROWS, D]: sums for weight, bias, branch_bias
        rows,
        kept,
        length,
        width,
        rows_per_program,
        gy_b,
        gy_m,
        gx_b,
        gx_m,
        x_b,
        x_l,
        branch_b,
        branch_m,
        factor,
        RMS: tl.constexpr,
        POST: tl.constexpr,
        WEIGHT_GRAD: tl.constexpr,
        BIAS_GRAD: tl.constexpr,
        BRANCH_BIAS_GRAD: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        # Every tile is [ROWS, BLOCK], w too: to change another layout, warps would have to wait for each other.
        column = tl.zeros((ROWS, 1), tl.int32) + tl.arange(0, BLOCK)[None, :]
        inside = column < width
        dw = tl.zeros((ROWS, BLOCK), tl.float32)
        db = tl.zeros((ROWS, BLOCK), tl.float32)
        dbranch_bias = tl.zeros((ROWS, BLOCK), tl.float32)
        first = program * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = start + tl.arange(0, ROWS)  # int32, for fast division
            here = row < rows
            mask = here[:, None] & inside
            row_sample = row // kept
            order = (row - row_sample * kept).to(tl.int64)
            sample = row_sample.to(tl.int64)
            if row_ids_ptr is not None:
                place = tl.load(row_ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                place = order
            x_row = sample * x_b + (place if POST else order) * x_l
            gy_row = sample * gy_b + order * gy_m
            x = tl.load(x_ptr + x_row[:, None] + column, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(gy_ptr + gy_row[:, None] + column, mask=mask, other=0.0).to(tl.float32)
            if gx_ptr is not None:
                gx_row = sample * gx_b + order * gx_m
                gx = tl.load(gx_ptr + gx_row[:, None] + column, mask=mask, other=0.0).to(tl.float32)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + sample, mask=here, other=0.0).to(tl.float32)[:, None]
            if POST:
                branch_row = sample * branch_b + order * branch_m
                added = tl.load(branch_ptr + branch_row[:, None] + column, mask=mask, other=0.0).to(tl.float32)
                if branch_bias_ptr is not None:
                    added += tl.load(branch_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
                if scale_ptr is not None:
                    added *= scale
                x += added * factor
                if gx_ptr is not None:
                    g += gx
            mean = tl.load(statistics_ptr + row, mask=here, other=0.0)
            rstd = tl.load(statistics_ptr + tl.cast(rows, tl.int64) + row, mask=here, other=0.0)
            x = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            if WEIGHT_GRAD:
                dw += g * x
            if BIAS_GRAD:
                db += g
            if w_ptr is not None:
                g *= tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
            if RMS:
                dx = g - x * (tl.sum(g * x, axis=1) / width)[:, None]
            else:
                shares, means = two_sums(g * x, g, 1)
                dx = g - (means / width)[:, None] - x * (shares / width)[:, None]
            dx *= rstd[:, None]
            if not POST and gx_ptr is not None:
                dx += gx
            dresidual_row = (sample * length + place) * width
            dresidual = dx.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + dresidual_row[:, None] + column, dresidual, mask=mask)
            dx *= factor
            if scale_ptr is not None:
                dx *= scale
            if dbranch_ptr is not None:
                dbranch = dx.to(dbranch_ptr.dtype.element_ty)
                tl.store(dbranch_ptr + (row.to(tl.int64) * width)[:, None] + column, dbranch, mask=mask)
            if BRANCH_BIAS_GRAD:
                dbranch_bias += tl.where(mask, dx, 0.0)
        slot = partial_ptr + (program.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None] * width + column
        plane = tl.num_programs(0).to(tl.int64) * ROWS * width
        if WEIGHT_GRAD:
            tl.store(slot, dw, mask=inside)
        if BIAS_GRAD:
            tl.store(slot + plane, db, mask=inside)
        if BRANCH_BIAS_GRAD:
            tl.store(slot + 2 * plane, dbranch_bias, mask=inside)

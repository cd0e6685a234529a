"""gather_layer_norm: LayerNorm of chosen rows, plus the position of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import PROGRAMS, next_power_of_2, on_its_device, runs_triton, triton
from umt_kernels.checks import check_eps, check_floats, check_ids, check_tensors

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if triton is not None:
    import triton.language as tl


def gather_layer_norm(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    *,
    row_ids: Int[Tensor, "b m"] | None = None,
    position: Float[Tensor, "n d"] | None = None,
    position_ids: Int[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b m d"]:
    """LayerNorm(x[b, row_ids[b, m]]) + position[position_ids[b, m]], in the dtype of x.

    row_ids       rows of each sample to keep, none twice where x has a gradient; None keeps all.
    position      optional table added after the norm. It gets no gradient.
    position_ids  row of the table for each row kept.

    Statistics are float32. The backward scatters without atomics, as no row is kept twice, and sums the weight and
    bias gradients in a fixed order. Raises ValueError for shapes or devices that do not fit, an id out of range, or one
    given twice for an x that has a gradient; TypeError for a dtype that does not fit.
    """
    check_eps(eps)
    _check(x, weight, bias, row_ids, position, position_ids)
    position = None if position is None else position.detach()
    if not runs_triton(x, weight, bias, position):
        return reference.gather_layer_norm(x, weight, bias, eps, row_ids, position, position_ids)
    return _forward(x, weight, bias, eps, row_ids, position, position_ids)[0]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
) -> None:
    check_tensors(x=x, weight=weight, bias=bias, row_ids=row_ids, position=position, position_ids=position_ids)
    check_floats(x=x, weight=weight, bias=bias, position=position)
    if x.dim() != 3 or weight.shape != x.shape[2:] or bias.shape != x.shape[2:]:
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}: give [b, l, d], [d], [d]"
        )
    if row_ids is not None:
        scatters = torch.is_grad_enabled() and x.requires_grad
        check_ids("row_ids", row_ids, x.shape[0], x.shape[1], "x has {} rows per sample", once=scatters)
    if (position is None) != (position_ids is None):
        raise ValueError("position and position_ids belong together: give both or neither")
    if position is not None and position_ids is not None:
        rows = x.shape[1] if row_ids is None else row_ids.shape[1]
        if position.shape[1:] != x.shape[2:] or position_ids.shape != (x.shape[0], rows):
            raise ValueError(
                f"position {list(position.shape)}, position_ids {list(position_ids.shape)}: "
                f"give [n, {x.shape[2]}] and [{x.shape[0]}, {rows}]"
            )
        check_ids("position_ids", position_ids, x.shape[0], position.shape[0], "position has {} rows")


@torch.library.custom_op("umt_kernels::gather_layer_norm", mutates_args=())
@on_its_device
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output [b,m,d], and mean and 1 / standard deviation of each row [2,b,m]."""
    batch, length, width = x.shape
    kept = length if row_ids is None else row_ids.shape[1]
    y = x.new_empty(batch, kept, width)
    statistics = x.new_empty(2, batch, kept, dtype=torch.float32)
    rows = batch * kept
    if rows == 0:
        return y, statistics
    x = _last_contiguous(x)
    config = forward_config(width)
    # Twice as many as of the backward: few rows to each, and that many may run at a time.
    per_program = triton.cdiv(triton.cdiv(rows, 2 * PROGRAMS), config["ROWS"]) * config["ROWS"]
    _forward_kernel[(triton.cdiv(rows, per_program),)](
        x,
        weight.contiguous(),
        bias.contiguous(),
        None if row_ids is None else row_ids.contiguous(),
        None if position is None else position.contiguous(),
        None if position_ids is None else position_ids.contiguous(),
        y,
        statistics,
        rows,
        kept,
        width,
        per_program,
        x.stride(0),
        x.stride(1),
        eps,
        GATHER=row_ids is not None,
        POSITION=position is not None,
        **config,
    )
    return y, statistics


@_forward.register_fake
def _(x, weight, bias, eps, row_ids, position, position_ids):
    kept = x.shape[1] if row_ids is None else row_ids.shape[1]
    return x.new_empty(x.shape[0], kept, x.shape[2]), x.new_empty(2, x.shape[0], kept, dtype=torch.float32)


@torch.library.custom_op("umt_kernels::gather_layer_norm_backward", mutates_args=())
@on_its_device
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, row_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    batch, length, width = x.shape
    kept = length if row_ids is None else row_ids.shape[1]
    rows = batch * kept
    whole = row_ids is None and rows > 0
    grad_x = x.new_empty(x.shape) if whole else x.new_zeros(x.shape)
    if rows == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    x, grad = _last_contiguous(x), _last_contiguous(grad)
    config = backward_config(width)
    per_program = triton.cdiv(triton.cdiv(rows, PROGRAMS), config["ROWS"]) * config["ROWS"]
    programs = triton.cdiv(rows, per_program)
    partial = x.new_empty(2, programs, width, dtype=torch.float32)
    _backward_kernel[(programs,)](
        grad,
        x,
        weight.contiguous(),
        None if row_ids is None else row_ids.contiguous(),
        statistics,
        grad_x,
        partial,
        rows,
        kept,
        length,
        width,
        per_program,
        x.stride(0),
        x.stride(1),
        grad.stride(0),
        grad.stride(1),
        GATHER=row_ids is not None,
        **config,
    )
    return grad_x, partial[0].sum(0).to(weight.dtype), partial[1].sum(0).to(bias.dtype)


@_backward.register_fake
def _(grad, x, weight, bias, statistics, row_ids):
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward_config(width: int) -> dict[str, int]:
    block = next_power_of_2(width)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def backward_config(width: int) -> dict[str, int]:
    """Eight numbers of a row to a thread, 16 bytes of bf16: few enough registers for eight programs at a time."""
    block = next_power_of_2(width)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": max(4, min(16, block // 256))}


def _setup(ctx, inputs, output):
    x, weight, bias, _, row_ids, _, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1], row_ids)


def _differentiate(ctx, grad, _grad_statistics):
    x, weight, bias, statistics, row_ids = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _backward(grad, x, weight, bias, statistics, row_ids)
    return grad_x, grad_weight, grad_bias, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)


if triton is not None:

    @triton.jit
    def _forward_kernel(
        x_ptr,  # [B, L, D]
        w_ptr,  # [D]
        b_ptr,
        row_ids_ptr,  # [B, M]
        position_ptr,  # [N, D]
        position_ids_ptr,  # [B, M]
        y_ptr,  # [B, M, D]
        statistics_ptr,  # [2, B, M]
        rows,  # B * M
        kept,  # M
        width,
        rows_per_program,
        x_b,
        x_l,
        eps,
        GATHER: tl.constexpr,
        POSITION: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        column = tl.arange(0, BLOCK)
        inside = column < width
        w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)
        first = tl.program_id(0).to(tl.int64) * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)  # the interpreter's range gives an int32
            here = row < rows
            mask = here[:, None] & inside[None, :]
            if GATHER:
                place = tl.load(row_ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                place = row % kept
            x_row = (row // kept) * x_b + place * x_l
            x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            mean = tl.sum(x, axis=1) / width
            centred = tl.where(mask, x - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
            y = centred * rstd[:, None] * w[None, :] + b[None, :]
            if POSITION:
                p_row = tl.load(position_ids_ptr + row, mask=here, other=0).to(tl.int64) * width
                y += tl.load(position_ptr + p_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            y_row = row * width
            tl.store(y_ptr + y_row[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(statistics_ptr + row, mean, mask=here)
            tl.store(statistics_ptr + rows + row, rstd, mask=here)

    @triton.jit
    def _backward_kernel(
        g_ptr,  # [B, M, D]
        x_ptr,  # [B, L, D]
        w_ptr,  # [D]
        row_ids_ptr,  # [B, M]
        statistics_ptr,  # [2, B, M]
        dx_ptr,  # [B, L, D], contiguous, zero where no row is kept
        partial_ptr,  # [2, programs, D]
        rows,
        kept,
        length,
        width,
        rows_per_program,
        x_b,
        x_l,
        g_b,
        g_m,
        GATHER: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        dw = tl.zeros((BLOCK,), tl.float32)
        db = tl.zeros((BLOCK,), tl.float32)
        first = program * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)  # the interpreter's range gives an int32
            here = row < rows
            mask = here[:, None] & inside[None, :]
            sample = row // kept
            if GATHER:
                place = tl.load(row_ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                place = row % kept
            x_row = sample * x_b + place * x_l
            g_row = sample * g_b + (row % kept) * g_m
            x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + g_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(statistics_ptr + row, mask=here, other=0.0)
            rstd = tl.load(statistics_ptr + rows + row, mask=here, other=0.0)
            x = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            dw += tl.sum(g * x, axis=0)
            db += tl.sum(g, axis=0)
            g = g * w[None, :]
            share = tl.sum(g * x, axis=1) / width
            dx = (g - tl.sum(g, axis=1)[:, None] / width - x * share[:, None]) * rstd[:, None]
            dx_row = (sample * length + place) * width
            tl.store(dx_ptr + dx_row[:, None] + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        slot = program * width
        tl.store(partial_ptr + slot + column, dw, mask=inside)
        tl.store(partial_ptr + tl.num_programs(0).to(tl.int64) * width + slot + column, db, mask=inside)

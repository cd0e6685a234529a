"""gather_layer_norm and gather_rms_norm: the norm of chosen rows, plus the position of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import KERNEL_DTYPES, next_power_of_2, triton
from umt_kernels.checks import check_eps, check_floats, check_ids, check_tensors
from umt_kernels.dispatch import KernelOp, differentiate_reference, runs_kernel
from umt_kernels.launch import Plan, plan, resident_programs

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if triton is not None:
    import triton.language as tl


def gather_layer_norm(
    x: Float[Tensor, "*k b l d"],
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    eps: float,
    *,
    row_ids: Int[Tensor, "r m"] | None = None,
    position: Float[Tensor, "n d"] | None = None,
    position_ids: Int[Tensor, "r m"] | None = None,
    padded: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Float[Tensor, "*k r m d"]:
    """LayerNorm(x[b, row_ids[r, m]]) + position[position_ids[r, m]] in `out_dtype`, by default that of x.

    x             [b, l, d], or [k, b, l, d]: layers that share ids and positions, each position read once for all.
    weight, bias  either may be None.
    row_ids       rows to keep, none twice in a set where x has a gradient; None keeps all. With r a multiple of b,
                  sets 0 .. r/b - 1 are of sample 0, and so on.
    position      table added after the norm; its gradient is summed in float32.
    position_ids  row of the table for each row kept.
    padded        ids may be -1: such a row id gives a row of zeros, such a position id adds nothing.

    Statistics are float32. No atomics: gradients are the same every time. Raises ValueError for shapes or devices that
    do not fit, an id out of range, or one given twice for an x that has a gradient; TypeError for a dtype.
    """
    return _norm(x, weight, bias, eps, row_ids, position, position_ids, padded, out_dtype, False)


def gather_rms_norm(
    x: Float[Tensor, "*k b l d"],
    weight: Float[Tensor, " d"] | None,
    eps: float,
    *,
    row_ids: Int[Tensor, "r m"] | None = None,
    position: Float[Tensor, "n d"] | None = None,
    position_ids: Int[Tensor, "r m"] | None = None,
    padded: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Float[Tensor, "*k r m d"]:
    """`gather_layer_norm` with RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight."""
    return _norm(x, weight, None, eps, row_ids, position, position_ids, padded, out_dtype, True)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    padded: bool,
    out_dtype: torch.dtype | None,
    rms: bool,
) -> Tensor:
    check_eps(eps)
    _check(x, weight, bias, row_ids, position, position_ids, padded)
    dtype = x.dtype if out_dtype is None else out_dtype
    if not dtype.is_floating_point:
        raise TypeError(f"out_dtype = {dtype}; give a floating-point dtype")
    run = _forward if _runs_kernel(x, weight, bias, row_ids, position, dtype) else _by_reference
    return run(x, weight, bias, float(eps), row_ids, position, position_ids, dtype, padded, rms)[0]


def _runs_kernel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor | None,
    position: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    if dtype not in KERNEL_DTYPES or not runs_kernel("gather_layer_norm", x, weight, bias, position):
        return False
    return x.numel() < MOST_ROWS * x.shape[-1] and (ids is None or ids.numel() < MOST_ROWS)


MOST_ROWS = 2**31 - 2**16
"""Rows are counted in int32, whose divisions are cheap."""


def _by_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    dtype: torch.dtype,
    padded: bool,
    rms: bool,
) -> tuple[Tensor]:
    arguments = (x, weight, bias, eps, row_ids, position, position_ids)
    return (reference.gather_layer_norm(*arguments, dtype=dtype, padded=padded, rms=rms),)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    padded: bool,
) -> None:
    check_tensors(x=x, weight=weight, bias=bias, row_ids=row_ids, position=position, position_ids=position_ids)
    check_floats(x=x, weight=weight, bias=bias, position=position)
    width = x.shape[-1:]
    if (
        x.dim() not in (3, 4)
        or (weight is not None and weight.shape != width)
        or (bias is not None and bias.shape != width)
    ):
        given = ", ".join(
            f"{name} {'None' if p is None else list(p.shape)}" for name, p in (("weight", weight), ("bias", bias))
        )
        raise ValueError(f"x {list(x.shape)}, {given}: give [b, l, d] or [k, b, l, d], then [d] or None")
    batch, length = x.shape[-3:-1]
    if row_ids is not None:
        scatters = torch.is_grad_enabled() and x.requires_grad
        check_ids(
            "row_ids", row_ids, batch, length, "x has {} rows per sample", once=scatters, sets=True, padded=padded
        )
    if (position is None) != (position_ids is None):
        raise ValueError("position and position_ids belong together: give both or neither")
    if position is not None and position_ids is not None:
        rows = tuple(x.shape[-3:-1] if row_ids is None else row_ids.shape)
        if position.dim() != 2 or position.shape[1:] != width or position_ids.shape != rows:
            raise ValueError(
                f"position {list(position.shape)}, position_ids {list(position_ids.shape)}: "
                f"give [n, {x.shape[-1]}] and {list(rows)}"
            )
        check_ids("position_ids", position_ids, rows[0], position.shape[0], "position has {} rows", padded=padded)


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    dtype: torch.dtype,
    padded: bool,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """The output [*k,r,m,d], and mean and 1 / standard deviation of each of its rows."""
    shape = x.shape if row_ids is None else (*x.shape[:-3], *row_ids.shape, x.shape[-1])
    y = x.new_empty(shape, dtype=dtype)
    statistics = x.new_empty((2, *shape[:-1]), dtype=torch.float32)
    if y.numel() == 0:
        return y, statistics
    if x.stride(-1) != 1:
        x = x.contiguous()
    key = (
        "gather_layer_norm", x.shape, x.stride(), x.dtype, x.device, eps, dtype, padded, rms,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        None if row_ids is None else (row_ids.dtype, row_ids.shape),
        None if position is None else (position.dtype, position_ids.dtype),  # type: ignore[union-attr]
    )  # fmt: skip
    found = plan(key, _plan_forward, x, weight, bias, eps, row_ids, position, padded, rms)
    found.launch(
        x, _contiguous(weight), _contiguous(bias), _contiguous(row_ids), _contiguous(position),
        _contiguous(position_ids), y, statistics,
    )  # fmt: skip
    return y, statistics


def _plan_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    row_ids: Tensor | None,
    position: Tensor | None,
    padded: bool,
    rms: bool,
) -> Plan:
    layers, (batch, length, width) = (1 if x.dim() == 3 else len(x)), x.shape[-3:]
    kept = length if row_ids is None else row_ids.shape[1]
    masks = 1 if row_ids is None else len(row_ids) // batch
    rows = batch * masks * kept
    config = forward_config(width)
    # Twice as many as can run at a time: few rows to each, and a wave of them is never half empty for long.
    programs = 2 * resident_programs(x.device, config["num_warps"], FORWARD_REGISTERS)
    per_program = triton.cdiv(triton.cdiv(rows, programs), config["ROWS"]) * config["ROWS"]
    settings = {
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "GATHER": row_ids is not None,
        "POSITION": position is not None,
        "PADDED": padded,
        "RMS": rms,
        **config,
    }
    numbers = (layers, rows, kept, masks, width, per_program, *_strides(x), eps)
    return Plan(_forward_kernel, (triton.cdiv(rows, per_program),), numbers, settings)


def _fake_forward(x, weight, bias, eps, row_ids, position, position_ids, dtype, padded, rms):
    shape = x.shape if row_ids is None else (*x.shape[:-3], *row_ids.shape, x.shape[-1])
    return x.new_empty(shape, dtype=dtype), x.new_empty((2, *shape[:-1]), dtype=torch.float32)


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    row_ids: Tensor | None,
    padded: bool,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; for those that are None one that is empty."""
    width = x.shape[-1]
    grad_x = x.new_empty(x.shape)
    if grad.numel() == 0:
        nothing = [x.new_zeros(0) if p is None else torch.zeros_like(p) for p in (weight, bias)]
        return grad_x.zero_(), nothing[0], nothing[1]
    x, grad = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, grad))
    key = (
        "gather_layer_norm_backward", x.shape, x.stride(), x.dtype, x.device, grad.stride(), grad.dtype, padded, rms,
        None if weight is None else weight.dtype,
        bias is None,
        None if row_ids is None else row_ids.shape,
    )  # fmt: skip
    found = plan(key, _plan_backward, grad, x, weight, bias, row_ids, rms)
    inverse = None if row_ids is None else _invert(row_ids, x.shape[-2])
    partial = x.new_empty(2, found.grid[0], width, dtype=torch.float32)
    found.launch(grad, x, _contiguous(weight), inverse, statistics, grad_x, partial)
    sums = [
        x.new_empty(0) if p is None else part.sum(0).to(p.dtype)
        for part, p in zip(partial, (weight, bias), strict=True)
    ]
    return grad_x, sums[0], sums[1]


def _plan_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, row_ids: Tensor | None, rms: bool
) -> Plan:
    layers, (batch, length, width) = (1 if x.dim() == 3 else len(x)), x.shape[-3:]
    kept = length if row_ids is None else row_ids.shape[1]
    masks = 1 if row_ids is None else len(row_ids) // batch
    rows = layers * batch * length
    config = backward_config(width)
    programs = resident_programs(x.device, config["num_warps"], BACKWARD_REGISTERS)
    per_program = triton.cdiv(triton.cdiv(rows, programs), config["ROWS"]) * config["ROWS"]
    settings = {
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "GATHER": row_ids is not None,
        "RMS": rms,
        **config,
    }
    numbers = (rows, batch, length, kept, masks, width, per_program, *_strides(x), *_strides(grad))
    return Plan(_backward_kernel, (triton.cdiv(rows, per_program),), numbers, settings)


def _fake_backward(grad, x, weight, bias, statistics, row_ids, padded, rms):
    return x.new_empty(x.shape), *(x.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias))


def _invert(row_ids: Tensor, length: int) -> Tensor:
    """For each row of x the place of it in `row_ids`, -1 for none: [r, l]. It lets every row of the gradient be written
    once, zeros included, by the one program that reads its row of x."""
    inverse = row_ids.new_empty(row_ids.shape[0], length, dtype=torch.int32)
    block = min(1024, next_power_of_2(max(length, row_ids.shape[1])))
    key = ("gather_layer_norm_invert", row_ids.shape, row_ids.dtype, row_ids.device, length)
    numbers = (row_ids.shape[1], length)
    plan(key, Plan, _invert_kernel, (row_ids.shape[0],), numbers, {"BLOCK": block, "num_warps": 4}).launch(
        row_ids.contiguous(), inverse
    )
    return inverse


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of layer, sample and row."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


FORWARD_REGISTERS, BACKWARD_REGISTERS = 96, 80
"""Per thread, at most, by the compiler's report at the widths of the models; a test of the report holds them."""


def forward_config(width: int) -> dict[str, int]:
    block = next_power_of_2(width)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def backward_config(width: int) -> dict[str, int]:
    """Eight numbers of a row to a thread, 16 bytes of bf16: few enough registers for eight programs at a time."""
    block = next_power_of_2(width)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": max(4, min(16, block // 256))}


def _save(ctx, inputs, output):
    x, weight, bias, ctx.eps, row_ids, position, position_ids, ctx.dtype, ctx.padded, ctx.rms = inputs
    ctx.save_for_backward(x, weight, bias, row_ids, position, position_ids, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_statistics=None):
    if grad is None:
        return (None,) * 10
    x, weight, bias, row_ids, position, position_ids, statistics = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _backward(grad, x, weight, bias, statistics, row_ids, ctx.padded, ctx.rms)
    grad_position = None
    if ctx.needs_input_grad[5]:
        grad_position = _table_gradient(grad, position, position_ids, row_ids if ctx.padded else None)
    return (
        grad_x,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        None,
        None,
        grad_position,
        *(None,) * 4,
    )


def _table_gradient(grad: Tensor, table: Tensor, ids: Tensor, row_ids: Tensor | None) -> Tensor:
    """Gradient rows summed by id. `index_put` sorts the ids on a GPU, so the order of the sum is fixed."""
    rows = grad.float() if grad.dim() == 3 else grad.float().sum(0)
    if row_ids is not None:
        rows = rows * ((ids >= 0) & (row_ids >= 0))[..., None]
        ids = ids.clamp_min(0)
    summed = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    return summed.index_put((ids.flatten().long(),), rows.flatten(0, 1), accumulate=True).to(table.dtype)


def _differentiate_again(ctx, grad):
    x, weight, bias, row_ids, position, position_ids, _ = ctx.saved_tensors

    def run(x, weight, bias, position):
        arguments = (x, weight, bias, ctx.eps, row_ids, position, position_ids)
        return reference.gather_layer_norm(*arguments, dtype=ctx.dtype, padded=ctx.padded, rms=ctx.rms)

    grad_x, grad_weight, grad_bias, grad_position = differentiate_reference(run, (x, weight, bias, position), grad)
    return grad_x, grad_weight, grad_bias, None, None, grad_position, *(None,) * 4


_backward = KernelOp("gather_layer_norm_backward", _launch_backward, _fake_backward)
_forward = KernelOp("gather_layer_norm", _launch_forward, _fake_forward, _save, _differentiate, _differentiate_again)


if triton is not None:

    @triton.jit
    def _forward_kernel(
        x_ptr,  # [K, B, L, D]
        w_ptr,  # [D]
        b_ptr,
        row_ids_ptr,  # [R, M]
        position_ptr,  # [N, D]
        position_ids_ptr,  # [R, M]
        y_ptr,  # [K, R, M, D]
        statistics_ptr,  # [2, K, R, M]
        layers,
        rows,  # R * M
        kept,  # M
        masks,  # R / B
        width,
        rows_per_program,
        x_k,
        x_b,
        x_l,
        eps,
        WEIGHT: tl.constexpr,
        BIAS: tl.constexpr,
        GATHER: tl.constexpr,
        POSITION: tl.constexpr,
        PADDED: tl.constexpr,
        RMS: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        column = tl.arange(0, BLOCK)
        inside = column < width
        if WEIGHT:
            w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            b = tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)
        first = tl.program_id(0) * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = start + tl.arange(0, ROWS)
            here = row < rows
            mask = here[:, None] & inside[None, :]
            row_set = row // kept
            if GATHER:
                place = tl.load(row_ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                place = (row - row_set * kept).to(tl.int64)
            there = here
            if PADDED:
                there = here & (place >= 0)
            read = there[:, None] & inside[None, :]
            if POSITION:
                p_id = tl.load(position_ids_ptr + row, mask=here, other=0).to(tl.int64)
                p_mask = mask
                if PADDED:
                    p_mask = read & (p_id >= 0)[:, None]
                p = tl.load(position_ptr + p_id[:, None] * width + column[None, :], mask=p_mask, other=0.0)
                p = p.to(tl.float32)
            x_row = (row_set // masks).to(tl.int64) * x_b + place * x_l
            for layer in range(layers):
                x_at = (tl.cast(layer, tl.int64) * x_k + x_row)[:, None] + column[None, :]
                x = tl.load(x_ptr + x_at, mask=read, other=0.0).to(tl.float32)
                if RMS:
                    mean = tl.zeros((ROWS,), tl.float32)
                else:
                    mean = tl.sum(x, axis=1) / width
                    x = tl.where(mask, x - mean[:, None], 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
                y = x * rstd[:, None]
                if WEIGHT:
                    y = y * w[None, :]
                if BIAS:
                    y += b[None, :]
                if POSITION:
                    y += p
                if PADDED:
                    y = tl.where(read, y, 0.0)
                y_row = tl.cast(layer, tl.int64) * rows + row
                tl.store(y_ptr + y_row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
                tl.store(statistics_ptr + y_row, mean, mask=here)
                tl.store(statistics_ptr + tl.cast(layers, tl.int64) * rows + y_row, rstd, mask=here)

    @triton.jit
    def _backward_kernel(
        g_ptr,  # [K, R, M, D]
        x_ptr,  # [K, B, L, D]
        w_ptr,  # [D]
        inverse_ptr,  # [R, L]
        statistics_ptr,  # [2, K, R, M]
        dx_ptr,  # [K, B, L, D], contiguous
        partial_ptr,  # [2, programs, D]
        rows,  # K * B * L
        batch,
        length,
        kept,  # M
        masks,  # R / B
        width,
        rows_per_program,
        x_k,
        x_b,
        x_l,
        g_k,
        g_r,
        g_m,
        WEIGHT: tl.constexpr,
        BIAS: tl.constexpr,
        GATHER: tl.constexpr,
        RMS: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        inside = column < width
        if WEIGHT:
            w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        dw = tl.zeros((ROWS, BLOCK), tl.float32)
        db = tl.zeros((ROWS, BLOCK), tl.float32)
        layers = rows // length // batch
        statistics_2 = tl.cast(layers * batch, tl.int64) * masks * kept
        first = program * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = start + tl.arange(0, ROWS)
            here = row < rows
            mask = here[:, None] & inside[None, :]
            image = row // length
            place = row - image * length
            layer = image // batch
            sample = image - layer * batch
            there = here
            if GATHER:
                # A row of x may be in several sets; their gradients add up before the norm's, which is the same.
                g = tl.zeros((ROWS, BLOCK), tl.float32)
                mean = tl.zeros((ROWS,), tl.float32)
                rstd = tl.zeros((ROWS,), tl.float32)
                there = row < 0
                for k in range(masks):
                    row_set = sample * masks + k
                    slot = tl.load(inverse_ptr + row_set.to(tl.int64) * length + place, mask=here, other=-1)
                    valid = slot >= 0
                    g_row = layer.to(tl.int64) * g_k + row_set.to(tl.int64) * g_r + slot.to(tl.int64) * g_m
                    g_mask = valid[:, None] & inside[None, :]
                    g += tl.load(g_ptr + g_row[:, None] + column[None, :], mask=g_mask, other=0.0).to(tl.float32)
                    s_row = (layer * batch * masks + row_set).to(tl.int64) * kept + slot
                    mean = tl.where(valid, tl.load(statistics_ptr + s_row, mask=valid, other=0.0), mean)
                    rstd = tl.where(valid, tl.load(statistics_ptr + statistics_2 + s_row, mask=valid, other=0.0), rstd)
                    there = there | valid
            else:
                g_row = layer.to(tl.int64) * g_k + sample.to(tl.int64) * g_r + place.to(tl.int64) * g_m
                g = tl.load(g_ptr + g_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
                mean = tl.load(statistics_ptr + row, mask=here, other=0.0)
                rstd = tl.load(statistics_ptr + statistics_2 + row, mask=here, other=0.0)
            read = there[:, None] & inside[None, :]
            x_row = layer.to(tl.int64) * x_k + sample.to(tl.int64) * x_b + place.to(tl.int64) * x_l
            x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=read, other=0.0).to(tl.float32)
            x = tl.where(read, (x - mean[:, None]) * rstd[:, None], 0.0)
            if WEIGHT:
                dw += g * x
            if BIAS:
                db += g
            if WEIGHT:
                g = g * w[None, :]
            if RMS:
                dx = g - x * (tl.sum(g * x, axis=1) / width)[:, None]
            else:
                shares, means = tl.split(tl.sum(tl.join(g * x, g), axis=1))
                dx = g - (means / width)[:, None] - x * (shares / width)[:, None]
            dx = dx * rstd[:, None]
            dx_row = row.to(tl.int64) * width
            tl.store(dx_ptr + dx_row[:, None] + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        slot = program.to(tl.int64) * width
        if WEIGHT:
            tl.store(partial_ptr + slot + column, tl.sum(dw, axis=0), mask=inside)
        if BIAS:
            slot += tl.num_programs(0).to(tl.int64) * width
            tl.store(partial_ptr + slot + column, tl.sum(db, axis=0), mask=inside)

    @triton.jit
    def _invert_kernel(
        row_ids_ptr,  # [R, M]
        inverse_ptr,  # [R, L]
        kept,
        length,
        BLOCK: tl.constexpr,
    ):
        row_set = tl.program_id(0).to(tl.int64)
        for start in range(0, length, BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(inverse_ptr + row_set * length + place, -1, mask=place < length)
        tl.debug_barrier()  # the rows below may be written by other threads
        for start in range(0, kept, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            place = tl.load(row_ids_ptr + row_set * kept + slot, mask=slot < kept, other=-1).to(tl.int64)
            tl.store(inverse_ptr + row_set * length + place, slot, mask=place >= 0)

"""gather_layer_norm and gather_rms_norm: the norm of chosen rows, plus their positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import KERNEL_DTYPES, next_power_of_2, triton
from umt_kernels.checks import check_eps, check_floats, check_id_values, check_ids, check_tensors
from umt_kernels.dispatch import KernelOp, differentiate_reference, runs_kernel
from umt_kernels.gather_layer_norm_backward import backward, row_strides
from umt_kernels.launch import PLANS, Plan, last_contiguous, resident_programs, share
from umt_kernels.sharding import Axes, is_distributed, on_shards

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
    rms: bool = False,
) -> Float[Tensor, "*k r m d"]:
    """LayerNorm(x[b, row_ids[r, m]]) + position[position_ids[r, m]] in `out_dtype`, by default that of x.

    x             [b, l, d], or [k, b, l, d] for k layers with the same ids and positions; each position is read once.
    weight, bias  either may be None.
    row_ids       rows to keep, no row twice in a set if x has a gradient; None keeps all. With r a multiple of b,
                  sets 0 .. r/b - 1 belong to sample 0, and so on.
    position      table added after the norm; its gradient is summed in float32.
    position_ids  row of the table for each kept row.
    padded        ids may be -1: this row id gives a row of zeros, this position id adds nothing.
    rms           RMSNorm (arXiv 1910.07467) instead of LayerNorm: x / sqrt(mean(x^2) + eps).

    Statistics are float32. Gradients are deterministic, as no atomics are used. Raises ValueError for shapes or devices
    that do not fit, an id out of range, or a repeated id if x has a gradient; TypeError for a dtype.
    """
    key = _forward.key((x, weight, bias, row_ids, position, position_ids), (eps, out_dtype, padded, rms))
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None:
        if is_distributed(x, weight, bias, row_ids, position, position_ids):
            samples = x.dim() - 3
            rows: Axes = (samples, samples + 1) if row_ids is None else (samples,)
            ids: Axes = (0, 1) if row_ids is None else (0,)
            axes: dict[str, Axes] = {
                "x": rows, "row_ids": ids, "position_ids": ids, "weight": None, "bias": None, "position": None
            }  # fmt: skip
            return on_shards(
                gather_layer_norm, axes, (rows,), x=x, weight=weight, bias=bias, eps=eps, row_ids=row_ids,
                position=position, position_ids=position_ids, padded=padded, out_dtype=out_dtype, rms=rms,
            )  # fmt: skip
        check_eps(eps)
        _check(x, weight, bias, row_ids, position, position_ids, out_dtype)
    if row_ids is not None:
        once = x.requires_grad and torch.is_grad_enabled()
        check_id_values("row_ids", row_ids, x.shape[-2], "x has {} rows per sample", once=once, padded=padded)
    if position_ids is not None:
        assert position is not None
        check_id_values("position_ids", position_ids, len(position), "position has {} rows", padded=padded)
    if plan is not None:
        return _forward.planned(plan, x, weight, bias, row_ids, position, position_ids)
    dtype = x.dtype if out_dtype is None else out_dtype
    if not _runs_kernel(x, weight, bias, row_ids, position, dtype):
        return reference.gather_layer_norm(
            x, weight, bias, eps, row_ids, position, position_ids, dtype=dtype, padded=padded, rms=rms
        )
    return _forward(x, weight, bias, row_ids, position, position_ids, float(eps), dtype, padded, rms, key=key)[0]


def gather_rms_norm(
    x: Float[Tensor, "*k b l d"], weight: Float[Tensor, " d"] | None, eps: float, **settings: Any
) -> Float[Tensor, "*k r m d"]:
    """`gather_layer_norm` with rms=True and no bias; `settings` are its other keywords."""
    return gather_layer_norm(x, weight, None, eps, rms=True, **settings)


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
"""Rows are counted in int32, because its divisions are fast."""


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Check all arguments except the values of ids."""
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
    if row_ids is not None:
        check_ids("row_ids", row_ids, x.shape[-3], sets=True)
    if (position is None) != (position_ids is None):
        raise ValueError("position and position_ids belong together: give both or neither")
    if position is not None and position_ids is not None:
        rows = tuple(x.shape[-3:-1] if row_ids is None else row_ids.shape)
        if position.dim() != 2 or position.shape[1:] != width or position_ids.shape != rows:
            raise ValueError(
                f"position {list(position.shape)}, position_ids {list(position_ids.shape)}: "
                f"give [n, {x.shape[-1]}] and {list(rows)}"
            )
        check_ids("position_ids", position_ids, rows[0])
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype = {out_dtype}; give a floating-point dtype")


def _shapes(x: Tensor, row_ids: Tensor | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the output [*k,r,m,d], and of mean and 1 / standard deviation of each of its rows [2,*k,r,m]."""
    shape = x.shape if row_ids is None else (*x.shape[:-3], *row_ids.shape, x.shape[-1])
    return shape, (2, *shape[:-1])


def _prepare(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    padded: bool,
    rms: bool,
) -> Plan:
    layers, (batch, length, width) = (1 if x.dim() == 3 else len(x)), x.shape[-3:]
    kept = length if row_ids is None else row_ids.shape[1]
    masks = 1 if row_ids is None else len(row_ids) // max(1, batch)
    rows = batch * masks * kept if layers * width else 0
    config = forward_config(width)
    # Twice as many programs as run at a time: each has few rows, so multiprocessors are not idle for long at the end.
    programs = 2 * resident_programs(x.device, config["num_warps"], FORWARD_REGISTERS)
    per_program, programs = share(rows, programs, config["ROWS"])
    settings = {
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "GATHER": row_ids is not None,
        "POSITION": position is not None,
        "PADDED": padded,
        "RMS": rms,
        **config,
    }
    numbers = (layers, rows, kept, masks, width, per_program, *row_strides(x), eps)
    of_y, of_statistics = _shapes(x, row_ids)
    outputs = ((of_y, dtype), (of_statistics, torch.float32))
    return Plan(_forward_kernel, (programs,), numbers, settings, outputs)


def _launch(
    plan: Plan,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    padded: bool,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    y, statistics = plan.allocate(x.device)
    plan.launch((x, weight, bias, row_ids, position, position_ids), (y, statistics))
    return y, statistics


def _fake(x, weight, bias, row_ids, position, position_ids, eps, dtype, padded, rms):
    shape, of_statistics = _shapes(x, row_ids)
    return x.new_empty(shape, dtype=dtype), x.new_empty(of_statistics, dtype=torch.float32)


FORWARD_REGISTERS = 96
"""Most registers per thread in the compiler's report at the models' widths; a test compares them."""


def forward_config(width: int) -> dict[str, int]:
    block = next_power_of_2(width)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def _save(ctx, inputs, output):
    *tensors, ctx.eps, ctx.dtype, ctx.padded, ctx.rms = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, grad, _grad_statistics=None):
    if grad is None:
        return (None,) * 10
    x, weight, bias, row_ids, position, position_ids, statistics = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = backward(grad, x, weight, bias, statistics, row_ids, ctx.padded, ctx.rms)
    grad_position = None
    if ctx.needs_input_grad[4]:
        grad_position = _table_gradient(grad, position, position_ids, row_ids, ctx.padded)
    return (
        grad_x,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        None,
        grad_position,
        *(None,) * 5,
    )


def _table_gradient(grad: Tensor, table: Tensor, ids: Tensor, row_ids: Tensor | None, padded: bool) -> Tensor:
    """Gradient rows summed by id. `index_put` sorts the ids on a GPU, so the order of the sum is fixed."""
    rows = grad.float() if grad.dim() == 3 else grad.float().sum(0)
    if padded:  # masked_fill, as a gradient may be infinite
        nothing = ids < 0 if row_ids is None else (ids < 0) | (row_ids < 0)
        rows, ids = rows.masked_fill(nothing[..., None], 0), ids.clamp_min(0)
    summed = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    return summed.index_put((ids.flatten().long(),), rows.flatten(0, 1), accumulate=True).to(table.dtype)


def _differentiate_again(ctx, grad):
    x, weight, bias, row_ids, position, position_ids, _ = ctx.saved_tensors

    def run(x, weight, bias, position):
        arguments = (x, weight, bias, ctx.eps, row_ids, position, position_ids)
        return reference.gather_layer_norm(*arguments, dtype=ctx.dtype, padded=ctx.padded, rms=ctx.rms)

    grad_x, grad_weight, grad_bias, grad_position = differentiate_reference(run, (x, weight, bias, position), grad)
    return grad_x, grad_weight, grad_bias, None, grad_position, *(None,) * 5


_forward = KernelOp(
    "gather_layer_norm",
    _prepare,
    _launch,
    _fake,
    _save,
    _differentiate,
    _differentiate_again,
    strided={"x": last_contiguous},
)


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
        # Every tile is [ROWS, BLOCK], w and b too: to change another layout, warps would have to wait for each other.
        column = tl.zeros((ROWS, 1), tl.int32) + tl.arange(0, BLOCK)[None, :]
        inside = column < width
        if WEIGHT:
            w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            b = tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)
        first = tl.program_id(0) * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = start + tl.arange(0, ROWS)
            here = row < rows
            mask = here[:, None] & inside
            row_set = row // kept
            if GATHER:
                place = tl.load(row_ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                place = (row - row_set * kept).to(tl.int64)
            there = here
            if PADDED:
                there = here & (place >= 0)
            read = there[:, None] & inside
            if POSITION:
                p_id = tl.load(position_ids_ptr + row, mask=here, other=0).to(tl.int64)
                p_mask = mask
                if PADDED:
                    p_mask = read & (p_id >= 0)[:, None]
                p = tl.load(position_ptr + p_id[:, None] * width + column, mask=p_mask, other=0.0)
                p = p.to(tl.float32)
            x_row = (row_set // masks).to(tl.int64) * x_b + place * x_l
            for layer in range(layers):
                x_at = (tl.cast(layer, tl.int64) * x_k + x_row)[:, None] + column
                x = tl.load(x_ptr + x_at, mask=read, other=0.0).to(tl.float32)
                if RMS:
                    mean = tl.zeros((ROWS,), tl.float32)
                else:
                    mean = tl.sum(x, axis=1) / width
                    x = tl.where(mask, x - mean[:, None], 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
                y = x * rstd[:, None]
                if WEIGHT:
                    y = y * w
                if BIAS:
                    y += b
                if POSITION:
                    y += p
                if PADDED:
                    y = tl.where(read, y, 0.0)
                y_row = tl.cast(layer, tl.int64) * rows + row
                tl.store(y_ptr + y_row[:, None] * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)
                tl.store(statistics_ptr + y_row, mean, mask=here)
                tl.store(statistics_ptr + tl.cast(layers, tl.int64) * rows + y_row, rstd, mask=here)

"""add_layer_norm: residual + branch, and the LayerNorm or RMSNorm of the sum, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.add_layer_norm_backward import backward
from umt_kernels.backend import KERNEL_DTYPES, next_power_of_2, triton
from umt_kernels.checks import check_eps, check_floats, check_id_values, check_ids, check_tensors
from umt_kernels.dispatch import KernelOp, differentiate_reference, runs_kernel
from umt_kernels.launch import PLANS, Plan, last_contiguous, resident_programs, share
from umt_kernels.sharding import Axes, is_distributed, on_shards

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if triton is not None:
    import triton.language as tl


def add_layer_norm(
    residual: Float[Tensor, "b l d"],
    branch: Float[Tensor, "r m d"],
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    eps: float,
    *,
    branch_bias: Float[Tensor, " d"] | None = None,
    scale: Float[Tensor, " r"] | float | None = None,
    row_ids: Int[Tensor, "r m"] | None = None,
    position: Float[Tensor, "n d"] | None = None,
    position_ids: Int[Tensor, "r m"] | None = None,
    padded: bool = False,
    out_dtype: torch.dtype | None = None,
    rms: bool = False,
    post_norm: bool = False,
) -> tuple[Float[Tensor, "r m d"], Float[Tensor, "r m d"]]:
    """The new residual x = residual + scale * (branch + branch_bias) in its own dtype, and LayerNorm(x) in `out_dtype`.

    scale         a number, or one factor per sample, as stochastic depth (arXiv 1603.09382) draws them; it gets no
                  gradient.
    row_ids       row of the residual for each row of the branch, none twice in a set if the residual has a gradient;
                  None: all. With r a multiple of b, sets 0 .. r/b - 1 belong to sample 0, and so on.
    position      table whose rows `position_ids` are added after the norm; it must not require a gradient.
    padded        ids may be -1: this row id gives rows of zeros, this position id adds nothing.
    out_dtype     dtype of the second output; None is the residual's.
    rms           RMSNorm (arXiv 1910.07467) instead of LayerNorm. With both, `weight` and `bias` may be None.
    post_norm     the normalised sum itself is the new residual (arXiv 1706.03762); the plain sum is not stored.

    Statistics are float32, of x as it is stored. Every input is read once and every output written once; with `padded`
    or several sets, the chosen rows of the residual are copied first. Raises ValueError for shapes, devices or ids that
    do not fit, TypeError for a dtype that does not.
    """
    factor, scale = (scale, None) if isinstance(scale, (int, float)) else (None, scale)
    key = _forward.key(
        (residual, branch, weight, bias, branch_bias, scale, row_ids, position, position_ids),
        (eps, out_dtype, rms, post_norm, factor, padded),
    )
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None and is_distributed(residual, branch, weight, bias, branch_bias, scale, row_ids):
        rows = (0, 1) if row_ids is None else (0,)
        axes: dict[str, Axes] = {
            "residual": rows, "branch": rows, "row_ids": rows, "position_ids": rows, "scale": (0, None)[: len(rows)],
            "weight": None, "bias": None, "branch_bias": None, "position": None,
        }  # fmt: skip
        if factor is not None:
            del axes["scale"]
        return on_shards(
            add_layer_norm, axes, (rows, rows), residual=residual, branch=branch, weight=weight, bias=bias, eps=eps,
            branch_bias=branch_bias, scale=scale if factor is None else factor, row_ids=row_ids, position=position,
            position_ids=position_ids, padded=padded, out_dtype=out_dtype, rms=rms, post_norm=post_norm,
        )  # fmt: skip
    if plan is None:
        check_eps(eps)
        _check(residual, branch, weight, bias, branch_bias, scale, row_ids, position, position_ids, out_dtype)
    if row_ids is not None:
        once = residual.requires_grad and torch.is_grad_enabled()
        limit = residual.shape[1]
        check_id_values("row_ids", row_ids, limit, "residual has {} rows per sample", once=once, padded=padded)
    if position_ids is not None:
        assert position is not None
        check_id_values("position_ids", position_ids, len(position), "position has {} rows", padded=padded)
    if plan is None and (padded or (row_ids is not None and len(row_ids) != len(residual))):
        return _of_sets(
            residual, branch, row_ids, position, position_ids, padded, weight=weight, bias=bias, eps=eps,
            branch_bias=branch_bias, scale=scale if factor is None else factor, out_dtype=out_dtype, rms=rms,
            post_norm=post_norm,
        )  # fmt: skip
    if scale is not None and scale.requires_grad:
        scale = scale.detach()
    tensors = (residual, branch, weight, bias, branch_bias, scale, row_ids, position, position_ids)
    dtype = residual.dtype if out_dtype is None else out_dtype
    if plan is not None:
        x, y = _forward.planned(plan, *tensors)
    else:
        settings = (float(eps), dtype, rms, post_norm, 1.0 if factor is None else float(factor))
        if not _runs_kernel(residual, branch, weight, bias, branch_bias, scale, position, dtype):
            return reference.add_layer_norm(*tensors, *settings)
        x, y = _forward(*tensors, *settings, key=key)[:2]
    return (y, y) if post_norm and dtype == residual.dtype else (x, y)


def _of_sets(
    residual: Tensor, branch: Tensor, row_ids: Tensor | None, position: Tensor | None, position_ids: Tensor | None,
    padded: bool, **settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Several sets of rows per sample, or ids of -1: each set becomes a sample of its own."""
    nothing = None
    if row_ids is not None:
        samples = torch.arange(len(row_ids), device=row_ids.device) // max(1, len(row_ids) // max(1, len(residual)))
        # By indices: their gradients are summed in a fixed order, on a GPU too.
        residual = residual[samples[:, None], (row_ids.clamp_min(0) if padded else row_ids).long()]
        if padded:  # what lies there may be NaN, and a NaN times 0 would be part of the weight's gradient
            nothing = (row_ids < 0)[..., None]
            residual, branch = residual.masked_fill(nothing, 0), branch.masked_fill(nothing, 0)
    if padded and position is not None and position_ids is not None:
        position_ids = torch.where(position_ids < 0, len(position), position_ids)
        position = torch.cat((position, position.new_zeros(1, position.shape[1])))
    x, y = add_layer_norm(residual, branch, position=position, position_ids=position_ids, **settings)
    if nothing is None:
        return x, y
    masked = y.masked_fill(nothing, 0)
    return masked if x is y else x.masked_fill(nothing, 0), masked


def _runs_kernel(residual: Tensor, branch: Tensor, *others: Any) -> bool:
    *floats, dtype = others
    few = branch.numel() < MOST_ROWS * branch.shape[-1] or branch.numel() == 0
    return few and dtype in KERNEL_DTYPES and runs_kernel("add_layer_norm", residual, branch, *floats)


MOST_ROWS = 2**31 - 2**16
"""Rows are counted in int32, because its divisions are fast."""


def _check(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Check all arguments except the values of ids."""
    floats = {
        "residual": residual, "branch": branch, "weight": weight, "bias": bias,
        "branch_bias": branch_bias, "scale": scale, "position": position,
    }  # fmt: skip
    check_tensors(**floats, row_ids=row_ids, position_ids=position_ids)
    check_floats(**floats)
    if residual.dim() != 3:
        raise ValueError(f"residual has shape {list(residual.shape)}; give [b, l, d]")
    batch, length, width = residual.shape
    if row_ids is not None:
        check_ids("row_ids", row_ids, batch, sets=True)
    sets, kept = (batch, length) if row_ids is None else row_ids.shape
    if branch.shape != (sets, kept, width):
        raise ValueError(f"branch has shape {list(branch.shape)}; give [{sets}, {kept}, {width}]")
    for name, vector in (("weight", weight), ("bias", bias), ("branch_bias", branch_bias)):
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"{name} has shape {list(vector.shape)}; give [{width}]")
    if scale is not None and scale.shape != (sets,):
        raise ValueError(f"scale has shape {list(scale.shape)}; give [{sets}], one factor per sample")
    if (position is None) != (position_ids is None):
        raise ValueError("position and position_ids belong together: give both or neither")
    if position is not None and position_ids is not None:
        if position.dim() != 2 or position.shape[1] != width or position_ids.shape != (sets, kept):
            raise ValueError(
                f"position {list(position.shape)}, position_ids {list(position_ids.shape)}: "
                f"give [n, {width}] and [{sets}, {kept}]"
            )
        if torch.is_grad_enabled() and position.requires_grad:
            raise ValueError("position requires a gradient, which add_layer_norm does not compute; add it afterwards")
        check_ids("position_ids", position_ids, sets)
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype = {out_dtype}; give a floating-point dtype")


def _prepare(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    rms: bool,
    post_norm: bool,
    factor: float,
) -> Plan:
    batch, kept, width = branch.shape
    rows = batch * kept if width else 0
    config = forward_config(width)
    programs = resident_programs(residual.device, config["num_warps"], FORWARD_REGISTERS)
    per_program, programs = share(rows, programs, config["ROWS"])
    numbers = (rows, kept, width, per_program, *residual.stride()[:2], *branch.stride()[:2], eps, factor)
    settings = {"RMS": rms, "POST": post_norm, **config}
    of_x, of_y, of_statistics = _shapes(residual, branch, out_dtype, post_norm)
    outputs = ((of_x, residual.dtype), (of_y, out_dtype), (of_statistics, torch.float32))
    return Plan(_forward_kernel, (programs,), numbers, settings, outputs)


def _shapes(residual: Tensor, branch: Tensor, out_dtype: torch.dtype, post_norm: bool) -> tuple[tuple[int, ...], ...]:
    same = post_norm and out_dtype == residual.dtype
    return (0,) if same else branch.shape, branch.shape, (2, *branch.shape[:2])


def _launch(
    plan: Plan,
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    rms: bool,
    post_norm: bool,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New residual [b,m,d], normalised rows [b,m,d], and mean and 1 / standard deviation of each row [2,b,m].

    The first is empty where it would equal the second.
    """
    x, y, statistics = plan.allocate(residual.device)
    plan.launch(
        (residual, branch, weight, bias, branch_bias, scale, row_ids, position, position_ids),
        (None if post_norm and out_dtype == residual.dtype else x, y, statistics),
    )
    return x, y, statistics


def _fake(
    residual, branch, weight, bias, branch_bias, scale, row_ids, position, position_ids, eps, out_dtype, rms,
    post_norm, factor,
):  # fmt: skip
    of_x, of_y, of_statistics = _shapes(residual, branch, out_dtype, post_norm)
    y = residual.new_empty(of_y, dtype=out_dtype)
    return residual.new_empty(of_x), y, residual.new_empty(of_statistics, dtype=torch.float32)


FORWARD_REGISTERS = 64
"""Most registers per thread in the compiler's report at the models' widths; a test compares them."""


def forward_config(width: int) -> dict[str, int]:
    """Each thread holds eight numbers of each of two rows, so both rows load at the same time."""
    block = next_power_of_2(width)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def _save(ctx, inputs, output):
    residual, branch, weight, bias, branch_bias, scale, row_ids, _, _, ctx.eps, *ctx.settings = inputs
    x, _, statistics = output
    kept = (residual, branch) if ctx.settings[2] else (x, None)
    ctx.save_for_backward(*kept, weight, bias, branch_bias, scale, row_ids, statistics)
    ctx.residual_shape, ctx.branch_dtype = residual.shape, branch.dtype


def _differentiate(ctx, grad_x, grad_y, _grad_statistics=None):
    x, branch, weight, bias, branch_bias, scale, row_ids, statistics = ctx.saved_tensors
    _, rms, post_norm, factor = ctx.settings
    if grad_x is not None and grad_x.numel() == 0:
        grad_x = None
    if grad_y is None:
        grad_y = torch.zeros(*statistics.shape[1:], x.shape[-1], dtype=x.dtype, device=x.device)
    residual, added, grad_weight, grad_bias, grad_branch_bias = backward(
        grad_y, grad_x, x, branch, weight, bias, branch_bias, scale, row_ids, statistics,
        tuple(ctx.residual_shape), ctx.branch_dtype, rms, post_norm, factor,
    )  # fmt: skip
    same = scale is None and factor == 1 and row_ids is None and ctx.branch_dtype == residual.dtype
    return (
        residual,
        residual if same else added,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        None if branch_bias is None else grad_branch_bias,
        *(None,) * 9,
    )


def _differentiate_again(ctx, grad_x, grad_y):
    x, branch, weight, bias, branch_bias, scale, row_ids, _ = ctx.saved_tensors
    out_dtype, rms, post_norm, factor = ctx.settings
    if grad_x is not None and grad_x.numel() == 0:
        grad_x = None
    if post_norm:

        def both(residual, branch, weight, bias, branch_bias):
            return reference.add_layer_norm(
                residual, branch, weight, bias, branch_bias, scale, row_ids, None, None, ctx.eps, *ctx.settings
            )

        inputs = (x, branch, weight, bias, branch_bias)
        return *differentiate_reference(both, inputs, (grad_x, grad_y)), *(None,) * 9

    def norm(x, weight, bias):
        return (reference.gather_layer_norm(x, weight, bias, ctx.eps, None, None, None, dtype=out_dtype, rms=rms),)

    # x, an output of this op, leads autograd back to the residual and the branch.
    grad, grad_weight, grad_bias = differentiate_reference(norm, (x, weight, bias), (grad_y,))
    parts = [part.float() for part in (grad, grad_x) if part is not None]
    summed = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    grad_branch = summed * factor if scale is None else summed * factor * scale[:, None, None]
    grad_branch_bias = None if branch_bias is None else grad_branch.sum((0, 1)).to(branch_bias.dtype)
    if row_ids is not None:
        places = row_ids.long()[..., None].expand(summed.shape)
        summed = summed.new_zeros(ctx.residual_shape).scatter(1, places, summed)
    return (
        summed.to(x.dtype), grad_branch.to(ctx.branch_dtype), grad_weight, grad_bias, grad_branch_bias, *(None,) * 9,
    )  # fmt: skip


_forward = KernelOp(
    "add_layer_norm",
    _prepare,
    _launch,
    _fake,
    _save,
    _differentiate,
    _differentiate_again,
    visible=2,
    strided={"residual": last_contiguous, "branch": last_contiguous},
)


if triton is not None:

    @triton.jit
    def _forward_kernel(
        residual_ptr,  # [B, L, D]
        branch_ptr,  # [B, M, D]
        w_ptr,  # [D]; None is ones
        b_ptr,  # [D]; None is zeros
        branch_bias_ptr,  # [D] or None
        scale_ptr,  # [B] or None
        row_ids_ptr,  # [B, M]; None is all rows, M = L
        position_ptr,  # [N, D] or None
        position_ids_ptr,  # [B, M]
        x_ptr,  # [B, M, D]; None: not stored
        y_ptr,  # [B, M, D]
        statistics_ptr,  # [2, B, M]
        rows,  # B * M
        kept,  # M
        width,
        rows_per_program,
        residual_b,
        residual_l,
        branch_b,
        branch_m,
        eps,
        factor,
        RMS: tl.constexpr,
        POST: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        # Every tile is [ROWS, BLOCK], w and b too: to change another layout, warps would have to wait for each other.
        column = tl.zeros((ROWS, 1), tl.int32) + tl.arange(0, BLOCK)[None, :]
        inside = column < width
        first = tl.program_id(0) * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = start + tl.arange(0, ROWS)  # int32, for fast division
            here = row < rows
            mask = here[:, None] & inside
            sample = row // kept
            if row_ids_ptr is not None:
                place = tl.load(row_ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                place = (row - sample * kept).to(tl.int64)
            residual_row = sample.to(tl.int64) * residual_b + place * residual_l
            branch_row = sample.to(tl.int64) * branch_b + (row - sample * kept).to(tl.int64) * branch_m
            x = tl.load(residual_ptr + residual_row[:, None] + column, mask=mask, other=0.0).to(tl.float32)
            added = tl.load(branch_ptr + branch_row[:, None] + column, mask=mask, other=0.0).to(tl.float32)
            if branch_bias_ptr is not None:
                added += tl.load(branch_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            if scale_ptr is not None:
                added *= tl.load(scale_ptr + sample, mask=here, other=0.0).to(tl.float32)[:, None]
            x += added * factor
            y_row = row.to(tl.int64) * width
            if not POST:
                stored = x.to(x_ptr.dtype.element_ty)
                tl.store(x_ptr + y_row[:, None] + column, stored, mask=mask)
                x = stored.to(tl.float32)
            if RMS:
                mean = tl.zeros((ROWS,), tl.float32)
            else:
                mean = tl.sum(x, axis=1) / width
            centred = tl.where(mask, x - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
            y = centred * rstd[:, None]
            if w_ptr is not None:
                y *= tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
            if b_ptr is not None:
                y += tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)
            if position_ptr is not None:
                p_row = tl.load(position_ids_ptr + row, mask=here, other=0).to(tl.int64) * width
                y += tl.load(position_ptr + p_row[:, None] + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + y_row[:, None] + column, y.to(y_ptr.dtype.element_ty), mask=mask)
            if POST and x_ptr is not None:
                tl.store(x_ptr + y_row[:, None] + column, y.to(x_ptr.dtype.element_ty), mask=mask)
            tl.store(statistics_ptr + row, mean, mask=here)
            tl.store(statistics_ptr + tl.cast(rows, tl.int64) + row, rstd, mask=here)

"""add_layer_norm: residual + branch, and the LayerNorm or RMSNorm of the sum, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import KERNEL_DTYPES, next_power_of_2, on_its_device, triton
from umt_kernels.checks import check_eps, check_floats, check_ids, check_tensors
from umt_kernels.dispatch import runs_kernel
from umt_kernels.launch import resident_programs

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if triton is not None:
    import triton.language as tl


def add_layer_norm(
    residual: Float[Tensor, "b l d"],
    branch: Float[Tensor, "b m d"],
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    eps: float,
    *,
    branch_bias: Float[Tensor, " d"] | None = None,
    scale: Float[Tensor, " b"] | float | None = None,
    row_ids: Int[Tensor, "b m"] | None = None,
    position: Float[Tensor, "n d"] | None = None,
    position_ids: Int[Tensor, "b m"] | None = None,
    out_dtype: torch.dtype | None = None,
    rms: bool = False,
    post_norm: bool = False,
) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m d"]]:
    """The new residual x = residual + scale * (branch + branch_bias) in its own dtype, and LayerNorm(x) in `out_dtype`.

    scale         a number, or a factor of each sample's branch as stochastic depth (arXiv 1603.09382) draws it, which
                  gets no gradient.
    row_ids       rows of the residual that the branch's rows belong to, none twice where it has a gradient; None: all.
    position      table whose rows `position_ids` are added after the norm; it must not require a gradient.
    out_dtype     dtype of the second output; None is the residual's.
    rms           RMSNorm (arXiv 1910.07467) in place of LayerNorm; `weight` and `bias` may be None for either.
    post_norm     the normalised sum itself is the new residual (arXiv 1706.03762); the plain sum is not stored.

    Statistics are float32, of x as it is stored. Every input is read once and every output written once. Raises
    ValueError for shapes, devices or ids that do not fit, TypeError for a dtype that does not.
    """
    check_eps(eps)
    factor = 1.0
    if isinstance(scale, (int, float)):
        factor, scale = float(scale), None
    _check(residual, branch, weight, bias, branch_bias, scale, row_ids, position, position_ids)
    out_dtype = residual.dtype if out_dtype is None else out_dtype
    if not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype = {out_dtype}; give a floating-point dtype")
    scale = None if scale is None else scale.detach()
    given = (residual, branch, weight, bias, branch_bias, scale, position)
    if out_dtype not in KERNEL_DTYPES or not runs_kernel("add_layer_norm", *given):
        return reference.add_layer_norm(
            residual, branch, weight, bias, eps, branch_bias, scale, row_ids, position, position_ids,
            out_dtype, rms, post_norm, factor,
        )  # fmt: skip
    x, y, _ = _forward(
        residual, branch, weight, bias, eps, branch_bias, scale, row_ids, position, position_ids,
        out_dtype, rms, post_norm, factor,
    )  # fmt: skip
    return (y, y) if post_norm and out_dtype == residual.dtype else (x, y)


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
) -> None:
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
        scatters = torch.is_grad_enabled() and residual.requires_grad
        check_ids("row_ids", row_ids, batch, length, "residual has {} rows per sample", once=scatters)
    kept = length if row_ids is None else row_ids.shape[1]
    if branch.shape != (batch, kept, width):
        raise ValueError(f"branch has shape {list(branch.shape)}; give [{batch}, {kept}, {width}]")
    for name, vector in (("weight", weight), ("bias", bias), ("branch_bias", branch_bias)):
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"{name} has shape {list(vector.shape)}; give [{width}]")
    if scale is not None and scale.shape != (batch,):
        raise ValueError(f"scale has shape {list(scale.shape)}; give [{batch}], one factor per sample")
    if (position is None) != (position_ids is None):
        raise ValueError("position and position_ids belong together: give both or neither")
    if position is not None and position_ids is not None:
        if position.dim() != 2 or position.shape[1] != width or position_ids.shape != (batch, kept):
            raise ValueError(
                f"position {list(position.shape)}, position_ids {list(position_ids.shape)}: "
                f"give [n, {width}] and [{batch}, {kept}]"
            )
        if torch.is_grad_enabled() and position.requires_grad:
            raise ValueError("position requires a gradient, which add_layer_norm does not compute; add it afterwards")
        check_ids("position_ids", position_ids, batch, position.shape[0], "position has {} rows")


@torch.library.custom_op("umt_kernels::add_layer_norm", mutates_args=())
@on_its_device
def _forward(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    out_dtype: torch.dtype,
    rms: bool,
    post_norm: bool,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """New residual [b,m,d], normalised rows [b,m,d], and mean and 1 / standard deviation of each row [2,b,m].

    The first is empty where it would equal the second.
    """
    x, y, statistics = _outputs(residual, branch, out_dtype, post_norm)
    batch, kept, width = branch.shape
    rows = batch * kept
    if rows == 0:
        return x, y, statistics
    residual, branch = _last_contiguous(residual), _last_contiguous(branch)
    config = forward_config(width)
    programs = resident_programs(residual.device, config["num_warps"], 64)
    per_program = triton.cdiv(triton.cdiv(rows, programs), config["ROWS"]) * config["ROWS"]
    _forward_kernel[(triton.cdiv(rows, per_program),)](
        residual,
        branch,
        _contiguous(weight),
        _contiguous(bias),
        _contiguous(branch_bias),
        _contiguous(scale),
        _contiguous(row_ids),
        _contiguous(position),
        _contiguous(position_ids),
        x if x.numel() else None,
        y,
        statistics,
        rows,
        kept,
        width,
        per_program,
        *residual.stride()[:2],
        *branch.stride()[:2],
        eps,
        factor,
        RMS=rms,
        POST=post_norm,
        **config,
    )
    return x, y, statistics


def _outputs(residual: Tensor, branch: Tensor, out_dtype: torch.dtype, post_norm: bool) -> tuple[Tensor, ...]:
    same = post_norm and out_dtype == residual.dtype
    x = residual.new_empty((0,) if same else branch.shape)
    y = residual.new_empty(branch.shape, dtype=out_dtype)
    return x, y, residual.new_empty(2, *branch.shape[:2], dtype=torch.float32)


@_forward.register_fake
def _(
    residual, branch, weight, bias, eps, branch_bias, scale, row_ids, position, position_ids, out_dtype,
    rms, post_norm, factor=1.0,
):  # fmt: skip
    return _outputs(residual, branch, out_dtype, post_norm)


@torch.library.custom_op("umt_kernels::add_layer_norm_backward", mutates_args=())
@on_its_device
def _backward(
    grad_y: Tensor,
    grad_x: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    row_ids: Tensor | None,
    statistics: Tensor,
    residual_shape: list[int],
    branch_dtype: torch.dtype,
    rms: bool,
    post_norm: bool,
    biased: bool,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the residual, of the branch (empty where it is the residual's), of weight, bias and branch_bias.

    `x` is the new residual [b,m,d], or with `post_norm` the old one [b,l,d]: then the sum is computed again.
    """
    batch, kept, width = grad_y.shape
    rows = batch * kept
    scaled = scale is not None or factor != 1
    grads = _gradients(x, grad_y, weight, branch_bias, scaled, row_ids, residual_shape, branch_dtype, biased)
    grad_residual, grad_branch, grad_weight, grad_bias, grad_branch_bias = grads
    if rows == 0 or row_ids is not None:
        grad_residual.zero_()
    if rows == 0:
        return grad_residual, grad_branch, grad_weight.zero_(), grad_bias.zero_(), grad_branch_bias.zero_()
    x, grad_y = _last_contiguous(x), _last_contiguous(grad_y)
    grad_x = None if grad_x is None else _last_contiguous(grad_x)
    branch = None if branch is None else _last_contiguous(branch)
    config = backward_config(width)
    programs = resident_programs(x.device, config["num_warps"], 80)
    per_program = triton.cdiv(triton.cdiv(rows, programs), config["ROWS"]) * config["ROWS"]
    programs = triton.cdiv(rows, per_program)
    wanted = [len(grad) > 0 for grad in grads[2:]]
    partial = x.new_empty(3, programs, width, dtype=torch.float32)
    _backward_kernel[(programs,)](
        grad_y,
        grad_x,
        x,
        branch,
        _contiguous(weight),
        _contiguous(branch_bias),
        _contiguous(scale),
        _contiguous(row_ids),
        statistics,
        grad_residual,
        grad_branch if grad_branch.numel() else None,
        partial,
        rows,
        kept,
        residual_shape[1],
        width,
        per_program,
        *grad_y.stride()[:2],
        *((0, 0) if grad_x is None else grad_x.stride()[:2]),
        *x.stride()[:2],
        *((0, 0) if branch is None else branch.stride()[:2]),
        factor,
        RMS=rms,
        POST=post_norm,
        WEIGHT_GRAD=wanted[0],
        BIAS_GRAD=wanted[1],
        BRANCH_BIAS_GRAD=wanted[2],
        **config,
    )
    sums = [p.sum(0).to(grad.dtype) if here else grad for p, grad, here in zip(partial, grads[2:], wanted, strict=True)]
    return grad_residual, grad_branch, sums[0], sums[1], sums[2]


def _gradients(
    x: Tensor,
    grad_y: Tensor,
    weight: Tensor | None,
    branch_bias: Tensor | None,
    scaled: bool,
    row_ids: Tensor | None,
    residual_shape: list[int],
    branch_dtype: torch.dtype,
    biased: bool,
) -> tuple[Tensor, ...]:
    """Unwritten outputs of the backward."""
    width = grad_y.shape[2]
    same = not scaled and row_ids is None and branch_dtype == x.dtype
    like = x if weight is None else weight
    return (
        x.new_empty(residual_shape),
        x.new_empty((0,) if same else grad_y.shape, dtype=branch_dtype),
        like.new_empty(0 if weight is None else width),
        like.new_empty(width if biased else 0),
        (x if branch_bias is None else branch_bias).new_empty(0 if branch_bias is None else width),
    )


@_backward.register_fake
def _(
    grad_y, grad_x, x, branch, weight, branch_bias, scale, row_ids, statistics, residual_shape, branch_dtype,
    rms, post_norm, biased, factor=1.0,
):  # fmt: skip
    scaled = scale is not None or factor != 1
    return _gradients(x, grad_y, weight, branch_bias, scaled, row_ids, residual_shape, branch_dtype, biased)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward_config(width: int) -> dict[str, int]:
    """Eight numbers of each of two rows to a thread: both are on their way at once."""
    block = next_power_of_2(width)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def backward_config(width: int) -> dict[str, int]:
    """Eight numbers of a row to a thread, 16 bytes of bf16: three inputs and three sums of it are held at once."""
    block = next_power_of_2(width)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": max(4, min(16, block // 256))}


def _setup(ctx, inputs, output):
    residual, branch, weight, bias, _, branch_bias, scale, row_ids, _, _, _, rms, post_norm, factor = inputs
    x, _, statistics = output
    ctx.set_materialize_grads(False)  # where only the normalised rows are used, nothing is read for the residual
    kept = (residual, branch) if post_norm else (x, None)
    ctx.save_for_backward(*kept, weight, branch_bias, scale, row_ids, statistics)
    ctx.residual_shape, ctx.branch_dtype = residual.shape, branch.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.rms, ctx.post_norm, ctx.factor = rms, post_norm, factor


def _differentiate(ctx, grad_x, grad_y, _grad_statistics):
    x, branch, weight, branch_bias, scale, row_ids, statistics = ctx.saved_tensors
    if grad_x is not None and grad_x.numel() == 0:
        grad_x = None
    if grad_y is None:
        grad_y = torch.zeros(*statistics.shape[1:], x.shape[-1], dtype=x.dtype, device=x.device)
    biased = ctx.bias_dtype is not None
    residual, added, grad_weight, grad_bias, grad_branch_bias = _backward(
        grad_y, grad_x, x, branch, weight, branch_bias, scale, row_ids, statistics,
        list(ctx.residual_shape), ctx.branch_dtype, ctx.rms, ctx.post_norm, biased, ctx.factor,
    )  # fmt: skip
    same = scale is None and ctx.factor == 1 and row_ids is None and ctx.branch_dtype == residual.dtype
    return (
        residual,
        residual if same else added,
        None if weight is None else grad_weight,
        grad_bias.to(ctx.bias_dtype) if biased else None,
        None,
        None if branch_bias is None else grad_branch_bias,
        *(None,) * 8,
    )


_forward.register_autograd(_differentiate, setup_context=_setup)


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
        column = tl.arange(0, BLOCK)
        inside = column < width
        first = tl.program_id(0).to(tl.int64) * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)  # the interpreter's range gives an int32
            here = row < rows
            mask = here[:, None] & inside[None, :]
            sample = row // kept
            if row_ids_ptr is not None:
                place = tl.load(row_ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                place = row - sample * kept
            residual_row = sample * residual_b + place * residual_l
            branch_row = sample * branch_b + (row - sample * kept) * branch_m
            x = tl.load(residual_ptr + residual_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            added = tl.load(branch_ptr + branch_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if branch_bias_ptr is not None:
                added += tl.load(branch_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if scale_ptr is not None:
                added *= tl.load(scale_ptr + sample, mask=here, other=0.0).to(tl.float32)[:, None]
            x += added * factor
            y_row = row * width
            if not POST:
                stored = x.to(x_ptr.dtype.element_ty)
                tl.store(x_ptr + y_row[:, None] + column[None, :], stored, mask=mask)
                x = stored.to(tl.float32)
            if RMS:
                mean = tl.zeros((ROWS,), tl.float32)
            else:
                mean = tl.sum(x, axis=1) / width
            centred = tl.where(mask, x - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
            y = centred * rstd[:, None]
            if w_ptr is not None:
                y *= tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if b_ptr is not None:
                y += tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if position_ptr is not None:
                p_row = tl.load(position_ids_ptr + row, mask=here, other=0).to(tl.int64) * width
                y += tl.load(position_ptr + p_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + y_row[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
            if POST and x_ptr is not None:
                tl.store(x_ptr + y_row[:, None] + column[None, :], y.to(x_ptr.dtype.element_ty), mask=mask)
            tl.store(statistics_ptr + row, mean, mask=here)
            tl.store(statistics_ptr + rows + row, rstd, mask=here)

    @triton.jit
    def _backward_kernel(
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
        dbranch_ptr,  # [B, M, D], contiguous; None where it is dresidual
        partial_ptr,  # [3, programs, D]: of weight, bias, branch_bias
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
        program = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        dw = tl.zeros((BLOCK,), tl.float32)
        db = tl.zeros((BLOCK,), tl.float32)
        dbranch_bias = tl.zeros((BLOCK,), tl.float32)
        first = program * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)  # the interpreter's range gives an int32
            here = row < rows
            mask = here[:, None] & inside[None, :]
            sample = row // kept
            order = row - sample * kept
            if row_ids_ptr is not None:
                place = tl.load(row_ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                place = order
            x_row = sample * x_b + (place if POST else order) * x_l
            gy_row = sample * gy_b + order * gy_m
            x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            g = tl.load(gy_ptr + gy_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if gx_ptr is not None:
                gx_row = sample * gx_b + order * gx_m
                gx = tl.load(gx_ptr + gx_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + sample, mask=here, other=0.0).to(tl.float32)[:, None]
            if POST:
                branch_row = sample * branch_b + order * branch_m
                added = tl.load(branch_ptr + branch_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
                if branch_bias_ptr is not None:
                    added += tl.load(branch_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
                if scale_ptr is not None:
                    added *= scale
                x += added * factor
                if gx_ptr is not None:
                    g += gx
            mean = tl.load(statistics_ptr + row, mask=here, other=0.0)
            rstd = tl.load(statistics_ptr + rows + row, mask=here, other=0.0)
            x = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            if WEIGHT_GRAD:
                dw += tl.sum(g * x, axis=0)
            if BIAS_GRAD:
                db += tl.sum(g, axis=0)
            if w_ptr is not None:
                g *= tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            dx = g - x * (tl.sum(g * x, axis=1) / width)[:, None]
            if not RMS:
                dx -= (tl.sum(g, axis=1) / width)[:, None]
            dx *= rstd[:, None]
            if not POST and gx_ptr is not None:
                dx += gx
            dresidual_row = (sample * length + place) * width
            dresidual = dx.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + dresidual_row[:, None] + column[None, :], dresidual, mask=mask)
            dx *= factor
            if scale_ptr is not None:
                dx *= scale
            if dbranch_ptr is not None:
                dbranch = dx.to(dbranch_ptr.dtype.element_ty)
                tl.store(dbranch_ptr + (row * width)[:, None] + column[None, :], dbranch, mask=mask)
            if BRANCH_BIAS_GRAD:
                dbranch_bias += tl.sum(tl.where(mask, dx, 0.0), axis=0)
        slot = partial_ptr + program * width + column
        plane = tl.num_programs(0).to(tl.int64) * width
        if WEIGHT_GRAD:
            tl.store(slot, dw, mask=inside)
        if BIAS_GRAD:
            tl.store(slot + plane, db, mask=inside)
        if BRANCH_BIAS_GRAD:
            tl.store(slot + 2 * plane, dbranch_bias, mask=inside)

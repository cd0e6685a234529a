"""cosine_alignment_loss, and alignment_loss with other distances: how far predictions are from targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import next_power_of_2, triton
from umt_kernels.checks import check_eps, check_floats, check_ids, check_tensors
from umt_kernels.dispatch import KernelOp, differentiate_reference, is_plain, runs_kernel
from umt_kernels.launch import Plan, plan, resident_programs

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if triton is not None:
    import triton.language as tl

Distance = Literal["cosine", "l1", "smooth_l1", "mse"]
Reduction = Literal["mean", "sum", "none"]

DISTANCES = {"cosine": 0, "l1": 1, "smooth_l1": 2, "mse": 3}


def cosine_alignment_loss(
    predictions: Float[Tensor, "*k r m c"],
    targets: Float[Tensor, "*k b n c"],
    *,
    target_ids: Int[Tensor, "r m"] | None = None,
    weight: Float[Tensor, "*k c"] | None = None,
    bias: Float[Tensor, "*k c"] | None = None,
    eps: float = 1e-6,
    row_weights: Float[Tensor, "*k r m"] | None = None,
    padded: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, ...]:
    """Mean of 2 - 2 cos(prediction, target) over all rows (UMT, arXiv 2303.16058, section 3.1).

    predictions   [k, b, m, c], or [b, m, c] for a single layer.
    target_ids    row of `targets` that belongs to each prediction; None pairs them in order (then n = m). With more
                  sets of predictions than samples of targets, sets 0 .. r/b - 1 belong to sample 0, and so on.
    weight, bias  LayerNorm of each layer k, applied to the predictions first, with `eps`; give both or neither.
    row_weights   factor of each row, the same for all layers if it has no axis k; it gets no gradient.
    padded        target_ids may be -1: such a row counts for nothing.
    reduction     mean (sum of weight * loss / sum of weights), sum, or none: [*k, r, m], each times its weight.

    Rows are L2-normalised inside, in float32; neither input needs to be. A prediction shorter than 1e-12 (float16:
    1e-4) has no direction: its cosine is 0 and it gets no gradient. For a mean or a sum, the gradients of predictions,
    weight and bias are written during the forward pass, so every input is read once. `targets` get none.

    Raises ValueError when shapes or devices differ, there is no row, or an id is out of range; TypeError for a dtype
    that does not fit.
    """
    return alignment_loss(
        predictions, targets, "cosine", target_ids=target_ids, weight=weight, bias=bias, eps=eps,
        row_weights=row_weights, padded=padded, reduction=reduction,
    )  # fmt: skip


def alignment_loss(
    predictions: Float[Tensor, "*k r m c"],
    targets: Float[Tensor, "*k b n c"],
    distance: Distance,
    *,
    target_ids: Int[Tensor, "r m"] | None = None,
    weight: Float[Tensor, "*k c"] | None = None,
    bias: Float[Tensor, "*k c"] | None = None,
    eps: float = 1e-6,
    beta: float = 1.0,
    row_weights: Float[Tensor, "*k r m"] | None = None,
    padded: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, ...]:
    """`cosine_alignment_loss` with the distance chosen: `cosine`, or `l1`, `smooth_l1`, `mse` averaged over columns.

    `l1` is V-JEPA 2's (arXiv 2506.09985), `mse` MAE's (arXiv 2111.06377); `beta` is where `smooth_l1` turns linear.
    """
    check_eps(eps)
    if distance not in DISTANCES:
        raise ValueError(f"distance = {distance!r}; give one of {', '.join(DISTANCES)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction = {reduction!r}; give mean, sum or none")
    if not beta >= 0:
        raise ValueError(f"beta = {beta}; it must be 0 or more")
    if distance == "smooth_l1" and beta == 0:
        distance = "l1"
    _check(predictions, targets, target_ids, weight, bias, row_weights, padded)
    if targets.requires_grad:
        targets = targets.detach()
    if row_weights is not None and row_weights.requires_grad:
        row_weights = row_weights.detach()
    kind = DISTANCES[distance]
    layered = predictions.dim() == 4
    floor = 1e-4 if predictions.dtype == torch.float16 else 1e-12
    settings = (kind, float(eps), float(beta), floor, padded)
    if not _runs_kernel(predictions, targets, weight, bias, row_weights):
        rows = reference.alignment_rows(predictions, targets, target_ids, weight, bias, *settings)
        if padded and target_ids is not None:
            valid = (target_ids >= 0).to(rows.dtype)
            row_weights = valid if row_weights is None else row_weights.to(rows.dtype) * valid
        return reference.reduce_rows(rows, row_weights, reduction)
    if not layered:
        predictions, targets = predictions[None], targets[None]
        weight, bias = (p if p is None else p[None] for p in (weight, bias))
    shape = predictions.shape[:-1]
    after: float | Tensor | None = None
    scale = 1.0
    if padded and target_ids is not None:
        valid = (target_ids >= 0).float()
        row_weights = valid if row_weights is None else row_weights.float() * valid
    if reduction == "mean" and row_weights is None:
        scale = 1.0 / shape.numel()
    elif reduction == "mean":
        row_weights = row_weights.float()  # type: ignore[union-attr]
        after = 1.0 / (row_weights.sum() * (shape.numel() // row_weights.numel()))
    if predictions.dtype == torch.float16:  # no room for the gradient of a mean over many rows
        after, scale = (scale if after is None else after), 1.0
    elif after is not None:
        row_weights, after = row_weights * after, None  # type: ignore[operator,assignment]
    inputs = (predictions, weight, bias)
    per_row = reduction == "none"
    with_grad = not per_row and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    loss = _loss(predictions, targets, target_ids, weight, bias, row_weights, *settings, scale, per_row, with_grad)[0]
    if after is not None and not per_row:
        loss = loss * after
    return loss[0] if per_row and not layered else loss


def _runs_kernel(*tensors: Tensor | None) -> bool:
    rows = tensors[0].numel() // tensors[0].shape[-1]  # type: ignore[union-attr]
    return rows < 2**31 - 2**16 and runs_kernel("cosine_alignment_loss", *tensors)  # rows are counted in int32


def _check(
    predictions: Tensor,
    targets: Tensor,
    target_ids: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_weights: Tensor | None,
    padded: bool,
) -> None:
    floats = {"predictions": predictions, "targets": targets, "weight": weight, "bias": bias}
    check_tensors(**floats, target_ids=target_ids, row_weights=row_weights)
    check_floats(**floats, row_weights=row_weights)
    if predictions.dim() not in (3, 4) or targets.dim() != predictions.dim():
        raise ValueError(f"{_both(predictions, targets)}: give [k, b, m, c] and [k, b, n, c], or both without k")
    lead, (sets, rows, width) = predictions.shape[:-3], predictions.shape[-3:]
    batch = targets.shape[-3]
    fits = sets == batch or (target_ids is not None and batch and sets % batch == 0)
    if targets.shape[:-3] != lead or not fits or targets.shape[-1] != width:
        raise ValueError(f"{_both(predictions, targets)} differ in layers, samples or width")
    if predictions.numel() == 0:
        raise ValueError(f"predictions are empty, {list(predictions.shape)}: a mean over no rows is undefined")
    if target_ids is None:
        if targets.shape[-2] != rows:
            raise ValueError(f"{_both(predictions, targets)} differ in rows; give target_ids to choose among targets")
    else:
        check_ids("target_ids", target_ids, sets, targets.shape[-2], "targets have {} rows per sample", padded=padded)
        if target_ids.shape[1] != rows:
            raise ValueError(f"target_ids {list(target_ids.shape)} must be [{sets}, {rows}], one per prediction")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias belong together: give both or neither")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (*lead, width):
            raise ValueError(f"{name} has shape {list(value.shape)}; give {[*lead, width]}")
    if row_weights is not None and row_weights.shape not in ((sets, rows), (*lead, sets, rows)):
        raise ValueError(f"row_weights has shape {list(row_weights.shape)}; give {[*lead, sets, rows]}")


def _both(predictions: Tensor, targets: Tensor) -> str:
    return f"predictions {list(predictions.shape)} and targets {list(targets.shape)}"


def _launch(
    predictions: Tensor,
    targets: Tensor,
    target_ids: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_weights: Tensor | None,
    kind: int,
    eps: float,
    beta: float,
    floor: float,
    padded: bool,
    scale: float,
    per_row: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row [k,r,m] or of all, times `scale`; and its gradients for predictions [k,r,m,c] and for weight
    and bias together [2,k,c], which are empty where there is nothing to differentiate."""
    layers, sets, rows, width = predictions.shape
    predictions, targets = (x if x.stride(3) == 1 else x.contiguous() for x in (predictions, targets))
    key = (
        "cosine_alignment_loss", predictions.shape, predictions.stride(), predictions.dtype, predictions.device,
        targets.shape, targets.stride(), targets.dtype, kind, eps, beta, floor, padded, scale, per_row, with_grad,
        None if weight is None else (weight.dtype, bias.dtype),  # type: ignore[union-attr]
        None if target_ids is None else target_ids.dtype,
        None if row_weights is None else row_weights.dim(),
    )  # fmt: skip
    found = plan(
        key, _plan, predictions, targets, target_ids, weight, row_weights, kind, eps, beta, floor, padded, scale,
        per_row, with_grad,
    )  # fmt: skip
    programs = found.grid[0]
    with_affine = with_grad and weight is not None
    loss = predictions.new_empty((layers, sets, rows) if per_row else (layers, programs), dtype=torch.float32)
    grad = predictions.new_empty(predictions.shape if with_grad else 0)
    affine = predictions.new_empty((2, layers, programs, width) if with_affine else 0, dtype=torch.float32)
    found.launch(
        predictions,
        targets,
        None if target_ids is None else target_ids.contiguous(),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if row_weights is None else row_weights.float().contiguous(),
        loss,
        grad,
        affine,
    )
    return loss if per_row else loss.sum(), grad, affine.sum(2) if with_affine else affine


def _plan(
    predictions: Tensor,
    targets: Tensor,
    target_ids: Tensor | None,
    weight: Tensor | None,
    row_weights: Tensor | None,
    kind: int,
    eps: float,
    beta: float,
    floor: float,
    padded: bool,
    scale: float,
    per_row: bool,
    with_grad: bool,
) -> Plan:
    layers, sets, rows, width = predictions.shape
    programs, per_program, config = launch_shape(predictions.device, layers, sets * rows, width)
    shared = row_weights is None or row_weights.dim() == 2
    numbers = (
        rows, sets * rows, sets // targets.shape[1], width, per_program, *predictions.stride()[:3],
        *targets.stride()[:3], 0 if shared else sets * rows, eps, beta, floor, scale,
    )  # fmt: skip
    settings = {
        "KIND": kind,
        "WITH_GRAD": with_grad,
        "NORM": weight is not None,
        "GATHER": target_ids is not None,
        "WEIGHTED": row_weights is not None,
        "PADDED": padded and target_ids is not None,
        "PER_ROW": per_row,
        **config,
    }
    return Plan(_kernel, (programs, layers), numbers, settings)


REGISTERS = 96
"""Per thread, at most, by the compiler's report at the widths of the models; a test of the report holds it."""


def launch_shape(device: torch.device, layers: int, rows: int, width: int) -> tuple[int, int, dict[str, int]]:
    """Programs per layer, rows per program, and the compile-time settings of the kernel.

    Eight numbers of a row to a thread, 16 bytes of bf16: with more, registers let too few programs run at a time.
    """
    block = next_power_of_2(width)
    tile = max(1, 1024 // block)
    warps = max(4, min(16, block // 256))
    programs = min(triton.cdiv(rows, tile), max(1, resident_programs(device, warps, REGISTERS) // layers))
    per_program = triton.cdiv(triton.cdiv(rows, programs), tile) * tile
    programs = triton.cdiv(rows, per_program)
    return programs, per_program, {"ROWS": tile, "BLOCK": block, "num_warps": warps}


def _fake(
    predictions, targets, target_ids, weight, bias, row_weights,
    kind, eps, beta, floor, padded, scale, per_row, with_grad,
):  # fmt: skip
    layers, sets, rows, width = predictions.shape
    loss = predictions.new_empty((layers, sets, rows) if per_row else (), dtype=torch.float32)
    grad = predictions.new_empty(predictions.shape if with_grad else 0)
    affine = (2, layers, width) if with_grad and weight is not None else 0
    return loss, grad, predictions.new_empty(affine, dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.settings = inputs[6:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_loss, *_):
    nothing = (None,) * 11
    predictions, targets, target_ids, weight, bias, row_weights, grad, affine = ctx.saved_tensors
    if grad_loss is None:
        return None, None, None, None, None, *nothing[2:]
    *settings, per_row, _ = ctx.settings
    if per_row:  # its upstream gradient is only known now: one pass more over the inputs
        factors = grad_loss if row_weights is None else grad_loss * row_weights
        settings = (*settings, False, True)
        _, grad, affine = _loss(predictions, targets, target_ids, weight, bias, factors, *settings)
    else:
        affine = affine * grad_loss
        grad = _scale(grad, grad_loss)
    if weight is None:
        return grad, None, None, None, None, *nothing[2:]
    grad_weight, grad_bias = affine
    return grad, None, None, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *nothing[2:]


def _differentiate_again(ctx, grad_loss, *_):
    predictions, targets, target_ids, weight, bias, row_weights, _, _ = ctx.saved_tensors
    *settings, scale, per_row, _ = ctx.settings

    def run(predictions, weight, bias):
        rows = reference.alignment_rows(predictions, targets, target_ids, weight, bias, *settings)
        rows = rows * scale if row_weights is None else rows * row_weights * scale
        return rows if per_row else rows.sum()

    grad, grad_weight, grad_bias = differentiate_reference(run, (predictions, weight, bias), grad_loss)
    return grad, None, None, grad_weight, grad_bias, *(None,) * 9


_loss = KernelOp("cosine_alignment_loss", _launch, _fake, _save, _differentiate, _differentiate_again)


def _scale(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor. Where nobody else will read `grad`, in place, and a factor of 1 costs no traffic."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    if torch.compiler.is_compiling() or not is_plain(grad, factor) or keeps_graph():
        return _scale_op(grad, factor)
    _launch_scale(grad, factor, grad)
    return grad


def _launch_scale(grad: Tensor, factor: Tensor, scaled: Tensor) -> None:
    key = ("cosine_alignment_loss_scale", grad.numel(), grad.dtype, factor.dtype, grad.device, scaled is grad)
    grid, settings = (triton.cdiv(grad.numel(), SCALE_BLOCK),), {"IN_PLACE": scaled is grad, "BLOCK": SCALE_BLOCK}
    plan(key, Plan, _scale_kernel, grid, (grad.numel(),), settings).launch(grad, factor, scaled)


def _scale_apart(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor in the dtype of grad, multiplied in float32: a float16 loss scale of 65536 would be infinite."""
    scaled = torch.empty_like(grad)
    _launch_scale(grad, factor, scaled)
    return scaled


_scale_op = KernelOp("cosine_alignment_loss_backward", _scale_apart, lambda grad, factor: torch.empty_like(grad))

SCALE_BLOCK = 4096


if triton is not None:

    @triton.jit
    def _sums(a, b, c, d):
        """Sums of four tiles over axis 1 in one reduction, so that the warps wait for each other once."""
        left, right = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=1))
        a, b = tl.split(left)
        c, d = tl.split(right)
        return a, b, c, d

    @triton.jit
    def _kernel(
        x_ptr,  # predictions [K, R, M, C]
        t_ptr,  # targets [K, B, N, C]
        ids_ptr,  # [R, M]
        w_ptr,  # [K, C]
        b_ptr,
        factor_ptr,  # [K or 1, R, M]
        loss_ptr,  # [K, R, M] or [K, programs]
        dx_ptr,  # [K, R, M, C], contiguous
        affine_ptr,  # [2, K, programs, C]
        rows_per_set,
        rows,
        masks,  # R / B
        width,
        rows_per_program,
        x_k,
        x_r,
        x_m,
        t_k,
        t_b,
        t_n,
        factor_k,
        eps,
        beta,
        floor,
        scale,
        KIND: tl.constexpr,
        WITH_GRAD: tl.constexpr,
        NORM: tl.constexpr,
        GATHER: tl.constexpr,
        WEIGHTED: tl.constexpr,
        PADDED: tl.constexpr,
        PER_ROW: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        layer = tl.program_id(1).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        if NORM:
            w = tl.load(w_ptr + layer * width + column, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + layer * width + column, mask=inside, other=0.0).to(tl.float32)
            dw = tl.zeros((ROWS, BLOCK), tl.float32)
            db = tl.zeros((ROWS, BLOCK), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        first = program * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = start + tl.arange(0, ROWS)
            here = row < rows
            mask = here[:, None] & inside[None, :]
            row_set = row // rows_per_set
            place = row - row_set * rows_per_set
            if GATHER:
                other = tl.load(ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                other = place.to(tl.int64)
            factor = tl.where(here, scale, 0.0)
            if WEIGHTED:
                factor = factor * tl.load(factor_ptr + layer * factor_k + row, mask=here, other=0.0)
            t_mask = mask
            if PADDED:  # the factor of such a row is 0
                t_mask = mask & (other >= 0)[:, None]
            x_row = layer * x_k + row_set.to(tl.int64) * x_r + place.to(tl.int64) * x_m
            t_row = layer * t_k + (row_set // masks).to(tl.int64) * t_b + other * t_n
            x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            t = tl.load(t_ptr + t_row[:, None] + column[None, :], mask=t_mask, other=0.0).to(tl.float32)
            if NORM:
                mean = tl.sum(x, axis=1) / width
                centred = tl.where(mask, x - mean[:, None], 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
                x = centred * rstd[:, None]
                y = x * w[None, :] + b[None, :]
            else:
                y = x
            if KIND == 0:
                yy, tt, yt, _ = _sums(y * y, t * t, y * t, y * t)
                norm = tl.sqrt(yy)
                y_inv = tl.where(norm > floor, 1.0 / tl.maximum(norm, 1e-12), 0.0)
                t_inv = 1.0 / tl.maximum(tl.sqrt(tt), 1e-12)
                cosine = yt * y_inv * t_inv
                loss = 2.0 - 2.0 * cosine
                if WITH_GRAD:
                    # d(2 - 2 cos)/dy = -2 (t / |t| - cos y / |y|) / |y|
                    a = -2.0 * y_inv * t_inv * factor
                    c = 2.0 * cosine * y_inv * y_inv * factor
                    dy = a[:, None] * t + c[:, None] * y
                    if NORM:
                        dw += dy * x
                        db += dy
                        dy = dy * w[None, :]
                        share, shift = tl.split(tl.sum(tl.join(dy * x, dy), axis=1))
            else:
                d = y - t
                if KIND == 1:
                    each = tl.abs(d)
                    dy = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
                elif KIND == 2:
                    near = tl.abs(d) < beta
                    each = tl.where(near, 0.5 * d * d / beta, tl.abs(d) - 0.5 * beta)
                    dy = tl.where(near, d / beta, tl.where(d > 0, 1.0, -1.0))
                else:
                    each = d * d
                    dy = 2.0 * d
                dy = tl.where(mask, dy * (factor / width)[:, None], 0.0)
                if NORM and WITH_GRAD:
                    dw += dy * x
                    db += dy
                    dy = dy * w[None, :]
                    loss, share, shift, _ = _sums(each, dy * x, dy, dy)
                else:
                    loss = tl.sum(each, axis=1)
                loss = loss / width
            if WITH_GRAD:
                if NORM:
                    dy = (dy - (shift / width)[:, None] - x * (share / width)[:, None]) * rstd[:, None]
                dx_row = (layer * rows + row) * width
                tl.store(dx_ptr + dx_row[:, None] + column[None, :], dy.to(dx_ptr.dtype.element_ty), mask=mask)
            if PER_ROW:
                tl.store(loss_ptr + layer * rows + row, loss * factor, mask=here)
            else:
                total += loss * factor
        slot = layer * tl.num_programs(0) + program
        if not PER_ROW:
            tl.store(loss_ptr + slot, tl.sum(total, axis=0))
        if NORM and WITH_GRAD:
            both = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * width
            tl.store(affine_ptr + slot * width + column, tl.sum(dw, axis=0), mask=inside)
            tl.store(affine_ptr + both + slot * width + column, tl.sum(db, axis=0), mask=inside)

    @triton.jit
    def _scale_kernel(grad_ptr, factor_ptr, scaled_ptr, count, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = place < count
        factor = tl.load(factor_ptr).to(tl.float32)
        if not IN_PLACE or factor != 1.0:
            scaled = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32) * factor
            tl.store(scaled_ptr + place, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)

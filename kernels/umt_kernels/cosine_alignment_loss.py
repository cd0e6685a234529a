"""cosine_alignment_loss: how far predictions point away from targets."""

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


def cosine_alignment_loss(
    predictions: Float[Tensor, "k b m c"],
    targets: Float[Tensor, "k b n c"],
    *,
    target_ids: Int[Tensor, "b m"] | None = None,
    weight: Float[Tensor, "k c"] | None = None,
    bias: Float[Tensor, "k c"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, " "]:
    """Mean of 2 - 2 cos(prediction, target) over all rows (UMT, arXiv 2303.16058, section 3.1).

    target_ids    row of `targets` that belongs to each prediction; None pairs them in order (then n = m).
    weight, bias  LayerNorm of each layer k, applied to the predictions first, with `eps`; give both or neither.

    Rows are L2-normalised inside, in float32; neither input needs to be. The gradients of predictions, weight and
    bias are written during the forward pass, so every input is read once. `targets` get none.

    Raises ValueError when shapes or devices differ, there is no row, or an id is out of range; TypeError for a dtype
    that does not fit.
    """
    check_eps(eps)
    _check(predictions, targets, target_ids, weight, bias)
    targets = targets.detach()
    if not runs_triton(predictions, targets, weight, bias):
        return reference.cosine_alignment_loss(predictions, targets, target_ids, weight, bias, eps)
    inputs = (predictions, weight, bias)
    with_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _loss_and_gradients(predictions, targets, target_ids, weight, bias, eps, with_grad)[0]


def _check(
    predictions: Tensor, targets: Tensor, target_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    check_tensors(predictions=predictions, targets=targets, target_ids=target_ids, weight=weight, bias=bias)
    check_floats(predictions=predictions, targets=targets, weight=weight, bias=bias)
    shapes = f"predictions {list(predictions.shape)} and targets {list(targets.shape)}"
    if predictions.dim() != 4 or targets.dim() != 4:
        raise ValueError(f"{shapes}: give [k, b, m, c] and [k, b, n, c]")
    layers, batch, rows, width = predictions.shape
    if targets.shape[:2] != (layers, batch) or targets.shape[3] != width:
        raise ValueError(f"{shapes} differ in layers, samples or width")
    if predictions.numel() == 0:
        raise ValueError(f"predictions are empty, {list(predictions.shape)}: a mean over no rows is undefined")
    if target_ids is None:
        if targets.shape[2] != rows:
            raise ValueError(f"{shapes} differ in rows; give target_ids to choose among the targets")
    else:
        check_ids("target_ids", target_ids, batch, targets.shape[2], "targets have {} rows per sample")
        if target_ids.shape[1] != rows:
            raise ValueError(f"target_ids {list(target_ids.shape)} must be [{batch}, {rows}], one per prediction")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias belong together: give both or neither")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (layers, width):
            raise ValueError(f"{name} has shape {list(value.shape)}; give [{layers}, {width}]")


@torch.library.custom_op("umt_kernels::cosine_alignment_loss", mutates_args=())
@on_its_device
def _loss_and_gradients(
    predictions: Tensor,
    targets: Tensor,
    target_ids: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean, and the sum's gradients for predictions [k,b,m,c], weight and bias [k,c] (empty if there are none).

    Of the sum, because float16 has no room for the gradient of a mean over many rows.
    """
    layers, batch, rows, width = predictions.shape
    if predictions.stride(3) != 1:
        predictions = predictions.contiguous()
    if targets.stride(3) != 1:
        targets = targets.contiguous()
    programs, per_program, config = launch_shape(layers, batch * rows, width)
    partial = predictions.new_empty((layers, programs), dtype=torch.float32)
    grad = predictions.new_empty(predictions.shape if with_grad else 0)
    affine = (2, layers, programs, width) if with_grad and weight is not None else (2, 0)
    grad_affine = predictions.new_empty(affine, dtype=torch.float32)
    _kernel[(programs, layers)](
        predictions,
        targets,
        None if target_ids is None else target_ids.contiguous(),
        weight if weight is None else weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        partial,
        grad,
        grad_affine[0],
        grad_affine[1],
        rows,
        batch * rows,
        width,
        per_program,
        *predictions.stride()[:3],
        *targets.stride()[:3],
        eps,
        1.0 / (layers * batch * rows),
        WITH_GRAD=with_grad,
        NORM=weight is not None,
        GATHER=target_ids is not None,
        **config,
    )
    loss = partial.sum()
    if not with_grad or weight is None or bias is None:
        empty = predictions.new_empty(0, dtype=torch.float32)
        return loss, grad, empty, empty.clone()
    return loss, grad, grad_affine[0].sum(1), grad_affine[1].sum(1)


def launch_shape(layers: int, rows: int, width: int) -> tuple[int, int, dict[str, int]]:
    """Programs per layer, rows per program, and the compile-time settings of the kernel.

    Eight numbers of a row to a thread, 16 bytes of bf16: with more, registers let too few programs run at a time.
    """
    block = next_power_of_2(width)
    tile = max(1, 1024 // block)
    programs = min(triton.cdiv(rows, tile), max(1, PROGRAMS // layers))
    per_program = triton.cdiv(triton.cdiv(rows, programs), tile) * tile
    programs = triton.cdiv(rows, per_program)
    return programs, per_program, {"ROWS": tile, "BLOCK": block, "num_warps": max(4, min(16, block // 256))}


@_loss_and_gradients.register_fake
def _(predictions, targets, target_ids, weight, bias, eps, with_grad):
    loss = predictions.new_empty((), dtype=torch.float32)
    grad = predictions.new_empty(predictions.shape if with_grad else 0)
    if not with_grad or weight is None:
        empty = predictions.new_empty(0, dtype=torch.float32)
        return loss, grad, empty, empty.clone()
    affine = [weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2)]
    return loss, grad, *affine


@torch.library.custom_op("umt_kernels::cosine_alignment_loss_backward", mutates_args=())
@on_its_device
def _scale(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor in the dtype of grad, multiplied in float32: a float16 loss scale of 65536 would be infinite."""
    scaled = torch.empty_like(grad)
    _scale_kernel[(triton.cdiv(grad.numel(), SCALE_BLOCK),)](grad, factor, scaled, grad.numel(), BLOCK=SCALE_BLOCK)
    return scaled


@_scale.register_fake
def _(grad, factor):
    return torch.empty_like(grad)


SCALE_BLOCK = 4096


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    layers, batch, rows, _ = inputs[0].shape
    ctx.rows = layers * batch * rows
    ctx.affine = None if inputs[3] is None else (inputs[3].dtype, inputs[4].dtype)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    grads = [None] * 7
    if grad_loss is not None:
        grad, *affine = ctx.saved_tensors
        factor = grad_loss / ctx.rows
        grads[0] = _scale(grad, factor)
        if ctx.affine is not None:
            grads[3], grads[4] = ((x * factor).to(dtype) for x, dtype in zip(affine, ctx.affine, strict=True))
    return tuple(grads)


_loss_and_gradients.register_autograd(_backward, setup_context=_save)


if triton is not None:

    @triton.jit
    def _kernel(
        x_ptr,  # predictions [K, B, M, C]
        t_ptr,  # targets [K, B, N, C]
        ids_ptr,  # [B, M]
        w_ptr,  # [K, C]
        b_ptr,
        loss_ptr,  # [K, programs]
        dx_ptr,  # [K, B, M, C], contiguous
        dw_ptr,  # [K, programs, C]
        db_ptr,
        rows_per_sample,
        rows,
        width,
        rows_per_program,
        x_k,
        x_b,
        x_m,
        t_k,
        t_b,
        t_n,
        eps,
        scale,  # 1 / (rows of all layers)
        WITH_GRAD: tl.constexpr,
        NORM: tl.constexpr,
        GATHER: tl.constexpr,
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
            dw = tl.zeros((BLOCK,), tl.float32)
            db = tl.zeros((BLOCK,), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        first = program * rows_per_program
        for start in range(first, min(first + rows_per_program, rows), ROWS):
            row = start + tl.arange(0, ROWS)
            here = row < rows
            mask = here[:, None] & inside[None, :]
            sample = (row // rows_per_sample).to(tl.int64)
            place = (row % rows_per_sample).to(tl.int64)
            if GATHER:
                other = tl.load(ids_ptr + row, mask=here, other=0).to(tl.int64)
            else:
                other = place
            x_row = layer * x_k + sample * x_b + place * x_m
            t_row = layer * t_k + sample * t_b + other * t_n
            x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            t = tl.load(t_ptr + t_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if NORM:
                mean = tl.sum(x, axis=1) / width
                centred = tl.where(mask, x - mean[:, None], 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
                x = centred * rstd[:, None]
                y = x * w[None, :] + b[None, :]
            else:
                y = x
            y_inv = 1.0 / tl.maximum(tl.sqrt(tl.sum(y * y, axis=1)), 1e-12)
            t_inv = 1.0 / tl.maximum(tl.sqrt(tl.sum(t * t, axis=1)), 1e-12)
            cosine = tl.sum(y * t, axis=1) * y_inv * t_inv
            total += tl.where(here, 2.0 - 2.0 * cosine, 0.0)
            if WITH_GRAD:
                # d(2 - 2 cos)/dy = -2 (t / |t| - cos y / |y|) / |y|
                dy = t * t_inv[:, None] - y * (cosine * y_inv)[:, None]
                dy = tl.where(mask, dy * (-2.0 * y_inv)[:, None], 0.0)
                if NORM:
                    dw += tl.sum(dy * x, axis=0)
                    db += tl.sum(dy, axis=0)
                    dy = dy * w[None, :]
                    share = tl.sum(dy * x, axis=1) / width
                    dy = (dy - tl.sum(dy, axis=1)[:, None] / width - x * share[:, None]) * rstd[:, None]
                dx_row = (layer * rows + row) * width
                tl.store(dx_ptr + dx_row[:, None] + column[None, :], dy.to(dx_ptr.dtype.element_ty), mask=mask)
        slot = layer * tl.num_programs(0) + program
        tl.store(loss_ptr + slot, tl.sum(total, axis=0) * scale)
        if NORM and WITH_GRAD:
            tl.store(dw_ptr + slot * width + column, dw, mask=inside)
            tl.store(db_ptr + slot * width + column, db, mask=inside)

    @triton.jit
    def _scale_kernel(grad_ptr, factor_ptr, scaled_ptr, count, BLOCK: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = place < count
        factor = tl.load(factor_ptr).to(tl.float32)
        scaled = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32) * factor
        tl.store(scaled_ptr + place, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)

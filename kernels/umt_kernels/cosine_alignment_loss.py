"""cosine_alignment_loss, and alignment_loss with other distances: how far predictions are from targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import next_power_of_2, triton
from umt_kernels.checks import check_eps, check_floats, check_id_values, check_ids, check_tensors
from umt_kernels.dispatch import KernelOp, differentiate_reference, is_plain, runs_kernel
from umt_kernels.launch import PLANS, Plan, contiguous, keep, last_contiguous, resident_programs, share
from umt_kernels.reductions import SUM_CONFIG
from umt_kernels.sharding import Axes, is_distributed, on_shards

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if triton is not None:
    import triton.language as tl

    from umt_kernels.reductions import column_sums, eight_sums, four_sums

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
    key = _loss.key(predictions, targets, distance, target_ids, weight, bias, eps, beta, row_weights, padded, reduction)
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None and is_distributed(predictions, targets, target_ids, weight, bias, row_weights):
        return _on_shards(
            predictions, targets, distance, target_ids, weight, bias, eps, beta, row_weights, padded, reduction
        )
    if plan is None:
        _check_settings(distance, eps, beta, reduction)
        _check(predictions, targets, target_ids, weight, bias, row_weights)
    if target_ids is not None:
        check_id_values("target_ids", target_ids, targets.shape[-2], "targets have {} rows per sample", padded=padded)
    if targets.requires_grad:
        targets = targets.detach()
    if row_weights is not None and row_weights.requires_grad:
        row_weights = row_weights.detach()
    if plan is None:
        settings = _settings(predictions, weight, bias, distance, eps, beta, row_weights, padded, reduction)
    else:
        settings = plan.inputs[6:]
    if plan is None and not _runs_kernel(predictions, targets, weight, bias, row_weights):
        rows = reference.alignment_rows(predictions, targets, target_ids, weight, bias, *settings[:5])
        if padded and target_ids is not None:
            valid = (target_ids >= 0).to(rows.dtype)
            row_weights = valid if row_weights is None else row_weights.to(rows.dtype) * valid
        return reference.reduce_rows(rows, row_weights, reduction)
    layered = predictions.dim() == 4
    if not layered:
        predictions, targets = predictions[None], targets[None]
        weight, bias = (p if p is None else p[None] for p in (weight, bias))
    after = None
    if row_weights is not None or padded or predictions.dtype == torch.float16:
        row_weights, after = _weigh(predictions, target_ids, row_weights, padded, reduction)
    loss = _loss(predictions, targets, target_ids, weight, bias, row_weights, *settings, key=key, plan=plan)[0]
    if reduction == "none":
        return loss if layered else loss[0]
    return loss if after is None else loss * after


def _on_shards(
    predictions: Tensor, targets: Tensor, distance: Distance, target_ids: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float, beta: float, row_weights: Tensor | None, padded: bool, reduction: Reduction,
) -> Tensor:  # fmt: skip
    """The loss of DTensors; a mean is the sum of the parts over the number, or weight, of all rows."""
    samples = predictions.dim() - 3
    axes: dict[str, Axes] = {
        "predictions": (samples,), "targets": (samples,), "target_ids": (0,), "weight": None, "bias": None,
        "row_weights": None if row_weights is None else (row_weights.dim() - 2,),
    }  # fmt: skip
    rows = reduction == "none"
    loss = on_shards(
        alignment_loss, axes, ((samples,) if rows else None,), predictions=predictions, targets=targets,
        distance=distance, target_ids=target_ids, weight=weight, bias=bias, eps=eps, beta=beta, row_weights=row_weights,
        padded=padded, reduction="none" if rows else "sum",
    )  # fmt: skip
    if reduction != "mean":
        return loss
    count = predictions.numel() // predictions.shape[-1]
    if padded and target_ids is not None:
        valid = (target_ids >= 0).float()
        row_weights = valid if row_weights is None else row_weights.detach() * valid
    if row_weights is None:
        return loss / count
    return loss / (row_weights.detach().sum() * (count // row_weights.numel()))


def _settings(
    predictions: Tensor, weight: Tensor | None, bias: Tensor | None, distance: str, eps: float, beta: float,
    row_weights: Tensor | None, padded: bool, reduction: str,
) -> tuple:  # fmt: skip
    """Settings of the kernel: the distance, eps, beta, floor, padded, a factor of every row, per row, with gradient."""
    kind = DISTANCES["l1" if distance == "smooth_l1" and beta == 0 else distance]
    half = predictions.dtype == torch.float16
    per_row = reduction == "none"
    scaled = reduction == "mean" and not half and row_weights is None and not padded
    scale = predictions.shape[-1] / predictions.numel() if scaled else 1.0
    learns = any(x is not None and x.requires_grad for x in (predictions, weight, bias))
    with_grad = learns and not per_row and torch.is_grad_enabled()
    return kind, float(eps), float(beta), 1e-4 if half else 1e-12, padded, scale, per_row, with_grad


def _weigh(
    predictions: Tensor, target_ids: Tensor | None, row_weights: Tensor | None, padded: bool, reduction: str
) -> tuple[Tensor | None, float | Tensor | None]:
    """Weights of the rows, and what is left to multiply the loss with after the kernel."""
    if padded and target_ids is not None:
        valid = (target_ids >= 0).float()
        row_weights = valid if row_weights is None else row_weights.float() * valid
    if reduction != "mean":
        return row_weights, None
    count = predictions.numel() // predictions.shape[-1]
    if row_weights is None:
        return None, 1.0 / count
    row_weights = row_weights.float()
    after = 1.0 / (row_weights.sum() * (count // row_weights.numel()))
    # float16 has no room for the gradient of a mean over many rows: the loss is divided at the end.
    return (row_weights, after) if predictions.dtype == torch.float16 else (row_weights * after, None)


def _check_settings(distance: str, eps: float, beta: float, reduction: str) -> None:
    check_eps(eps)
    if distance not in DISTANCES:
        raise ValueError(f"distance = {distance!r}; give one of {', '.join(DISTANCES)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction = {reduction!r}; give mean, sum or none")
    if not beta >= 0:
        raise ValueError(f"beta = {beta}; it must be 0 or more")


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
) -> None:
    """Everything but the values of ids."""
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
        check_ids("target_ids", target_ids, sets)
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


def _prepare(
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
) -> Plan:
    layers, sets, rows, width = predictions.shape
    predictions, targets = last_contiguous(predictions), last_contiguous(targets)
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
    of_loss, of_grad, of_affine = _shapes(predictions, weight, per_row, with_grad)
    affine = with_grad and weight is not None
    sums = programs * config["ROWS"]
    partial = layers * sums * (1 + 2 * width * affine)
    finish = Plan(
        _finish_kernel,
        (triton.cdiv(width, SUM_CONFIG["BLOCK"]), 2 * layers) if affine else (1,),
        (layers * sums, sums, width),
        {"AFFINE": affine, **SUM_CONFIG},
    )
    wide = torch.float32
    outputs = [(of_loss, wide), (of_grad, predictions.dtype), (of_affine, wide)]
    outputs += [] if per_row else [((partial,), wide)]
    return Plan(_kernel, (programs, layers), numbers, settings, outputs, (finish,))


def _shapes(predictions: Tensor, weight: Tensor | None, per_row: bool, with_grad: bool) -> tuple:
    """Shapes of the loss, the gradient of the predictions, and that of weight and bias."""
    layers, sets, rows, width = predictions.shape
    return (
        (layers, sets, rows) if per_row else (),
        predictions.shape if with_grad else (0,),
        (2, layers, width) if with_grad and weight is not None else (0,),
    )


def _launch(
    plan: Plan,
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
    loss, grad, affine, *rest = plan.allocate(predictions.device)
    partial = rest[0] if rest else None
    plan.launch(
        last_contiguous(predictions), last_contiguous(targets), contiguous(target_ids), contiguous(weight),
        contiguous(bias), None if row_weights is None else row_weights.float().contiguous(), loss, grad, partial,
    )  # fmt: skip
    if partial is not None:
        plan.parts[0].launch(partial, loss, affine)
    return loss, grad, affine


REGISTERS = 96
"""Per thread, at most, by the compiler's report at the widths of the models; a test of the report holds it."""


def launch_shape(device: torch.device, layers: int, rows: int, width: int) -> tuple[int, int, dict[str, int]]:
    """Programs per layer, rows per program, and the compile-time settings of the kernel.

    Eight numbers of a row to a thread, 16 bytes of bf16: with more, registers let too few programs run at a time.
    """
    block = next_power_of_2(width)
    tile = max(1, 1024 // block)
    warps = max(4, min(16, block // 256))
    most = min(triton.cdiv(rows, tile), max(1, resident_programs(device, warps, REGISTERS) // layers))
    per_program, programs = share(rows, most, tile)
    return programs, per_program, {"ROWS": tile, "BLOCK": block, "num_warps": warps}


def _fake(
    predictions, targets, target_ids, weight, bias, row_weights,
    kind, eps, beta, floor, padded, scale, per_row, with_grad,
):  # fmt: skip
    of_loss, of_grad, of_affine = _shapes(predictions, weight, per_row, with_grad)
    loss = predictions.new_empty(of_loss, dtype=torch.float32)
    return loss, predictions.new_empty(of_grad), loss.new_empty(of_affine)


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


_loss = KernelOp("cosine_alignment_loss", _prepare, _launch, _fake, _save, _differentiate, _differentiate_again)


def _scale(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor. Where nobody else will read `grad`, in place, and a factor of 1 costs no traffic."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    if torch.compiler.is_compiling() or not is_plain(grad, factor) or keeps_graph():
        return _scale_op(grad, factor)
    key = _scale_op.key(grad, factor, True)
    plan = PLANS.get(key) or _prepare_scale(grad, factor, in_place=True)  # type: ignore[arg-type]
    if key is not None:
        keep(key, plan)
    plan.launch(grad, factor, grad)
    return grad


def _prepare_scale(grad: Tensor, factor: Tensor, in_place: bool = False) -> Plan:
    settings = {"IN_PLACE": in_place, "BLOCK": SCALE_BLOCK}
    return Plan(_scale_kernel, (triton.cdiv(grad.numel(), SCALE_BLOCK),), (grad.numel(),), settings)


def _scale_apart(plan: Plan, grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor in the dtype of grad, multiplied in float32: a float16 loss scale of 65536 would be infinite."""
    scaled = torch.empty_like(grad)
    plan.launch(grad, factor, scaled)
    return scaled


_scale_op = KernelOp(
    "cosine_alignment_loss_backward", _prepare_scale, _scale_apart, lambda grad, factor: torch.empty_like(grad)
)

SCALE_BLOCK = 4096


if triton is not None:

    @triton.jit
    def _kernel(
        x_ptr,  # predictions [K, R, M, C]
        t_ptr,  # targets [K, B, N, C]
        ids_ptr,  # [R, M]
        w_ptr,  # [K, C]
        b_ptr,
        factor_ptr,  # [K or 1, R, M]
        loss_ptr,  # [K, R, M] with PER_ROW
        dx_ptr,  # [K, R, M, C], contiguous
        partial_ptr,  # without PER_ROW: sums of gradients [2, K, sums, C] with NORM, then of the loss [K, sums]; each
        # program leaves ROWS sums
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
        # Every tile is [ROWS, BLOCK], w and b too: from another layout, warps would wait for each other to exchange it.
        column = tl.zeros((ROWS, 1), tl.int32) + tl.arange(0, BLOCK)[None, :]
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
            mask = here[:, None] & inside
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
            x = tl.load(x_ptr + x_row[:, None] + column, mask=mask, other=0.0).to(tl.float32)
            t = tl.load(t_ptr + t_row[:, None] + column, mask=t_mask, other=0.0).to(tl.float32)
            if NORM:
                mean = tl.sum(x, axis=1) / width
                centred = tl.where(mask, x - mean[:, None], 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
                x = centred * rstd[:, None]
                y = x * w + b
            else:
                y = x
            if KIND == 0:
                # All sums at once: those of the norm's backward, over dy = a t + c y, follow from sums over t and y.
                if NORM and WITH_GRAD:
                    tw, yw = t * w, y * w
                    yy, tt, yt, t_shift, y_shift, t_share, y_share, _ = eight_sums(
                        y * y, t * t, y * t, tw, yw, tw * x, yw * x, yw * x, 1
                    )
                else:
                    yy, tt, yt, _ = four_sums(y * y, t * t, y * t, y * t, 1)
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
                        dy = dy * w
                        share = a * t_share + c * y_share
                        shift = a * t_shift + c * y_shift
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
                    dy = dy * w
                    loss, share, shift, _ = four_sums(each, dy * x, dy, dy, 1)
                else:
                    loss = tl.sum(each, axis=1)
                loss = loss / width
            if WITH_GRAD:
                if NORM:
                    slope = tl.where(width > 1, rstd, 0.0)  # one column alone is normalised to 0 whatever it is
                    dy = (dy - (shift / width)[:, None] - x * (share / width)[:, None]) * slope[:, None]
                dx_row = (layer * rows + row) * width
                tl.store(dx_ptr + dx_row[:, None] + column, dy.to(dx_ptr.dtype.element_ty), mask=mask)
            if PER_ROW:
                tl.store(loss_ptr + layer * rows + row, loss * factor, mask=here)
            else:
                total += loss * factor
        if not PER_ROW:
            slot = (layer * tl.num_programs(0) + program) * ROWS + tl.arange(0, ROWS)
            losses_ptr = partial_ptr
            if NORM and WITH_GRAD:
                plane = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * ROWS * width
                place = slot[:, None] * width + column
                tl.store(partial_ptr + place, dw, mask=inside)
                tl.store(partial_ptr + plane + place, db, mask=inside)
                losses_ptr += 2 * plane
            tl.store(losses_ptr + slot, total)

    @triton.jit
    def _finish_kernel(
        partial_ptr,  # as above
        loss_ptr,  # a scalar
        affine_ptr,  # [2, K, C] with AFFINE
        losses,  # K * sums
        sums,
        width,
        AFFINE: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        losses_ptr = partial_ptr
        if AFFINE:
            plane = tl.program_id(1).to(tl.int64)
            column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            total = column_sums(partial_ptr + plane * sums * width, sums, width, column, ROWS, BLOCK)
            tl.store(affine_ptr + plane * width + column, total, mask=column < width)
            losses_ptr += tl.cast(losses, tl.int64) * 2 * width
        if tl.program_id(0) + tl.program_id(1) == 0:
            loss = tl.zeros((ROWS * BLOCK,), tl.float32)
            for start in range(0, losses, ROWS * BLOCK):
                place = start + tl.arange(0, ROWS * BLOCK)
                loss += tl.load(losses_ptr + place, mask=place < losses, other=0.0)
            tl.store(loss_ptr, tl.sum(loss, axis=0))

    @triton.jit
    def _scale_kernel(grad_ptr, factor_ptr, scaled_ptr, count, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = place < count
        factor = tl.load(factor_ptr).to(tl.float32)
        if not IN_PLACE or factor != 1.0:
            scaled = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32) * factor
            tl.store(scaled_ptr + place, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)

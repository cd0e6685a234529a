"""The op under `alignment_loss`: its plan, its launches and its derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import next_power_of_2, triton
from umt_kernels.dispatch import KernelOp, differentiate_reference, is_plain
from umt_kernels.launch import PLANS, Plan, keep, last_contiguous, resident_programs, share
from umt_kernels.reductions import SUM_CONFIG

if triton is not None:
    from umt_kernels.cosine_alignment_loss_kernel import finish_kernel, kernel, scale_kernel

DISTANCES = {"cosine": 0, "l1": 1, "smooth_l1": 2, "mse": 3}
"""Number of each distance in the kernel and in `reference.alignment_rows`."""


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
        finish_kernel,
        (triton.cdiv(width, SUM_CONFIG["BLOCK"]), 2 * layers) if affine else (1,),
        (layers * sums, sums, width),
        {"AFFINE": affine, **SUM_CONFIG},
    )
    wide = torch.float32
    outputs = (
        (of_loss, wide),
        (of_grad, predictions.dtype) if with_grad else None,
        (of_affine, wide) if affine else None,
        None if per_row else ((partial,), wide),
    )
    return Plan(kernel, (programs, layers), numbers, settings, outputs, (finish,))


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
    """The loss of each row [k,r,m], or one of all rows, times `scale`; and its gradients of predictions [k,r,m,c] and
    of weight and bias [2,k,c], which are None or empty if not needed."""
    loss, grad, affine, partial = plan.allocate(predictions.device)
    plan.launch((predictions, targets, target_ids, weight, bias, row_weights), (loss, grad, partial))
    if partial is not None:
        plan.parts[0].launch((), (partial, loss, affine))
    return loss, grad, affine


REGISTERS = 96
"""Most registers per thread in the compiler's report at the models' widths; a test compares them."""


def launch_shape(device: torch.device, layers: int, rows: int, width: int) -> tuple[int, int, dict[str, int]]:
    """Programs per layer, rows per program, and the compile-time settings of the kernel.

    Each thread holds eight numbers of a row, 16 bytes of bf16: more would need so many registers that too few programs
    run at a time.
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


def _differentiate(ctx, grad_loss, *_):
    nothing = (None,) * 11
    predictions, targets, target_ids, weight, bias, row_weights, grad, affine = ctx.saved_tensors
    if grad_loss is None:
        return None, None, None, None, None, *nothing[2:]
    *settings, per_row, _ = ctx.settings
    if per_row:  # the gradient of each row is known only now, so the inputs are read once more
        factors = grad_loss if row_weights is None else grad_loss * row_weights
        settings = (*settings, False, True)
        _, grad, affine = alignment(predictions, targets, target_ids, weight, bias, factors, *settings)
    else:
        affine = affine if weight is None else affine * grad_loss
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


alignment = KernelOp(
    "cosine_alignment_loss",
    _prepare,
    _launch,
    _fake,
    _save,
    _differentiate,
    _differentiate_again,
    strided={"predictions": last_contiguous, "targets": last_contiguous},
)


def _scale(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, in place if `grad` has no other reader; then a factor of 1 moves no memory."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    if torch.compiler.is_compiling() or not is_plain(grad, factor) or keeps_graph():
        return _scale_op(grad, factor)
    key = _scale_op.key((grad, factor), (True,))
    plan = PLANS.get(key) or _prepare_scale(grad, factor, in_place=True)  # type: ignore[arg-type]
    if key is not None:
        keep(key, plan)
    plan.launch((grad, factor, grad))
    return grad


def _prepare_scale(grad: Tensor, factor: Tensor, in_place: bool = False) -> Plan:
    settings = {"IN_PLACE": in_place, "BLOCK": SCALE_BLOCK}
    return Plan(scale_kernel, (triton.cdiv(grad.numel(), SCALE_BLOCK),), (grad.numel(),), settings)


def _scale_apart(plan: Plan, grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor in the dtype of grad, multiplied in float32: a float16 loss scale of 65536 would be infinite."""
    scaled = torch.empty_like(grad)
    plan.launch((grad, factor), (scaled,))
    return scaled


_scale_op = KernelOp(
    "cosine_alignment_loss_backward", _prepare_scale, _scale_apart, lambda grad, factor: torch.empty_like(grad)
)

SCALE_BLOCK = 4096

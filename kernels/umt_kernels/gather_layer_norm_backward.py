"""Backward of gather_layer_norm: gradients of x, weight and bias in one pass over x."""

from __future__ import annotations

import torch
from torch import Tensor

from umt_kernels.backend import next_power_of_2, triton
from umt_kernels.dispatch import KernelOp
from umt_kernels.launch import Plan, last_contiguous, resident_programs, share
from umt_kernels.reductions import add_up, plan_sums

if triton is not None:
    import triton.language as tl

    from umt_kernels.reductions import two_sums


def _prepare(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    row_ids: Tensor | None,
    padded: bool,
    rms: bool,
) -> Plan:
    layers, (batch, length, width) = (1 if x.dim() == 3 else len(x)), x.shape[-3:]
    kept = length if row_ids is None else row_ids.shape[1]
    masks = 1 if row_ids is None else len(row_ids) // max(1, batch)
    rows = layers * batch * length if grad.numel() else 0
    config = backward_config(width)
    programs = resident_programs(x.device, config["num_warps"], BACKWARD_REGISTERS)
    per_program, programs = share(rows, programs, config["ROWS"])
    settings = {
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "GATHER": row_ids is not None,
        "RMS": rms,
        **config,
    }
    numbers = (rows, batch, length, kept, masks, width, per_program, *row_strides(x), *row_strides(grad))
    sums = programs * config["ROWS"]
    parts = (plan_sums(sums, width), plan_inversion(row_ids, length))
    outputs = ((x.shape, x.dtype), ((2, sums, width), torch.float32))
    return Plan(_kernel, (programs,), numbers, settings, outputs, parts)


def _launch(
    plan: Plan,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    row_ids: Tensor | None,
    padded: bool,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; an empty tensor where weight or bias is None."""
    grad_x, partial = plan.allocate(x.device)
    if grad.numel() == 0:
        nothing = [x.new_zeros(0) if p is None else torch.zeros_like(p) for p in (weight, bias)]
        return grad_x.zero_(), nothing[0], nothing[1]
    sums, inversion = plan.parts
    inverse = None
    if row_ids is not None:
        (inverse,) = inversion.allocate(x.device)
        inversion.launch((row_ids,), (inverse,))
    plan.launch((grad, x, weight, inverse, statistics), (grad_x, partial))
    grad_weight, grad_bias = add_up(sums, partial, weight, bias)
    return grad_x, grad_weight, grad_bias


def _fake(grad, x, weight, bias, statistics, row_ids, padded, rms):
    return x.new_empty(x.shape), *(x.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias))


def plan_inversion(row_ids: Tensor | None, length: int) -> Plan:
    """Plan for the index of each row of x in `row_ids`, -1 for none: [r, l]. With this index the program that reads a
    row of x also writes its row of the gradient, once, zeros included."""
    sets, kept = (0, 1) if row_ids is None else row_ids.shape
    settings = {"BLOCK": min(1024, next_power_of_2(max(1, length, kept))), "num_warps": 4}
    return Plan(_invert_kernel, (sets,), (kept, length), settings, (((sets, length), torch.int32),))


def row_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of layer, sample and row."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


BACKWARD_REGISTERS = 80
"""Most registers per thread in the compiler's report at the models' widths; a test compares them."""


def backward_config(width: int) -> dict[str, int]:
    """Each thread holds eight numbers of a row, 16 bytes of bf16: few enough registers for eight programs at a time.

    `add_layer_norm_backward`, with three inputs and three sums in registers, uses the same.
    """
    block = next_power_of_2(width)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": max(4, min(16, block // 256))}


backward = KernelOp(
    "gather_layer_norm_backward",
    _prepare,
    _launch,
    _fake,
    strided={"grad": last_contiguous, "x": last_contiguous},
)


if triton is not None:

    @triton.jit
    def _kernel(
        g_ptr,  # [K, R, M, D]
        x_ptr,  # [K, B, L, D]
        w_ptr,  # [D]
        inverse_ptr,  # [R, L]
        statistics_ptr,  # [2, K, R, M]
        dx_ptr,  # [K, B, L, D], contiguous
        partial_ptr,  # [2, programs * ROWS, D]
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
        # Every tile is [ROWS, BLOCK], w too: to change another layout, warps would have to wait for each other.
        column = tl.zeros((ROWS, 1), tl.int32) + tl.arange(0, BLOCK)[None, :]
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
            mask = here[:, None] & inside
            image = row // length
            place = row - image * length
            layer = image // batch
            sample = image - layer * batch
            there = here
            if GATHER:
                # A row of x may be in several sets, with the same norm: their gradients are summed before its backward.
                g = tl.zeros((ROWS, BLOCK), tl.float32)
                mean = tl.zeros((ROWS,), tl.float32)
                rstd = tl.zeros((ROWS,), tl.float32)
                there = row < 0
                for k in range(masks):
                    row_set = sample * masks + k
                    slot = tl.load(inverse_ptr + row_set.to(tl.int64) * length + place, mask=here, other=-1)
                    valid = slot >= 0
                    g_row = layer.to(tl.int64) * g_k + row_set.to(tl.int64) * g_r + slot.to(tl.int64) * g_m
                    g_mask = valid[:, None] & inside
                    g += tl.load(g_ptr + g_row[:, None] + column, mask=g_mask, other=0.0).to(tl.float32)
                    s_row = (layer * batch * masks + row_set).to(tl.int64) * kept + slot
                    mean = tl.where(valid, tl.load(statistics_ptr + s_row, mask=valid, other=0.0), mean)
                    rstd = tl.where(valid, tl.load(statistics_ptr + statistics_2 + s_row, mask=valid, other=0.0), rstd)
                    there = there | valid
            else:
                g_row = layer.to(tl.int64) * g_k + sample.to(tl.int64) * g_r + place.to(tl.int64) * g_m
                g = tl.load(g_ptr + g_row[:, None] + column, mask=mask, other=0.0).to(tl.float32)
                mean = tl.load(statistics_ptr + row, mask=here, other=0.0)
                rstd = tl.load(statistics_ptr + statistics_2 + row, mask=here, other=0.0)
            read = there[:, None] & inside
            x_row = layer.to(tl.int64) * x_k + sample.to(tl.int64) * x_b + place.to(tl.int64) * x_l
            x = tl.load(x_ptr + x_row[:, None] + column, mask=read, other=0.0).to(tl.float32)
            x = tl.where(read, (x - mean[:, None]) * rstd[:, None], 0.0)
            if WEIGHT:
                dw += g * x
            if BIAS:
                db += g
            if WEIGHT:
                g = g * w
            if RMS:
                dx = g - x * (tl.sum(g * x, axis=1) / width)[:, None]
            else:
                shares, means = two_sums(g * x, g, 1)
                dx = g - (means / width)[:, None] - x * (shares / width)[:, None]
            dx = dx * rstd[:, None]
            dx_row = row.to(tl.int64) * width
            tl.store(dx_ptr + dx_row[:, None] + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        place = (program.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None] * width + column
        if WEIGHT:
            tl.store(partial_ptr + place, dw, mask=inside)
        if BIAS:
            plane = tl.num_programs(0).to(tl.int64) * ROWS * width
            tl.store(partial_ptr + plane + place, db, mask=inside)

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

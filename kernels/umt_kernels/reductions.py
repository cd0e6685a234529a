"""Sums for several kernels: over a few tiles at once, and over the partial sums of a kernel's programs.

Each reduction across warps has one or two barriers, at which all warps wait; tiles that are summed together share them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from umt_kernels.backend import triton
from umt_kernels.launch import Plan

if triton is not None:
    import triton.language as tl

SUM_CONFIG = {"ROWS": 128, "BLOCK": 32, "num_warps": 8}
"""Columns of 128 bytes, and as many loads in flight as registers allow: latency is the whole cost of the sum."""


def plan_sums(programs: int, width: int) -> Plan:
    """A plan for `add_up` of partial sums [3, programs, width] or [2, programs, width]."""
    return Plan(_kernel, (triton.cdiv(width, SUM_CONFIG["BLOCK"]), 3), (programs, width), SUM_CONFIG)


def add_up(plan: Plan, partial: Tensor, *like: Tensor | None) -> list[Tensor]:
    """Sum of each plane of `partial`, in shape and dtype of its tensor in `like`; None gives an empty tensor."""
    sums = [
        partial.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in like
    ]
    outputs = [x if x.numel() else None for x in sums]
    if any(x is not None for x in outputs):
        plan.launch((partial,), (*outputs, *(None,) * (3 - len(outputs))))
    return sums


if triton is not None:

    @triton.jit
    def two_sums(a, b, AXIS: tl.constexpr):
        return tl.split(tl.sum(tl.join(a, b), axis=AXIS))

    @triton.jit
    def largest_magnitudes(x):
        """The largest magnitude of each row; infinity for a row with a NaN, which tl.max would ignore."""
        return tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1)

    @triton.jit
    def four_sums(a, b, c, d, AXIS: tl.constexpr):
        left, right = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=AXIS))
        a, b = tl.split(left)
        c, d = tl.split(right)
        return a, b, c, d

    @triton.jit
    def eight_sums(a, b, c, d, e, f, g, h, AXIS: tl.constexpr):
        left = tl.join(tl.join(a, b), tl.join(c, d))
        right = tl.join(tl.join(e, f), tl.join(g, h))
        left, right = tl.split(tl.sum(tl.join(left, right), axis=AXIS))
        first, second = tl.split(left)
        third, fourth = tl.split(right)
        a, b = tl.split(first)
        c, d = tl.split(second)
        e, f = tl.split(third)
        g, h = tl.split(fourth)
        return a, b, c, d, e, f, g, h

    @triton.jit
    def column_sums(partial_ptr, programs, width, column, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """Sums over the rows of one plane [programs, width]."""
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, programs, ROWS):
            row = start + tl.arange(0, ROWS)
            mask = (row < programs)[:, None] & (column < width)[None, :]
            place = row.to(tl.int64)[:, None] * width + column[None, :]
            total += tl.load(partial_ptr + place, mask=mask, other=0.0)
        return tl.sum(total, axis=0)

    @triton.jit
    def _store_sums(
        partial_ptr, sums_ptr, programs, width, PLANE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):
        if tl.program_id(1) == PLANE:
            column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            plane_ptr = partial_ptr + tl.cast(programs, tl.int64) * width * PLANE
            total = column_sums(plane_ptr, programs, width, column, ROWS, BLOCK)
            tl.store(sums_ptr + column, total.to(sums_ptr.dtype.element_ty), mask=column < width)

    @triton.jit
    def _kernel(
        partial_ptr,  # [planes, programs, D]
        first_ptr,  # [D] each, or None
        second_ptr,
        third_ptr,
        programs,
        width,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        if first_ptr is not None:
            _store_sums(partial_ptr, first_ptr, programs, width, 0, ROWS, BLOCK)
        if second_ptr is not None:
            _store_sums(partial_ptr, second_ptr, programs, width, 1, ROWS, BLOCK)
        if third_ptr is not None:
            _store_sums(partial_ptr, third_ptr, programs, width, 2, ROWS, BLOCK)

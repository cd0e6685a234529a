"""sample_visible: draw tokens without replacement, in proportion to their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import next_power_of_2, triton
from umt_kernels.checks import check_ints, check_tensors, reads_values
from umt_kernels.dispatch import KernelOp, runs_kernel
from umt_kernels.launch import PLANS, Plan, last_contiguous
from umt_kernels.sharding import is_distributed

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if triton is not None:
    import triton.language as tl

LONGEST = 16384
"""Scores per row that the kernel keeps in registers; longer rows run the reference."""


def sample_visible(
    scores: Float[Tensor, "r p"],
    num_visible: int,
    generator: torch.Generator | None = None,
    *,
    counts: Int[Tensor, " r"] | None = None,
) -> Int[Tensor, "r n"]:
    """`num_visible` different ids per row, ascending int32, drawn without replacement in proportion to `scores`.

    The distribution is that of `torch.multinomial(scores, num_visible)` (UMT, arXiv 2303.16058, section 3.1, semantic
    masking); rows need not sum to 1. A row with fewer positive scores than `num_visible` gives all of these, and the
    rest uniformly among its other ids. A negative score or NaN counts as 0.

    generator  on the scores' device; not supported under torch.compile. It draws one 8-byte seed, in one launch.
    counts     how many ids each row draws, 0 to `num_visible`; -1 fills the rest of the row.

    No value is read on the host. The kernel draws from Philox, so its ids differ from the reference's but have the same
    distribution. Raises ValueError if `scores` is not [R, P], `num_visible` is not in 1..P, `counts` is not [R] or a
    device differs.
    """
    key = _draw.key((scores, counts), (num_visible,))
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None:
        if is_distributed(scores, counts):
            raise ValueError(
                "scores is a DTensor: its parts would draw alike. Give scores.to_local(), with a seed for each process"
            )
        check_tensors(scores=scores, counts=counts)
        (num_visible,) = check_ints(num_visible=num_visible)
        if scores.dim() != 2 or not scores.is_floating_point():
            raise ValueError(f"scores is {scores.dtype} {list(scores.shape)}; give floats of shape [rows, patches]")
        if not 1 <= num_visible <= scores.shape[1]:
            raise ValueError(f"num_visible = {num_visible}, but a row of scores has {scores.shape[1]} entries")
    if counts is not None:
        _check_counts(counts, len(scores), num_visible)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is a {type(generator).__name__}; give a torch.Generator")
        if generator.device.type != scores.device.type:
            raise ValueError(
                f"generator is on {generator.device}, but scores is on {scores.device}; bring them together"
            )
    if plan is None and (scores.shape[1] > LONGEST or not runs_kernel("sample_visible", scores)):
        return reference.sample_visible(scores, num_visible, generator, counts)
    # On the device, so that it can be captured in a CUDA graph and drawn again at every replay.
    seed = torch.randint(2**62, (1,), device=scores.device, generator=generator)
    scores = scores.detach() if scores.requires_grad else scores
    if plan is not None:
        return _draw.planned(plan, scores, seed, counts)
    return _draw(scores, seed, counts, num_visible, key=key)


def _check_counts(counts: Tensor, rows: int, most: int) -> None:
    if counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"counts has dtype {counts.dtype}; give int32 or int64")
    if counts.shape != (rows,):
        raise ValueError(f"counts has shape {list(counts.shape)}; give [{rows}], one per row of scores")
    if counts.device.type == "cpu" and reads_values(counts):
        wrong = ((counts < 0) | (counts > most)).nonzero()
        if len(wrong):
            row = int(wrong[0, 0])
            raise ValueError(f"counts[{row}] = {int(counts[row])}; give 0 to num_visible = {most}")


def _prepare(scores: Tensor, seed: Tensor, counts: Tensor | None, num_visible: int) -> Plan:
    rows, patches = scores.shape
    numbers = (rows, patches, num_visible, scores.stride(0))
    settings = {"COUNTED": counts is not None, **config(patches)}
    return Plan(
        _kernel, (triton.cdiv(rows, settings["ROWS"]),), numbers, settings, (((rows, num_visible), torch.int32),)
    )


def _launch(plan: Plan, scores: Tensor, seed: Tensor, counts: Tensor | None, num_visible: int) -> Tensor:
    (drawn,) = plan.allocate(scores.device)
    plan.launch((scores, seed, counts), (drawn,))
    return drawn


def config(patches: int) -> dict[str, int]:
    """Whole rows in registers, 8 scores per thread; one warp per row of up to 256 scores, which needs no barrier."""
    block = next_power_of_2(patches)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": max(4, min(16, block // 256))}


_draw = KernelOp(
    "sample_visible",
    _prepare,
    _launch,
    lambda scores, seed, counts, num_visible: scores.new_empty(scores.shape[0], num_visible, dtype=torch.int32),
    strided={"scores": last_contiguous},
)


if triton is not None:

    @triton.jit
    def _keys(scores_ptr, seed, row, stride, patch, mask):
        """Logarithm of how early each patch arrives in the race: log(score) - log(wait), as float32.

        Patches without a score arrive after all others, in the order of their waits: a power of two apart from any
        positive score's key, and exact.
        """
        score = tl.load(scores_ptr + row[:, None] * stride + patch[None, :], mask=mask, other=0.0).to(tl.float32)
        # 23 random bits and a half are exact in float32: never 0, never 1, so the wait is positive and finite.
        # The row goes into Philox's key and the patch, a 32-bit number, into its counter.
        counter = tl.zeros_like(score).to(tl.int32) + patch[None, :]
        uniform = (tl.randint(seed + row[:, None], counter).to(tl.uint32, bitcast=True) >> 9).to(tl.float32)
        wait = -tl.log((uniform + 0.5) * (1.0 / 8388608.0))
        bits = score.to(tl.int32, bitcast=True)
        positive = (bits > 0) & (bits <= 0x7F800000)
        # A score too small to be normal counts by its bits, in steps of 2^-149: the GPU may read it as 0.
        small = bits < 0x00800000
        score = tl.where(small, tl.maximum(bits, 1).to(tl.float32), tl.minimum(score, 3.4028234663852886e38))
        speed = tl.log(score) - tl.where(small, 103.27892990343185, 0.0)
        key = tl.where(positive, speed - tl.log(wait), -1099511627776.0 * wait)
        return tl.where(mask, key, float("-inf"))

    @triton.jit
    def _kernel(
        scores_ptr,  # [R, P]
        seed_ptr,  # [1]
        counts_ptr,  # [R]
        drawn_ptr,  # [R, n]
        rows,
        patches,
        num_visible,
        stride,
        COUNTED: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Find each row's n-th largest key bit by bit; draw all above it, and of those equal to it the first."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        patch = tl.arange(0, BLOCK)
        here = row < rows
        mask = here[:, None] & (patch < patches)[None, :]
        key = _keys(scores_ptr, tl.load(seed_ptr), row, stride, patch, mask)
        # Flip all bits of negative floats, the sign bit of others: their order is then that of unsigned integers.
        bits = key.to(tl.uint32, bitcast=True)
        order = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
        wanted = tl.zeros((ROWS,), tl.int32) + num_visible
        if COUNTED:
            count = tl.load(counts_ptr + row, mask=here, other=0)
            wanted = tl.minimum(tl.maximum(count, 0), num_visible).to(tl.int32)
        threshold = tl.zeros((ROWS,), tl.uint32)
        bit = tl.zeros((ROWS,), tl.uint32) + 0x80000000
        for _ in range(32):
            candidate = threshold | bit
            enough = tl.sum((order >= candidate[:, None]).to(tl.int32), axis=1) >= wanted
            threshold = tl.where(enough, candidate, threshold)
            bit = bit >> 1
        above = (order > threshold[:, None]) & mask
        equal = (order == threshold[:, None]) & mask
        left = wanted - tl.sum(above.to(tl.int32), axis=1)
        drawn = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) <= left[:, None]))
        place = tl.cumsum(drawn.to(tl.int32), axis=1) - 1
        first = row[:, None] * num_visible
        tl.store(drawn_ptr + first + place, tl.zeros_like(place) + patch[None, :], mask=drawn)
        if COUNTED:
            rest = here[:, None] & (patch >= wanted[:, None]) & (patch < num_visible)[None, :]
            tl.store(drawn_ptr + first + patch[None, :], tl.zeros_like(place) - 1, mask=rest)

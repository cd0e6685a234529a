"""sample_visible: draw tokens without replacement, in proportion to their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import next_power_of_2, on_its_device, runs_triton, triton
from umt_kernels.checks import check_ints, check_tensors

if TYPE_CHECKING:
    from jaxtyping import Float, Int

if triton is not None:
    import triton.language as tl


def sample_visible(
    scores: Float[Tensor, "r p"], num_visible: int, generator: torch.Generator | None = None
) -> Int[Tensor, "r n"]:
    """`num_visible` different ids per row, ascending int32, drawn without replacement in proportion to `scores`.

    The law is that of `torch.multinomial(scores, num_visible)` (UMT, arXiv 2303.16058, section 3.1, semantic
    masking), which does not need the rows to sum to 1. A row with fewer positive scores than `num_visible` gives
    all of them, and the rest uniformly among its other ids; a score that is not above 0, NaN included, counts as 0.
    No value is read on the host. `generator` (on the scores' device; torch.compile takes none) gives one 8-byte
    seed, a launch of its own; the kernel's own numbers come from Philox, so they differ from the reference's, with
    the same law.

    Raises ValueError if `scores` is not [R, P], `num_visible` is not in 1..P or `generator` is on another device.
    """
    check_tensors(scores=scores)
    check_ints(num_visible=num_visible)
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"scores is {scores.dtype} {list(scores.shape)}; give floats of shape [rows, patches]")
    if not 1 <= num_visible <= scores.shape[1]:
        raise ValueError(f"num_visible = {num_visible}, but a row of scores has {scores.shape[1]} entries")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; give a torch.Generator")
    if generator is not None and generator.device.type != scores.device.type:
        raise ValueError(f"generator is on {generator.device}, but scores is on {scores.device}; bring them together")
    if not runs_triton(scores):
        return reference.sample_visible(scores, num_visible, generator)
    # On the device, so that it can be captured in a CUDA graph and drawn anew at every replay.
    seed = torch.randint(2**62, (1,), device=scores.device, generator=generator)
    return _draw(scores, num_visible, seed)


@torch.library.custom_op("umt_kernels::sample_visible", mutates_args=())
@on_its_device
def _draw(scores: Tensor, num_visible: int, seed: Tensor) -> Tensor:
    rows, patches = scores.shape
    drawn = scores.new_empty(rows, num_visible, dtype=torch.int32)
    if rows:
        scores = scores if scores.stride(1) == 1 else scores.contiguous()
        _kernel[(rows,)](scores, seed, drawn, patches, num_visible, scores.stride(0), **config(patches))
    return drawn


@_draw.register_fake
def _(scores, num_visible, seed):
    return scores.new_empty(scores.shape[0], num_visible, dtype=torch.int32)


def config(patches: int) -> dict[str, int]:
    """The comparisons of a tile, 16 of each thread, stay in registers; with 32 half as many programs would fit."""
    block = next_power_of_2(patches)
    return {"BLOCK": min(block, 256), "OTHERS": min(block, 16), "num_warps": 8}


if triton is not None:

    @triton.jit
    def _speeds(scores_ptr, seed, row, patch, patches):
        """How early each patch arrives: score / Exp(1), and after all of those, at random, the ones without score."""
        score = tl.load(scores_ptr + patch, mask=patch < patches, other=0.0).to(tl.float32)
        # 23 random bits and a half are exact in float32: never 0, never 1, so the wait is positive and finite.
        # The row goes into Philox's key and the patch, a 32-bit number, into its counter.
        uniform = (tl.randint(seed + row, patch).to(tl.uint32, bitcast=True) >> 9).to(tl.float32)
        wait = -tl.log((uniform + 0.5) * (1.0 / 8388608.0))
        speed = tl.where(score > 0, score / wait, -wait)
        return tl.where(patch < patches, speed, float("-inf"))

    @triton.jit
    def _kernel(
        scores_ptr,  # [R, P]
        seed_ptr,  # [1]
        drawn_ptr,  # [R, n]
        patches,
        num_visible,
        stride,
        BLOCK: tl.constexpr,
        OTHERS: tl.constexpr,
    ):
        """A patch is drawn if fewer than n others arrive before it; its place is the number of drawn ones below it.

        Speeds are computed again wherever they are needed: Philox makes any of them from its index.
        """
        row = tl.program_id(0).to(tl.int64)
        seed = tl.load(seed_ptr)
        scores_ptr += row * stride
        before = 0
        for first in range(0, patches, BLOCK):
            patch = first + tl.arange(0, BLOCK)
            speed = _speeds(scores_ptr, seed, row, patch, patches)
            rank = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, patches, OTHERS):
                other = start + tl.arange(0, OTHERS)
                theirs = _speeds(scores_ptr, seed, row, other, patches)
                earlier = theirs[None, :] > speed[:, None]
                tie = (theirs[None, :] == speed[:, None]) & (other[None, :] < patch[:, None])
                rank += tl.sum((earlier | tie).to(tl.int32), axis=1)
            drawn = (rank < num_visible) & (patch < patches)
            place = before + tl.cumsum(drawn.to(tl.int32), axis=0) - 1
            tl.store(drawn_ptr + row * num_visible + place, patch, mask=drawn)
            before += tl.sum(drawn.to(tl.int32), axis=0)

"""cls_scores: attention of the class token to each patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import next_power_of_2, triton
from umt_kernels.checks import check_floats, check_ints, check_tensors
from umt_kernels.dispatch import KernelOp, differentiate_reference, runs_kernel
from umt_kernels.launch import PLANS, Plan, last_contiguous
from umt_kernels.sharding import Axes, is_distributed, on_shards

if TYPE_CHECKING:
    from jaxtyping import Float

if triton is not None:
    import triton.language as tl

LONGEST = 4096
"""Most keys per head for the kernel; longer rows run the reference."""


def cls_scores(
    q: Float[Tensor, "r h d"], k: Float[Tensor, "r h l d"], *, num_prefix_tokens: int = 1
) -> Float[Tensor, "r p"]:
    """Attention of the class token to the patches: softmax over all keys, mean over heads, other tokens dropped.

    q  query of the class token; k  keys of all tokens, in any layout whose last dimension is contiguous: first
    `num_prefix_tokens` of class token and registers (arXiv 2309.16588), then P patches. The scale is d^-0.5. Returns
    [R, P], float32 (float64 for float64 inputs). No P x P matrix is made; the backward recomputes the softmax.

    Raises ValueError when shapes or devices do not fit each other, TypeError for tensors that are not floats.
    """
    key = _forward.key((q, k), (num_prefix_tokens,))
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is None:
        if is_distributed(q, k):
            axes: dict[str, Axes] = {"q": (0,), "k": (0,)}
            return on_shards(cls_scores, axes, ((0,),), q=q, k=k, num_prefix_tokens=num_prefix_tokens)
        num_prefix_tokens = _check(q, k, num_prefix_tokens)
        if not runs_kernel("cls_scores", q, k) or k.shape[2] > LONGEST:
            return reference.cls_scores(q, k, num_prefix_tokens)
        return _forward(q, k, num_prefix_tokens, key=key)
    return _forward.planned(plan, q, k)


def _check(q: Tensor, k: Tensor, num_prefix_tokens: int) -> int:
    """The number of prefix tokens as an int."""
    check_tensors(q=q, k=k)
    check_floats(q=q, k=k)
    (prefix,) = check_ints(num_prefix_tokens=num_prefix_tokens)
    if q.dim() != 3 or k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[2]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} do not fit; give q [r, h, d] and k [r, h, 1 + p, d]")
    if 0 in k.shape[1:]:
        raise ValueError(
            f"k has shape {list(k.shape)}; it needs a head, a key (the class token's is first) and a column"
        )
    if not 0 <= prefix <= k.shape[2]:
        raise ValueError(f"num_prefix_tokens = {prefix}, but k has {k.shape[2]} tokens")
    return prefix


def _prepare(q: Tensor, k: Tensor, prefix: int) -> Plan:
    rows, length = k.shape[0], k.shape[2]
    return _plan(
        _forward_kernel, (rows if length > prefix else 0,), k, prefix, (((rows, length - prefix), torch.float32),)
    )


def _launch(plan: Plan, q: Tensor, k: Tensor, prefix: int) -> Tensor:
    (scores,) = plan.allocate(q.device)
    plan.launch((q, k), (scores,))
    return scores


def _prepare_backward(grad: Tensor, q: Tensor, k: Tensor, prefix: int) -> Plan:
    return _plan(_backward_kernel, tuple(k.shape[:2]), k, prefix, ((q.shape, q.dtype), (k.shape, k.dtype)))


def _launch_backward(plan: Plan, grad: Tensor, q: Tensor, k: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Gradients of q and k; that of k is contiguous."""
    grad_q, grad_k = plan.allocate(q.device)
    plan.launch((grad, q, k), (grad_q, grad_k))
    return grad_q, grad_k


def _plan(kernel, grid: tuple[int, ...], k: Tensor, prefix: int, outputs: tuple) -> Plan:
    _, heads, length, depth = k.shape
    numbers = (heads, length, depth, prefix, *k.stride()[:3], depth**-0.5)
    return Plan(kernel, grid, numbers, config(length, depth, k.element_size()), outputs)


def config(length: int, depth: int, key_bytes: int) -> dict[str, int]:
    """A tile holds `CHUNK` columns of all keys of a head, 16 KiB, which fits into registers."""
    block = next_power_of_2(length)
    chunk = max(8, min(next_power_of_2(depth), (16 << 10) // (block * key_bytes)))
    return {"LENGTH": block, "CHUNK": chunk, "num_warps": max(4, min(16, block * chunk * key_bytes // 2048))}


def _save(ctx, inputs, output):
    q, k, ctx.prefix = inputs
    ctx.save_for_backward(q, k)


def _differentiate(ctx, grad):
    return *_backward(grad, *ctx.saved_tensors, ctx.prefix), None


def _differentiate_again(ctx, grad):
    def run(q, k):
        return reference.cls_scores(q, k, ctx.prefix)

    return *differentiate_reference(run, ctx.saved_tensors, grad), None


_backward = KernelOp(
    "cls_scores_backward",
    _prepare_backward,
    _launch_backward,
    lambda grad, q, k, prefix: (q.new_empty(q.shape), k.new_empty(k.shape)),
    strided={"k": last_contiguous},
)
_forward = KernelOp(
    "cls_scores",
    _prepare,
    _launch,
    lambda q, k, prefix: q.new_empty(k.shape[0], k.shape[2] - prefix, dtype=torch.float32),
    _save,
    _differentiate,
    _differentiate_again,
    strided={"k": last_contiguous},
)


if triton is not None:

    @triton.jit
    def _load_keys(k_ptr, token, column, length, depth, k_l):
        mask = (token < length)[:, None] & (column < depth)[None, :]
        k = tl.load(k_ptr + token.to(tl.int64)[:, None] * k_l + column[None, :], mask=mask, other=0.0)
        return k.to(tl.float32), mask

    @triton.jit
    def _softmax(q_ptr, k_ptr, token, length, depth, k_l, scale, LENGTH: tl.constexpr, CHUNK: tl.constexpr):
        """Attention of one query, at q_ptr, to the keys of its head, at k_ptr."""
        logits = tl.zeros((LENGTH,), tl.float32)
        for start in range(0, depth, CHUNK):
            column = start + tl.arange(0, CHUNK)
            q = tl.load(q_ptr + column, mask=column < depth, other=0.0).to(tl.float32)
            k, _ = _load_keys(k_ptr, token, column, length, depth, k_l)
            logits += tl.sum(k * q[None, :], axis=1)
        logits = tl.where(token < length, logits * scale, float("-inf"))
        weights = tl.exp(logits - tl.max(logits, axis=0))
        return weights / tl.sum(weights, axis=0)

    @triton.jit
    def _forward_kernel(
        q_ptr,  # [R, H, D]
        k_ptr,  # [R, H, L, D]
        scores_ptr,  # [R, L - prefix]
        heads,
        length,
        depth,
        prefix,
        k_r,
        k_h,
        k_l,
        scale,
        LENGTH: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        token = tl.arange(0, LENGTH)
        total = tl.zeros((LENGTH,), tl.float32)
        for head in range(heads):
            q_head = q_ptr + (row * heads + head) * depth
            k_head = k_ptr + row * k_r + tl.cast(head, tl.int64) * k_h
            total += _softmax(q_head, k_head, token, length, depth, k_l, scale, LENGTH, CHUNK)
        place = row * (length - prefix) + token - prefix
        tl.store(scores_ptr + place, total / heads, mask=(token >= prefix) & (token < length))

    @triton.jit
    def _backward_kernel(
        grad_ptr,  # [R, L - prefix]
        q_ptr,  # [R, H, D]
        k_ptr,  # [R, H, L, D]
        dq_ptr,  # [R, H, D]
        dk_ptr,  # [R, H, L, D], contiguous
        heads,
        length,
        depth,
        prefix,
        k_r,
        k_h,
        k_l,
        scale,
        LENGTH: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1)
        token = tl.arange(0, LENGTH)
        base = row * heads + head
        q_ptr += base * depth
        k_ptr += row * k_r + head.to(tl.int64) * k_h
        weights = _softmax(q_ptr, k_ptr, token, length, depth, k_l, scale, LENGTH, CHUNK)
        place = row * (length - prefix) + token - prefix
        grad = tl.load(grad_ptr + place, mask=(token >= prefix) & (token < length), other=0.0).to(tl.float32) / heads
        logits = weights * (grad - tl.sum(weights * grad, axis=0)) * scale
        dk_row = (base * length + token) * depth
        for start in range(0, depth, CHUNK):  # the keys again, from a cache: registers cannot hold them all
            column = start + tl.arange(0, CHUNK)
            q = tl.load(q_ptr + column, mask=column < depth, other=0.0).to(tl.float32)
            k, mask = _load_keys(k_ptr, token, column, length, depth, k_l)
            dq = tl.sum(logits[:, None] * k, axis=0)
            tl.store(dq_ptr + base * depth + column, dq.to(dq_ptr.dtype.element_ty), mask=column < depth)
            dk = logits[:, None] * q[None, :]
            tl.store(dk_ptr + dk_row[:, None] + column[None, :], dk.to(dk_ptr.dtype.element_ty), mask=mask)

"""The attention function of all models, with many backends.

    sdpa                                   torch's own choice of kernel; the default of every model
    cudnn, flash, efficient, math          torch's kernels, each by name
    matmul                                 two matmuls around a softmax: much memory, but fast on CPUs
    heads                                  the same for groups of heads that fit a cache: the fastest on CPUs
    flash_attn_2, flash_attn_3, flash_attn_4, xformers    libraries, imported only on request

The fastest backend depends on GPU, shapes and versions, so `umt_fast.run.attention_choice` measures them. The backend
is fixed before a model is compiled, so that the compiled graph has no branches.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Backend:
    """A way to compute softmax(q k^T / sqrt(d)) v, with its gradients."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """q [b,l,h,d], k and v [b,s,h,d] -> [b,l,h,d]; the last stride must be 1, the others are arbitrary."""
    attend_packed: Callable[[Tensor], Tensor]
    """qkv [b,l,3,h,d] -> [b,l,h,d]; some libraries have a packed function that writes the gradient of qkv at once."""


def attention(
    q: Float[Tensor, "b l h d"],
    k: Float[Tensor, "b s h d"],
    v: Float[Tensor, "b s h d"],
    backend: Backend,
    mask: Bool[Tensor, "b 1 q s"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b l h d"]:
    """softmax(q k^T / sqrt(d)) v. `mask` is True where a query may attend to a key; None: everywhere.

    `dropout` is the share of the softmax that is set to 0; the rest is scaled up. Not every library supports masks and
    dropout. Only texts need them, and texts are short, so such a call goes to `sdpa`, or to `matmul` if that is chosen.
    """
    if mask is None and dropout == 0:
        return backend.attend(q, k, v)
    return (_matmul if backend.name == "matmul" else _sdpa)(q, k, v, mask, dropout)


def self_attention(qkv: Float[Tensor, "b l 3 h d"], backend: Backend) -> Float[Tensor, "b l h d"]:
    """Attention of one packed tensor of q, k and v, which need not be copied into three tensors."""
    return backend.attend_packed(qkv)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (F.dropout(scores.softmax(dim=-1), dropout, training=dropout > 0) @ v).transpose(1, 2)


class _Heads(torch.autograd.Function):
    """`_matmul` on [heads,l,d] in groups of heads whose scores fit a CPU's cache.

    `_matmul` writes and reads the scores of all heads, hundreds of megabytes of fresh memory per layer, several times.
    Here only the probabilities, which the backward pass needs, take that memory.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.group = max(_CACHED_BYTES // (q.shape[1] * k.shape[1] * q.element_size()), 1)
        q = q * q.shape[-1] ** -0.5
        out, kept = torch.empty_like(q), []
        for one_q, one_k, one_v, one_out in zip(*(x.split(ctx.group) for x in (q, k, v, out)), strict=True):
            probabilities = torch.bmm(one_q, one_k.transpose(1, 2)).softmax(-1)
            one_out.copy_(torch.bmm(probabilities, one_v))
            if any(ctx.needs_input_grad):
                kept.append(probabilities)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        parts = (x.split(ctx.group) for x in (q, k, v, grad, *grads))
        for p, one_q, one_k, one_v, one_grad, dq, dk, dv in zip(kept, *parts, strict=True):
            dv.copy_(torch.bmm(p.transpose(1, 2), one_grad))  # `@` would copy the transposed operand
            scores = torch._softmax_backward_data(torch.bmm(one_grad, one_v.transpose(1, 2)), p, -1, p.dtype)
            dq.copy_(torch.bmm(scores, one_k))
            dk.copy_(torch.bmm(scores.transpose(1, 2), one_q))
        return grads[0] * q.shape[-1] ** -0.5, grads[1], grads[2]


_CACHED_BYTES = 8 << 20
"""Bytes of scores at a time. On an EPYC, 1568 tokens in bf16, one head at a time (4.9 MB) was the fastest."""


def _heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = q.shape[2]
    flat = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    return _Heads.apply(*flat).unflatten(0, (-1, heads)).transpose(1, 2)


def _heads_packed(qkv: Tensor) -> Tensor:
    heads = qkv.shape[3]
    flat = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()
    return _Heads.apply(*flat.unbind(0)).unflatten(0, (-1, heads)).transpose(1, 2)


def _sdpa_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return _sdpa(q, k, v)


def _unpacked(attend: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Tensor) -> Tensor:
    return attend(*qkv.unbind(2))


def _first(call: Callable[..., Any], *tensors: Tensor) -> Tensor:
    """The output without the log-sum-exp that some versions of the libraries also return."""
    out = call(*tensors)
    return out[0] if isinstance(out, tuple) else out


def _backend(name: str, attend: Callable[..., Tensor], attend_packed: Callable[..., Tensor] | None = None) -> Backend:
    return Backend(name, attend, attend_packed or functools.partial(_unpacked, attend))


SDPA = _backend("sdpa", _sdpa)
MATMUL = _backend("matmul", _matmul)
HEADS = _backend("heads", _heads, _heads_packed)

TORCH_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Library:
    """A package with an attention function on [b,l,h,d]."""

    module: str
    function: str
    distribution: str
    install: str
    packed_function: str | None = None


LIBRARIES = {
    "flash_attn_2": Library(
        "flash_attn",
        "flash_attn_func",
        "flash-attn",
        "pip install flash-attn --no-build-isolation",
        "flash_attn_qkvpacked_func",
    ),
    "flash_attn_3": Library(
        "flash_attn_interface",
        "flash_attn_func",
        "flash-attn-3",
        "git clone https://github.com/Dao-AILab/flash-attention && cd flash-attention/hopper && pip install .",
        "flash_attn_qkvpacked_func",
    ),
    "flash_attn_4": Library("flash_attn.cute", "flash_attn_func", "flash-attn-4", "pip install flash-attn-4"),
    "xformers": Library("xformers.ops", "memory_efficient_attention", "xformers", "pip install xformers"),
}

MANY = 10_000
"""A limit on recompilations that no process reaches."""

OWN = {"sdpa": SDPA, "matmul": MATMUL, "heads": HEADS}

NAMES = (*OWN, *TORCH_KERNELS, *LIBRARIES)


def load(name: str) -> Backend:
    """The backend called `name`. Raises ValueError for an unknown name, and ImportError with the install command for a
    missing library."""
    if name in OWN:
        return OWN[name]
    if name in TORCH_KERNELS:
        return _backend(name, functools.partial(_sdpa_by, TORCH_KERNELS[name]))
    if name not in LIBRARIES:
        raise ValueError(f"no attention backend {name!r}; there are {', '.join(NAMES)}")
    library = LIBRARIES[name]
    try:
        module = importlib.import_module(library.module)
        function = getattr(module, library.function)
        packed = getattr(module, library.packed_function) if library.packed_function else None
    except (ImportError, AttributeError, OSError) as error:  # OSError: a library built for another CUDA
        raise ImportError(f"attention backend {name} cannot be imported ({error}); {library.install}") from error
    return _backend(name, functools.partial(_first, function), packed and functools.partial(_first, packed))


def fault(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool, compiled: bool = False
) -> str | None:
    """Reason why `backend` does not work with this device, dtype and head, found by a small trial; None if it works.

    `compiled` also tests that torch.compile traces it without a graph break.
    """
    q, k, v = torch.ones(3, 1, 8, 1, head_dim, device=device, dtype=dtype).unbind()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, backend)

    # Every trial compiles `attend` again, and torch.compile gives up on a function after a few recompilations.
    many = torch._dynamo.config.patch(recompile_limit=MANY) if compiled else contextlib.nullcontext()
    try:
        with torch.set_grad_enabled(gradients), many:
            trial = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
            out = trial(*(x.requires_grad_(gradients) for x in (q, k, v)))
            if gradients:
                out.sum().backward()
        return None if out.isfinite().all() else "its output is not finite"
    except Exception as error:  # libraries raise errors of any class when they do not support the case
        return (str(error) or type(error).__name__).strip().splitlines()[0]

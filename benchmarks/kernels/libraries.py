"""The nearest kernels of other libraries: their LayerNorm, with PyTorch's gather before and PyTorch's ops after it.

Also patch_embed as an implicit GEMM.

No library is known that gathers patches from uint8 clips, draws ids without replacement or scores by the class token.
xformers has no LayerNorm (its norm is RMSNorm).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from umt_kernels.backend import runs_triton

from benchmarks.kernels.published import LAYER_NORM_EPS, Inputs, cosine_distance

LayerNorm = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """The message says why a library's kernel does not run here."""


def liger() -> LayerNorm:
    """Liger-Kernel's LayerNorm, with a backward."""
    layer_norm = _import("liger_kernel.ops.layer_norm", "liger-kernel").LigerLayerNormFunction
    return lambda x, weight, bias: layer_norm.apply(x, weight, bias, LAYER_NORM_EPS)


def quack() -> LayerNorm:
    """QuACK's LayerNorm, forward only; it needs rows in two dimensions and float32 parameters."""
    layer_norm = _import("quack.rmsnorm", "quack-kernels").layernorm_fwd

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x.flatten(0, -2), weight.float(), bias.float(), eps=LAYER_NORM_EPS).view_as(x)

    return run


def xformers() -> LayerNorm:
    """Raises Unavailable: listed so that the report says why it is missing."""
    raise Unavailable("xformers has no LayerNorm, only RMSNorm")


FORWARD = {"liger": liger, "quack": quack, "xformers": xformers}
BACKWARD = {"liger": liger, "xformers": xformers}


def _import(module: str, distribution: str) -> Any:
    if not torch.cuda.is_available():
        raise Unavailable(f"{distribution} needs a GPU")
    try:
        return importlib.import_module(module)
    except Exception as error:  # its dependencies may fail in any way, for example on this GPU
        raise Unavailable(f"{distribution} cannot be imported: {error!r}") from error


def gather_layer_norm_rows(x: Inputs, layer_norm: LayerNorm) -> Tensor:
    """Gather by index, then the library's LayerNorm."""
    rows = x["x"].gather(1, x["row_ids"][..., None].expand(-1, -1, x["x"].shape[-1]))
    return layer_norm(rows, x["weight"], x["bias"])


def gather_layer_norm_position(x: Inputs, layer_norm: LayerNorm) -> Tensor:
    """The library's LayerNorm, then the positions by index."""
    return layer_norm(x["x"], x["weight"], x["bias"]) + x["position"][x["position_ids"]]


def cosine_alignment_loss(x: Inputs, layer_norm: LayerNorm) -> Tensor:
    """The library's LayerNorm of each layer, then the published loss."""
    layers = zip(x["predictions"], x["weight"], x["bias"], strict=True)
    return cosine_distance(torch.stack([layer_norm(p, w, b) for p, w, b in layers]), x["targets"])


def implicit_patch_embed(patch: int, dtype: torch.dtype, x: Inputs) -> Tensor:
    """Read the pixels inside a Triton GEMM, instead of gathering them for cuBLAS."""
    if not runs_triton(x["clip"]):
        raise Unavailable("the implicit GEMM needs a GPU")
    from benchmarks.kernels.implicit_patch_embed import implicit_patch_embed as implicit_gemm  # it imports triton

    return implicit_gemm(x["clip"], x["weight"], x["bias"], patch, x["token_ids"], x["position"], dtype)


def max_autotune(run: Callable[[Inputs], Tensor], x: Inputs) -> Tensor:
    """`run` in Inductor's mode max-autotune: the matmul from tuned templates, with the activation fused behind it."""
    if not torch.cuda.is_available():
        raise Unavailable("max-autotune is compared on a GPU")
    if run not in _TUNED:
        _TUNED[run] = torch.compile(run, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    return _TUNED[run](x)


_TUNED: dict[Callable[[Inputs], Tensor], Callable[[Inputs], Tensor]] = {}


def flash_attn_layer_norm(x: Inputs) -> tuple[Tensor, Tensor]:
    """flash-attn's Triton LayerNorm, which includes the residual sum."""
    layer_norm = _import("flash_attn.ops.triton.layer_norm", "flash-attn").layer_norm_fn
    given = {"residual": x["residual"], "eps": LAYER_NORM_EPS, "prenorm": True}
    y, total = layer_norm(x["branch"], x["weight"], x["bias"], **given)
    return total, y


def quack_linear_gelu(x: Inputs) -> Tensor:
    """QuACK's matmul with GELU in its epilogue: the tanh form, at most 5e-4 from the exact one."""
    gemm_act = _import("quack.gemm_interface", "quack-kernels").gemm_act
    return gemm_act(x["x"], x["weight"].T, bias=x["bias"], activation="gelu_tanh_approx", store_preact=False)[1]

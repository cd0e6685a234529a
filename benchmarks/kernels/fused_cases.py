"""Cases of the fused ops: residual + LayerNorm, matmuls with an epilogue, and the loss on pixels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import umt_kernels
from torch import Tensor
from umt_kernels import reference
from umt_kernels.backend import runs_triton

from benchmarks.kernels import libraries
from benchmarks.kernels.case import OpCase
from benchmarks.kernels.inputs import IDS, make_clip, make_visible, with_grad
from benchmarks.kernels.published import LAYER_NORM_EPS, Inputs
from benchmarks.kernels.shapes import Shapes

MLP_RATIO = 4


def add_layer_norm(s: Shapes) -> Iterator[OpCase]:
    """The teacher: every row, a half-precision residual, no gradient. The student: a float32 residual, trained."""
    yield _add_layer_norm(s, "teacher", s.images, s.patches + 1, s.dtype, backward=False)
    for backward in (False, True):
        yield _add_layer_norm(s, "student", s.batch, s.kept, torch.float32, backward)


def _add_layer_norm(s: Shapes, form: str, rows: int, length: int, residual: torch.dtype, backward: bool) -> OpCase:
    leaves = ("residual", "branch", "weight", "bias")

    def make(device: torch.device) -> Inputs:
        x = {
            "residual": torch.randn(rows, length, s.width, device=device, dtype=residual),
            "branch": torch.randn(rows, length, s.width, device=device, dtype=s.dtype),
            **{name: torch.randn(s.width, device=device) for name in ("weight", "bias")},
        }
        if not backward:
            return x
        x = with_grad(x, leaves, backward, None)
        x["grad"] = torch.randn(rows, length, s.width, device=device, dtype=residual)
        x["grad1"] = torch.randn(rows, length, s.width, device=device, dtype=s.dtype)
        return x

    def plain(x: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
        tensors = (x["residual"], x["branch"], x["weight"], x["bias"], None, None, None, None, None)
        return reference.add_layer_norm(*tensors, LAYER_NORM_EPS, dtype, False, False)

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        total = x["residual"] + x["branch"]
        normed = F.layer_norm(total.float(), (s.width,), x["weight"], x["bias"], LAYER_NORM_EPS)
        return total.to(residual), normed.to(s.dtype)

    count, wide, narrow = rows * length * s.width, residual.itemsize, s.dtype.itemsize
    return OpCase(
        "add_layer_norm",
        form,
        s,
        make,
        lambda x: umt_kernels.add_layer_norm(
            x["residual"], x["branch"], x["weight"], x["bias"], LAYER_NORM_EPS, out_dtype=s.dtype
        ),
        eager,
        plain,
        # Backward: both gradients and the stored sum.
        read=count * (wide + narrow) + 8 * s.width + backward * (count * (2 * wide + narrow) + 4 * s.width),
        written=count * (wide + narrow) * (1 + backward) + backward * 8 * s.width,
        backward=backward,
        leaves=leaves,
        libraries={"flash-attn": libraries.flash_attn_layer_norm},
    )


def linear(s: Shapes) -> Iterator[OpCase]:
    """The MLP's first matmul: the teacher's with QuickGELU, the student's with GELU, trained."""
    yield _linear(s, "teacher, QuickGELU", s.images * (s.patches + 1), "quick_gelu", backward=False)
    for backward in (False, True):
        yield _linear(s, "student, GELU", s.batch * s.kept, "gelu", backward)


def _linear(s: Shapes, form: str, rows: int, activation: Any, backward: bool) -> OpCase:
    hidden, item = MLP_RATIO * s.width, s.dtype.itemsize
    leaves = ("x", "weight", "bias")

    def make(device: torch.device) -> Inputs:
        options: Any = {"device": device, "dtype": s.dtype}
        x = {
            "x": torch.randn(rows, s.width, **options),
            "weight": torch.randn(hidden, s.width, **options) * s.width**-0.5,
            "bias": torch.randn(hidden, **options),
        }
        return with_grad(x, leaves, backward, (rows, hidden))

    def eager(x: Inputs) -> Tensor:
        return reference.activated(F.linear(x["x"], x["weight"], x["bias"]), activation)

    def own(x: Inputs) -> Tensor:
        backend: Any = "triton" if runs_triton(x["x"]) else "torch"
        return umt_kernels.linear(x["x"], x["weight"], x["bias"], activation=activation, backend=backend)

    rivals: dict[str, Any] = {"max-autotune": partial(libraries.max_autotune, eager)}
    if activation == "gelu" and not backward:
        rivals["quack"] = libraries.quack_linear_gelu
    read = (rows * s.width + hidden * s.width + hidden) * item
    written = rows * hidden * item
    return OpCase(
        "linear",
        form,
        s,
        make,
        own,
        eager,
        lambda x, dtype: reference.linear(x["x"], x["weight"], x["bias"], activation, None),
        # Backward: the activation's input is saved; gradients of all leaves.
        read=read + backward * (read + 2 * written),
        written=written + backward * (written + read),
        backward=backward,
        flops=2 * rows * s.width * hidden * (1 + 2 * backward),
        leaves=leaves,
        libraries=rivals,
    )


def pixel_loss(s: Shapes) -> Iterator[OpCase]:
    """VideoMAE's loss on a fifth of the tokens, with its gradient."""
    features, rows = 3 * s.patch**2, s.batch * s.kept
    leaves = ("predictions",)

    def make(device: torch.device, backward: bool) -> Inputs:
        x = {"clip": make_clip(s, device), "token_ids": make_visible(s, device)["token_ids"]}
        x["predictions"] = torch.randn(s.batch, s.kept, features, device=device, dtype=s.dtype)
        return with_grad(x, leaves, backward, None)

    pixels, size = rows * features, rows * features * s.dtype.itemsize
    settings: Any = (s.patch, 1, "channel", 1e-6, False, (1 / 255,) * 3, (0.0,) * 3)
    for backward in (False, True):
        yield OpCase(
            "pixel_loss",
            "normalised targets",
            s,
            partial(make, backward=backward),
            lambda x: umt_kernels.pixel_loss(x["predictions"], x["clip"], x["token_ids"], s.patch, 1),
            lambda x: (
                (x["predictions"].float() - reference.pixel_targets(x["clip"], x["token_ids"], *settings))
                .square()
                .mean()
            ),
            lambda x, dtype: reference.pixel_errors(x["predictions"], x["clip"], x["token_ids"], *settings).mean(),
            read=pixels + size + rows * IDS,
            written=4 + backward * size,
            backward=backward,
            leaves=leaves,
        )

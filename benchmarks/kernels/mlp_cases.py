"""Cases of a block's MLP: the second matmul with the residual, the MLP forward and backward, the 8-bit teacher's MLP.

PyTorch's contenders: cuBLASLt with the bias in its epilogue and further passes (eager), the same with Inductor's fused
pass (compiled), and Inductor's own Triton matmuls (max-autotune).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import umt_kernels
from torch import Tensor
from umt_kernels import EightBit, reference
from umt_kernels.backend import runs_triton
from umt_kernels.matmul import GROUP

from benchmarks.kernels import libraries
from benchmarks.kernels.case import OpCase
from benchmarks.kernels.published import Inputs
from benchmarks.kernels.shapes import Shapes


def linear(s: Shapes) -> Iterator[OpCase]:
    """The teacher's second matmul of the MLP, with the residual."""
    m, k, n = s.images * (s.patches + 1), 4 * s.width, s.width

    def make(device: torch.device) -> Inputs:
        options: Any = {"device": device, "dtype": s.dtype}
        x = {"x": torch.randn(m, k, **options), "weight": torch.randn(n, k, **options) * k**-0.5}
        return {**x, "bias": torch.randn(n, **options), "residual": torch.randn(m, n, **options)}

    def run(x: Inputs, backend: Any) -> Tensor:
        return umt_kernels.linear(x["x"], x["weight"], x["bias"], residual=x["residual"], backend=backend)

    def eager(x: Inputs) -> Tensor:
        return run(x, "torch")

    yield OpCase(
        "linear", "teacher, residual", s, make,
        lambda x: run(x, "triton" if runs_triton(x["x"]) else "torch"),
        eager,
        lambda x, dtype: run(x, "torch"),
        read=s.dtype.itemsize * (m * k + n * k + n + m * n),
        written=s.dtype.itemsize * m * n,
        flops=2 * m * n * k,
        libraries={"max-autotune": partial(libraries.max_autotune, eager)},
    )  # fmt: skip


def mlp(s: Shapes) -> Iterator[OpCase]:
    """The student's MLP, forward and backward."""
    leaves = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    m, d, h = s.batch * s.kept, s.width, 4 * s.width

    def make(device: torch.device) -> Inputs:
        options: Any = {"device": device, "dtype": s.dtype}
        shapes = {"x": (m, d), "fc1_weight": (h, d), "fc1_bias": (h,), "fc2_weight": (d, h), "fc2_bias": (d,)}
        x = {name: torch.randn(shape, **options) for name, shape in shapes.items()}
        x["fc1_weight"] *= d**-0.5
        x["fc2_weight"] *= h**-0.5
        return {**{name: t.requires_grad_() for name, t in x.items()}, "grad": torch.randn(m, d, **options)}

    def run(x: Inputs, backend: Any) -> Tensor:
        return umt_kernels.mlp(*(x[name] for name in leaves), backend=backend)

    def eager(x: Inputs) -> Tensor:
        return run(x, "torch")

    item = s.dtype.itemsize
    yield OpCase(
        "mlp", "student, GELU", s, make,
        lambda x: run(x, "triton" if runs_triton(x["x"]) else "torch"),
        eager,
        lambda x, dtype: run(x, "torch"),
        # The hidden layer is written before and after the activation, and read for both weights' gradients.
        read=item * (3 * m * d + 4 * m * h + 4 * d * h),
        written=item * (2 * m * d + 3 * m * h + 2 * d * h + d + h),
        backward=True,
        flops=12 * m * d * h,
        leaves=leaves,
        libraries={"max-autotune": partial(libraries.max_autotune, eager)},
    )  # fmt: skip


def linear_8bit(s: Shapes) -> Iterator[OpCase]:
    """The teacher's MLP from normalised rows. Eager: PyTorch's 8-bit matmul, and passes that quantise its inputs."""
    for name, dtype, tolerance in (("int8", torch.int8, 3e-2), ("float8", torch.float8_e4m3fn, 5e-2)):
        yield _linear_8bit(s, f"teacher MLP, {name}", dtype, tolerance)


def _linear_8bit(s: Shapes, form: str, eight_bit: torch.dtype, tolerance: float) -> OpCase:
    """`tolerance` is larger for eager, which rounds the hidden layer with another scale."""
    m, d, h = s.images * (s.patches + 1), s.width, 4 * s.width

    def make(device: torch.device) -> Inputs:
        x = {"x": torch.randn(m, d, device=device).to(s.dtype)}
        for name, shape in {"fc1": (h, d), "fc2": (d, h)}.items():
            weight = umt_kernels.quantize_rows(torch.randn(shape, device=device) * shape[1] ** -0.5, eight_bit)
            x |= {f"{name}_values": weight.values, f"{name}_scale": weight.scale}
            x[f"{name}_bias"] = torch.randn(shape[0], device=device)
        return x

    def layer(x: Inputs, name: str) -> tuple[EightBit, Tensor]:
        return EightBit(x[f"{name}_values"], x[f"{name}_scale"]), x[f"{name}_bias"]

    def ours(x: Inputs) -> Tensor:
        _check_float8(x["x"], eight_bit)
        rows = umt_kernels.quantize_rows(x["x"], eight_bit)
        hidden = umt_kernels.linear_8bit(rows, *layer(x, "fc1"), activation="quick_gelu", out_dtype=eight_bit)
        assert isinstance(hidden, EightBit)
        y = umt_kernels.linear_8bit(hidden, *layer(x, "fc2"), out_dtype=s.dtype)
        assert isinstance(y, Tensor)
        return y

    def eager(x: Inputs) -> Tensor:
        _check_float8(x["x"], eight_bit)
        y = x["x"]
        for name in ("fc1", "fc2"):
            _, values, scale = reference.quantize_rows(y, None, None, None, 0.0, eight_bit, False)
            weight, bias = layer(x, name)
            if eight_bit == torch.int8:
                y = torch._int_mm(values, weight.values.T).float() * scale[:, None] * weight.scale + bias
            else:
                y = torch._scaled_mm(
                    values, weight.values.T, scale[:, None], weight.scale[None], bias.bfloat16(),
                    out_dtype=torch.bfloat16,
                )  # fmt: skip
            y = (y * torch.sigmoid(1.702 * y) if name == "fc1" else y).to(s.dtype)
        return y

    def plain(x: Inputs, dtype: torch.dtype) -> Tensor:
        """The right result, with the same roundings as our kernels."""
        _, values, scale = reference.quantize_rows(x["x"].float(), None, None, None, 0.0, eight_bit, False)
        first, bias1 = layer(x, "fc1")
        hidden = reference.linear_8bit(
            values, scale, first.values, first.scale.float(), bias1, "quick_gelu", eight_bit, GROUP
        )
        second, bias2 = layer(x, "fc2")
        return reference.linear_8bit(*hidden, second.values, second.scale.float(), bias2, None, dtype, GROUP)[0]

    return OpCase(
        "linear_8bit", form, s, make, ours, eager, plain,
        read=m * d * s.dtype.itemsize + m * (d + h) + 2 * d * h,
        written=m * (d + h) + m * d * s.dtype.itemsize,
        flops=4 * m * d * h,
        tolerance=tolerance,
    )  # fmt: skip


def _check_float8(x: Tensor, eight_bit: torch.dtype) -> None:
    """Raise Unavailable for float8 on a GPU that cannot multiply it."""
    if eight_bit == torch.float8_e4m3fn and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise libraries.Unavailable("float8 matmuls need Ada, Hopper or later")


OPS: tuple[Callable[[Shapes], Iterator[OpCase]], ...] = (linear, mlp, linear_8bit)

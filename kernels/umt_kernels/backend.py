"""Choice between Triton kernels and the reference, by device, dtype and environment."""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # the CPU build of torch does not include it
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton's interpreter runs the kernels on CPU tensors: for tests."""

REFERENCE_ONLY = os.environ.get("UMT_KERNELS_REFERENCE", "0") == "1"
"""Run the reference of every op, to find out whether a kernel causes a fault."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether the kernels support these tensors: on CUDA, or anywhere under the interpreter, with a supported dtype."""
    if triton is None or REFERENCE_ONLY:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in KERNEL_DTYPES and tensor.is_floating_point():
            return False
        if not (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")):
            return False
    return True


def lacking(device: torch.device) -> str | None:
    """Why tensors on `device` cannot use the kernels, with a fix; None if they can."""
    if device.type != "cuda" and not INTERPRETED:
        return "a CUDA GPU"
    if triton is None:
        return "triton (pip install triton)"
    return "UMT_KERNELS_REFERENCE unset" if REFERENCE_ONLY else None


def kernels_on(device: torch.device) -> str:
    """Name of the kernels that tensors on `device` use."""
    if triton is None:
        return "plain PyTorch (triton is missing)"
    if lacking(device) is None:
        return f"triton {triton.__version__}" + (" interpreter" if INTERPRETED else "")
    return "plain PyTorch"


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()

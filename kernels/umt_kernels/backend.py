"""Where an op runs: its Triton kernels, or the reference."""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # the CPU build of torch does not bring it
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton's interpreter runs the kernels on CPU tensors: for tests."""

REFERENCE_ONLY = os.environ.get("UMT_KERNELS_REFERENCE", "0") == "1"
"""Every op runs its reference, to find out whether a kernel is at fault."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: CUDA, or any under the interpreter, and of a dtype they know."""
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
    """What is missing for tensors on `device` to use the kernels, with its fix; None if nothing is."""
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

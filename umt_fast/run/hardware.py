"""Facts about a device: bf16 support, the decoder and kernels in use, and its peak FLOP/s."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

import umt_fast
from umt_fast.config import Decoder, Precision

KNOWN_BF16 = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "V100": 125e12}
"""Dense bf16 tensor-core rates (V100: fp16) from NVIDIA's data sheets, FLOP/s."""
MEASURED_SIDES = {"cuda": (8192,), "cpu": (512, 1024)}
"""Sides of the matmuls that measure a device. On a busy CPU every long one is interrupted: in 20 ms at a side of 1024
half of the rate was lost that 2 ms at 512 reached."""
REPEATS = 4
"""Timings of the largest matmul; smaller ones are repeated for the same number of operations."""


def cpu_computes_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them float32 is faster."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_precision(precision: Precision, device: torch.device) -> bool:
    """Whether to run under bf16 autocast on `device`."""
    if precision != "auto":
        return precision == "bf16"
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_computes_bf16()


def in_use(device: torch.device, decoder: Decoder = "auto") -> dict[str, str]:
    """Device, decoder and kernels of a run on `device`. Raises MissingDali."""
    from umt_kernels.backend import kernels_on

    from umt_fast.data.decode.choice import choose_decoder

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    return {"device": name, "decoder": choose_decoder(decoder, device).text, "kernels": kernels_on(device)}


def describe(device: torch.device, bf16: bool, decoder: Decoder = "auto") -> str:
    """First line of a program's output: version, device, decoder, kernels and precision."""
    used = ", ".join(f"{name} {value}" for name, value in in_use(device, decoder).items())
    return f"umt-fast {umt_fast.__version__}  {used}, precision {'bf16 autocast' if bf16 else 'float32'}"


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of one device, and the source of the number."""

    flops: float
    source: str


def peak_flops(device: torch.device, bf16: bool) -> Peak:
    """Peak FLOP/s: from the data sheet for a known GPU in bf16, otherwise the fastest of a few square matmuls."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if bf16:
        for model, flops in KNOWN_BF16.items():
            if model in name:
                return Peak(flops, f"data sheet of {model}")
    sides, dtype = MEASURED_SIDES[device.type], torch.bfloat16 if bf16 else torch.float32
    measured = {_matmul_flops(side, REPEATS * (sides[-1] // side) ** 3, device, dtype): side for side in sides}
    best = max(measured)
    return Peak(best, f"measured on a {measured[best]} x {measured[best]} matmul")


def _matmul_flops(side: int, repeats: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some products of two square matrices."""
    left = torch.full((side, side), 0.5, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one initialises the library
        begun = time.perf_counter()
        torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best

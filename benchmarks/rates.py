"""Rates of GPUs: peaks from the datasheets, and the reachable share of a peak.

| | source |
|---|---|
| peaks, dense | NVIDIA's datasheets: A100 80GB SXM, H100 SXM, H200 SXM |
| MATMUL_SHARE | a large bf16 matmul of random numbers on an H200: 790 of 989 TFLOP/s (docs/design.md); for 8 bits too |
| COPY_SHARE | a large copy on an H200: 4.3 of 4.8 TB/s (docs/design.md); taken for all |
| attention on Ampere | FlashAttention-2 (arXiv 2307.08691): 50-73% of an A100's peak; the lower end, for heads of 64 |
| attention on Hopper | FlashAttention-3 (arXiv 2407.08608): FlashAttention-2 reaches 35% of an H100's peak |

Measured rates replace these: step_time.json holds the matmul and copy rates of its own run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.environment import gpu_name

MATMUL_SHARE = 790 / 989
COPY_SHARE = 4.3 / 4.8


@dataclass(frozen=True)
class Rates:
    """Sustained rates of a GPU, per second."""

    name: str
    matmul: float
    """Floating-point operations of bf16 and fp16 matmuls."""
    eight_bit: float
    """Operations of int8 (Ampere) or float8 (Hopper) matmuls."""
    eight_bit_type: str
    attention: float
    """Floating-point operations of fused attention."""
    copy: float
    """Bytes read and written."""
    origins: tuple[str, str, str, str]
    """Source of each rate, in this order."""

    def rows(self) -> list[list[str]]:
        """Lines of a table: the rate, its value, its source."""
        units = {"bf16 matmul": self.matmul, f"{self.eight_bit_type} matmul": self.eight_bit}
        units |= {"attention": self.attention, "memory": self.copy}
        values = [f"{rate / 1e12:.4g} {'TB/s' if name == 'memory' else 'TFLOP/s'}" for name, rate in units.items()]
        return [list(row) for row in zip(units, values, self.origins, strict=True)]


def _from_datasheet(
    name: str, title: str, matmul: float, eight_bit: float, kind: str, attention: float, paper: str, copy: float
) -> Rates:
    source = f"of NVIDIA's datasheet of the {title}, the share that an H200 reached (docs/design.md)"
    origins = (
        f"{MATMUL_SHARE:.0%} of {matmul / 1e12:.0f} TFLOP/s {source}",
        f"{MATMUL_SHARE:.0%} of its {eight_bit / 1e12:.0f} TOP/s, the share of bf16",
        f"{attention:.0%} of its {matmul / 1e12:.0f} TFLOP/s: {paper}",
        f"{COPY_SHARE:.0%} of {copy / 1e12:.4g} TB/s {source}",
    )
    rates = (MATMUL_SHARE * matmul, MATMUL_SHARE * eight_bit, kind, attention * matmul, COPY_SHARE * copy)
    return Rates(name, *rates, origins)


AMPERE = "the lower end of FlashAttention-2's 50-73% on an A100, for heads of 64 (arXiv 2307.08691)"
HOPPER = "FlashAttention-2's share on an H100 (arXiv 2407.08608)"
GPUS = {
    "a100": _from_datasheet("a100", "A100 80GB SXM", 312e12, 624e12, "int8", 0.50, AMPERE, 2.039e12),
    "h100": _from_datasheet("h100", "H100 SXM", 989e12, 1979e12, "float8", 0.35, HOPPER, 3.35e12),
    "h200": _from_datasheet("h200", "H200 SXM", 989e12, 1979e12, "float8", 0.35, HOPPER, 4.8e12),
}


def measured_rates(content: dict[str, Any]) -> Rates | None:
    """The rates of a measurement's own run; None if its device has no datasheet here or its rates are missing."""
    sheet = GPUS.get(gpu_name(content["device"]))
    rates = content.get("gemm_flops_per_second", {})
    matmul, copy = rates.get("bf16") or rates.get("fp16"), content.get("copy_bytes_per_second")
    if sheet is None or not matmul or not copy:
        return None
    scale = matmul / sheet.matmul
    return replace(
        sheet,
        matmul=matmul,
        eight_bit=scale * sheet.eight_bit,
        attention=scale * sheet.attention,
        copy=copy,
        origins=(
            "measured in the same run",
            "the datasheet's ratio to bf16",
            f"the datasheet's peak and {AMPERE if sheet.eight_bit_type == 'int8' else HOPPER}, scaled as the matmul",
            "measured in the same run",
        ),
    )

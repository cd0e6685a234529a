"""Report of what is installed, in use and missing on this machine: `python -m umt_fast.doctor`."""

from __future__ import annotations

import platform

import torch

from umt_fast.models.attention import NAMES, fault, load
from umt_fast.packages import PACKAGES
from umt_fast.run.hardware import in_use, resolve_precision

GROUPS = {
    "library": "packages of the library",
    "programs": "packages of the programs that train, test and prepare",
    "optional": "optional packages",
}
"""Title of each group of packages."""


def attention_backends(device: torch.device) -> list[str]:
    """Names of the backends that work on `device` with heads of 64 and gradients, in the precision `auto` chooses."""
    dtype = torch.bfloat16 if resolve_precision("auto", device) else torch.float32
    usable = []
    for name in NAMES:
        try:
            if fault(load(name), device, dtype, 64, gradients=True) is None:
                usable.append(name)
        except ImportError:
            continue
    return usable


def report() -> str:
    """The report that `python -m umt_fast.doctor` prints."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16 autocast" if resolve_precision("auto", device) else "float32"
    used = {**in_use(device), "attention": ", ".join(attention_backends(device)), "precision": precision}
    lines = [f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}", "", "in use"]
    lines += [f"  {key:<10} {value}" for key, value in used.items()]
    if device.type == "cpu":
        lines.append(
            "  no GPU: torch sees none"
            + (f" (built for CUDA {torch.version.cuda})" if torch.version.cuda else " (a CPU build of torch)")
        )
    left = max(len(package.distribution) for package in PACKAGES)
    middle = max(len(package.purpose) for package in PACKAGES)
    for group, title in GROUPS.items():
        lines += ["", title]
        for package in PACKAGES:
            if package.group == group:
                lack = "not installed" if group == "optional" else "MISSING"
                state = package.version() or f"{lack}: {package.install}"
                lines.append(f"  {package.distribution:<{left}}  {package.purpose:<{middle}}  {state}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())

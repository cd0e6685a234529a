"""What this machine has for training, and what is missing: `python -m umt_fast.doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch

from umt_fast.config import Decoder, Precision
from umt_fast.models.attention import LIBRARIES, NAMES, fault, load


@dataclass(frozen=True)
class Package:
    """A package that some part of the project uses."""

    module: str
    distribution: str
    purpose: str
    install: str


PACKAGES = (
    Package("umt_kernels", "umt-kernels", "the ops", "pip install -e kernels"),
    Package("triton", "triton", "fused kernels on GPUs", "pip install triton"),
    Package("av", "av", "video decoding on the CPU", "pip install av"),
    Package("nvidia.dali", "nvidia-dali-cuda130", "video decoding on the GPU", "pip install 'umt-fast[dali]'"),
    Package("einops", "einops", "tensor reshaping", "pip install einops"),
    Package("safetensors", "safetensors", ".safetensors weights", "pip install safetensors"),
    Package("PIL", "pillow", "drawing the demo's videos", "pip install pillow"),
    Package("tyro", "tyro", "command line", "pip install tyro"),
    Package("tensorboard", "tensorboard", "TensorBoard logs", "pip install tensorboard"),
    Package("matplotlib", "matplotlib", "pictures", "pip install matplotlib"),
    Package("huggingface_hub", "huggingface_hub", "teacher weights by repo id", "pip install huggingface_hub"),
    *(
        Package(lib.module, lib.distribution, f"--model.attention {name}", lib.install)
        for name, lib in LIBRARIES.items()
    ),
)


def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16 itself; where it must emulate, float32 is faster."""
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
    """The parts that a run on `device` takes. Raises MissingDali."""
    from umt_kernels.backend import kernels_on

    from umt_fast.data.decode import choose_decoder

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    return {
        "device": name,
        "decoder": choose_decoder(decoder, device).text,
        "kernels": kernels_on(device),
    }


def attention_backends(device: torch.device) -> list[str]:
    """The backends that run on `device` with a head of 64, in the precision that `auto` takes, with gradients."""
    dtype = torch.bfloat16 if resolve_precision("auto", device) else torch.float32
    usable = []
    for name in NAMES:
        try:
            if fault(load(name), device, dtype, 64, gradients=True) is None:
                usable.append(name)
        except ImportError:
            continue
    return usable


def version(package: Package) -> str | None:
    """Version of an installed package, None if it is missing."""
    try:
        if importlib.util.find_spec(package.module) is None:
            return None
    except (ImportError, ValueError):  # no parent package; blocked in sys.modules
        return None
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"


def report() -> str:
    """All of it, as text."""
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
    lines += ["", "packages"]
    for package in PACKAGES:
        found = version(package)
        state = found if found is not None else f"MISSING, {package.install}"
        lines.append(f"  {package.distribution:<16} {package.purpose:<30} {state}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())

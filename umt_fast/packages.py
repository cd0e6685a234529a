"""The packages that parts of the project use, and how each is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Literal

from umt_fast.models.attention import LIBRARIES


@dataclass(frozen=True)
class Package:
    """A package that some part of the project uses."""

    module: str
    distribution: str
    purpose: str
    install: str
    group: Literal["library", "programs", "optional"] = "optional"
    """Part of the project that does not work without it."""

    def version(self) -> str | None:
        """Version of the installed package, None if it is missing."""
        try:
            if importlib.util.find_spec(self.module) is None:
                return None
        except (ImportError, ValueError):  # no parent package; blocked in sys.modules
            return None
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "from a checkout"


TRAIN = "pip install 'umt-fast[train]'"
PACKAGES = (
    Package("umt_kernels", "umt-kernels", "the ops", "pip install -e kernels", "library"),
    Package("av", "av", "video decoding on the CPU", "pip install av", "library"),
    Package("einops", "einops", "tensor reshaping", "pip install einops", "library"),
    Package("fsspec", "fsspec", "data from URLs", "pip install fsspec", "library"),
    Package("safetensors", "safetensors", ".safetensors weights", "pip install safetensors", "library"),
    Package("tyro", "tyro", "command line", TRAIN, "programs"),
    Package("tqdm", "tqdm", "progress bars", TRAIN, "programs"),
    Package("filelock", "filelock", "locks on folders", TRAIN, "programs"),
    Package("pebble", "pebble", "processes that make copies", TRAIN, "programs"),
    Package("PIL", "pillow", "pictures, RandAugment", "pip install pillow", "programs"),
    Package("tokenizers", "tokenizers", "captions as tokens", "pip install tokenizers", "programs"),
    Package("tensorboard", "tensorboard", "TensorBoard logs", TRAIN, "programs"),
    Package("matplotlib", "matplotlib", "pictures of losses", TRAIN, "programs"),
    Package("triton", "triton", "fused kernels on GPUs", "pip install triton"),
    Package("nvidia.dali", "nvidia-dali-cuda130", "video decoding on the GPU", "pip install 'umt-fast[dali]'"),
    Package("torchao", "torchao", "8-bit matmuls", "pip install 'umt-fast[low-precision]'"),
    Package("huggingface_hub", "huggingface_hub", "weights by repo id", "pip install huggingface_hub"),
    *(
        Package(lib.module, lib.distribution, f"--compute.attention {name}", lib.install)
        for name, lib in LIBRARIES.items()
    ),
)


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """One line that says what needs the missing module and how to install it; None if it is not in `PACKAGES`."""
    for package in PACKAGES:
        if package.module == error.name:
            return f"{package.purpose} needs {package.distribution}, which is missing: {package.install}"
    return None

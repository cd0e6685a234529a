"""Device, versions and sources of a measurement. `python -m benchmarks.environment` prints the GPU's short name."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def gpu_name(device_name: str) -> str:
    """Folder of a GPU's results: "NVIDIA H200" -> h200, "NVIDIA A100-SXM4-80GB" -> a100."""
    model = re.search(r"\b(?:[A-Z]{1,2}\d{2,4}[A-Z]?)\b", device_name)
    if model:
        return model[0].lower()
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().replace("nvidia", "").replace("geforce", "")).strip("-")


def describe() -> dict[str, str]:
    """Device, versions, commit and digest of the sources, for a result file."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "missing"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _commit(),
        "sources": sources_digest(),
    }


def _commit(root: Path = ROOT) -> str:
    """The checkout's commit, with a + if files outside the results differ from it; "unknown" outside a git checkout."""
    differing = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results"]
    try:
        commit, status = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], differing)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if status else "")


def sources_digest(root: Path = ROOT) -> str:
    """Digest of all code that a measurement runs. A measurement can continue results of the same digest and device,
    even if other files were committed in between, such as the results."""
    digest = hashlib.sha256()
    for folder in ("umt_fast", "kernels/umt_kernels", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU is visible to PyTorch; kernels are timed only on a GPU")
    print(gpu_name(torch.cuda.get_device_name()))

"""Which decoder a run uses."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import get_args

import torch

from umt_fast.config import Decoder, FileDecoder, LoaderDecoder
from umt_fast.data.decode import nvdec
from umt_fast.errors import RunError

INSTALL = "pip install 'umt-fast[dali]' (for CUDA 12: pip install nvidia-dali-cuda120)"


class MissingDali(RunError):
    """DALI was asked for and is not installed."""


@dataclass(frozen=True)
class DecoderChoice:
    """A decoder, and why."""

    name: FileDecoder | LoaderDecoder
    text: str
    """For the lines at the start of a run."""
    engines: dict[str, nvdec.Limits] | None = None
    """What NVDEC supports, for DALI on a GPU."""


def choose_decoder(wanted: Decoder, device: torch.device) -> DecoderChoice:
    """`auto` is DALI where it is installed and the device has NVDEC, else PyAV. Raises MissingDali."""
    for name in get_args(FileDecoder):
        if wanted == name:
            return DecoderChoice(name, name)
    if wanted == "dali" or wanted == "auto":
        return _choose_dali(wanted == "dali", device)
    raise AssertionError(f"nothing chooses data.decoder = {wanted}")


def _choose_dali(required: bool, device: torch.device) -> DecoderChoice:
    """DALI if it can be used here, or must be; else PyAV."""
    installed = has_dali()
    if not installed and required:
        raise MissingDali(f"--data.decoder dali, but DALI is not installed: {INSTALL}")
    try:
        engines = nvdec.limits(device)
    except nvdec.NoEngine as error:
        if required:
            return DecoderChoice("dali", f"dali on the CPU ({error}): VP8, VP9 and MJPEG; the rest pyav")
        return DecoderChoice("pyav", "pyav" if device.type == "cpu" else f"pyav ({error})")
    count = nvdec.count_engines(engines)
    if not installed:
        return DecoderChoice("pyav", f"pyav (the GPU has {count} NVDEC, but DALI is not installed: {INSTALL})")
    return DecoderChoice("dali", f"dali on {count} NVDEC ({', '.join(engines)}; the rest pyav)", engines)


def has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):  # no package `nvidia`; blocked in sys.modules
        return False

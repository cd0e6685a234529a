"""Which decoder a run takes, and its loader."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from umt_fast.config import Decoder
from umt_fast.data.decode import nvdec
from umt_fast.errors import RunError

if TYPE_CHECKING:
    from umt_fast.data.clips import ClipStream
    from umt_fast.data.loader import Loader

INSTALL = "pip install 'umt-fast[dali]' (for CUDA 12: pip install nvidia-dali-cuda120)"


class MissingDali(RunError):
    """DALI was asked for and is not installed."""


@dataclass(frozen=True)
class Choice:
    """A decoder, and why."""

    dali: bool
    engines: dict[str, nvdec.Limits] | None
    """What NVDEC takes; None on the CPU."""
    text: str
    """For the lines at the start of a run."""


def choose_decoder(wanted: Decoder, device: torch.device) -> Choice:
    """`auto` is DALI where it is installed and the device has NVDEC. Raises MissingDali."""
    if wanted == "pyav":
        return Choice(False, None, "pyav")
    installed = has_dali()
    if not installed and wanted == "dali":
        raise MissingDali(f"--data.decoder dali, but DALI is not installed: {INSTALL}")
    try:
        engines = nvdec.limits(device)
    except nvdec.NoEngine as error:
        if wanted == "dali":
            return Choice(True, None, f"dali on the CPU ({error}): VP8, VP9 and MJPEG; the rest pyav")
        return Choice(False, None, "pyav" if device.type == "cpu" else f"pyav ({error})")
    count = nvdec.count_engines(engines)
    if not installed:
        return Choice(False, None, f"pyav (the GPU has {count} NVDEC, but DALI is not installed: {INSTALL})")
    return Choice(True, engines, f"dali on {count} NVDEC ({', '.join(engines)}; the rest pyav)")


def has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):  # no package `nvidia`; blocked in sys.modules
        return False


def open_loader(stream: ClipStream, device: torch.device, say: Callable[[str], None] = print, **options: Any) -> Loader:
    """The loader of the decoder that `stream.config.decoder` chooses; the options are those of `loader.Prepared`."""
    choice = choose_decoder(stream.config.decoder, device)
    pinned = device.type == "cuda"
    if not choice.dali:
        from umt_fast.data.loader import ClipLoader  # PyAV; doctor reports where it is missing

        return ClipLoader(stream, pin_memory=pinned, **options)
    from umt_fast.data.decode.dali import DaliLoader

    return DaliLoader(stream, device, choice.engines, say=say, pin_memory=pinned, **options)

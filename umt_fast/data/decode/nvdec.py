"""The limits of a GPU's decoding engines (NVDEC) by codec, and their number."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

LIBRARY = "libnvcuvid.so.1"

# FFmpeg's name -> cudaVideoCodec of the Video Codec SDK, for the codecs that DALI decodes with NVDEC.
CODECS = {"mpeg4": 2, "h264": 4, "hevc": 8, "vp8": 9, "vp9": 10, "av1": 11}
_CHROMA_420 = 1


class NoEngine(Exception):
    """NVDEC cannot be used; the message says why."""


@dataclass(frozen=True)
class Limits:
    """Limits of the engines for one codec, in 8-bit 4:2:0."""

    engines: int
    """Number of engines that support the codec."""
    width: tuple[int, int]
    """Smallest and largest, pixels."""
    height: tuple[int, int]
    macroblocks: int
    """Blocks of 256 pixels in a frame, at most."""

    def fit(self, width: int, height: int) -> bool:
        inside = self.width[0] <= width <= self.width[1] and self.height[0] <= height <= self.height[1]
        return inside and width * height <= self.macroblocks * 256


class _Capabilities(ctypes.Structure):
    """CUVIDDECODECAPS of the Video Codec SDK's cuviddec.h."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("histogram", ctypes.c_ubyte),
        ("counter_bits", ctypes.c_ubyte),
        ("histogram_bins", ctypes.c_ushort),
        ("reserved2", ctypes.c_uint * 10),
    )


def limits(device: torch.device) -> dict[str, Limits]:
    """Limits of a GPU's engines, by codec. Raises NoEngine if there are none or the driver hides them."""
    if device.type != "cuda":
        raise NoEngine("no GPU")
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise NoEngine(f"no {LIBRARY}; in a container set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video") from None
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # creates the CUDA context, for which the driver answers
        found = {name: _ask(library, code) for name, code in CODECS.items()}
    supported = {name: answer for name, answer in found.items() if answer is not None}
    if not supported:
        raise NoEngine("the GPU has no NVDEC")
    return supported


def count_engines(supported: dict[str, Limits]) -> int:
    return max(limit.engines for limit in supported.values())


def _ask(library: ctypes.CDLL, codec: int) -> Limits | None:
    asked = _Capabilities(codec=codec, chroma=_CHROMA_420, bit_depth_minus_8=0)
    if library.cuvidGetDecoderCaps(ctypes.byref(asked)) != 0 or not asked.supported:
        return None
    return Limits(
        engines=max(asked.engines, 1),  # drivers before 455 do not count them
        width=(asked.min_width, asked.max_width),
        height=(asked.min_height, asked.max_height),
        macroblocks=asked.max_macroblocks,
    )

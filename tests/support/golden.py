"""Recorded tensors, stored smaller: `NAME.safetensors`, or the same content packed as `NAME.safetensors.z`.

    python tests/support/golden.py FILE.safetensors ...        pack, and remove the plain files

A packed file is a zlib stream of a safetensors file whose tensors are stored byte by byte: first the lowest byte of
every value, then the next, and so on. Signs and exponents vary little, so this saves a sixth; the fractions are noise.
Packing is lossless.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

_FORMS = "packed tensors"
"""Key of the metadata with dtype and shape of each tensor."""


def read_recorded(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a recorded file; a tensor that equals another is stored once, under `same_as`."""
    metadata, tensors = _read_plain(path) if path.exists() else _read_packed(path.with_name(f"{path.name}.z"))
    return metadata, tensors | {key: tensors[other] for key, other in json.loads(metadata.get("same_as", "{}")).items()}


def pack(path: Path) -> None:
    """Replace a plain file by the packed one."""
    metadata, tensors = _read_plain(path)
    forms = {key: [str(value.dtype).removeprefix("torch."), list(value.shape)] for key, value in tensors.items()}
    planes = {key: value.reshape(-1, 1).view(torch.uint8).T.contiguous() for key, value in tensors.items()}
    packed = path.with_name(f"{path.name}.z")
    packed.write_bytes(zlib.compress(save(planes, {**metadata, _FORMS: json.dumps(forms)}), 9))
    found, after = _read_packed(packed)
    assert (found, after.keys()) == (metadata, tensors.keys())
    assert all(_bits(after[key]) == _bits(value) for key, value in tensors.items())
    path.unlink()


def _read_plain(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping


def _read_packed(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    content = zlib.decompress(path.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    forms = json.loads(metadata.pop(_FORMS))
    return metadata, {key: _joined(planes, *forms[key]) for key, planes in load(content).items()}


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1, 1).view(torch.uint8).numpy().tobytes()


def _joined(planes: Tensor, dtype: str, shape: list[int]) -> Tensor:
    return planes.T.flatten().view(getattr(torch, dtype)).reshape(shape)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        pack(Path(name))

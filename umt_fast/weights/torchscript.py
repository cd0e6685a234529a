"""Tensors of a TorchScript archive, read without running its code.

`torch.jit.load` runs the archive's `__setstate__`, which can write any file. An archive is a zip of a pickle with the
tree of modules and tensors, the tensors' bytes, and code. The pickle is read with a fixed set of opcodes and names; the
code is not opened. Format: torch/csrc/jit/docs/serialization.md.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGEST_PICKLE = 64 << 20
"""Largest pickle, bytes; that of CLIP-L/14 has 0.3 MB."""
_OPCODES = """
    PROTO STOP MARK GLOBAL NEWOBJ REDUCE BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE
    BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS
"""
"""The opcodes that TorchScript's pickler writes."""
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def refuse_bomb(path: Path) -> None:
    """Raise ValueError if a zip unpacks to much more than its size: torch stores tensors uncompressed."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(record.file_size for record in archive.infolist())
    if unpacked > path.stat().st_size + LARGEST_PICKLE:
        raise ValueError(f"it would unpack to {unpacked} bytes")


def is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):  # not a zip, or a damaged one
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of the modules in an archive by state-dict key. Raises ValueError for a damaged archive."""
    refuse_bomb(path)
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("no data.pkl in this TorchScript archive")
        if archive.getinfo(pickles[0]).file_size > LARGEST_PICKLE:
            raise ValueError(f"its data.pkl is larger than {LARGEST_PICKLE} bytes")
        content = archive.read(pickles[0])
        _check_opcodes(content)
        try:
            root = _Unpickler(content, archive, pickles[0].removesuffix("data.pkl")).load()
        except Exception as error:  # a damaged pickle can raise any error
            raise ValueError(f"its data.pkl is damaged: {type(error).__name__}: {error}") from error
    found = _tensors(root)
    if not found:
        raise ValueError("no tensors in this TorchScript archive")
    return found


def _check_opcodes(content: bytes) -> None:
    known = frozenset(_OPCODES.split())
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in known:
            raise ValueError(f"its data.pkl uses {opcode.name}, which TorchScript does not write")
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(
            content
        ):  # the unpickler allocates that many places
            raise ValueError("its data.pkl is damaged")


class _Object:
    """A module or another object of the archive: only its attributes, without its class."""

    attributes: dict[str, Any]

    def __new__(cls, *_: object) -> _Object:
        self = super().__new__(cls)
        self.attributes = {}
        return self

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.attributes = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(content))
        self._archive = archive
        self._folder = folder
        self._read: dict[str, Tensor] = {}
        """Storages by key."""

    def find_class(self, module: str, name: str) -> Any:
        """Map names to functions of this module and storage dtypes; any other name becomes an inert `_Object`."""
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _first
        if module == "torch.jit._pickle":  # lists with a type
            return _first
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return _Object

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage as a flat tensor."""
        kind, dtype, key, _device, _count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"a storage of {dtype}")
        if key not in self._read:
            content = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            size = len(content) // dtype.itemsize
            self._read[key] = (
                torch.frombuffer(content, dtype=dtype, count=size) if size else torch.empty(0, dtype=dtype)
            )
        return self._read[key]


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(storage)):
        raise ValueError(f"a tensor of {list(size)} does not fit its storage of {len(storage)}")
    return torch.as_strided(storage, size, stride, offset)


def _first(value: Any, *_: object) -> Any:
    return value


def _tensors(root: Any) -> dict[str, Tensor]:
    """Tensors of a tree of modules by their dotted names."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    while waiting:
        prefix, value = waiting.pop()
        if not isinstance(value, _Object) or id(value) in seen:  # a module may occur twice, or contain itself
            continue
        seen.add(id(value))
        for name, attribute in value.attributes.items():
            if isinstance(attribute, Tensor):
                found[f"{prefix}{name}"] = attribute
            else:
                waiting.append((f"{prefix}{name}.", attribute))
    return found

"""Argument checks that several ops share."""

from __future__ import annotations

import operator
import os
from typing import Any

import torch
from torch import Tensor

from umt_kernels.backend import KERNEL_DTYPES
from umt_kernels.dispatch import is_plain, is_transformed

EVERYWHERE = os.environ.get("UMT_KERNELS_CHECK_IDS", "0") == "1"
"""Debug switch: check ids on GPUs too, which makes every call wait for the device."""


def reads_values(x: Tensor) -> bool:
    """Whether the values of `x` can be read, which is impossible while a program is traced or transformed."""
    return not torch.compiler.is_compiling() and is_plain(x) and not is_transformed(x)


def check_tensors(**tensors: Tensor | None) -> None:
    """Raise unless all arguments that are not None are tensors on one device."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; give a tensor")
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but {first} is on {device}; bring them together")


def check_floats(**tensors: Tensor | None) -> None:
    """Raise unless all arguments that are not None have a dtype that the ops support."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (*KERNEL_DTYPES, torch.float64):
            raise TypeError(f"{name} has dtype {tensor.dtype}; give float32, bfloat16, float16 or float64")


def check_ints(**numbers: Any) -> list[Any]:
    """The numbers as ints. NumPy's integers and torch.compile's symbolic integers are accepted, bools are not."""
    found = []
    for name, number in numbers.items():
        if type(number) is int or isinstance(number, torch.SymInt):
            found.append(number)
        elif isinstance(number, bool) or not hasattr(number, "__index__") or isinstance(number, Tensor):
            raise TypeError(f"{name} = {number!r}; give an int")
        else:
            found.append(operator.index(number))
    return found


def check_eps(eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"eps = {eps}; it must be 0 or more")


def check_ids(name: str, ids: Tensor, batch: int, *, sets: bool = False) -> None:
    """Raise unless `ids` is an integer [batch, m] tensor; with `sets` its rows may be a multiple of `batch`."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {ids.dtype}; give int32 or int64")
    if ids.dim() != 2 or not (ids.shape[0] == batch or (sets and batch and ids.shape[0] % batch == 0)):
        rows = f"[{batch}, m], one row per sample" + (", or a multiple of that many rows" if sets else "")
        raise ValueError(f"{name} has shape {list(ids.shape)}; give {rows}")


def sees_ids(ids: Tensor) -> bool:
    """Whether `check_id_values` reads these ids."""
    return (ids.is_cpu or EVERYWHERE) and not ids.is_meta and reads_values(ids)


def check_id_values(
    name: str, ids: Tensor, limit: int, meaning: str, *, once: bool = False, padded: bool = False
) -> None:
    """Raise unless all ids are in [0, limit), with `once` no id twice in a row; `padded` allows -1 any number of times.

    Values are read on the CPU only, because on a GPU the host would wait. There a wrong id gives undefined results
    unless UMT_KERNELS_CHECK_IDS=1 is set in the environment.
    """
    if not sees_ids(ids):
        return
    wrong = (ids < (-1 if padded else 0)) | (ids >= limit)
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"{name}[{row}, {column}] = {int(ids[row, column])}, but " + meaning.format(limit))
    if once:
        ordered, columns = ids.sort(dim=1, stable=True)
        again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if again.any():
            row, place = (int(i) for i in again.nonzero()[0])
            earlier, later = (int(columns[row, i]) for i in (place, place + 1))
            raise ValueError(
                f"{name}[{row}, {later}] = {int(ids[row, later])}, as is {name}[{row}, {earlier}]; give each row once"
            )

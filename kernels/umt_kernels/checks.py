"""Argument checks that several ops share."""

from __future__ import annotations

import os

import torch
from torch import Tensor

EVERYWHERE = os.environ.get("UMT_KERNELS_CHECK_IDS", "0") == "1"
"""Debug switch: look at ids on GPUs too, which waits for the device at every call."""


def check_ids(name: str, ids: Tensor, batch: int, limit: int, meaning: str) -> None:
    """Raise unless `ids` is an integer [batch, m] tensor with values in [0, limit).

    Values are looked at on the CPU; on a GPU that would stop the host, so an id out of range is undefined there
    unless the environment has UMT_KERNELS_CHECK_IDS=1.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {ids.dtype}; give int32 or int64")
    if ids.dim() != 2 or ids.shape[0] != batch:
        raise ValueError(f"{name} has shape {list(ids.shape)}; give [{batch}, m], one row per sample")
    if torch.compiler.is_compiling() or not (ids.device.type == "cpu" or EVERYWHERE):
        return
    wrong = (ids < 0) | (ids >= limit)
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"{name}[{row}, {column}] = {int(ids[row, column])}, but " + meaning.format(limit))

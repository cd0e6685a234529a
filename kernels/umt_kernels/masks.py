"""Conversion between boolean token masks and ids, without reading values on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_kernels.checks import check_id_values, check_ids, check_ints, check_tensors, reads_values

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


def mask_to_ids(mask: Bool[Tensor, "r n"], num_ids: int) -> Int[Tensor, "r m"]:
    """Ids of the True entries of each row, ascending int32 [R, num_ids]; -1 fills the rest of a shorter row.

    For a mask of hidden tokens (VideoMAE's, MAE's), `mask_to_ids(~mask, n)` gives the visible ids. Pass ids with -1 to
    the ops with `padded=True`; `ids >= 0` marks the real ones. Rows with `num_ids` True entries have no -1.

    Raises TypeError unless `mask` is bool, ValueError if it is not [r, n], and on the CPU if a row has more than
    `num_ids` True entries. On a GPU this check would make the host wait, so the extra entries are dropped.
    """
    check_tensors(mask=mask)
    (num_ids,) = check_ints(num_ids=num_ids)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; give bool")
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {list(mask.shape)}; give [rows, tokens]")
    if not 0 <= num_ids <= mask.shape[1]:
        raise ValueError(f"num_ids = {num_ids}, but a row of the mask has {mask.shape[1]} entries")
    if mask.device.type == "cpu" and reads_values(mask):
        counts = mask.sum(1)
        over = (counts > num_ids).nonzero()
        if len(over):
            row = int(over[0, 0])
            raise ValueError(f"mask[{row}] has {int(counts[row])} True entries, but num_ids = {num_ids}")
    place = mask.cumsum(1) - 1
    place = torch.where(mask & (place < num_ids), place, num_ids)  # an extra last column takes the other entries
    tokens = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device).expand(mask.shape)
    ids = torch.full((mask.shape[0], num_ids + 1), -1, dtype=torch.int32, device=mask.device)
    return ids.scatter(1, place, tokens)[:, :num_ids]


def ids_to_mask(ids: Int[Tensor, "r m"], num_tokens: int) -> Bool[Tensor, "r n"]:
    """A mask that is True at the ids of each row; -1 means no id.

    Raises ValueError if `ids` is not [r, m] or, on the CPU, an id is not in -1 .. num_tokens - 1; TypeError unless it
    is int32 or int64.
    """
    check_tensors(ids=ids)
    (num_tokens,) = check_ints(num_tokens=num_tokens)
    check_ids("ids", ids, ids.shape[0] if ids.dim() else 0)
    check_id_values("ids", ids, num_tokens, "a row has {} tokens", padded=True)
    mask = torch.zeros(ids.shape[0], num_tokens + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter(1, torch.where(ids < 0, num_tokens, ids).long(), True)[:, :num_tokens]

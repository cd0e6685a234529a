"""Activation checkpointing: which activations a block keeps for the backward pass, and which it computes again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from umt_fast.config import Recompute

Block = Callable[[Tensor], Tensor]
RunBlock = Callable[[Block, Tensor], Tensor]

_COSTLY = ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "_scaled_dot_product")


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of matmuls, of attention, and of any library's own ops; norms, GELU and sums are cheap."""
    space, _, name = operation.name().partition("::")
    costly = space != "aten" or name.split(".")[0].startswith(_COSTLY)
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_all(block: Block, x: Tensor) -> Tensor:
    return block(x)


def _selective(block: Block, x: Tensor) -> Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def _full(block: Block, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


RUN_BLOCK: dict[Recompute, RunBlock] = {"none": _keep_all, "selective": _selective, "full": _full}

"""Visible sets: which tokens the student sees.

A visible set is an integer tensor `[B, G, n]`: n ascending ids in each of G groups that split a clip's tokens evenly
in time order. A rule either draws per frame of tokens (G = frames, ids are patches of that frame) or over the whole
clip (G = 1). The number of visible tokens is fixed, so every shape of a step is static.

The rules are in `umt_fast.masking.rules`: a new one is a row there and a name in `umt_fast/config/mask.py`. The draws
of the published codes from a NumPy seed are in `umt_fast.masking.published`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umt_fast.config import Masking, PixelMasking
from umt_fast.masking.rules import RULES, Clips, Rule, count_visible, find_rule

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "RULES",
    "Clips",
    "Rule",
    "check_visible",
    "count_seen",
    "count_visible",
    "draw_blind",
    "draw_by_score",
    "draw_scored",
    "find_rule",
    "hidden_ids",
    "token_ids",
]


def count_seen(rule: Masking | PixelMasking, frames: int, patches: int, ratio: float) -> int:
    """Visible tokens of a whole clip of `frames` x `patches` tokens."""
    found = find_rule(rule)
    groups = frames if found.counts == "per frame" else 1
    return groups * found.num_visible(frames, patches, ratio)


def draw_by_score(
    scores: Float[Tensor, "b t p"], num_visible: int, generator: torch.Generator | None = None
) -> Int[Tensor, "b t n"]:
    """Per frame, `num_visible` patches without replacement in proportion to their scores, as in torch.multinomial."""
    return RULES["attention"].draw(scores, num_visible, generator)


def draw_blind(
    rule: Masking | PixelMasking,
    batch: int,
    frames: int,
    patches: int,
    ratio: float,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b g n"] | None:
    """The visible sets of a rule that needs nothing, when the share `ratio` is hidden; None for any other rule."""
    if find_rule(rule).needs != "nothing":
        return None
    return draw_scored(rule, torch.ones(batch, frames, patches, device=device), ratio, generator)


def draw_scored(
    rule: Masking | PixelMasking,
    scores: Float[Tensor, "b t p"],
    ratio: float,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b g n"]:
    """The visible sets of a rule, from the scores that it needs, when the share `ratio` is hidden."""
    found = find_rule(rule)
    _batch, frames, patches = scores.shape
    return found.draw(scores, found.num_visible(frames, patches, ratio), generator)


def token_ids(visible: Int[Tensor, "b g n"], tokens: int) -> Int[Tensor, "b m"]:
    """Ids within groups -> ids in the flattened (t, h, w) grid of `tokens` tokens."""
    groups = visible.shape[1]
    start = torch.arange(groups, device=visible.device) * (tokens // groups)
    return (visible + start[:, None]).flatten(1)


def hidden_ids(visible: Int[Tensor, "b n"], tokens: int) -> Int[Tensor, "b m"]:
    """The ids that are not in each row, ascending. A row must not repeat an id."""
    shown = torch.zeros(len(visible), tokens, dtype=torch.bool, device=visible.device).scatter_(1, visible, True)
    # A stable sort puts the hidden ids first, in order. Unlike nonzero, it does not make the host wait.
    return shown.sort(dim=1, stable=True).indices[:, : tokens - visible.shape[1]]


def check_visible(visible: Tensor, batch: int, frames: int, patches: int) -> None:
    """Raise TypeError or ValueError unless `visible` is a visible set. Values are checked for CPU tensors only."""
    if visible.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"visible has dtype {visible.dtype}; give int32 or int64 ids, not a mask")
    if visible.dim() != 3 or visible.shape[0] != batch or visible.shape[1] not in (1, frames):
        raise ValueError(
            f"visible has shape {list(visible.shape)}; give [{batch}, {frames}, n] ids within a frame, "
            f"or [{batch}, 1, n] within the clip"
        )
    if visible.device.type != "cpu" or torch.compiler.is_compiling():
        return
    whole = visible.shape[1] != frames
    limit = frames * patches if whole else patches
    wrong = (visible < 0) | (visible >= limit)
    if wrong.any():
        place = [int(i) for i in wrong.nonzero()[0]]
        unit = f"a clip has {limit} tokens" if whole else f"a frame has {limit} patches"
        raise ValueError(f"visible{place} = {int(visible[tuple(place)])}, but {unit}")

"""Which tokens the student sees.

A visible set is an integer tensor `[B, G, n]`: n ascending ids in each of G groups that split a clip's tokens evenly
in time order. Per-frame masking has one group per frame of tokens (ids are patches of that frame); random masking
has one group, the whole clip. The number of visible tokens is fixed, so every shape of a step is static.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from umt_kernels import sample_visible

from umt_fast.config import Masking

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def count_visible(tokens: int, ratio: float) -> int:
    """Tokens left visible out of `tokens` when the share `ratio` is hidden, rounded as UMT rounds."""
    return tokens - int(tokens * ratio)


def count_seen(rule: Masking, frames: int, patches: int, ratio: float) -> int:
    """Visible tokens of a whole clip of `frames` x `patches` tokens; `random` rounds once, the others per frame."""
    return count_visible(frames * patches, ratio) if rule == "random" else frames * count_visible(patches, ratio)


def draw_by_score(
    scores: Float[Tensor, "b t p"], num_visible: int, generator: torch.Generator | None = None
) -> Int[Tensor, "b t n"]:
    """UMT's semantic masking: per frame, patches without replacement in proportion to the teacher's attention."""
    return sample_visible(scores.flatten(0, 1), num_visible, generator).long().unflatten(0, scores.shape[:2])


def draw_blind(
    rule: Masking,
    batch: int,
    frames: int,
    patches: int,
    ratio: float,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b g n"] | None:
    """The visible set of a rule that needs no scores; None for `attention`, which waits for the teacher.

    random  over the whole clip, [B, 1, n];  tube  one draw of a frame, the same in all, [B, T, n].
    """
    if rule == "attention":
        return None
    if rule not in ("random", "tube"):
        raise ValueError(f"no masking rule {rule!r}; there are attention, random and tube")
    tokens = frames * patches if rule == "random" else patches
    uniform = torch.ones(batch, tokens, device=device)
    drawn = sample_visible(uniform, count_visible(tokens, ratio), generator).long()[:, None]
    return drawn if rule == "random" else drawn.expand(-1, frames, -1)


def token_ids(visible: Int[Tensor, "b g n"], tokens: int) -> Int[Tensor, "b m"]:
    """Ids within groups -> ids in the flattened (t, h, w) grid of `tokens` tokens."""
    groups = visible.shape[1]
    start = torch.arange(groups, device=visible.device) * (tokens // groups)
    return (visible + start[:, None]).flatten(1)


def check_visible(visible: Tensor, batch: int, frames: int, patches: int) -> None:
    """Raise unless `visible` is a visible set of such a clip. Values are looked at on the CPU only."""
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

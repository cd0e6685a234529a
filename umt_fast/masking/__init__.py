"""Masking rules: which tokens the student sees.

A visible set is an integer tensor `[B, G, n]`: n ascending ids in each of G groups that split a clip's tokens evenly
in time order. A rule either draws per frame of tokens (G = frames, ids are patches of that frame) or over the whole
clip (G = 1). The number of visible tokens is fixed, so every shape of a step is static.

A new rule is a function from scores to a visible set, a row of `RULES`, and its name in `umt_fast.config.Masking` or
`PixelMasking`. `umt_fast.masking.guided` computes scores from flow, motion, text features and regions;
`umt_fast.masking.published` repeats the draws of the published codes from a NumPy seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from umt_kernels import sample_visible

from umt_fast.config import Masking, PixelMasking
from umt_fast.masking.guided import draw_marked, highest, lowest

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Rule:
    """Input of a masking rule, the unit in which it counts tokens, and its draw function."""

    needs: Literal["nothing", "scores", "sampler", "tokens", "motion", "regions", "flow", "text"]
    """scores: the teacher's attention to each patch, so the draw waits for the teacher; sampler: AdaMAE's network;
    tokens: embedded patches; motion, regions: the guide channel of `umt_fast.data.guides`; flow, text: the result of
    the user's function `mask.source`."""
    counts: Literal["per frame", "per clip"]
    """Unit in which the number of visible tokens is fixed and rounded."""
    count: Callable[[int, float], int]
    """(tokens, hidden share) -> visible tokens. The published codes round differently."""
    draw: Callable[[Float[Tensor, "b t p"], int, torch.Generator | None], Int[Tensor, "b g n"]]
    """(scores, visible tokens of a group, generator) -> visible set. Rules that need nothing get scores of 1, others
    the scores that `guided` computes from their input."""


def _draw_attention(scores: Tensor, num_visible: int, generator: torch.Generator | None) -> Tensor:
    return sample_visible(scores.flatten(0, 1), num_visible, generator).long().unflatten(0, scores.shape[:2])


def _draw_random(scores: Tensor, num_visible: int, generator: torch.Generator | None) -> Tensor:
    return sample_visible(scores.flatten(1), num_visible, generator).long()[:, None]


def _draw_tube(scores: Tensor, num_visible: int, generator: torch.Generator | None) -> Tensor:
    one_frame = sample_visible(scores[:, 0].contiguous(), num_visible, generator).long()
    return one_frame[:, None].expand(-1, scores.shape[1], -1)


def _draw_frames(scores: Tensor, num_visible: int, generator: torch.Generator | None) -> Tensor:
    batch, frames, patches = scores.shape
    slots = -(-num_visible // patches)
    order = torch.rand(batch, frames, device=scores.device, generator=generator).argsort(1).argsort(1)
    in_kept_slot = (order < slots).to(scores.dtype)[..., None].expand_as(scores)
    return _draw_random(in_kept_slot.contiguous(), num_visible, generator)  # score 0 comes after all others


def _show_highest(scores: Tensor, num_visible: int, _generator: torch.Generator | None) -> Tensor:
    return highest(scores, num_visible)


def count_visible(tokens: int, ratio: float) -> int:
    """Tokens left visible out of `tokens` when the share `ratio` is hidden, rounded as UMT and VideoMAE round."""
    return tokens - int(tokens * ratio)


def _count_rounded_down(tokens: int, ratio: float) -> int:
    return int(tokens * (1 - ratio))


RULES: dict[Masking | PixelMasking, Rule] = {
    # UMT's semantic masking (arXiv 2303.16058, 3.1): in proportion to the class token's attention, without replacement.
    "attention": Rule("scores", "per frame", count_visible, _draw_attention),
    # Uniform over the tokens of the clip.
    "random": Rule("nothing", "per clip", count_visible, _draw_random),
    # One uniform draw, the same in all frames (VideoMAE, arXiv 2203.12602).
    "tube": Rule("nothing", "per frame", count_visible, _draw_tube),
    # As random, with one token less where the share is not exact (MAE-ST, arXiv 2205.09113).
    "mae_st": Rule("nothing", "per clip", _count_rounded_down, _draw_random),
    # Whole frames of tokens are hidden, and random tokens of the other frames until the count is exact.
    "frame": Rule("nothing", "per clip", count_visible, _draw_frames),
    # In proportion to the probabilities of a learned network (AdaMAE, arXiv 2211.09120).
    "adamae": Rule("sampler", "per clip", _count_rounded_down, _draw_random),
    # Of the tokens that differ most from the previous frame, a random part is visible and the rest is decoded (EVEREST,
    # arXiv 2211.10636).
    "everest": Rule("tokens", "per clip", _count_rounded_down, draw_marked),
    # The patches that move most are hidden (MGM, ICCV 2023; after the paper, which has no public code).
    "motion": Rule("motion", "per frame", count_visible, lowest),
    # Regions are shown in a given order until enough is visible (MARLIN, arXiv 2211.06627).
    "region": Rule("regions", "per clip", _count_rounded_down, draw_marked),
    # A map of the middle frame is carried along by optical flow (MGMAE, arXiv 2308.10794).
    "flow": Rule("flow", "per frame", _count_rounded_down, _show_highest),
    # The patches most similar to the caption are hidden (text-guided masking; after the paper, without public code).
    "text": Rule("text", "per frame", count_visible, lowest),
}


def find_rule(name: Masking | PixelMasking) -> Rule:
    """The rule called `name`. Raises ValueError that lists the names."""
    if name not in RULES:
        raise ValueError(f"no masking rule {name!r}; choose one of {', '.join(RULES)}")
    return RULES[name]


def count_seen(rule: Masking | PixelMasking, frames: int, patches: int, ratio: float) -> int:
    """Visible tokens of a whole clip of `frames` x `patches` tokens."""
    found = find_rule(rule)
    if found.counts == "per clip":
        return found.count(frames * patches, ratio)
    return frames * found.count(patches, ratio)


def draw_by_score(
    scores: Float[Tensor, "b t p"], num_visible: int, generator: torch.Generator | None = None
) -> Int[Tensor, "b t n"]:
    """Per frame, `num_visible` patches without replacement in proportion to their scores (torch.multinomial's law)."""
    return _draw_attention(scores, num_visible, generator)


def draw_blind(
    rule: Masking | PixelMasking,
    batch: int,
    frames: int,
    patches: int,
    ratio: float,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b g n"] | None:
    """The visible sets of a rule that needs no scores; None for any other rule."""
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
    tokens = scores[0].numel() if found.counts == "per clip" else scores.shape[2]
    return found.draw(scores, found.count(tokens, ratio), generator)


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

"""The masking rules: what each needs, how many tokens it leaves visible, how it draws them.

A new rule is its functions and a row of `RULES` here, and its name in `umt_fast/config/mask.py`, with its settings if
it has any. The arithmetic of the published rules is in `umt_fast.masking.guided`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from umt_kernels import sample_visible

from umt_fast.config import MaeStConfig, Masking, PixelMaskConfig, PixelMasking, VideoMaeConfig
from umt_fast.masking import guided
from umt_fast.masking.source import Source

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8


@dataclass(frozen=True)
class Clips:
    """A batch of clips as a rule sees it."""

    pixels: UInt8[Tensor, "b t h w 3"]
    guide: UInt8[Tensor, "b t h w"] | None
    """The fourth channel of a `umt_fast.data.guides.GuidedStream`."""
    captions: Sequence[str]
    source: Source | None
    """The function of the user."""
    sizes: VideoMaeConfig | MaeStConfig
    mask: PixelMaskConfig

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of scores: [B, frames of tokens, patches]."""
        return len(self.pixels), self.sizes.token_frames, self.sizes.patches


def _equal_scores(clips: Clips) -> Float[Tensor, "b t p"]:
    return torch.ones(clips.shape, device=clips.pixels.device)


@dataclass(frozen=True)
class Rule:
    """What a masking rule needs, how many tokens it leaves visible, and how it draws them."""

    needs: Literal["nothing", "teacher", "model", "pixels", "motion", "regions", "source", "captions"]
    """nothing: all scores are equal; teacher: its attention to each patch, which are the scores; model: parts of the
    model that is trained; of `Clips`: pixels, a guide channel (motion, regions), the function of the user (source), or
    this function and captions."""
    counts: Literal["per frame", "per clip"]
    """Unit in which the number of visible tokens is fixed and rounded."""
    count: Callable[[int, float], int]
    """(tokens, hidden share) -> visible tokens. The published codes round differently."""
    choose: Callable[[Float[Tensor, "b t p"], int, torch.Generator | None], Int[Tensor, "b g n"]] | None
    """(scores, visible tokens of a group, generator) -> visible set. None: the step of the model chooses."""
    scores: Callable[[Clips], Float[Tensor, "b t p"]] = _equal_scores
    """Clips -> the scores of their patches. Scores of a teacher take their place."""

    def num_visible(self, frames: int, patches: int, ratio: float) -> int:
        """Visible tokens of a group, which is a frame or the clip, when the share `ratio` is hidden."""
        return self.count(patches if self.counts == "per frame" else frames * patches, ratio)

    def draw(
        self, scores: Float[Tensor, "b t p"], num_visible: int, generator: torch.Generator | None = None
    ) -> Int[Tensor, "b g n"]:
        """A visible set of `num_visible` tokens of each group. Raises ValueError for a rule that needs the model."""
        if self.choose is None:
            raise ValueError("this masking rule does not draw from scores: the step of its model chooses the tokens")
        return self.choose(scores, num_visible, generator)


# How many.


def count_visible(tokens: int, ratio: float) -> int:
    """Tokens left visible out of `tokens` when the share `ratio` is hidden, rounded as UMT and VideoMAE round."""
    return tokens - int(tokens * ratio)


def _count_rounded_down(tokens: int, ratio: float) -> int:
    return int(tokens * (1 - ratio))


# Draws.


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
    return guided.highest(scores, num_visible)


# Scores of clips.


def _motion(clips: Clips) -> Float[Tensor, "b t p"]:
    assert clips.guide is not None
    side = clips.sizes.patch_size
    by_frame = clips.guide[:, :, ::side, ::side].flatten(2).float()  # all pixels of a patch have its motion
    return by_frame.unflatten(1, (clips.sizes.token_frames, -1)).mean(2)


def _regions(clips: Clips) -> Float[Tensor, "b t p"]:
    """1 for patches of regions that are shown, by the order of the mask, its last ones shuffled for every clip."""
    assert clips.guide is not None
    mask, sizes, device = clips.mask, clips.sizes, clips.pixels.device
    order = guided.numbers_on(device, *mask.order)
    first = clips.guide[:, :: sizes.tubelet_size].int()
    nearest = (first[..., None] - order).abs().argmin(-1)  # compression changes the values of a mask video
    fixed, batch = len(order) - mask.shuffled, len(first)
    chance = torch.rand(batch, mask.shuffled, device=device).argsort(1)
    places = torch.arange(fixed, device=device).expand(batch, -1)
    ranks = torch.cat((places, fixed + chance), 1).gather(1, nearest.flatten(1)).view_as(nearest)
    return guided.regions_shown(ranks, range(len(order)), sizes.patch_size, mask.least_share).float()


def _flow(clips: Clips) -> Float[Tensor, "b t p"]:
    """MGMAE: bumps at random patches of the middle frame, carried to the others by the flow."""
    assert clips.source is not None
    sizes, pixels = clips.sizes, clips.pixels
    flow = clips.source((len(pixels), sizes.frames - 1, 2, sizes.image_size, sizes.image_size), pixels)
    between = {(f, f - 1): flow[:, f - 1] for f in range(1, sizes.frames)}
    count = count_visible(sizes.patches, clips.mask.ratio)  # of bumps; MGMAE rounds the visible tokens differently
    centres = torch.rand(len(pixels), sizes.patches, device=pixels.device).topk(count).indices
    start = guided.gaussian_map(centres, sizes.grid, sizes.grid, sizes.patch_size)
    return guided.flow_scores(start, between, sizes.frames, sizes.patch_size, sizes.tubelet_size)


def _likeness(clips: Clips) -> Float[Tensor, "b t p"]:
    assert clips.source is not None
    return clips.source(clips.shape, clips.pixels, list(clips.captions))


RULES: dict[Masking | PixelMasking, Rule] = {
    # UMT's semantic masking (arXiv 2303.16058, 3.1): in proportion to the class token's attention, without replacement.
    "attention": Rule("teacher", "per frame", count_visible, _draw_attention),
    # Uniform over the tokens of the clip.
    "random": Rule("nothing", "per clip", count_visible, _draw_random),
    # One uniform draw, the same in all frames (VideoMAE, arXiv 2203.12602).
    "tube": Rule("nothing", "per frame", count_visible, _draw_tube),
    # As random, with one token less where the share is not exact (MAE-ST, arXiv 2205.09113).
    "mae_st": Rule("nothing", "per clip", _count_rounded_down, _draw_random),
    # Whole frames of tokens are hidden, and random tokens of the other frames until the count is exact.
    "frame": Rule("nothing", "per clip", count_visible, _draw_frames),
    # In proportion to the probabilities of a learned network (AdaMAE, arXiv 2211.09120), which is part of its model.
    "adamae": Rule("model", "per clip", _count_rounded_down, choose=None),
    # Of the tokens that differ most from the previous frame, a random part is visible and the rest is decoded (EVEREST,
    # arXiv 2211.10636). PixelMasks draws both by `guided.redundancy_removing`, from the model's embedded patches.
    "everest": Rule("model", "per clip", _count_rounded_down, choose=None),
    # The patches that move most are hidden (MGM, ICCV 2023; after the paper, which has no public code).
    "motion": Rule("motion", "per frame", count_visible, guided.lowest, _motion),
    # Regions are shown in a given order until enough is visible (MARLIN, arXiv 2211.06627).
    "region": Rule("regions", "per clip", _count_rounded_down, guided.draw_marked, _regions),
    # A map of the middle frame is carried along by optical flow (MGMAE, arXiv 2308.10794).
    "flow": Rule("source", "per frame", _count_rounded_down, _show_highest, _flow),
    # The patches most similar to the caption are hidden (text-guided masking; after the paper, without public code).
    "text": Rule("captions", "per frame", count_visible, guided.lowest, _likeness),
}


def find_rule(name: Masking | PixelMasking) -> Rule:
    """The rule called `name`. Raises ValueError that lists the names."""
    if name not in RULES:
        raise ValueError(f"no masking rule {name!r}; choose one of {', '.join(RULES)}")
    return RULES[name]

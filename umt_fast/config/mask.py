"""Sections `mask`: the names of the masking rules, and their settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from umt_fast.config.base import ConfigError, check_at_least, check_share

# Names of the rules in `umt_fast.masking.rules`, each in one list, by the jobs that can use it.
AnyMasking = Literal["tube", "random", "frame", "mae_st"]
"""Rules that need nothing."""
TeacherMasking = Literal["attention"]
"""Rules that draw by a teacher's scores: stage 1."""
ClipMasking = Literal["adamae", "everest", "motion", "region", "flow", "text"]
"""Rules for objectives on pixels; some depend on the clip."""
Masking = Literal[TeacherMasking, AnyMasking]
PixelMasking = Literal[AnyMasking, ClipMasking]


@dataclass(frozen=True)
class MaskConfig:
    """Which tokens the student sees."""

    rule: Masking = "attention"
    """attention: drawn in each frame by the teacher's attention; random, mae_st: any tokens of the clip; tube: one draw
    for all frames; frame: tokens of few frames."""
    ratio: float = 0.8
    """Share of the patches that the student does not see."""
    masks_per_clip: int = 1
    """Visible sets per clip and teacher pass; the student's batch is that many times larger."""

    def __post_init__(self) -> None:
        check_share("mask.ratio", self.ratio, below_one=True)
        check_at_least(self, "mask", masks_per_clip=1)


@dataclass(frozen=True)
class PixelMaskConfig:
    """Which tokens the encoder sees, and which the model's decoder (a network) predicts."""

    rule: PixelMasking = "tube"
    """tube, random, frame and mae_st need nothing; everest and adamae use the model's embedded patches; motion needs
    videos with motion vectors; region needs `regions` and `order`; flow and text need `source`."""
    ratio: float = 0.9
    """Share of the patches that the encoder does not see."""
    decoder_ratio: float | None = None
    """Share of the patches that the running cell of VideoMAE V2 excludes from the decoder: 0.25, 0.5 or 0.75. None:
    the decoder predicts all hidden patches."""
    candidate_ratio: float = 0.7
    """everest: share of the patches, most similar to the previous frame, that are neither visible nor decoded."""
    regions: str = ""
    """region: folder of mask videos, named like the videos."""
    order: tuple[int, ...] = ()
    """region: grey values of the mask videos, in the order in which their regions are shown."""
    shuffled: int = 0
    """region: number of values at the end of `order` to shuffle for every clip (MARLIN: the parts of the face)."""
    least_share: float = 0.1
    """region: regions are shown, one after the other, until this share of a frame is visible."""
    source: str = ""
    """flow and text: `module:name` of a function that computes optical flow or similarity to the caption."""

    def __post_init__(self) -> None:
        check_share("mask.ratio", self.ratio, below_one=True)
        check_share("mask.candidate_ratio", self.candidate_ratio, below_one=True)
        check_share("mask.least_share", self.least_share)
        if self.rule == "region" and not (self.regions and self.order):
            raise ConfigError(
                "mask.rule = region needs mask videos and the order in which their grey values are shown: give "
                "--mask.regions FOLDER and --mask.order 0 1 ..."
            )
        if len(set(self.order)) < len(self.order) or not all(0 <= value <= 255 for value in self.order):
            raise ConfigError(f"mask.order = {self.order}: must be grey values from 0 to 255, each once")
        if not 0 <= self.shuffled <= len(self.order):
            raise ConfigError(
                f"mask.shuffled = {self.shuffled}: must be in 0..{len(self.order)}, the length of mask.order"
            )
        if self.rule in ("flow", "text") and not re.fullmatch(r"[\w.]+:\w+", self.source):
            what = "optical flow" if self.rule == "flow" else "similarity to the caption"
            raise ConfigError(
                f"mask.rule = {self.rule} needs {what}: give --mask.source MODULE:FUNCTION (it is {self.source!r}); "
                "docs/pixels.md says what the function returns"
            )
        if self.rule == "everest" and not self.candidate_ratio < self.ratio:
            raise ConfigError(
                f"mask.candidate_ratio = {self.candidate_ratio}: must be below mask.ratio = {self.ratio}, or nothing "
                "is left to decode"
            )
        if self.rule == "everest" and self.decoder_ratio is not None:
            raise ConfigError("mask.decoder_ratio is not for mask.rule = everest, which chooses what is decoded itself")
        if self.decoder_ratio not in (None, 0.25, 0.5, 0.75):
            raise ConfigError(f"mask.decoder_ratio = {self.decoder_ratio}: give 0.25, 0.5 or 0.75")

"""Sections of stage 2 alone: `objective`, its losses, and `joint`, the space where video and text meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from umt_fast.config.base import ConfigError, check_at_least, check_share

Stage2Job = Literal["pretrain", "retrieval", "qa"]
GatherGradient = Literal["published", "true"]


@dataclass(frozen=True)
class VideoTextObjective:
    """What a step of stage 2 minimises. Defaults are those of the published pre-training."""

    uta: float = 1.0
    """Weight of the alignment with the teacher; 0 leaves it, the teacher and the mask out."""
    vtc: float = 1.0
    """Weight of the contrast."""
    vtm: float = 1.0
    """Weight of the matching."""
    mlm: float = 1.0
    """Weight of the masked words."""
    video_mask_ratio: float = 0.8
    """Share of a video's patches that are hidden."""
    image_mask_ratio: float = 0.5
    mlm_probability: float = 0.5
    """Share of the words that are to be predicted."""
    negatives: Literal["hard", "uniform"] = "hard"
    """Negatives of the matching. hard: those that the contrast takes for matches are drawn more often, as published;
    uniform: every sample of the batch that does not match is as likely."""
    gather_gradient: GatherGradient = "published"
    """published: VTC gives the encoders 1 / ranks of its gradient, as the published gather does; true: all of it."""

    def __post_init__(self) -> None:
        check_at_least(self, "objective", uta=0, vtc=0, vtm=0, mlm=0)
        check_share("objective.video_mask_ratio", self.video_mask_ratio, below_one=True)
        check_share("objective.image_mask_ratio", self.image_mask_ratio, below_one=True)
        if not 0 < self.mlm_probability <= 1:
            raise ConfigError(f"objective.mlm_probability = {self.mlm_probability}: must be in (0, 1]")


@dataclass(frozen=True)
class JointConfig:
    """The space in which video and text meet, and how stage 2 differs from stage 1 in the video encoder."""

    width: int = 512
    temperature: float = 0.07
    """What similarities are divided by, at the start; it is learned."""
    align_eps: float = 1e-5
    """Epsilon of the alignment heads' LayerNorm: 1e-5 as published for stage 2, where stage 1 has 1e-6."""
    position_frames: int | None = None
    """Frames of the position table; another number of frames interpolates it in time. None: one table of any length."""

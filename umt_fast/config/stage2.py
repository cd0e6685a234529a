"""Sections of stage 2 alone: `objective`, its losses, and `joint`, the joint space of video and text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from umt_fast.config.base import ConfigError, check_at_least, check_share

Stage2Job = Literal["pretrain", "retrieval", "qa"]
GatherGradient = Literal["published", "true"]


@dataclass(frozen=True)
class VideoTextObjective:
    """Losses of a step of stage 2. Defaults are those of the published pre-training."""

    uta: float = 1.0
    """Weight of the alignment with the teacher; 0 leaves out alignment, teacher and mask."""
    vtc: float = 1.0
    """Weight of the contrast."""
    vtm: float = 1.0
    """Weight of the matching."""
    mlm: float = 1.0
    """Weight of the masked words."""
    video_mask_ratio: float = 0.8
    """Share of a video's patches that are hidden."""
    image_mask_ratio: float = 0.5
    """Share of a picture's patches that are hidden."""
    mlm_probability: float = 0.5
    """Share of the words that are hidden and predicted."""
    negatives: Literal["hard", "uniform"] = "hard"
    """Negatives of the matching. hard: drawn by the softmax of the contrast, as published; uniform: every sample of
    the batch that does not match is equally likely."""
    gather_gradient: GatherGradient = "published"
    """published: the encoders get 1 / ranks of VTC's gradient, as with the published gather; true: all of it."""

    def __post_init__(self) -> None:
        check_at_least(self, "objective", uta=0, vtc=0, vtm=0, mlm=0)
        check_share("objective.video_mask_ratio", self.video_mask_ratio, below_one=True)
        check_share("objective.image_mask_ratio", self.image_mask_ratio, below_one=True)
        if not 0 < self.mlm_probability <= 1:
            raise ConfigError(f"objective.mlm_probability = {self.mlm_probability}: must be in (0, 1]")


@dataclass(frozen=True)
class JointConfig:
    """The joint space of video and text, and the settings of stage 2's video encoder that differ from stage 1."""

    width: int = 512
    """Channels of the joint space."""
    temperature: float = 0.07
    """Initial temperature, the learned divisor of similarities."""
    align_eps: float = 1e-5
    """Epsilon of the alignment heads' LayerNorm: 1e-5 as published for stage 2, where stage 1 has 1e-6."""
    position_frames: int | None = None
    """Frames of the position table; another number of frames interpolates it in time. None: one table of any length."""

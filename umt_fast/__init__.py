"""Unmasked Teacher (arXiv 2303.16058): training and use of video foundation models, fast and exact."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umt_fast import checkpoint, weights
    from umt_fast.config import ClassifierConfig, StudentConfig, TeacherConfig, TextConfig, VideoTextConfig
    from umt_fast.evaluation.features import load_encoder
    from umt_fast.models.classifier import VideoClassifier
    from umt_fast.models.clip_vision import ClipTeacher
    from umt_fast.models.encoder import VideoEncoder
    from umt_fast.models.heads import VideoStudent
    from umt_fast.models.video_text import VideoQaModel, VideoTextModel
    from umt_fast.objectives.alignment import Alignment, alignment_step
    from umt_fast.objectives.video_text import video_text_step

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "ClassifierConfig",
    "ClipTeacher",
    "StudentConfig",
    "TeacherConfig",
    "TextConfig",
    "VideoClassifier",
    "VideoEncoder",
    "VideoQaModel",
    "VideoStudent",
    "VideoTextConfig",
    "VideoTextModel",
    "alignment_step",
    "checkpoint",
    "load_encoder",
    "video_text_step",
    "weights",
]

_HOME = {
    "Alignment": "umt_fast.objectives.alignment",
    "ClassifierConfig": "umt_fast.config",
    "ClipTeacher": "umt_fast.models.clip_vision",
    "StudentConfig": "umt_fast.config",
    "TeacherConfig": "umt_fast.config",
    "TextConfig": "umt_fast.config",
    "VideoClassifier": "umt_fast.models.classifier",
    "VideoEncoder": "umt_fast.models.encoder",
    "VideoQaModel": "umt_fast.models.video_text",
    "VideoStudent": "umt_fast.models.heads",
    "VideoTextConfig": "umt_fast.config",
    "VideoTextModel": "umt_fast.models.video_text",
    "alignment_step": "umt_fast.objectives.alignment",
    "load_encoder": "umt_fast.evaluation.features",
    "video_text_step": "umt_fast.objectives.video_text",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `python -m umt_fast.doctor` works when a dependency is missing."""
    if name in ("checkpoint", "weights"):
        return importlib.import_module(f"umt_fast.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'umt_fast' has no attribute {name!r}")

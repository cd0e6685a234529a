"""Sections of fine-tuning alone: `init`, its starting weights, and `test`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from umt_fast.config.base import check_at_least


@dataclass(frozen=True)
class InitConfig:
    """The weights that fine-tuning starts from."""

    checkpoint: str = ""
    """A pre-trained or fine-tuned file, ours or a published one, a folder or a Hugging Face repo; empty: random
    weights. Also `--init FILE`."""
    strict: bool = True
    """Refuse a file with unexpected keys or shapes; false: only report them."""
    delete_head: bool = False
    """Start with a new head even if the file's head fits."""
    class_map: str = ""
    """JSON list with the row of the file's head for each class, to reduce a K710 head to K600 or K700."""
    scale: float = 0.001
    """Factor of a new head's initial weights."""


@dataclass(frozen=True)
class TestConfig:
    """The multi-view test, and validation."""

    segments: int = 4
    """Number of views in time."""
    crops: int = 3
    """Number of views along the frame's longer side."""
    merge: Literal["probabilities", "logits"] = "probabilities"
    """Quantity that is averaged over the views."""
    clips_per_pass: int = 16
    """Clips per forward pass."""
    every_epochs: int = 1
    """Epochs between validations."""

    __test__ = False  # pytest would collect it where it is imported

    def __post_init__(self) -> None:
        check_at_least(self, "test", segments=1, crops=1, clips_per_pass=1, every_epochs=1)

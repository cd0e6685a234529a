"""A batch of clips, and its pickling in a worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from umt_fast.data.shared_memory import Lease

if TYPE_CHECKING:
    from jaxtyping import Int64, Shaped

NO_LABEL = -1
"""Label of a video without one."""


@dataclass(frozen=True)
class VisitedVideo:
    """The video that a visit read, and its row of the list."""

    visit: int
    row: int
    path: str
    label: int | None
    caption: str | None
    drawn: Any = None
    """The stream's record of its random choices, such as `view_pairs.DrawnPair`s."""


@dataclass
class Batch:
    """The clips of several visits; clips of one visit are neighbours."""

    clip: Shaped[Tensor, b * shape]
    """uint8 [B,T,H,W,3], or the output of the stream's transform."""
    videos: list[VisitedVideo]
    """One for each visit."""
    bad: list[tuple[str, str]]
    """Path and reason of each video that could not be read while making the batch."""
    lease: Lease | None = None
    """The buffer that holds `clip`, in a worker."""

    @property
    def paths(self) -> list[str]:
        """Path of each visit's video."""
        return [video.path for video in self.videos]

    @property
    def visits(self) -> list[int]:
        """Number of each visit in the run."""
        return [video.visit for video in self.videos]

    @property
    def rows(self) -> list[int]:
        """Row of each visit's video in the list, from 0."""
        return [video.row for video in self.videos]

    @property
    def labels(self) -> Int64[Tensor, " b"]:
        """Label of each clip; -1 if the list has none."""
        labels = [NO_LABEL if video.label is None else video.label for video in self.videos]
        return torch.tensor(labels, dtype=torch.int64).repeat_interleave(self._clips_per_visit)

    @property
    def captions(self) -> list[str]:
        """Caption of each clip; empty if the list has none."""
        return [video.caption or "" for video in self.videos for _ in range(self._clips_per_visit)]

    @property
    def _clips_per_visit(self) -> int:
        return len(self.clip) // max(len(self.videos), 1)

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        """Pickles the lease of the shared buffer instead of the clips."""
        if self.lease is None:
            return Batch, (self.clip, self.videos, self.bad)
        clip = self.clip.numpy()
        return _receive, (self.lease, clip.shape, clip.dtype, self.videos, self.bad)

    def pin_memory(self) -> Batch:
        self.clip = self.clip.pin_memory()
        return self


def _receive(
    lease: Lease,
    shape: tuple[int, ...],
    dtype: np.dtype,
    videos: list[VisitedVideo],
    bad: list[tuple[str, str]],
) -> Batch:
    return Batch(lease.open(shape, dtype), videos, bad)

"""Which frames of a video make a clip."""

from __future__ import annotations

import numpy as np


def sample_rng(seed: int, epoch: int, index: int, attempt: int = 0) -> np.random.Generator:
    """The source of every choice made for one clip: the same on any machine, rank and worker."""
    return np.random.default_rng((seed, epoch, index, attempt, 1))


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch visits `count` videos."""
    return np.random.default_rng((seed, epoch, 0, 0, 2)).permutation(count)


def segment_frames(num_frames: int, segments: int, rng: np.random.Generator) -> list[int]:
    """One random frame from each of `segments` equal parts (TSN, arXiv 1608.00859, section 3.1).

    A video shorter than `segments` frames gives its frame 0 every time, as UMT does.
    """
    length = num_frames // segments
    if length == 0:
        return [0] * segments
    return [int(i) for i in np.arange(segments) * length + rng.integers(length, size=segments)]

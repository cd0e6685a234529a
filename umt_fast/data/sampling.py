"""Sampling: which frames of a video make a clip.

Stage 1 draws with `segment_frames`. Fine-tuning has four rules, each for training, validation and multi-view tests,
as the published data sets define them:

    sparse    one frame from each of F equal parts of the whole video (Kinetics, Moments in Time)
    dense     F frames at a fixed rate, a clip of F * rate frames (UCF101, HMDB51)
    strided   as dense in training; a test spreads its views over every rate-th frame (VideoMAE)
    segment   one frame from each of F whole-numbered segments (Something-Something V2)
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from umt_fast.config import FrameRule

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Timeline:
    """Presentation times of the frames of a video."""

    times: Sequence[int] | np.ndarray
    """Time of each frame, ascending, in ticks."""
    tick: Callable[[], float]
    """Returns the length of a tick in seconds; called when first needed."""

    @property
    def num_frames(self) -> int:
        return len(self.times)

    @functools.cached_property
    def seconds(self) -> Float[np.ndarray, " n"]:
        """Time of each frame after the first frame, seconds."""
        times = np.asarray(self.times, np.float64)
        return (times - times[0]) * self.tick()

    @property
    def fps(self) -> float:
        """Frames per second, on average; 25 for a single frame."""
        return (self.num_frames - 1) / float(self.seconds[-1]) if self.num_frames > 1 else 25.0

    def between(self, first: int, last: int) -> Timeline:
        """The timeline of the frames from `first` up to, but not including, `last`."""
        return Timeline(self.times[first:last], self.tick)


class FrameSampling(Protocol):
    """Chooses the frames of a visit: their indices, from 0, in any order and with repeats."""

    def __call__(self, timeline: Timeline, rng: np.random.Generator) -> Sequence[int]: ...


@dataclass
class Draws:
    """The three random generators that the published augmentation uses, one set per clip."""

    python: random.Random
    numpy: np.random.RandomState
    torch: torch.Generator

    @classmethod
    def seeded(cls, seed: int) -> Draws:
        """Generators as after `random.seed`, `numpy.random.seed` and `torch.manual_seed` of `seed`, below 2**32."""
        return cls(random.Random(seed), np.random.RandomState(seed), torch.Generator().manual_seed(seed))


def sample_rng(seed: int, epoch: int, index: int, attempt: int = 0) -> np.random.Generator:
    """The random generator of all choices for one clip: the same on any machine, rank and worker."""
    numbers = seed, epoch, index, attempt, 1
    if 0 <= seed < 1 << 32:  # gives the same generator as the tuple in two thirds of the time
        return np.random.default_rng(np.array(numbers, np.uint32))
    return np.random.default_rng(numbers)


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
    return (np.arange(segments) * length + rng.integers(length, size=segments)).tolist()


def stride_start(num_frames: int, frames: int, step: int) -> int:
    """Number of possible first frames of a clip of every `step`-th frame (VideoMAE, arXiv 2203.12602)."""
    return max(1, num_frames - frames * step + 1)


def stride_frames(num_frames: int, frames: int, step: int, start: int) -> list[int]:
    """Frames `start`, `start + step`, ...; a short video repeats the last of them that exists, as published."""
    indices = [start]
    for _ in range(frames - 1):
        following = indices[-1] + step
        indices.append(following if following + 1 < num_frames else indices[-1])
    return indices


@dataclass(frozen=True)
class StrideSampling:
    """Clips of every `step`-th frame, `frames` of them, from a random first frame."""

    frames: int
    step: int

    def __call__(self, timeline: Timeline, rng: np.random.Generator) -> list[int]:
        start = int(rng.integers(stride_start(timeline.num_frames, self.frames, self.step)))
        return stride_frames(timeline.num_frames, self.frames, self.step, start)


def spread_frames(timeline: Timeline, frames: int, seconds: float, rng: np.random.Generator) -> list[int]:
    """`frames` frames spread over `seconds` of the video, both ends included (MAE-ST, arXiv 2205.09113).

    The start is a uniform real number; positions are rounded down. A video that is too short repeats its last frame.
    """
    total, length = timeline.num_frames, seconds * timeline.fps
    start = rng.uniform(0, max(total - length, 0))
    return span_frames(total, frames, start, start + length - 1)


def span_frames(total: int, frames: int, first: float, last: float) -> list[int]:
    """Frame ids spread evenly from `first` to `last`, clamped to a video of `total` frames and rounded down.

    Computed in float32, as published: rounding can move the last frame of a clip that fits exactly one frame earlier.
    """
    places = torch.linspace(first, last, frames).clamp(0, total - 1)
    return [int(place) for place in places]


def interval_frames(total: int, frames: int, rng: np.random.Generator, last: bool = False) -> list[int]:
    """One random frame from each of `frames` equal intervals of whole numbers (stage 2 in training).

    As published, the last frame of an interval is never drawn; `last` draws from whole intervals. If an interval is
    then empty, min(frames, total) distinct random frames are drawn instead. A video shorter than `frames` repeats its
    last frame.
    """
    edges = _edges(total, frames)
    lengths = np.diff(edges) - (not last)
    if (lengths < 1).any():
        drawn = np.sort(rng.permutation(total)[: len(lengths)])
    else:
        drawn = edges[:-1] + rng.integers(lengths)
    return _repeat_last(drawn, frames)


def middle_frames(total: int, frames: int) -> list[int]:
    """The middle frame of each of `frames` equal intervals (stage 2 in evaluation)."""
    edges = _edges(total, frames)
    return _repeat_last((edges[:-1] + edges[1:] - 1) // 2, frames)


def rate_frames(total: int, fps: float, rate: float) -> list[int]:
    """The middle frame of each window of 1 / `rate` seconds (stage 2's `fpsX`, which no published recipe uses)."""
    window, length = 1 / rate, total / fps
    indices = np.around(np.arange(window / 2, length + window / 2, window) * fps).astype(int)
    return [int(i) for i in indices if i < total]


def _edges(total: int, frames: int) -> np.ndarray:
    if total < 1 or frames < 1:
        raise ValueError(f"total = {total}, frames = {frames}: give numbers above 0")
    return np.linspace(0, total, min(frames, total) + 1).astype(int)


def _repeat_last(drawn: np.ndarray, frames: int) -> list[int]:
    indices = [int(i) for i in drawn]
    return indices + indices[-1:] * (frames - len(indices))


def frames_at_rate(timeline: Timeline, frames: int, rate: float, rng: np.random.Generator) -> list[int]:
    """Frames of a clip of `rate` frames per second, from a random time on, for a video of any frame rate.

    A video that is too short repeats its last frame.
    """
    seconds = timeline.seconds
    start = rng.uniform(0, max(float(seconds[-1]) - (frames - 1) / rate, 0))
    moments = start + np.arange(frames) / rate
    return [int(index) for index in np.searchsorted(seconds, moments + 1e-6, "right") - 1]


def train_frames(total: int, frames: int, rule: FrameRule, draws: Draws, rate: float = 1) -> list[int]:
    """Frame ids of one training clip of a video of `total` frames. Raises ValueError for sizes below 1.

    As published: a video shorter than a `dense` clip is spread over the clip (`_short_dense`), and a `segment` video
    shorter than `frames` gives copies of its frame 0.
    """
    _check(total, frames, rule, rate)
    if rule == "sparse":
        length = (total - 1) / frames
        starts = [round(length * i) for i in range(frames + 1)]
        return [min(draws.python.randint(starts[i], starts[i + 1]), total - 1) for i in range(frames)]
    if rule == "segment":
        length = total // frames
        if length == 0:
            return [0] * frames
        return [int(i) for i in np.arange(frames) * length + draws.numpy.randint(length, size=frames)]
    span = round(frames * rate)
    if total <= span:
        return _short_dense(total, frames, rate)
    end = draws.numpy.randint(span, total)
    return _evenly(end - span, end, frames)


def validation_frames(total: int, frames: int, rule: FrameRule, rate: float = 1) -> list[int]:
    """Frame ids of the single view of a video in validation during training.

    The published `dense` clip starts one span too early and wraps round to the video's end; only the choice of the best
    checkpoint depends on this. Here it is the middle clip; `published_dense_validation` gives the published one.
    """
    return (
        test_frames(total, frames, rule, 2, 1, rate)
        if rule == "segment"
        else test_frames(total, frames, rule, 1, 0, rate)
    )


def published_dense_validation(total: int, frames: int, rate: int) -> list[int]:
    """The published dense validation clip, one span early; ids below 0 count from the end, as in the published code."""
    _check(total, frames, "dense", rate)
    span = frames * rate
    if total <= span:
        return _short_dense(total, frames, rate)
    end = (total - span) // 2
    return [index % total for index in _evenly(end - span, end, frames)]


def test_frames(total: int, frames: int, rule: FrameRule, views: int, view: int, rate: float = 1) -> list[int]:  # noqa: PT028, not a test
    """Frame ids of time view `view` of `views` of a video of `total` frames, for a test.

    `rate`: a `dense` clip has every rate-th frame. The published code fails for `dense` with one view, which is the
    middle clip here, and for `segment` with more than two views, which follow its raw-frame rule here. Raises
    ValueError for a view outside of `views` or sizes below 1.
    """
    _check(total, frames, rule, rate)
    if not 0 <= view < views:
        raise ValueError(f"view = {view} is not in 0..{views - 1}")
    if rule == "sparse":
        length = (total - 1) / frames
        offset = int(length / (views + 1) * (view + 1))
        return [min(round(length * i) + offset, total - 1) for i in range(frames)]
    if rule == "segment":
        length = total / frames
        every = sorted(int(length * v / views + length * i) for i in range(frames) for v in range(views))
        return every[view::views]
    if rule == "strided":
        return _strided_view(total, frames, views, view, max(round(rate), 1))
    span = round(frames * rate)
    start = int(view * max((total - span) / (views - 1), 0)) if views > 1 else max(total - span, 0) // 2
    ids = [start + int(rate * i) for i in range(frames)]
    return [index if index < total else max(i for i in ids if i < total) for index in ids]


def _strided_view(total: int, frames: int, views: int, view: int, step: int) -> list[int]:
    """VideoMAE's test: of every `step`-th frame, views of consecutive frames whose starts are spread evenly."""
    kept = range(0, total, step)
    slack = max(len(kept) - frames, 0)
    start = int(view * (slack / (views - 1))) if views > 1 else slack // 2
    return [kept[min(start + index, len(kept) - 1)] for index in range(frames)]


test_frames.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it where it is imported


def _check(total: int, frames: int, rule: str, rate: float) -> None:
    if rule not in ("sparse", "dense", "strided", "segment"):
        raise ValueError(f"rule = {rule!r}: give sparse, dense, strided or segment")
    if total < 1 or frames < 1 or not rate > 0:
        raise ValueError(f"total = {total}, frames = {frames}, rate = {rate}: give numbers above 0")


def _short_dense(total: int, frames: int, rate: float) -> list[int]:
    """Frame ids of a video no longer than a dense clip: total // rate frames spread over it, then its last frame."""
    given = int(total // rate)
    ids = np.concatenate((np.linspace(0, total, num=given), np.full(frames - given, float(total))))
    return [int(i) for i in np.clip(ids, 0, total - 1)]


def _evenly(start: int, end: int, frames: int) -> list[int]:
    ids = np.clip(np.linspace(start, end, num=frames), start, end - 1)
    return [int(i) for i in ids]

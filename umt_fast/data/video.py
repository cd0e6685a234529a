"""A video: where its bytes are, and what is known of it before it is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.sampling import Timeline


class BadVideo(Exception):
    """A file that gives no clip; the message says why."""


@dataclass(frozen=True)
class Packets:
    """Place of a file's packets: one per frame, one after another in the order they are shown."""

    sizes: int
    """First byte of the table of their sizes, 32-bit big-endian."""
    first: int
    """First byte of the packets."""
    setup: bytes
    """FFmpeg's extradata, which the decoder needs first."""


@dataclass(frozen=True)
class Facts:
    """Facts for choosing and finding the frames of a video."""

    width: int
    """Pixels, upright."""
    height: int
    fps: float
    codec: str
    times: np.ndarray
    """Presentation time of each frame, ascending, in ticks of the file; its number where the file gives no times."""
    keys: np.ndarray
    """Presentation times of the key frames, ascending; empty where the file gives no times."""
    plain: bool = True
    """Whether every packet is one frame, shown upright as it is stored, at a known time."""
    packets: Packets | None = None
    """None: unknown, only a demuxer finds the packets."""

    @property
    def frames(self) -> int:
        return len(self.times)

    @property
    def timeline(self) -> Timeline:
        return Timeline(self.times, self._tick)

    def _tick(self) -> float:
        """An index does not say how long a tick is, but its average frame rate does, for copies exactly."""
        steps = np.diff(self.times)
        ticks = int(steps.sum() + np.median(steps)) if len(steps) else 1
        return self.frames / (ticks * (self.fps or 25.0))


@dataclass(frozen=True)
class Limits:
    """Limits for reading one file, independent of what its header says; the settings of the same names."""

    max_bytes: int = DataConfig.max_bytes
    max_pixels: int = DataConfig.max_pixels
    time_limit: float = math.inf
    """Seconds. Infinite except in training; `prepare` has its own limit."""

    @classmethod
    def of(cls, config: DataConfig) -> Limits:
        return cls(config.max_bytes, config.max_pixels, config.time_limit)


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Part:
    """A part of a video, in seconds after its first frame or in frames."""

    start: float = 0.0
    end: float | None = None
    """None: to the end."""
    first: int = 0
    """Frame."""
    count: int | None = None
    """Frames; None: to the end."""

    def __str__(self) -> str:
        named = []
        if self.start > 0 or self.end is not None:
            named.append(f"{self.start:g} s to {'the end' if self.end is None else f'{self.end:g} s'}")
        if self.first > 0 or self.count is not None:
            named.append(f"{'all' if self.count is None else self.count} frames from number {self.first} on")
        return ", ".join(named) or "all of it"

    def bounds(self, timeline: Timeline) -> tuple[int, int]:
        """Numbers of its first frame and of the one after its last. Raises BadVideo if it has no frame."""
        first, last = self.first, timeline.num_frames
        if self.start > 0 or self.end is not None:
            first = max(first, int(np.searchsorted(timeline.seconds, self.start - _HALF_MICROSECOND)))
        if self.end is not None:
            last = int(np.searchsorted(timeline.seconds, self.end - _HALF_MICROSECOND))
        if self.count is not None:
            last = min(last, self.first + self.count)
        if first >= last:
            raise BadVideo(f"no frame of it lies in the part that the list names ({self})")
        return first, last


_HALF_MICROSECOND = 5e-7


@dataclass(frozen=True)
class Video:
    """A video file, or one in a shard."""

    path: str
    """Path of the file, or of the shard: a local path or a URL."""
    member: str = ""
    """Its name in the shard."""
    offset: int | None = None
    """Its first byte in the shard; None for a file of its own."""
    size: int | None = None
    """Bytes, where known; always in a shard."""
    facts: Facts | None = None
    """None: unknown until the file is read."""
    label: int | None = None
    caption: str | None = None
    class_name: str | None = None
    """In place of a label, where the list names the classes."""
    part: Part | None = None
    """The part that clips are made of; None: all of it."""
    read_timeout: float = DataConfig.read_timeout
    """Seconds in which it must arrive, if it is remote."""
    limits: Limits = DEFAULT_LIMITS
    refused: str = ""
    """Reason why it must not be read; empty: it may be."""

    @property
    def name(self) -> str:
        """Name of the video for messages."""
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def remote(self) -> bool:
        return is_url(self.path)


def is_url(path: str) -> bool:
    return "://" in path

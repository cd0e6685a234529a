"""A video: the location of its bytes, and the facts that are known before it is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.sampling import Timeline


class BadVideo(Exception):
    """A video cannot be read; the message says why."""


@dataclass(frozen=True)
class Packets:
    """Position of a file's packets: one per frame, one after another in presentation order."""

    sizes: int
    """First byte of the table of packet sizes, 32-bit big-endian."""
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
    """Presentation time of each frame, ascending, in ticks of the file; 0, 1, 2, ... if the file has no times."""
    keys: np.ndarray
    """Presentation times of the key frames, ascending; empty if the file has no times."""
    plain: bool = True
    """Whether every packet is one frame, stored upright, with a known time."""
    packets: Packets | None = None
    """None: unknown; a demuxer must find the packets."""

    @property
    def frames(self) -> int:
        return len(self.times)

    @property
    def timeline(self) -> Timeline:
        return Timeline(self.times, self._tick)

    def _tick(self) -> float:
        """Length of a tick in seconds, from the average frame rate; exact for copies of `prepare`."""
        steps = np.diff(self.times)
        ticks = int(steps.sum() + np.median(steps)) if len(steps) else 1
        return self.frames / (ticks * (self.fps or 25.0))


@dataclass(frozen=True)
class Limits:
    """Limits for reading one file, independent of its header; see the settings of the same names."""

    max_bytes: int = DataConfig.max_bytes
    max_pixels: int = DataConfig.max_pixels
    time_limit: float = math.inf
    """Seconds; infinite outside of training. `prepare` has its own limit."""

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
    """First frame."""
    count: int | None = None
    """Number of frames; None: to the end."""

    def __str__(self) -> str:
        named = []
        if self.start > 0 or self.end is not None:
            named.append(f"{self.start:g} s to {'the end' if self.end is None else f'{self.end:g} s'}")
        if self.first > 0 or self.count is not None:
            named.append(f"{'all' if self.count is None else self.count} frames from number {self.first} on")
        return ", ".join(named) or "all of it"

    def bounds(self, timeline: Timeline) -> tuple[int, int]:
        """Index of the first frame, and of the frame after the last. Raises BadVideo if the part has no frame."""
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
    """A video: a file, or a member of a shard."""

    path: str
    """Path of the file, or of the shard: a local path or a URL."""
    member: str = ""
    """Name in the shard; empty for a file."""
    offset: int | None = None
    """First byte in the shard; None for a file."""
    size: int | None = None
    """Size in bytes, if known; always known in a shard."""
    facts: Facts | None = None
    """None: unknown until the file is read."""
    label: int | None = None
    caption: str | None = None
    class_name: str | None = None
    """Name of the class, if the list has names instead of numbers."""
    part: Part | None = None
    """The part from which clips are made; None: the whole video."""
    read_timeout: float = DataConfig.read_timeout
    """Seconds for fetching a remote video."""
    limits: Limits = DEFAULT_LIMITS
    refused: str = ""
    """Reason why the video must not be read; empty: it may be read."""

    @property
    def name(self) -> str:
        """Name of the video for messages."""
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def remote(self) -> bool:
        return is_url(self.path)


def is_url(path: str) -> bool:
    return "://" in path

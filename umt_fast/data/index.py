"""The videos of a data set, and what an index tells of them, so that none has to be opened to ask.

An index is a file `index.jsonl` beside the videos or shards, as `umt_fast.data.prepare` writes it: a line that names
the format, then one JSON object per video:

    path          of the file, relative to the index; with `shard`, its name in there
    shard         the tar file that it lies in, relative to the index; `offset`: where in that it begins
    bytes         size of the file; `sha256`: of its content
    codec         as FFmpeg names it
    width height  pixels, upright
    fps           frames per second, on average
    frames        how many
    times         their presentation times, in ticks of the file: the first, then [step, how often] runs
    keys          the key frames: frame 0, then [frames to the next, how often] runs
    packets       where the frames' packets lie: one behind another from byte `first` on, in the order they are shown;
                  at byte `sizes` begins a table of their sizes, 32-bit numbers with the highest byte first; `setup`
                  (base64) is what a decoder must know before them, FFmpeg's extradata
    label caption what the data set says of the video, if anything
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import posixpath
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.sampling import Timeline
from umt_fast.errors import RunError

INDEX_NAME = "index.jsonl"
STATE_NAME = ".prepare"
"""Folder, beside the index, of what `prepare` needs to go on; where there is no index yet, copies are missing."""
FORMAT = {"format": "umt-fast video index", "version": 1}
_MOST_FRAMES = 1 << 24
"""Of a video that an index tells of, six days at 30 a second: what claims more would take the memory of the machine."""


class BadIndex(RunError, ValueError):
    """An index that cannot be used."""


class BadVideo(Exception):
    """A file that gives no clip; the message says why."""


@dataclass(frozen=True)
class Packets:
    """Where a file keeps its frames: a packet each, one behind another in the order they are shown."""

    sizes: int
    """At which byte the table of their sizes begins: 32-bit numbers, the highest byte first."""
    first: int
    """At which byte they begin."""
    setup: bytes
    """What the decoder must know before them: FFmpeg's extradata."""


@dataclass(frozen=True)
class Facts:
    """What choosing and finding frames needs to know of a video."""

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
    """Every packet is one frame that is shown, with a time, the way up it is stored."""
    packets: Packets | None = None
    """None: only the file's own tables tell."""

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
    """What a file may cost, whatever it says of itself; the settings of the same names."""

    max_bytes: int = DataConfig.max_bytes
    max_pixels: int = DataConfig.max_pixels
    time_limit: float = math.inf
    """None unless training: `prepare` has a limit of its own."""

    @classmethod
    def of(cls, config: DataConfig) -> Limits:
        return cls(config.max_bytes, config.max_pixels, config.time_limit)


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Video:
    """A video file, or one in a shard."""

    path: str
    """Of the file, or of the shard: local or a URL that fsspec knows."""
    member: str = ""
    """Its name in the shard."""
    offset: int | None = None
    """Where it begins in the shard; None for a file of its own."""
    size: int | None = None
    """Bytes, where known; always in a shard."""
    facts: Facts | None = None
    """None: not known before the file is read."""
    label: int | None = None
    caption: str | None = None
    read_timeout: float = DataConfig.read_timeout
    """Seconds within which it must have come, if it is remote."""
    limits: Limits = DEFAULT_LIMITS
    refused: str = ""
    """Why it must not be read, if so."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def remote(self) -> bool:
        return is_url(self.path)


class VideoList(Sequence[Video]):
    """The videos of a run: rows as of an index, of which only `path` must be there; relative to `base`.

    The rows stay one block of bytes, which all worker processes share; a list of objects would be copied into each
    of them, page by page, as they count its references.
    """

    def __init__(self, rows: Iterable[bytes], base: str = "", confined: bool = False) -> None:
        """`confined`: a row that names a file outside `base` gives a video that is refused."""
        rows = list(rows)
        self._base = base
        self._rows = b"".join(rows)
        self._ends = np.cumsum([0, *map(len, rows)])
        self.may_be_remote = is_url(base) or b"://" in self._rows
        self.read_timeout = DataConfig.read_timeout
        """Of its videos."""
        self.limits = DEFAULT_LIMITS
        """Likewise."""
        self._confined = confined

    @classmethod
    def of_rows(cls, rows: Iterable[dict[str, Any]], base: str = "") -> VideoList:
        return cls((json.dumps(row).encode() for row in rows), base)

    @classmethod
    def of_paths(cls, paths: Iterable[str]) -> VideoList:
        return cls.of_rows({"path": path} for path in paths)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Video: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Video]: ...

    def __getitem__(self, index: int | slice) -> Video | Sequence[Video]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        try:
            video = _parse(self._load(row), self._base)
            return replace(video, read_timeout=self.read_timeout, limits=self.limits)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            # An IndexError would end a loop. Deep nesting ends in a RecursionError.
            raise BadIndex(f"row {row + 1} is no row of an index: {error!r}") from None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row as in an index, with a path of its own instead of one relative to the index."""
        for number in range(len(self)):
            row = self._load(number)
            place = _place(row)
            yield {**row, place: join(self._base, row[place])}

    def count_distinct(self) -> int:
        """How many different videos the list names."""
        return len({self._row(index) for index in range(len(self))})

    def digest(self) -> str:
        """Tells this list from others, whatever their lengths."""
        return hashlib.sha256(self._rows).hexdigest()[:12]

    def _load(self, index: int) -> dict[str, Any]:
        row = json.loads(self._row(index))
        if self._confined and not _is_inside(row[_place(row)]):
            row["refused"] = "it lies outside the folder of its index"
        return row

    def _row(self, index: int) -> bytes:
        return self._rows[self._ends[index] : self._ends[index + 1]]


def _place(row: dict[str, Any]) -> str:
    """Which key of a row names its file."""
    return "path" if row.get("shard") is None else "shard"


def _is_inside(path: str) -> bool:
    """Whether a path of an index stays in the folder of the index."""
    return not (is_url(path) or path.startswith("/") or posixpath.normpath(path).split("/")[0] == "..")


def is_url(path: str) -> bool:
    return "://" in path


def join(base: str, path: str) -> str:
    """`path`, a file name relative to the folder or URL `base` unless it is absolute."""
    if is_url(path) or path.startswith("/"):
        return path
    if base.startswith(("http://", "https://")) or "::http" in base:  # `#`, `?` and `%` mean something in these
        path = urllib.parse.quote(path, errors="surrogateescape")
    return posixpath.join(base, path)


def parse_index(content: bytes, where: str) -> VideoList:
    """Read an index that lies at `where` (a path or URL). Raises BadIndex unless it is one."""
    head, *rows = content.split(b"\n")
    rows = [row for row in rows if row.strip()]
    try:
        found = json.loads(head)
    except (ValueError, RecursionError):
        found = None
    if found != FORMAT:
        raise BadIndex(f"{where} does not begin with {json.dumps(FORMAT)}; make an index with umt_fast.data.prepare")
    if not rows:
        raise BadIndex(f"{where} lists no video")
    videos = VideoList(rows, posixpath.dirname(where), confined=True)
    for line, index in ((2, 0), (len(rows) + 1, len(rows) - 1)):  # a file cut off while it was copied
        try:
            videos[index]
        except BadIndex as error:
            raise BadIndex(f"{where}, line {line}: {error}; make it anew") from None
    return videos


def write_index(rows: Iterable[dict[str, Any]]) -> bytes:
    """Content of an index of `rows`."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in (FORMAT, *rows))


def describe(facts: Facts) -> dict[str, Any]:
    """The part of a row that tells what is in a video. `facts` are of a plain file that begins with a key frame."""
    places = np.searchsorted(facts.times, facts.keys)
    row = {
        "codec": facts.codec,
        "width": facts.width,
        "height": facts.height,
        "fps": facts.fps,
        "frames": facts.frames,
        "times": [int(facts.times[0]), *_runs(np.diff(facts.times))],
        "keys": list(_runs(np.diff(places))),
    }
    if facts.packets is not None:
        setup = base64.b64encode(facts.packets.setup).decode()
        row["packets"] = {"sizes": facts.packets.sizes, "first": facts.packets.first, "setup": setup}
    return row


def _parse(row: dict[str, Any], base: str) -> Video:
    facts = None
    if "times" in row:
        first, *steps = row["times"]
        times = _sums(first, steps)
        if len(times) != row["frames"]:
            raise ValueError(f"times of {len(times)} frames, but frames = {row['frames']}")
        keys = times[_sums(0, row["keys"])]
        packets = None
        if "packets" in row:
            where = row["packets"]
            setup = base64.b64decode(where["setup"], validate=True)
            packets = Packets(_whole(where, "sizes"), _whole(where, "first"), setup)
        width, height = _whole(row, "width"), _whole(row, "height")
        if not isinstance(row["fps"], int | float) or not 0 <= row["fps"] < 1 << 31:
            raise ValueError(f"fps = {row['fps']!r}")
        facts = Facts(width, height, row["fps"], str(row["codec"]), times, keys, packets=packets)
    path, shard = row["path"], row.get("shard")
    if not (isinstance(row.get("label"), int | None) and isinstance(row.get("caption"), str | None)):
        raise ValueError("label must be an integer, caption a text")
    return Video(
        path=join(base, path if shard is None else shard),
        member="" if shard is None else path,
        offset=None if row.get("offset") is None else _whole(row, "offset"),
        size=None if row.get("bytes") is None else _whole(row, "bytes"),
        facts=facts,
        label=row.get("label"),
        caption=row.get("caption"),
        refused=str(row.get("refused", "")),
    )


def _whole(row: dict[str, Any], key: str) -> int:
    """A size, or a place in a file."""
    value = row[key]
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{key} = {value!r} is no whole number from 0 on")
    return value


def _runs(values: np.ndarray) -> Iterator[list[int]]:
    """`[value, how often]` for each stretch of equal values."""
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.empty(0, np.int64)
    for start, count in zip(starts, np.diff(np.r_[starts, len(values)]), strict=True):
        yield [int(values[start]), int(count)]


def _sums(first: int, runs: list[list[int]]) -> np.ndarray:
    """`first` and, ascending, what the runs make of it."""
    count, last = 1, first
    for step, times in runs:
        if not (type(step) is type(times) is int and step > 0 and times > 0):
            raise ValueError(f"{[step, times]} is not [step, how often]")
        count += times
        last += step * times
    if type(first) is not int or not -(1 << 62) < first <= last < 1 << 62 or count > _MOST_FRAMES:
        raise ValueError(f"{count} frames from {first} to {last}")
    if len(runs) == 1:  # as nearly always
        return np.arange(first, last + 1, runs[0][0])
    steps = np.repeat(np.array([step for step, _ in runs], np.int64), [times for _, times in runs])
    return first + np.concatenate(([0], np.cumsum(steps)))

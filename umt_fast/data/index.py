"""The videos of a data set, and their index, which stores the facts of each video so that no file must be opened.

An index is a file `index.jsonl` beside the videos or shards, as `umt_fast.data.prepare` writes it: a line with the
format, then one JSON object per video:

    path          path of the file, relative to the index; with `shard`, its name in the shard
    shard         the tar file that holds it, relative to the index; `offset`: its first byte in the tar file
    bytes         size of the file; `sha256`: of its content
    codec         as FFmpeg names it
    width height  pixels, upright
    fps           frames per second, on average
    frames        number of frames
    times         presentation times of the frames, in ticks of the file: the first, then runs [step, number of steps]
    keys          the key frames: frame 0, then runs [frames to the next, number of steps]
    packets       position of the frames' packets: one after another from byte `first` on, in presentation order; a
                  table of their sizes, 32-bit big-endian, begins at byte `sizes`; `setup` (base64) is FFmpeg's
                  extradata, which the decoder needs first
    label caption of the video, if the data set has them; `class` instead of `label`: the name of its class
    start end     the part that clips are made of, in seconds; or `first` and `count`, in frames
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import posixpath
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.video import DEFAULT_LIMITS, Facts, Limits, Packets, Part, Video, is_url
from umt_fast.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import Int64

INDEX_NAME = "index.jsonl"
STATE_NAME = ".prepare"
"""Folder beside the index with the state of `prepare`. If it exists without an index, copies are unfinished."""
FORMAT = {"format": "umt-fast video index", "version": 1}
_MOST_FRAMES = 1 << 22
"""Most frames of an indexed video: 39 hours at 30 per second. A row that claims more could exhaust the memory."""


class BadIndex(RunError, ValueError):
    """An index, or a row of it, is invalid."""


class VideoList(Sequence[Video]):
    """The videos of a run. Each is a row in the format of an index, in which only `path` is required.

    The rows stay one block of bytes that all worker processes share and that may be mapped from a file. A list of
    Python objects would be copied into each process, page by page, by the updates of reference counts.
    """

    def __init__(
        self,
        block: bytes | np.ndarray,
        bounds: Int64[np.ndarray, "n 2"],
        base: str = "",
        parse: Callable[[bytes], dict[str, Any]] = json.loads,
        confined: bool = False,
    ) -> None:
        """`bounds`: begin and end of each row in `block`, bytes; `parse` converts bytes to a row; paths are relative to
        `base`. `confined`: refuse videos whose row names a file outside `base`."""
        self._block = block
        self._bounds = bounds
        self._base = base
        self._parse = parse
        self._confined = confined
        self.may_be_remote = is_url(base) or (isinstance(block, bytes) and b"://" in block)
        self.read_timeout = DataConfig.read_timeout
        """Read timeout of the videos, seconds."""
        self.limits = DEFAULT_LIMITS
        """Limits of the videos."""
        self._confined = confined
        self.distinct: int | None = None
        """Number of different rows, if known."""
        self.known_digest: str | None = None
        """Digest of a list that is mapped from a file."""

    @classmethod
    def of_bytes(cls, rows: Iterable[bytes], base: str = "", confined: bool = False) -> VideoList:
        """A list from rows in JSON."""
        rows = list(rows)
        ends = np.cumsum([0, *map(len, rows)])
        return cls(b"".join(rows), np.stack((ends[:-1], ends[1:]), 1), base, confined=confined)

    @classmethod
    def of_rows(cls, rows: Iterable[dict[str, Any]], base: str = "") -> VideoList:
        return cls.of_bytes((json.dumps(row).encode() for row in rows), base)

    @classmethod
    def of_paths(cls, paths: Iterable[str]) -> VideoList:
        return cls.of_rows({"path": path} for path in paths)

    def __len__(self) -> int:
        return len(self._bounds)

    @overload
    def __getitem__(self, index: int) -> Video: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Video]: ...

    def __getitem__(self, index: int | slice) -> Video | Sequence[Video]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        with _as_bad_index(row):
            return _to_video(self._load(row), self._base, self.read_timeout, self.limits)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row as in an index, but with its path joined to `base`."""
        for number in range(len(self)):
            with _as_bad_index(number):
                row = self._load(number)
                place = _place(row)
                found = {**row, place: join(self._base, row[place])}
            yield found

    def count_distinct(self) -> int:
        """Number of different rows."""
        if self.distinct is None:
            self.distinct = len({self._row(index) for index in range(len(self))})
        return self.distinct

    def digest(self) -> str:
        """A digest of all rows, to recognise the list when a run is resumed."""
        if self.known_digest is not None:
            return self.known_digest
        assert isinstance(self._block, bytes)
        parts = hashlib.sha256(self._block)
        if self._parse is not json.loads:
            parts.update(repr(self._parse).encode())
        return parts.hexdigest()[:12]

    def _load(self, index: int) -> dict[str, Any]:
        row = self._parse(self._row(index))
        if self._confined and not _is_inside(row[_place(row)]):
            row["refused"] = "it lies outside the folder of its index"
        return row

    def _row(self, index: int) -> bytes:
        first, last = self._bounds[index].tolist()
        return bytes(self._block[first:last])


@contextlib.contextmanager
def _as_bad_index(row: int) -> Iterator[None]:
    """Turn the errors of a damaged row into BadIndex."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        # IndexError: it would end a `for` loop silently. RecursionError: deep nesting.
        raise BadIndex(f"row {row + 1} is not a row of an index: {error!r}") from None


def _place(row: dict[str, Any]) -> str:
    """The key of a row that names its file."""
    return "path" if row.get("shard") is None else "shard"


def _is_inside(path: str) -> bool:
    """Whether a path of an index stays in the folder of the index."""
    return not (is_url(path) or path.startswith("/") or posixpath.normpath(path).split("/")[0] == "..")


def without_query(path: str) -> str:
    """A URL without query and fragment, such as a signature; other paths unchanged."""
    return path if not is_url(path) else urllib.parse.urlsplit(path)._replace(query="", fragment="").geturl()


def suffix_of(path: str) -> str:
    """Suffix of a path or URL, in lower case, with its dot: `.tar`."""
    return posixpath.splitext(without_query(path))[1].lower()


def join(base: str, path: str) -> str:
    """Join `path` to the folder or URL `base`, unless `path` is absolute."""
    if is_url(path) or path.startswith("/"):
        return path
    if base.startswith(("http://", "https://")) or "::http" in base:  # `#`, `?` and `%` have a meaning in these
        path = urllib.parse.quote(path, errors="surrogateescape")
    return posixpath.join(base, path)


def parse_index(content: bytes, where: str) -> VideoList:
    """Read an index; `where` is its path or URL. Raises BadIndex if it is not one."""
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
    videos = VideoList.of_bytes(rows, posixpath.dirname(without_query(where)), confined=True)
    for line, index in ((2, 0), (len(rows) + 1, len(rows) - 1)):  # detects a truncated file
        try:
            videos[index]
        except BadIndex as error:
            raise BadIndex(f"{where}, line {line}: {error}; make it again") from None
    return videos


def write_index(rows: Iterable[dict[str, Any]]) -> bytes:
    """Content of an index of `rows`."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in (FORMAT, *rows))


def describe(facts: Facts) -> dict[str, Any]:
    """The keys of a row that describe the content. `facts` must be of a plain file that begins with a key frame."""
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


def describe_part(part: Part | None) -> dict[str, Any]:
    """The keys of a row that describe a part of a video."""
    if part is None:
        return {}
    found = {"start": part.start or None, "end": part.end, "first": part.first or None, "count": part.count}
    return {key: value for key, value in found.items() if value is not None}


def _to_video(row: dict[str, Any], base: str, read_timeout: float, limits: Limits) -> Video:
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
        if not isinstance(row["fps"], (int, float)) or not 0 <= row["fps"] < 1 << 31:
            raise ValueError(f"fps = {row['fps']!r}")
        facts = Facts(width, height, row["fps"], str(row["codec"]), times, keys, packets=packets)
    path, shard = row["path"], row.get("shard")
    caption = row.get("caption")
    if not (caption is None or isinstance(caption, str)):
        raise ValueError("caption must be a text")
    return Video(
        path=join(base, path if shard is None else shard),
        member="" if shard is None else path,
        offset=None if row.get("offset") is None else _whole(row, "offset"),
        size=None if row.get("bytes") is None else _whole(row, "bytes"),
        facts=facts,
        label=_label(row),
        caption=caption,
        class_name=None if row.get("class") is None else str(row["class"]),
        part=_part(row),
        read_timeout=read_timeout,
        limits=limits,
        refused=str(row.get("refused", "")),
    )


def _label(row: dict[str, Any]) -> int | None:
    label = row.get("label")
    if label is not None and (type(label) is not int or not -(1 << 63) <= label < 1 << 63):
        raise ValueError(f"label = {str(label)[:30]!r}: must be an integer of 64 bits")
    return label


def _part(row: dict[str, Any]) -> Part | None:
    if not row.keys() & {"start", "end", "first", "count"}:
        return None
    start, end, first, count = (row.get(key) for key in ("start", "end", "first", "count"))
    part = Part(float(start or 0), None if end is None else float(end), first or 0, count)
    numbers = [value for value in (part.start, part.end) if value is not None]
    frames = [value for value in (part.first, part.count) if value is not None]
    if not all(0 <= value < math.inf for value in numbers) or not all(type(n) is int and n >= 0 for n in frames):
        raise ValueError(f"{part}: must be seconds >= 0 and whole frames >= 0")
    return None if part == Part() else part


def _whole(row: dict[str, Any], key: str) -> int:
    """A size or an offset. Raises ValueError."""
    value = row[key]
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{key} = {value!r}: must be an integer >= 0")
    return value


def _runs(values: np.ndarray) -> Iterator[list[int]]:
    """`[value, length]` for each run of equal values."""
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.empty(0, np.int64)
    for start, count in zip(starts, np.diff(np.r_[starts, len(values)]), strict=True):
        yield [int(values[start]), int(count)]


def _sums(first: int, runs: list[list[int]]) -> np.ndarray:
    """`first`, then the running sums of the steps. Raises ValueError."""
    count, last = 1, first
    for step, times in runs:
        if not (type(step) is type(times) is int and step > 0 and times > 0):
            raise ValueError(f"{[step, times]} is not [step, number of steps]")
        count += times
        last += step * times
    if type(first) is not int or not -(1 << 62) < first <= last < 1 << 62 or count > _MOST_FRAMES:
        raise ValueError(f"{count} frames from {first} to {last}")
    if len(runs) == 1:  # fast path of nearly all videos
        return np.arange(first, last + 1, runs[0][0])
    steps = np.repeat(np.array([step for step, _ in runs], np.int64), [times for _, times in runs])
    return first + np.concatenate(([0], np.cumsum(steps)))

"""What `prepare` is to make and what is made already: the plan, and the journal that a killed run leaves."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from umt_fast.data.index import Video, is_url
from umt_fast.errors import RunError
from umt_fast.files import write_whole

TIME_LIMIT = 3600.0
"""Seconds that one video may take: for films too, on a slow core."""


class CannotPrepare(RunError):
    """Copies that cannot be made here, or not as asked."""


@dataclass(frozen=True)
class Item:
    """One video to copy."""

    number: int
    video: Video
    path: str
    """Of the copy, relative to the folder of copies; its name in the shard, if it goes into one."""

    @property
    def name(self) -> str:
        return self.video.name


@dataclass(frozen=True)
class Line:
    """One line of the source's list: a video, which other lines may name too, and what it says of it."""

    item: int
    label: int | None
    caption: str | None


@dataclass(frozen=True)
class Shard:
    name: str
    items: Sequence[Item]
    lines: Sequence[Line]
    """Of each item, the first."""

    @property
    def digest(self) -> str:
        """Of all that decides what is in it."""
        content = [
            (item.name, item.path, line.label, line.caption) for item, line in zip(self.items, self.lines, strict=True)
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    base: str
    """Folder that the copies' paths are relative to; of the sources."""
    items: list[Item]
    lines: list[Line]
    shards: list[Shard] = field(default_factory=list)


def make_plan(videos: Sequence[Video], source: str, per_shard: int | None) -> Plan:
    """A copy for each different video: a tree like the sources', or numbered in shards of `per_shard`."""
    numbers: dict[str, int] = {}
    distinct: list[Video] = []
    lines = []
    for video in videos:
        if video.name not in numbers:
            numbers[video.name] = len(distinct)
            distinct.append(video)
        caption = _read_caption(video) if video.caption is None else video.caption
        lines.append(Line(numbers[video.name], video.label, caption))
    places = [_place(video) for video in distinct]
    base = os.path.abspath(source) if os.path.isdir(source) else os.path.commonpath([*map(os.path.dirname, places)])
    if per_shard is None:
        paths = _copy_paths([os.path.relpath(place, base) for place in places])
        return Plan(base, [Item(i, video, paths[i]) for i, video in enumerate(distinct)], lines)
    items = [Item(i, video, f"{i:08d}.mp4") for i, video in enumerate(distinct)]
    firsts: dict[int, Line] = {}
    for line in lines:
        firsts.setdefault(line.item, line)
    shards = []
    for number, start in enumerate(range(0, len(items), per_shard)):
        part = items[start : start + per_shard]
        shards.append(Shard(f"shard-{number:06d}.tar", part, [firsts[item.number] for item in part]))
    return Plan(base, items, lines, shards)


def _read_caption(video: Video) -> str | None:
    """The text of a file `NAME.txt` beside a video file `NAME.mp4`, if there is one, as WebDataset has it."""
    if video.remote or video.offset is not None:
        return None
    try:
        text = Path(os.path.splitext(video.path)[0] + ".txt").read_text("utf-8", "replace").strip()
    except (OSError, ValueError):
        return None
    return text or None


def _place(video: Video) -> str:
    """An absolute path for what may be a URL or lie in a shard."""
    name = "/" + video.name.replace("://", "/") if is_url(video.path) else os.path.abspath(video.name)
    return posixpath.normpath(name)


def _copy_paths(paths: list[str]) -> list[str]:
    """`a/b.avi` becomes `a/b.mp4`, or `a/b.avi.mp4` where another video is or becomes `a/b.mp4`, and so on."""
    wanted = [os.path.splitext(path)[0] + ".mp4" for path in paths]
    counts = collections.Counter(wanted)
    given = set(paths)
    taken = given | counts.keys()
    found = []
    for path, copy in zip(paths, wanted, strict=True):
        if path != copy and (counts[copy] > 1 or copy in given):
            copy = f"{path}.mp4"
            while copy in taken:
                copy += ".mp4"
            taken.add(copy)
        found.append(copy)
    return found


class Journal:
    """The copies and shards that are complete, a line each, written once the file is in its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.copies: dict[str, dict[str, Any]] = {}
        """By the source's name: the index row, and the source's bytes and seconds."""
        self.shards: dict[str, dict[str, Any]] = {}
        """By file name: its size and digest, where each video begins in it, and which videos had failed."""
        content = path.read_bytes() if path.exists() else b""
        for line in content.split(b"\n")[:-1]:  # behind the last line feed is what a killed run did not finish
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                break
        self._file: BinaryIO | None = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, kind: str, name: str, content: dict[str, Any] | None) -> None:
        """Note a complete copy or shard; None: it is to be made anew."""
        if self._file is None:
            self.compact()  # an unfinished line goes
            self._file = open(self._path, "ab")  # noqa: SIM115, closed by close()
        record = {"kind": kind, "name": name, "content": content}
        self._take(record)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _take(self, record: dict[str, Any]) -> None:
        known = {"copy": self.copies, "shard": self.shards}[record["kind"]]
        if record["content"] is None:
            known.pop(record["name"], None)
        else:
            known[record["name"]] = record["content"]

    def compact(self, order: Iterable[str] = ()) -> None:
        """Write it anew, the copies named in `order` first: the same bytes however often the run was interrupted."""
        ranks = {name: rank for rank, name in enumerate(order)}
        lines = []
        for kind, known in (("copy", self.copies), ("shard", self.shards)):
            for name in sorted(known, key=lambda name: (ranks.get(name, len(ranks)), name)):
                lines.append(json.dumps({"kind": kind, "name": name, "content": known[name]}).encode() + b"\n")
        write_whole(self._path, b"".join(lines))

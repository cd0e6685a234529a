"""The plan of `prepare`: the copies to make, their names and their shards."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import posixpath
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from umt_fast.data.video import Part, Video, is_url
from umt_fast.errors import RunError

LONGEST_CAPTION = 64 << 10
"""Largest caption file beside a video, bytes; larger files are ignored."""


class CannotPrepare(RunError):
    """Copies cannot be made here or with these settings."""


@dataclass(frozen=True)
class Item:
    """One video to copy."""

    number: int
    video: Video
    path: str
    """Path of the copy, relative to the folder of copies, or its name in the shard."""

    @property
    def name(self) -> str:
        return self.video.name


@dataclass(frozen=True)
class Line:
    """One line of the source's list: video, label and caption. Several lines may name the same video."""

    item: int
    """Number of the item."""
    label: int | str | None
    """Number or name of its class."""
    caption: str | None
    part: Part | None = None


@dataclass(frozen=True)
class Shard:
    name: str
    items: Sequence[Item]
    lines: Sequence[Line]
    """The first line of each item."""

    @property
    def digest(self) -> str:
        """Digest of everything that the shard's content depends on."""
        content = [
            (item.name, item.path, line.label, line.caption) for item, line in zip(self.items, self.lines, strict=True)
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    base: str
    """Folder of the sources to which the copies' paths are relative."""
    items: list[Item]
    lines: list[Line]
    shards: list[Shard] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Reason of each video that cannot be copied, by name."""


def make_plan(videos: Sequence[Video], source: str, per_shard: int | None) -> Plan:
    """One copy of each distinct video: in a tree like the sources', or numbered in shards of `per_shard`."""
    good, failures = _sort_out(videos, os.path.abspath(source) if os.path.isdir(source) else None)
    numbers: dict[str, int] = {}
    distinct: list[Video] = []
    for video in good:
        if video.name not in numbers:
            numbers[video.name] = len(distinct)
            distinct.append(video)
    if not distinct:
        name, reason = next(iter(failures.items()))
        raise CannotPrepare(f"none of the {len(failures)} videos can be copied; {name}: {reason}")
    places = [_place(video) for video in distinct]
    base = os.path.abspath(source) if os.path.isdir(source) else os.path.commonpath([*map(os.path.dirname, places)])
    lines = []
    for video in good:
        caption = _read_caption(video, base) if video.caption is None else video.caption
        label = video.class_name if video.label is None else video.label
        lines.append(Line(numbers[video.name], label, caption, video.part))
    if per_shard is None:
        paths = _copy_paths([os.path.relpath(place, base) for place in places])
        return Plan(base, [Item(i, video, paths[i]) for i, video in enumerate(distinct)], lines, [], failures)
    items = [Item(i, video, f"{i:08d}.mp4") for i, video in enumerate(distinct)]
    firsts: dict[int, Line] = {}
    for line in lines:
        firsts.setdefault(line.item, line)
    shards = []
    for number, start in enumerate(range(0, len(items), per_shard)):
        part = items[start : start + per_shard]
        shards.append(Shard(f"shard-{number:06d}.tar", part, [firsts[item.number] for item in part]))
    return Plan(base, items, lines, shards, failures)


def _sort_out(videos: Sequence[Video], folder: str | None) -> tuple[list[Video], dict[str, str]]:
    """The videos that may be copied, and the reasons of the others. OUT has the same tree as `folder`."""
    good, failures = [], {}
    for video in videos:
        outside = folder is not None and os.path.commonpath([folder, _place(video)]) != folder
        if video.refused or outside:
            failures[video.name] = video.refused or "its copy would lie outside OUT"
        else:
            good.append(video)
    return good, failures


def _read_caption(video: Video, base: str) -> str | None:
    """The text of a file `NAME.txt` beside a video file `NAME.mp4`, as in WebDataset, or None.

    Links to outside the source folder, pipes, devices and files of more than LONGEST_CAPTION bytes are ignored.
    """
    if video.remote or video.offset is not None:
        return None
    path = os.path.splitext(video.path)[0] + ".txt"
    try:
        if os.path.islink(path):
            path = os.path.realpath(path)
            root = os.path.realpath(base)
            if os.path.commonpath([root, path]) != root:
                return None
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)  # a pipe would block
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LONGEST_CAPTION:
                return None
            content = file.read(LONGEST_CAPTION)
    except (OSError, ValueError):
        return None
    return content.decode("utf-8", "replace").strip() or None


def _place(video: Video) -> str:
    """An absolute path for a file, a URL or a member of a shard."""
    name = "/" + video.name.replace("://", "/") if is_url(video.path) else os.path.abspath(video.name)
    return posixpath.normpath(name)


def _copy_paths(paths: list[str]) -> list[str]:
    """`a/b.avi` becomes `a/b.mp4`, or `a/b.avi.mp4` if another video is or becomes `a/b.mp4`, and so on."""
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

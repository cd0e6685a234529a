"""Which videos a run reads: an index, a folder, shards, or a list in one of several forms."""

from __future__ import annotations

import codecs
import collections
import csv
import glob
import itertools
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.index import (
    DEFAULT_LIMITS,
    INDEX_NAME,
    STATE_NAME,
    Limits,
    VideoList,
    is_url,
    parse_index,
    suffix_of,
    without_query,
)
from umt_fast.data.mapped_list import MAPPED_SUFFIX, read_mapped
from umt_fast.data.shards import list_shard
from umt_fast.data.storage import read
from umt_fast.errors import RunError

_CONTAINERS = (
    ".3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .ivf .m2ts .m4v .mkv .mov .mp4 .mpe .mpeg .mpg .mpv .mts .mxf .nut "
    ".ogg .ogm .ogv .qt .rm .rmvb .ts .vob .webm .wmv .y4m"
)
_BARE_STREAMS = ".264 .265 .h264 .h265 .hevc .m1v .m2v .mjpeg .mjpg"
VIDEO_SUFFIXES = frozenset(f"{_CONTAINERS} {_BARE_STREAMS}".split())
FORMS = (
    "a line of a list is `path`, `path,label` or `path label`, with quotes around a path as in CSV; `path START TOTAL` "
    "in frames (TOTAL -1: to the end); `FOLDER TOTAL LABEL` for a folder of frames; or below a header line the columns "
    "path, label, start, end (seconds) and caption. A .json file is a list of objects with these names"
)
_COLUMNS = {
    "path": ("path", "video", "video_path", "image", "file", "filename", "file_path"),
    "label": ("label", "class", "class_id"),
    "start": ("start", "start_time", "begin"),
    "end": ("end", "end_time"),
    "caption": ("caption", "text", "sentence"),
}
_FIRST_LINES = 20
"""Lines whose files `check_files` looks for."""
_PAIR = re.compile(r"(.*?)[\s,]+([0-9]{1,9})[\s,]+(-?[0-9]{1,9})")
_PAIR_AFTER_URL = re.compile(r"(.*?)\s+([0-9]{1,9})\s+(-?[0-9]{1,9})")
_LABEL = re.compile(r"(-?[0-9]{1,18})(?:\.0*)?")


class ManifestError(RunError, ValueError):
    """A list of videos that cannot be used."""


def read_manifest(
    source: str, prefix: str = "", read_timeout: float = DataConfig.read_timeout, limits: Limits = DEFAULT_LIMITS
) -> VideoList:
    """The videos that `source` names, which is one of

    - an index that `umt_fast.data.prepare` wrote, the folder that holds it, or a list file that its --list wrote;
    - a folder of videos, searched through, linked folders once, sorted; hidden files are left out;
    - WebDataset shards: `.tar`, with `{000000..000099}`, `{a,b}`, `*` or `one.tar::other.tar` for several;
    - a pattern of video files, as `videos/*.mp4`;
    - a list: see `FORMS`. A path may hold spaces and commas; relative ones start from `prefix`, or from the working
      directory. After a URL with a query, a comma begins a label only if the query has no other comma.

    Indices, shards and lists may be URLs, and a URL that names none of them is a folder with an index. `read_timeout`:
    seconds for each read from a URL, now and of the videos later. `limits` hold for both too. Raises ManifestError if
    there is nothing to read.
    """
    videos = _read(source, os.path.expanduser(prefix), read_timeout, limits.max_bytes)
    videos.read_timeout, videos.limits = read_timeout, limits
    return videos


def check_files(videos: VideoList, source: str, prefix: str = "") -> None:
    """Raise ManifestError if none of the first local files of a list is there: it was probably read in a wrong form."""
    listed = [videos[row] for row in range(min(len(videos), _FIRST_LINES))]
    if any(video.remote or os.path.exists(video.path) for video in listed):
        return
    first = listed[0]
    label = "no label" if first.label is None else f"label {first.label}"
    raise ManifestError(
        f"none of the first {len(listed)} files of {source} is there. Its first video was read as {first.path!r}, "
        f"{label}; relative paths start from --data.prefix {prefix or os.getcwd()!r}. {FORMS}"
    )


def _read(source: str, prefix: str, read_timeout: float, max_bytes: int) -> VideoList:
    if not source:
        raise ManifestError("no training data: give --data.train a list file or a folder of videos")
    source = source if is_url(source) else os.path.expanduser(source)
    suffix = suffix_of(source)
    if suffix in (".tgz", ".gz", ".zst", ".bz2", ".xz") or source.startswith("pipe:"):
        raise ManifestError(
            f"{source}: clips are read at any place of a shard, which a compressed file or a pipe does not allow. "
            "Unpack it, and give its name or a pattern: shard-{000000..000099}.tar"
        )
    if suffix == ".tar":
        return _shards(source, read_timeout)
    if suffix == MAPPED_SUFFIX and not is_url(source):
        return read_mapped(source)
    if is_url(source) and suffix not in (".csv", ".tsv", ".json", ".jsonl", ".txt"):
        bare = without_query(source)
        source, suffix = posixpath.join(bare, INDEX_NAME) + source[len(bare) :], ".jsonl"
    if os.path.isdir(source):
        if not os.path.exists(os.path.join(source, INDEX_NAME)):
            return _folder(Path(source))
        source, suffix = os.path.join(source, INDEX_NAME), ".jsonl"
    if not is_url(source) and glob.has_magic(source) and not os.path.exists(source):
        if found := sorted(path for path in glob.glob(source, recursive=True) if suffix_of(path) in VIDEO_SUFFIXES):
            return VideoList.of_paths(found)
        raise ManifestError(f"no video matches the pattern {source}")
    if suffix in VIDEO_SUFFIXES:
        raise ManifestError(f"{source} is one video; give --data.train a list file or a folder of videos")
    try:
        content = read(source, timeout=read_timeout, max_bytes=max_bytes)
    except OSError as error:
        raise ManifestError(f"cannot read the list {source}: {error.strerror or error}") from None
    if suffix == ".jsonl":
        return parse_index(content, source)
    return _json_list(content, source, prefix) if suffix == ".json" else _list(content, source, prefix)


def _folder(path: Path) -> VideoList:
    if (path / STATE_NAME).is_dir():
        raise ManifestError(f"{path} holds unfinished copies; give umt_fast.data.prepare the same command again")
    found: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    visited: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in visited:  # links in a circle, or two to one folder
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):  # macOS writes `._a.mp4` beside `a.mp4` on foreign disks
                others["hidden"] += 1
            elif suffix in VIDEO_SUFFIXES:
                found.append(os.path.join(folder, name))
            else:
                others[suffix or "without a suffix"] += 1
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8)) + (", ..." if len(others) > 8 else "")
    if not found:
        raise ManifestError(
            f"{path} holds no video{f', but {kinds}' if kinds else ''}: looked for {' '.join(sorted(VIDEO_SUFFIXES))}"
        )
    if others and os.environ.get("RANK", "0") == "0":
        print(f"note: {path}: left out {others.total()} files of other kinds: {kinds}", file=sys.stderr)
    found.sort()
    return VideoList.of_paths(found)


def _shards(pattern: str, read_timeout: float) -> VideoList:
    shards = list(expand_shards(pattern))
    rows: list[dict[str, Any]] = []
    for shard in shards:
        try:
            rows += list_shard(shard, VIDEO_SUFFIXES, read_timeout)
        except OSError as error:
            raise ManifestError(f"cannot read the shard {shard}: {error.strerror or error}") from None
    if not rows:
        raise ManifestError(f"no video in the {len(shards)} shards of {pattern}")
    return VideoList.of_rows(rows)


def expand_shards(pattern: str) -> Iterator[str]:
    """The shards that a pattern of WebDataset names: `a-{08..11}.tar`, `{train,val}.tar`, `a*.tar`, `a.tar::b.tar`."""
    parts = pattern.split("::")
    if len(parts) > 1 and all(suffix_of(part) == ".tar" for part in parts):
        for part in parts:
            yield from expand_shards(part)
    elif braces := re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern):
        low, high, names = braces.groups()
        for name in names.split(",") if names else (f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)):
            yield from expand_shards(pattern[: braces.start()] + name + pattern[braces.end() :])
    elif not is_url(pattern) and glob.has_magic(pattern) and not os.path.exists(pattern):
        found = sorted(glob.glob(pattern))
        if not found:
            raise ManifestError(f"no shard matches the pattern {pattern}")
        yield from found
    else:
        yield pattern


def _json_list(content: bytes, source: str, prefix: str) -> VideoList:
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{source} is not a JSON list: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ManifestError(f"{source} is not a JSON list of objects that name a video. {FORMS}")
    columns = _find_columns({key: None for entry in entries for key in entry})
    if "path" not in columns:
        raise ManifestError(f"{source}: its first entry names no video: {json.dumps(entries[0])[:200]}. {FORMS}")
    rows = ({name: entry[key] for name, key in columns.items() if entry.get(key) is not None} for entry in entries)
    try:
        return VideoList.of_rows({**row, "path": _join(prefix, row["path"])} for row in rows)
    except (KeyError, TypeError, AttributeError):
        raise ManifestError(f"{source}: an entry has no path in {columns['path']!r}") from None


def _list(content: bytes, source: str, prefix: str) -> VideoList:
    # File names are bytes, and only a line feed ends a line.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise ManifestError(f"{source} begins as UTF-16 text, but is not: {error}") from None
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content:
        raise ManifestError(f"{source} is not a text list: it holds a zero byte")
    bounds = find_lines(content)
    if not len(bounds):
        raise ManifestError(f"the list {source} is empty")
    first = content[bounds[0, 0] : bounds[0, 1]].decode("utf-8", "surrogateescape").strip()
    parse = LineParser(prefix, *_header(first), _frames_first(first, prefix))
    if parse.columns:
        bounds = bounds[1:]
        if not len(bounds):
            raise ManifestError(f"the list {source} has a header and no line")
    return VideoList(content, bounds, parse=parse)


def find_lines(content: bytes) -> np.ndarray:
    """First and last byte of each line that holds more than white space, int64 [n, 2]."""
    characters = np.frombuffer(content, np.uint8)
    feeds = np.flatnonzero(characters == 10)
    starts = np.concatenate(([0], feeds + 1))
    ends = np.append(feeds, len(content))
    filled = ends > starts
    starts, ends = starts[filled], ends[filled]
    if len(starts):
        written = np.logical_or.reduceat(characters > 32, starts)
        starts, ends = starts[written], ends[written]
    return np.stack((starts, ends), 1)


@dataclass(frozen=True)
class LineParser:
    """Makes a row of a line of a list."""

    prefix: str
    columns: tuple[tuple[str, int], ...] = ()
    """Names and places of the columns, where a header names them."""
    width: int = 0
    """Number of columns in the header."""
    separator: str = ","
    total_first: bool = True
    """Whether the first of two numbers after a folder of frames is the number of frames, and the second the label."""

    def __call__(self, line: bytes) -> dict[str, Any]:
        text = line.decode("utf-8", "surrogateescape").strip()
        row = self._of_columns(text) if self.columns else self._of_line(text)
        return {**row, "path": _join(self.prefix, row["path"])}

    def _of_columns(self, text: str) -> dict[str, Any]:
        fields = next(csv.reader([text], delimiter=self.separator, skipinitialspace=True))
        path, extra = dict(self.columns)["path"], len(fields) - self.width
        if extra > 0:  # commas of a path without quotes
            fields[path : path + extra + 1] = [self.separator.join(fields[path : path + extra + 1])]
        row: dict[str, Any] = {name: fields[place] for name, place in self.columns if place < len(fields)}
        found = _LABEL.fullmatch(row.pop("label", ""))
        if found:
            row["label"] = int(found[1])
        return {name: float(value) if name in ("start", "end") else value for name, value in row.items() if value != ""}

    def _of_line(self, text: str) -> dict[str, Any]:
        if text.startswith('"'):
            fields = next(csv.reader([text], skipinitialspace=True))
            path, rest = fields[0], fields[1:]
            label = _LABEL.fullmatch(rest[-1].strip()) if rest else None
            return {"path": path, "label": int(label[1])} if label else {"path": path}
        pair = (_PAIR_AFTER_URL if is_url(text) else _PAIR).fullmatch(text)
        if pair and (suffix_of(pair[1]) in VIDEO_SUFFIXES or os.path.isdir(_join(self.prefix, pair[1]))):
            return self._of_pair(pair[1], int(pair[2]), int(pair[3]))
        for separator in (",", None):
            parts = text.rsplit(separator, 1)
            label = _LABEL.fullmatch(parts[1].strip()) if len(parts) == 2 else None
            if label and not (separator and is_url(text) and "," in parts[0].partition("?")[2]):
                return {"path": parts[0].strip(), "label": int(label[1])}
        return {"path": text}

    def _of_pair(self, path: str, one: int, other: int) -> dict[str, Any]:
        if suffix_of(path) not in VIDEO_SUFFIXES and self.total_first and other >= 0:
            return {"path": path, "count": one, "label": other}
        return {"path": path, "first": one} if other < 0 else {"path": path, "first": one, "count": other}


def _header(line: str) -> tuple[tuple[tuple[str, int], ...], int, str]:
    """Known columns, width and separator of a line that is a header; no column of one that is not."""
    separator = "\t" if "\t" in line else ","
    names = [name.strip() for name in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]
    columns = _find_columns({name: place for place, name in enumerate(names)})
    if "path" not in columns or len(columns) + ("" in names) < min(len(names), 2):
        return (), 0, separator
    return tuple((name, names.index(column)) for name, column in columns.items()), len(names), separator


def _find_columns(names: dict[str, Any]) -> dict[str, str]:
    """The table's name of each column, by our name."""
    lower = {name.lower(): name for name in reversed(names)}
    columns = {}
    for ours, known in _COLUMNS.items():
        if theirs := next((lower[name] for name in known if name in lower), None):
            columns[ours] = theirs
    return columns


def _frames_first(line: str, prefix: str) -> bool:
    """Whether `FOLDER a b` means a frames and label b, not b frames from frame a on; judged by the first folder."""
    found = _PAIR.fullmatch(line)
    if not found or not os.path.isdir(_join(prefix, found[1])):
        return True
    frames = sum(1 for _ in itertools.islice(os.scandir(_join(prefix, found[1])), 1 << 20))
    return abs(frames - int(found[2])) <= abs(frames - int(found[3]) - int(found[2]))


def _join(prefix: str, path: str) -> str:
    return path if is_url(path) else os.path.join(prefix, path)

"""The forms of a list of videos: lines of paths and labels, tables with a header, JSON."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import re
import string
from dataclasses import dataclass
from typing import Any

import numpy as np

from umt_fast.data.index import VideoList, suffix_of
from umt_fast.data.video import is_url
from umt_fast.errors import RunError

_CONTAINERS = (
    ".3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .ivf .m2ts .m4v .mkv .mov .mp4 .mpe .mpeg .mpg .mpv .mts .mxf .nut "
    ".ogg .ogm .ogv .qt .rm .rmvb .ts .vob .webm .wmv .y4m"
)
_BARE_STREAMS = ".264 .265 .h264 .h265 .hevc .m1v .m2v .mjpeg .mjpg"
VIDEO_SUFFIXES = frozenset(f"{_CONTAINERS} {_BARE_STREAMS}".split())
FORMS = (
    "a line of a list is `path`, `path,label` or `path label`, the label a number or a name, with quotes around a path "
    "as in CSV; `path START TOTAL` in frames (TOTAL -1: to the end); `FOLDER TOTAL LABEL` for a folder of frames; or "
    "below a header line the columns path, label, start, end (seconds) or start, total (frames), and caption. Columns "
    "may be separated by `;` or tabs too; a line that begins with # is a comment. A .json file is a list of objects "
    "with these names"
)
JSON_FORM = 'Give a list of objects, as [{"path": "a.mp4", "label": 3}]; label, start, end and caption may be left out'
_COLUMNS = {
    "path": ("path", "video", "video_path", "image", "file", "filename", "file_path"),
    "label": ("label", "class", "class_id"),
    "start": ("start", "start_time", "begin"),
    "end": ("end", "end_time"),
    "total": ("total", "total_frames"),
    "caption": ("caption", "text", "sentence"),
}
_PAIR = re.compile(r"[\s,;]+([0-9]{1,9})[\s,;]+(-?[0-9]{1,9})$")
_PAIR_AFTER_URL = re.compile(r"\s+([0-9]{1,9})\s+(-?[0-9]{1,9})$")
_LONGEST_PAIR = 100
"""Two numbers are searched for in this many characters at the end of a line."""
_NAMED_FRAMES = re.compile(r"(\S.*?)[\s,;]+([0-9]{1,9})[\s,;]+([^\W\d].*)")
"""Folder, number of frames and name of a class."""
_LONGEST_NAMED = 1000
"""Longest such line, characters: the time to match it grows with the square of its length."""
_LABEL = re.compile(r"(-?[0-9]{1,18})(?:\.0*)?")
_QUOTED = re.compile(r'"((?:[^"]|"")+)"\s*(?:$|([,;\s])\s*(.*))')
_COMMENT = ord("#")
_MOST_COMMAS = 16
"""Most separators at which a class name is searched for: each attempt scans the whole line."""


class ManifestError(RunError, ValueError):
    """A list of videos is invalid, missing or empty."""


def parse_json(content: bytes, source: str, prefix: str) -> VideoList:
    """The videos of a JSON list of objects. Raises ManifestError."""
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{source} is not a JSON list: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ManifestError(f"{source} is not a JSON list of objects that name a video. {JSON_FORM}")
    columns = _find_columns({key: None for entry in entries for key in entry})
    if "path" not in columns:
        raise ManifestError(f"{source}: its first entry names no video: {json.dumps(entries[0])[:200]}. {JSON_FORM}")
    rows = ({name: entry[key] for name, key in columns.items() if entry.get(key) is not None} for entry in entries)
    try:
        return VideoList.of_rows({**_named(row), "path": _join(prefix, row["path"])} for row in rows)
    except (KeyError, TypeError, AttributeError):
        raise ManifestError(f"{source}: an entry has no path in {columns['path']!r}") from None
    except ValueError as error:
        raise ManifestError(f"{source}: {error}") from None


def parse_lines(content: bytes, source: str, prefix: str) -> VideoList:
    """The videos of a text list. A line is parsed when its video is accessed, so that a long list opens at once.

    File names may be any bytes; only a line feed ends a line. Raises ManifestError for a list without a video.
    """
    content = as_utf8(content, source)
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


def as_utf8(content: bytes, source: str) -> bytes:
    """The text of a list as UTF-8, without a byte order mark. Raises ManifestError if it is not text."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise ManifestError(f"{source} begins as UTF-16 text, but is not: {error}") from None
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content:
        raise ManifestError(f"{source} is not a text list: it holds a zero byte")
    return content if b"\n" in content else content.replace(b"\r", b"\n")  # old Mac


def split_columns(line: str, separator: str = ",") -> list[str]:
    """The columns of a line of CSV. Raises ValueError for a column that is too long or has a line end inside."""
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    except csv.Error as error:
        raise ValueError(f"{line[:100]!r} is not a line of CSV: {error}") from None


def find_lines(content: bytes) -> np.ndarray:
    """Begin and end of each line that is not blank and not a comment, bytes, int64 [n, 2]."""
    characters = np.frombuffer(content, np.uint8)
    feeds = np.flatnonzero(characters == 10)
    starts = np.concatenate(([0], feeds + 1))
    ends = np.append(feeds, len(content))
    filled = ends > starts
    starts, ends = starts[filled], ends[filled]
    if len(starts):
        written = np.logical_or.reduceat(characters > 32, starts) & (characters[starts] != _COMMENT)
        starts, ends = starts[written], ends[written]
    return np.stack((starts, ends), 1)


@dataclass(frozen=True)
class LineParser:
    """Parses a line of a list into a row."""

    prefix: str
    columns: tuple[tuple[str, int], ...] = ()
    """Names and positions of the columns, if the list has a header."""
    width: int = 0
    """Number of columns in the header."""
    separator: str = ","
    total_first: bool = True
    """Whether two numbers after a folder of frames are TOTAL LABEL (true) or START TOTAL (false)."""

    def __call__(self, line: bytes) -> dict[str, Any]:
        text = line.decode("utf-8", "surrogateescape").strip()
        row = self._of_columns(text) if self.columns else self._of_line(text)
        return {**row, "path": _join(self.prefix, row["path"])}

    def _of_columns(self, text: str) -> dict[str, Any]:
        fields = split_columns(text, self.separator)
        path, extra = dict(self.columns)["path"], len(fields) - self.width
        if extra > 0:  # an unquoted path with commas
            fields[path : path + extra + 1] = [self.separator.join(fields[path : path + extra + 1])]
        row = {name: fields[place] for name, place in self.columns if place < len(fields)}
        return _named({name: value for name, value in row.items() if value != ""})

    def _of_line(self, text: str) -> dict[str, Any]:
        if quoted := _QUOTED.fullmatch(text):
            return self._of_quoted(quoted[1].replace('""', '"'), quoted[2] or ",", quoted[3] or "")
        pair = _split_pair(text)
        if pair and (suffix_of(pair[0]) in VIDEO_SUFFIXES or os.path.isdir(_join(self.prefix, pair[0]))):
            return self._of_pair(*pair)
        query = is_url(text) and "?" in text
        for separator in (",", ";", None):
            parts = text.rsplit(separator, 1)
            label = _LABEL.fullmatch(parts[1].strip()) if len(parts) == 2 else None
            if label and not (separator and query and "," in parts[0].partition("?")[2]):
                return {"path": parts[0].strip(), "label": int(label[1])}
        frames = _NAMED_FRAMES.fullmatch(text) if len(text) <= _LONGEST_NAMED else None
        if frames and suffix_of(frames[1]) not in VIDEO_SUFFIXES and os.path.isdir(_join(self.prefix, frames[1])):
            return {"path": frames[1], "count": int(frames[2]), "class": frames[3]}
        return {"path": text} if query else _split_name(text)

    def _of_quoted(self, path: str, separator: str, rest: str) -> dict[str, Any]:
        """A row of a quoted path; `rest` is two numbers, or columns of which the last is the label."""
        if (pair := _split_pair(f",{rest}")) and not pair[0] and suffix_of(path) in VIDEO_SUFFIXES:
            return self._of_pair(path, *pair[1:])
        fields = split_columns(rest, separator)
        return _named({"path": path, "label": fields[-1].strip()} if fields else {"path": path})

    def _of_pair(self, path: str, one: int, other: int) -> dict[str, Any]:
        if suffix_of(path) not in VIDEO_SUFFIXES and self.total_first and other >= 0:
            return {"path": path, "count": one, "label": other}
        return {"path": path, "first": one} if other < 0 else {"path": path, "first": one, "count": other}


def _split_pair(text: str) -> tuple[str, int, int] | None:
    """Path and numbers of a line that ends in two numbers; None for other lines."""
    found = (_PAIR_AFTER_URL if is_url(text) else _PAIR).search(text[-_LONGEST_PAIR:])
    if not found:
        return None
    path = text[: len(text) - len(found[0])].rstrip(None if is_url(text) else f"{string.whitespace},;")
    return path, int(found[1]), int(found[2])


def _split_name(text: str) -> dict[str, Any]:
    """A row of a line `path,class name`, if the path has a video's suffix and the name begins with a letter."""
    end = len(text)
    for _ in range(_MOST_COMMAS):
        end = max(text.rfind(separator, 0, end) for separator in ",;\t")
        if end < 0:
            break
        path, name = text[:end].strip(), text[end + 1 :].strip()
        if suffix_of(path) in VIDEO_SUFFIXES and suffix_of(name) not in VIDEO_SUFFIXES:
            if not name:
                return {"path": path}
            return {"path": path, "class": name} if name[0].isalpha() else {"path": text}
    return {"path": text}


def _header(line: str) -> tuple[tuple[tuple[str, int], ...], int, str]:
    """Known columns, number of columns and separator of a header line; no columns if it is not a header."""
    separator = next((character for character in "\t;" if character in line), ",")
    try:
        names = [name.strip() for name in split_columns(line, separator)]
    except ValueError:
        return (), 0, separator
    columns = _find_columns({name: place for place, name in enumerate(names)})
    if "path" not in columns or len(columns) + ("" in names) < min(len(names), 2):
        return (), 0, separator
    return tuple((name, names.index(column)) for name, column in columns.items()), len(names), separator


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """Convert named columns to a row as in an index. A label that is not a number is a class name.

    With a total, the start is a frame; otherwise start and end are seconds.
    """
    row, label = dict(row), row.get("label")
    if isinstance(label, float) and label.is_integer():  # pandas writes a column with missing values as floats
        row["label"] = int(label)
    if isinstance(label, str):
        number = _LABEL.fullmatch(row.pop("label"))
        row |= {"label": int(number[1])} if number else {"class": label}
    total = row.pop("total", None)
    if total is not None and "start" in row:
        first, count = int(row.pop("start")), int(total)
        return {**row, "first": first} | ({"count": count} if count >= 0 else {})
    return row | {name: float(row[name]) for name in ("start", "end") if isinstance(row.get(name), str)}


def _find_columns(names: dict[str, Any]) -> dict[str, str]:
    """The list's own name of each column, by our name."""
    lower = {name.lower(): name for name in reversed(names)}
    columns = {}
    for ours, known in _COLUMNS.items():
        if theirs := next((lower[name] for name in known if name in lower), None):
            columns[ours] = theirs
    return columns


def _frames_first(line: str, prefix: str) -> bool:
    """Whether `FOLDER a b` means a frames and label b, and not b frames from frame a on, judged by the first folder."""
    found = _split_pair(line)
    if not found or not os.path.isdir(_join(prefix, found[0])):
        return True
    frames = sum(1 for _ in itertools.islice(os.scandir(_join(prefix, found[0])), 1 << 20))
    return abs(frames - found[1]) <= abs(frames - found[2] - found[1])


def _join(prefix: str, path: str) -> str:
    return path if is_url(path) else os.path.join(prefix, path)

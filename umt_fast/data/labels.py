"""Lists of videos with labels: numbers, or class names, which a class file may number."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.index import INDEX_NAME, VideoList, suffix_of
from umt_fast.data.list_forms import VIDEO_SUFFIXES, as_utf8, split_columns
from umt_fast.data.manifest import read_manifest
from umt_fast.data.storage import read
from umt_fast.data.video import is_url
from umt_fast.errors import RunError
from umt_fast.files import expand_home, read_small

if TYPE_CHECKING:
    from jaxtyping import Int


def _can_be_written(name: str) -> bool:
    """Whether a name fits into a line of a class file. Undecodable bytes of a folder's name do (surrogate escapes);
    line feeds and lone surrogates from JSON do not."""
    return all(letter.isprintable() or "\udc80" <= letter <= "\udcff" for letter in name)


class LabelError(RunError, ValueError):
    """A list whose labels are missing, unknown or out of range."""


MOST_CLASSES = 1 << 20
"""Most classes that the labels of a list may imply: a wrong digit could exhaust the memory."""


@dataclass(frozen=True)
class LabelledVideos:
    """Videos, and the class of each by number."""

    videos: VideoList
    labels: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    """Names of the classes; their numbers if the list has numbers and no class file is given."""


def read_labelled(
    source: str,
    prefix: str = "",
    classes: Sequence[str] | int | None = None,
    read_timeout: float = DataConfig.read_timeout,
) -> LabelledVideos:
    """Read a source of `read_manifest` with a label for every video. Labels are checked before any video is opened.

    A line of a list is `path,label` or `path label`; in a folder, the subfolder's name is the label. `classes`: the
    class names in order of their numbers, or the number of classes; None: the classes of the list, names in
    alphabetical order. Raises LabelError naming file and line, ManifestError if there is nothing to read.
    """
    where, videos, labels = _read(source, prefix, read_timeout)
    videos.read_timeout = read_timeout
    return LabelledVideos(videos, *_number(source, where, labels, classes))


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The names in a class file, one a line, numbered from 0. Raises LabelError, also for a repeated name."""
    try:
        lines = read_small(expand_home(path)).decode("utf-8-sig", "surrogateescape").split("\n")
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise LabelError(f"cannot read the class file {path}: {reason}") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names or not all(map(_can_be_written, names)):
        raise LabelError(f"the class file {path} {'is not text' if names else 'is empty'}")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise LabelError(f"{path} has the class {name[:100]!r} twice")
    return tuple(names)


def _read(source: str, prefix: str, read_timeout: float) -> tuple[list[str], VideoList, list[str]]:
    """The location of each label in the list, for messages; the videos; the text of each label."""
    videos = read_manifest(source, prefix, read_timeout)
    labels = [str(row.get("label", row.get("class", ""))) for row in videos.rows()]
    where = [f"row {row + 1}" for row in range(len(videos))]
    path = source if is_url(source) else os.path.expanduser(source)
    copied = any(labels) or any("shard" in row for row in videos.rows())
    if os.path.isdir(path) and not (os.path.exists(os.path.join(path, INDEX_NAME)) and copied):
        where = [os.path.relpath(video.path, path) for video in videos]
        return where, videos, [place.split(os.sep)[0] if os.sep in place else "" for place in where]
    if os.path.isdir(path) or suffix_of(source) not in _LISTS:
        return where, videos, labels
    content = as_utf8(read(path, timeout=read_timeout), source).decode("utf-8", "surrogateescape")
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(content.split("\n"), 1)]
    lines = [(place, line) for place, line in lines if line and not line.startswith("#")]
    where = [place for place, _ in lines]
    if len(lines) > len(videos):  # a header
        return where[1:], videos, labels
    if all(labels):
        return where, videos, labels
    rows = list(videos.rows())
    for place, (_, line) in enumerate(lines):
        if not labels[place] and rows[place].keys() == {"path"}:  # `path name`; pre-training reads all of it as a path
            try:
                path, labels[place] = _split(line)
            except ValueError as error:
                raise LabelError(f"{source}, {where[place]}: {error}") from None
            rows[place] = {"path": path if is_url(path) else os.path.join(os.path.expanduser(prefix), path)}
    return where, VideoList.of_rows(rows), labels


_LISTS = (".csv", ".tsv", ".txt", ".list", "")
"""Suffixes of lists that have one video on each line."""


def _split(line: str) -> tuple[str, str]:
    """Path and label of a line; the label is empty if it is missing or is a video file's name."""
    if '"' in line:
        fields = split_columns(line)
        path, label = (fields[0], fields[-1]) if len(fields) > 1 else (line, "")
    else:
        path, _, label = line.rpartition(",") if "," in line else " ".join(line.rsplit(None, 1)).rpartition(" ")
    if is_url(path) and "," in path.partition("?")[2]:  # commas of a query
        return line, ""
    if not path or posixpath.splitext(label)[1].lower() in VIDEO_SUFFIXES:
        return line, ""
    return path.strip(), label.strip()


def _number(
    source: str, where: list[str], labels: list[str], classes: Sequence[str] | int | None
) -> tuple[Int[np.ndarray, " n"], tuple[str, ...]]:
    unlabelled = next((place for place, label in zip(where, labels, strict=True) if not label), None)
    if unlabelled is not None:
        raise LabelError(
            f"{source}, {unlabelled}: no label; give `path,label` or `path label`, or a folder for each class"
        )
    odd_name = next((place for place, label in enumerate(labels) if not _can_be_written(label)), None)
    if odd_name is not None:
        raise LabelError(f"{source}, {where[odd_name]}: {labels[odd_name][:100]!r} cannot be the name of a class")
    numeric = [label.isascii() and label.removeprefix("-").isdigit() for label in labels]
    names = None if classes is None or isinstance(classes, int) else tuple(classes)
    if all(numeric):
        numbers = np.array([int(label[:9]) for label in labels], np.int64)
        count = classes if isinstance(classes, int) else len(classes or ()) or int(numbers.max()) + 1
        if classes is None and count > MOST_CLASSES:
            raise LabelError(
                f"{source}, {where[int(numbers.argmax())]}: label {count - 1} would make {count} classes; say how many "
                "there are if it is right"
            )
        if numbers.min() < 0 or numbers.max() >= count:
            first = int(((numbers < 0) | (numbers >= count)).argmax())
            raise LabelError(
                f"{source}, {where[first]}: label {labels[first][:20]} is not one of {count} classes, 0 to {count - 1}"
            )
        return numbers, names or tuple(map(str, range(count)))
    if any(numeric) and names is None:
        odd = numeric.index(not numeric[0])
        raise LabelError(
            f"{source}, {where[odd]}: label {labels[odd]!r}, but {where[0]} has {labels[0]!r}: give numbers or names"
        )
    if isinstance(classes, int) and len(set(labels)) > classes:
        raise LabelError(f"{source} has {len(set(labels))} class names, but the model has {classes} classes")
    names = names or tuple(sorted(set(labels)))
    number = {name: index for index, name in enumerate(names)}
    unknown = next((place for place, label in enumerate(labels) if label not in number), None)
    if unknown is not None:
        known = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise LabelError(
            f"{source}, {where[unknown]}: no class {labels[unknown]!r} among the {len(names)} known: {known}"
        )
    return np.array([number[label] for label in labels], np.int64), names

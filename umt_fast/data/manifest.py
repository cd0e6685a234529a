"""Which videos a run reads."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umt_fast.config import DataConfig
from umt_fast.data.index import DEFAULT_LIMITS, INDEX_NAME, STATE_NAME, Limits, VideoList, is_url, parse_index
from umt_fast.data.shards import list_shard
from umt_fast.data.storage import read
from umt_fast.errors import RunError

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv .y4m".split()  # noqa: SIM905
)


class ManifestError(RunError, ValueError):
    """A list of videos that cannot be used."""


def read_manifest(
    source: str, prefix: str = "", read_timeout: float = DataConfig.read_timeout, limits: Limits = DEFAULT_LIMITS
) -> VideoList:
    """The videos that `source` names, which is one of

    - an index that `umt_fast.data.prepare` wrote, or the folder that holds it;
    - a folder of videos, searched through, linked folders once, sorted;
    - WebDataset shards: `.tar`, with `{000000..000099}` for a range of numbers;
    - a list, a video a line: `path,label` or `path label`, as UMT's are, or a path. A path may hold spaces and commas;
      relative ones start from `prefix`, or from the working directory.

    Indices, shards and lists may be URLs, and a URL that names none of them is a folder with an index. `read_timeout`:
    seconds for each read from a URL, now and of the videos later. `limits` hold likewise. Raises ManifestError if there
    is nothing to read.
    """
    videos = _read(source, os.path.expanduser(prefix), read_timeout, limits.max_bytes)
    videos.read_timeout, videos.limits = read_timeout, limits
    return videos


def _read(source: str, prefix: str, read_timeout: float, max_bytes: int) -> VideoList:
    if not source:
        raise ManifestError("no training data: give --data.train a list file or a folder of videos")
    source = source if is_url(source) else str(Path(source).expanduser())
    suffix = posixpath.splitext(source)[1].lower()
    if suffix == ".tar":
        return _shards(source, read_timeout)
    if is_url(source) and suffix not in (".csv", ".jsonl", ".txt"):
        source, suffix = posixpath.join(source, INDEX_NAME), ".jsonl"
    if os.path.isdir(source):
        if not os.path.exists(os.path.join(source, INDEX_NAME)):
            return _folder(Path(source))
        source, suffix = os.path.join(source, INDEX_NAME), ".jsonl"
    if suffix in VIDEO_SUFFIXES:
        raise ManifestError(f"{source} is one video; give --data.train a list file or a folder of videos")
    try:
        content = read(source, timeout=read_timeout, max_bytes=max_bytes)
    except OSError as error:
        raise ManifestError(f"cannot read the list {source}: {error.strerror or error}") from None
    return parse_index(content, source) if suffix == ".jsonl" else _list(content, source, prefix)


def _folder(path: Path) -> VideoList:
    if (path / STATE_NAME).is_dir():
        raise ManifestError(f"{path} holds unfinished copies; give umt_fast.data.prepare the same command again")
    found: list[str] = []
    visited: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in visited:  # links in a circle, or two to one folder
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        folders.sort()
        found += (os.path.join(folder, name) for name in names if posixpath.splitext(name)[1].lower() in VIDEO_SUFFIXES)
    found.sort()
    if not found:
        raise ManifestError(f"{path} holds no video: looked for {' '.join(sorted(VIDEO_SUFFIXES))}")
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
    """`a-{08..11}.tar` as a-08.tar, a-09.tar, a-10.tar, a-11.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        yield pattern
        return
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from expand_shards(f"{pattern[: found.start()]}{number:0{len(found[1])}d}{pattern[found.end() :]}")


def _list(content: bytes, source: str, prefix: str) -> VideoList:
    # File names are bytes, and only a line feed ends a line.
    lines = content.decode("utf-8-sig", "surrogateescape").split("\n")
    if any("\0" in line for line in lines):
        raise ManifestError(f"{source} is no text list: it holds a zero byte")
    rows = [_row(line.strip(), prefix) for line in lines if line.strip()]
    if not rows:
        raise ManifestError(f"the list {source} is empty")
    return VideoList.of_rows(rows)


def _row(line: str, prefix: str) -> dict[str, Any]:
    for separator in (",", None):
        parts = line.rsplit(separator, 1)
        if len(parts) == 2 and parts[1].strip().lstrip("-").isdigit():
            return {"path": _join(prefix, parts[0].strip()), "label": int(parts[1])}
    return {"path": _join(prefix, line)}


def _join(prefix: str, path: str) -> str:
    return path if is_url(path) else os.path.join(prefix, path)

"""The videos of a run: from an index, a folder, shards, or a list in one of several forms."""

from __future__ import annotations

import collections
import glob
import os
import posixpath
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from umt_fast.config import DataConfig
from umt_fast.data.index import INDEX_NAME, STATE_NAME, VideoList, parse_index, suffix_of, without_query
from umt_fast.data.list_forms import FORMS, VIDEO_SUFFIXES, ManifestError, parse_json, parse_lines
from umt_fast.data.mapped_list import MAPPED_SUFFIX, read_mapped
from umt_fast.data.shards import list_shard
from umt_fast.data.storage import read
from umt_fast.data.video import DEFAULT_LIMITS, Limits, Video, is_url

FIRST_LINES = 20
"""Number of first lines whose files `check_files` looks for."""


def read_manifest(
    source: str, prefix: str = "", read_timeout: float = DataConfig.read_timeout, limits: Limits = DEFAULT_LIMITS
) -> VideoList:
    """Read the videos that `source` names, which is one of

    - an index that `umt_fast.data.prepare` wrote, the folder that holds it, or a list file that its --list wrote;
    - a folder of videos, searched recursively, each linked folder once; sorted, without hidden files;
    - WebDataset shards: `.tar`, with `{000000..000099}`, `{a,b}`, `*` or `one.tar::other.tar` for several;
    - a pattern of video files, as `videos/*.mp4`;
    - a list: see `FORMS`. A path may hold spaces and commas; relative ones start from `prefix`, or from the working
      directory. After a URL with a query, a comma begins a label only if the query has no other comma.

    Indices, shards and lists may be URLs; any other URL is a folder with an index. `read_timeout` (seconds per read
    from a URL) and `limits` apply to the list and to its videos. Raises ManifestError if there is nothing to read.
    """
    videos = _read(source, os.path.expanduser(prefix), read_timeout, limits.max_bytes)
    videos.read_timeout, videos.limits = read_timeout, limits
    return videos


def check_files(videos: Sequence[Video], source: str, prefix: str = "", advice: str = "") -> None:
    """Raise ManifestError if none of the first local files of a list exists: its lines were probably misread.

    `advice` ends the message; by default it names the folder of relative paths and the forms of a list.
    """
    listed = [videos[row] for row in range(min(len(videos), FIRST_LINES))]
    if any(video.remote or os.path.exists(video.path) for video in listed):
        return
    first = listed[0]
    label = "no label" if first.label is None else f"label {first.label}"
    read = f"{first.path!r}, {label}" + (f", {first.part}" if first.part else "")
    start = f"the prefix {prefix!r}" if prefix else f"the working directory {os.getcwd()!r}, unless a prefix is given"
    advice = advice or f"relative paths start from {start}. {FORMS}"
    raise ManifestError(
        f"none of the first {len(listed)} files of {source} is there. Its first video was read as {read}; {advice}"
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
        if rows := list(shard_rows(source, VIDEO_SUFFIXES, read_timeout)):
            return VideoList.of_rows(rows)
        raise ManifestError(f"no video in the shards of {source}")
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
        raise ManifestError(f"{source} is one video; give a folder of videos or a list of them")
    try:
        content = read(source, timeout=read_timeout, max_bytes=max_bytes)
    except OSError as error:
        raise ManifestError(f"cannot read the list {source}: {error.strerror or error}") from None
    if suffix == ".jsonl":
        return parse_index(content, source)
    return parse_json(content, source, prefix) if suffix == ".json" else parse_lines(content, source, prefix)


def _folder(path: Path) -> VideoList:
    if (path / STATE_NAME).is_dir():
        raise ManifestError(f"{path} holds unfinished copies; give umt_fast.data.prepare the same command again")
    found: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    visited: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in visited:  # circular links, or two links to one folder
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):  # macOS writes `._a.mp4` beside `a.mp4` on some disks
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


def shard_rows(pattern: str, suffixes: Collection[str], read_timeout: float) -> Iterator[dict[str, Any]]:
    """The members of shards that have one of `suffixes`, as rows of an index. Raises ManifestError."""
    for shard in expand_shards(pattern):
        try:
            yield from list_shard(shard, suffixes, read_timeout)
        except OSError as error:
            raise ManifestError(f"cannot read the shard {shard}: {error.strerror or error}") from None


def expand_shards(pattern: str) -> Iterator[str]:
    """The shards that a pattern of WebDataset names: `a-{08..11}.tar`, `{train,val}.tar`, `a*.tar`, `a.tar::b.tar`."""
    parts = pattern.split("::")
    if len(parts) > 1 and all(suffix_of(part) == ".tar" for part in parts):
        for part in parts:
            yield from expand_shards(part)
    elif braces := re.search(r"\{(?:([0-9]{1,18})\.\.([0-9]{1,18})|([^{}]*,[^{}]*))\}", pattern):
        low, high, names = braces.groups()
        found: set[str] = set()  # nested braces would give some shards twice
        for name in names.split(",") if names else (f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)):
            for shard in expand_shards(pattern[: braces.start()] + name + pattern[braces.end() :]):
                if shard not in found:
                    found.add(shard)
                    yield shard
    elif not is_url(pattern) and glob.has_magic(pattern) and not os.path.exists(pattern):
        matching = sorted(glob.glob(pattern))
        if not matching:
            raise ManifestError(f"no shard matches the pattern {pattern}")
        yield from matching
    else:
        yield pattern

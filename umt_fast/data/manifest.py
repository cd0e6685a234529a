"""Which videos a run reads."""

from __future__ import annotations

import os
from pathlib import Path

from umt_fast.errors import RunError

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv .y4m".split()  # noqa: SIM905
)


class ManifestError(RunError, ValueError):
    """A list of videos that cannot be used."""


def read_manifest(source: str, prefix: str = "") -> list[str]:
    """Paths of the videos of a folder (searched through, sorted) or a list file.

    A line of a list is `path,label` or `path label`, as UMT's lists are, or a path alone; a label is an integer and
    is not used in stage 1. A path may hold spaces and commas. Relative paths start from `prefix`, or from the
    working directory. Raises ManifestError if there is nothing to read.
    """
    path = Path(source).expanduser()
    if not source:
        raise ManifestError("no training data: give --data.train a list file or a folder of videos")
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and not file.is_dir())
        found = sorted(str(file) for file in files)
        if not found:
            raise ManifestError(f"{path} holds no video: looked for {' '.join(sorted(VIDEO_SUFFIXES))}")
        return found
    if path.suffix.lower() in VIDEO_SUFFIXES:
        raise ManifestError(f"{path} is one video; give --data.train a list file or a folder of videos")
    try:
        # File names are bytes, and only a line feed ends a line.
        lines = path.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")
    except OSError as error:
        raise ManifestError(f"cannot read the list {path}: {error.strerror}") from None
    if any("\0" in line for line in lines):
        raise ManifestError(f"{path} is no text list: it holds a zero byte")
    videos = [os.path.join(prefix, _without_label(line.strip())) for line in lines if line.strip()]
    if not videos:
        raise ManifestError(f"the list {path} is empty")
    return videos


def _without_label(line: str) -> str:
    for separator in (",", None):
        parts = line.rsplit(separator, 1)
        if len(parts) == 2 and parts[1].strip().lstrip("-").isdigit():
            return parts[0].strip()
    return line

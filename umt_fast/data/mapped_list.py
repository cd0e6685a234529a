"""Lists of millions of videos that open at once: rows and their offsets in one file, mapped into memory.

All processes that map it share its pages. `python -m umt_fast.data.prepare --list SOURCE FILE.videos` writes one.

    4096 bytes   the format; then {"rows": number of rows, "distinct": number of different rows, "remote": whether any
                 row has a URL, "digest": digest of the rows}
    then         the offset of each row's first byte, and of the end of the last row: 64-bit, little-endian
    then         the rows, JSON objects as in an index, concatenated
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from umt_fast.data.index import BadIndex, VideoList
from umt_fast.data.video import is_url
from umt_fast.files import check_regular, replacing

MAPPED_SUFFIX = ".videos"
_FORMAT = b"umt-fast video list 1\n"
_HEADER = 4096
"""Bytes before the offsets."""


def write_mapped(videos: VideoList, target: str) -> int:
    """Write a list with absolute paths. Returns the number of rows. Raises OSError."""
    lengths, seen, remote, digest = [], set(), False, hashlib.sha256()
    # Rows go to a temporary file first: the size of the offset table is known only after the last row.
    with (
        replacing(Path(target), locked=False) as aside,
        tempfile.TemporaryFile(dir=aside.parent) as rows,
        open(aside, "wb") as file,
    ):
        for row in videos.rows():
            place = "path" if row.get("shard") is None else "shard"
            remote |= is_url(row[place])
            row[place] = row[place] if is_url(row[place]) else os.path.abspath(row[place])
            line = json.dumps(row).encode()
            digest.update(line)
            lengths.append(rows.write(line))
            seen.add(hash(line))
        counts = {"rows": len(lengths), "distinct": len(seen), "remote": remote, "digest": digest.hexdigest()[:12]}
        header = _FORMAT + json.dumps(counts).encode() + b"\n"
        file.write(header.ljust(_HEADER, b" "))
        file.write(np.cumsum([0, *lengths], dtype="<i8").tobytes())
        rows.seek(0)
        shutil.copyfileobj(rows, file, 1 << 20)
    return len(lengths)


def read_mapped(path: str) -> VideoList:
    """The videos of a list that `write_mapped` wrote. Raises BadIndex for any other or a truncated file."""
    try:
        check_regular(path)
        file = np.memmap(path, np.uint8, "r")
        head = bytes(file[:_HEADER])
        counts = json.loads(head[len(_FORMAT) :])
        rows = counts["rows"]
        offsets = np.frombuffer(file[_HEADER : _HEADER + 8 * (rows + 1)], "<i8")
        block = file[_HEADER + offsets.nbytes :]
        whole = rows > 0 and offsets[0] == 0 and offsets[-1] == len(block) and head.startswith(_FORMAT)
        distinct, remote, digest = int(counts["distinct"]), bool(counts["remote"]), str(counts["digest"])
    except OSError as error:
        raise BadIndex(f"cannot read the list {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        whole = False
    if not whole:
        raise BadIndex(f"{path} is not a list of umt_fast.data.prepare --list, or is cut off; make it again")
    bounds = np.lib.stride_tricks.sliding_window_view(offsets, 2)
    videos = VideoList(block, bounds)
    videos.distinct, videos.may_be_remote, videos.known_digest = distinct, remote, digest
    return videos

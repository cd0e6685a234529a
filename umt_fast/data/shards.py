"""WebDataset shards: tar files in which the files of one sample share a name up to its first dot."""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from umt_fast.config import DataConfig
from umt_fast.data.storage import read, url_size
from umt_fast.data.video import is_url
from umt_fast.files import check_regular

_LONGEST_TEXT = 1 << 20
"""Largest label, caption or header, bytes; larger members are ignored, larger headers refused."""
_LONGEST_HEADERS = 2 * _LONGEST_TEXT
"""Most bytes to read for one member besides its video: several headers may follow each other, and a sparse member
begins with a list of its parts."""
_LONGEST_NAME = 1000
"""Characters of a class name."""
_HEADERS_AT_ONCE = 64 << 10
"""Bytes per request to a remote shard: a member's header and what follows it."""


def list_shard(
    path: str, suffixes: Collection[str], read_timeout: float = DataConfig.read_timeout
) -> list[dict[str, Any]]:
    """Index rows, without facts, of the videos in a shard (file or URL) that has no index.

    Reads headers, labels (.cls) and captions (.txt, or "caption" in .json). `read_timeout`: seconds for each read from
    a URL. Raises OSError if the shard cannot be read or is not a tar file.
    """
    remote = is_url(path)
    if not remote:
        check_regular(path)
    raw = io.BufferedReader(_Remote(path, read_timeout), _HEADERS_AT_ONCE) if remote else open(path, "rb")  # noqa: SIM115
    rows: list[dict[str, Any]] = []
    beside: dict[str, dict[str, bytes]] = {}
    """Content of the small members, by key and suffix."""
    try:
        headers: Any = _Headers(raw)
        with raw, tarfile.open(fileobj=headers, mode="r:") as tar:
            for member in tar:
                headers.left = _LONGEST_HEADERS
                if member.size < 0:  # tarfile would loop forever
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                suffix = posixpath.splitext(member.name)[1].lower()
                if not member.isfile() or member.issparse():  # a sparse member's bytes are not all in the file
                    continue
                if suffix in suffixes:
                    place = {"shard": path, "offset": member.offset_data, "bytes": member.size}
                    rows.append({"path": member.name, **place})
                elif suffix in _BESIDE and member.size <= _LONGEST_TEXT and (file := tar.extractfile(member)):
                    beside.setdefault(_key(member.name), {})[suffix] = file.read()
    except (tarfile.TarError, ValueError, RecursionError, IndexError, TypeError) as error:
        # The errors after TarError come from damaged headers.
        raise OSError(f"not a tar file: {error}") from None
    for row in rows:
        row |= _described(beside.get(_key(row["path"]), {}))
    return rows


_BESIDE = (".cls", ".txt", ".json")


def _key(name: str) -> str:
    """WebDataset's key of a sample: the name up to the first dot of its last part."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _described(members: dict[str, bytes]) -> dict[str, Any]:
    """Label and caption of a sample: from .cls and .txt, or from "label" and "caption" in .json. A label that is not a
    number is a class name."""
    try:
        found = json.loads(members.get(".json", b"{}"))
    except (ValueError, RecursionError):
        found = {}
    described = found if isinstance(found, dict) else {}
    row: dict[str, Any] = {}
    label: Any = members.get(".cls", b"").decode("utf-8", "replace").strip() or described.get("label")
    if isinstance(label, str):
        if re.fullmatch(r"[0-9]{1,18}", label, re.ASCII):
            row["label"] = int(label)
        elif 0 < len(label) <= _LONGEST_NAME and label.isprintable():
            row["class"] = label
    elif type(label) is int and abs(label) < 1 << 63:
        row["label"] = label
    if ".txt" in members:
        row["caption"] = members[".txt"].decode("utf-8", "replace").strip()
    elif isinstance(described.get("caption"), str):
        row["caption"] = described["caption"]
    return row


@dataclass(frozen=True)
class Sample:
    """The members of a shard for one video."""

    key: str
    """Name without a dot, since the suffix begins at the first dot."""
    video: str
    """Path of the .mp4 file."""
    facts: dict[str, Any]
    """Content of the .json file."""
    label: int | str | None = None
    """Number or name of its class."""
    caption: str | None = None


def write_shard(path: str, samples: Iterable[Sample]) -> list[int]:
    """Write a tar file of KEY.mp4, KEY.json and, if known, KEY.cls and KEY.txt. Returns the offset of each video.

    The bytes depend only on the samples: members have no owner and no date.
    """
    offsets = []
    with open(path, "wb") as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            small = {"json": json.dumps(sample.facts, sort_keys=True)}
            if sample.label is not None:
                small["cls"] = str(sample.label)
            if sample.caption is not None:
                small["txt"] = sample.caption
            with open(sample.video, "rb") as video:
                member = tarfile.TarInfo(f"{sample.key}.mp4")
                member.size = os.fstat(video.fileno()).st_size
                offsets.append(tar.offset + tarfile.BLOCKSIZE)
                tar.addfile(member, video)
            for kind, text in small.items():
                content = text.encode("utf-8", "surrogateescape")
                member = tarfile.TarInfo(f"{sample.key}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        tar.close()
        raw.flush()
        os.fsync(raw.fileno())
    return offsets


class _Headers:
    """A file wrapper for tarfile that refuses to read huge headers, in one piece or in many."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.seek, self.tell, self.close = raw.seek, raw.tell, raw.close
        self.left = _LONGEST_HEADERS
        """Bytes that may be read for the next member."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_TEXT or size > self.left:
            raise tarfile.ReadError(f"headers of more than {_LONGEST_HEADERS} bytes")
        self.left -= size
        return self._raw.read(size)


class _Remote(io.RawIOBase):
    """A URL as a raw file; each read is one request."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url = url
        self._timeout = timeout
        self._place = 0
        self._size = url_size(url, timeout)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._size)
        if end <= self._place:
            return 0
        content = read(self._url, self._place, end, self._timeout)
        buffer[: len(content)] = content
        self._place = end
        return len(content)

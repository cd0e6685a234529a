"""The journal of `prepare`: the finished copies, so that a killed run can continue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from umt_fast.files import write_whole

_ROW: dict[str, Any] = {
    "path": str,
    "bytes": int,
    "sha256": str,
    "codec": str,
    "width": int,
    "height": int,
    "frames": int,
}
_COPY: dict[str, Any] = {"source_bytes": int, "seconds": (int, float)}
_SHARD: dict[str, Any] = {"bytes": int, "digest": str, "offsets": dict}


class Journal:
    """The finished copies and shards, one line each, written after the file is in place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.copies: dict[str, dict[str, Any]] = {}
        """Index row, and the source's bytes and seconds, by the source's name."""
        self.shards: dict[str, dict[str, Any]] = {}
        """Size and digest of each shard and the offset of each video in it, by file name."""
        content = path.read_bytes() if path.exists() else b""
        for line in content.split(b"\n")[:-1]:  # the last line may be incomplete
            try:
                self._apply(_checked(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                break
        self._file: BinaryIO | None = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, kind: str, name: str, content: dict[str, Any] | None) -> None:
        """Record a finished copy or shard; `content` None: it has to be made again."""
        if self._file is None:
            self.compact()  # drops an incomplete last line
            self._file = open(self._path, "ab")  # noqa: SIM115, closed by close()
        record = {"kind": kind, "name": name, "content": content}
        self._apply(record)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _apply(self, record: dict[str, Any]) -> None:
        known = {"copy": self.copies, "shard": self.shards}[record["kind"]]
        if record["content"] is None:
            known.pop(record["name"], None)
        else:
            known[record["name"]] = record["content"]

    def compact(self, order: Iterable[str] = ()) -> None:
        """Rewrite the file with the copies of `order` first, so that interruptions do not change its bytes."""
        ranks = {name: rank for rank, name in enumerate(order)}
        lines = []
        for kind, known in (("copy", self.copies), ("shard", self.shards)):
            for name in sorted(known, key=lambda name: (ranks.get(name, len(ranks)), name)):
                lines.append(json.dumps({"kind": kind, "name": name, "content": known[name]}).encode() + b"\n")
        write_whole(self._path, b"".join(lines))


def _checked(record: Any) -> dict[str, Any]:
    """A line of the journal. Raises ValueError for what this program does not write: the folder may be anyone's."""
    content = record["content"]
    if content is not None:
        parts = ((content["row"], _ROW), (content, _COPY)) if record["kind"] == "copy" else ((content, _SHARD),)
        for part, kinds in parts:
            for name, kind in kinds.items():
                if not isinstance(part[name], kind) or isinstance(part[name], bool):
                    raise ValueError(f"{name} = {part[name]!r}")
        if any(type(offset) is not int for offset in content.get("offsets", {}).values()):
            raise ValueError("an offset is not a number")
    return record

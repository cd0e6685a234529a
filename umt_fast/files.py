"""Folders and files that several processes, or a killed one, must not spoil."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from umt_fast.errors import RunError


class FolderInUse(RunError):
    """A folder that another process has locked."""


@contextlib.contextmanager
def lock_folder(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Make `folder` and keep others that lock it out meanwhile; the lock goes with the process.

    Raises FolderInUse if another has it and keeps it for `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise FolderInUse(f"another process is using {folder}") from None
                time.sleep(0.05)
        yield


def put_in_place(aside: Path, path: Path) -> None:
    """Rename a file that is complete to its name, so that it is there after a power cut or not at all."""
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that at any moment the old content or the new is there, whole."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_bytes(content)
    put_in_place(aside, path)

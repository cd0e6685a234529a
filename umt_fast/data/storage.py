"""Bytes of data sets: local files, and whatever fsspec opens by URL (S3, GCS, HTTP, ...)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from umt_fast.data.index import Video, is_url
from umt_fast.errors import RunError

T = TypeVar("T")

ATTEMPTS = 5
"""Tries to read from a URL, each after a pause twice as long as the one before."""
FIRST_PAUSE = 0.2
"""Seconds."""
PATIENCE = 60.0
"""Seconds that one answer may take."""


class CannotReach(RunError):
    """A URL that this installation cannot open."""


def file_size(video: Video) -> int:
    """Bytes of a local video; of one in a shard, those that are there. Raises OSError."""
    size = os.path.getsize(video.path)
    return size if video.offset is None else max(min(video.size or 0, size - video.offset), 0)


def read_video(video: Video) -> bytes:
    """The bytes of a video file, local or remote. Raises OSError and CannotReach as `read`."""
    start = video.offset or 0
    return read(video.path, start, None if video.size is None else start + video.size)


def read(path: str, start: int = 0, end: int | None = None) -> bytes:
    """Bytes `start` to `end` of a file or URL.

    Raises OSError; for a URL after ATTEMPTS, with what each of them said. An answer of another length than asked for
    is a failed attempt: connections break in the middle. Raises CannotReach for a URL of a kind that needs a package.
    """
    if not is_url(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(end - start)
    if end is not None and end <= start:
        return b""

    def attempt() -> bytes:
        content = _fetch(path, start, end)
        if end is not None and len(content) != end - start:
            raise OSError(f"{len(content)} bytes came where {end - start} were asked for")
        return content

    return _persist(path, attempt)


def url_size(url: str) -> int:
    """Bytes behind a URL. Raises as `read`."""

    def attempt() -> int:
        system, path = _open(url)
        size = _call(system, "size", path)
        if size is None:
            raise OSError("it does not say how long it is")
        return size

    return _persist(url, attempt)


def _persist(url: str, attempt: Callable[[], T]) -> T:
    reasons: list[str] = []
    for number in range(ATTEMPTS):
        if number:
            time.sleep(FIRST_PAUSE * 2 ** (number - 1))
        try:
            return attempt()
        except FileNotFoundError:
            raise FileNotFoundError(2, "no such file", url) from None
        except CannotReach:
            raise
        except Exception as error:  # each file system has errors of its own
            reasons.append(f"{type(error).__name__}: {error}")
    raise OSError(f"{url}: given up after {ATTEMPTS} attempts: {'; '.join(dict.fromkeys(reasons))}")


def _open(url: str) -> tuple[Any, str]:
    """The file system that knows a URL, and its name for it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise CannotReach(f"cannot open {url}: {error}") from None


def _fetch(url: str, start: int, end: int | None) -> bytes:
    system, path = _open(url)
    return _call(system, "cat_file", path, **({} if end is None else {"start": start, "end": end}))


def _call(system: Any, method: str, path: str, **options: Any) -> Any:
    """A file system's answer, waited for no longer than PATIENCE where that can be told."""
    from fsspec.asyn import AsyncFileSystem, sync

    if isinstance(system, AsyncFileSystem):
        return sync(system.loop, getattr(system, f"_{method}"), path, timeout=PATIENCE, **options)
    return getattr(system, method)(path, **options)

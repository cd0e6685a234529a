"""Reading the bytes of data sets: local files, and URLs through fsspec (HTTP, S3, GCS, ...)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import hashlib
import multiprocessing.util
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from umt_fast.config import DataConfig
from umt_fast.data.video import Video, is_url
from umt_fast.errors import RunError
from umt_fast.files import check_regular, expand_home

T = TypeVar("T")

ATTEMPTS = 5
"""Attempts to read from a URL; the pause before each doubles."""
FIRST_PAUSE = 0.2
"""Pause before the second attempt, seconds."""
SHARE = 0.5
"""Share of the remaining time that one attempt may take, so that a lost answer leaves time for another attempt."""


SCHEMES = frozenset({"http", "https", "s3", "gs", "gcs", "az", "abfs", "file", "memory"})
"""File systems of fsspec that a list may name. Others let a remote author choose what is opened: `reference` reads any
file and runs templates; `zip` and similar ones open their content."""
CACHES = frozenset({"simplecache", "filecache", "blockcache"})
"""Caches of fsspec that may precede one of these schemes, as in `filecache::https://...`. The copies lie in the folder
of fsspec's configuration, but are made here: fsspec's own caches write endless answers to the disk, and keep the part
of a broken download as the whole file."""
_BLOCK = 1 << 20
"""Bytes to read from an answer before its length is checked again."""
_MOST_AT_ONCE = 256 << 20
"""If the unfinished answers of a process hold more bytes than this, all but the oldest wait: a worker reads 8 ahead."""

_TOO_LATE = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)  # the same from Python 3.11 on


class CannotReach(RunError):
    """A URL is not allowed, or this installation cannot open it."""


class TooLarge(OSError):
    """A file has more bytes than `--data.max-bytes`."""


def file_size(video: Video) -> int:
    """Size of a local video in bytes; in a truncated shard, of the part that exists. Raises OSError."""
    status = os.stat(video.path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would hang, a device never end
        raise OSError("a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    size = status.st_size
    return size if video.offset is None else max(min(video.size or 0, size - video.offset), 0)


def read_video(video: Video) -> bytes:
    """The bytes of a video, local or remote. Raises OSError and CannotReach as `read` does."""
    if video.refused:
        raise OSError(video.refused)
    most = video.limits.max_bytes
    size = video.size if video.remote else file_size(video)
    if size is not None and size > most:
        raise _too_large(video.path, most)
    start = video.offset or 0
    return read(video.path, start, None if video.size is None else start + video.size, video.read_timeout, most)


def start_reading(video: Video) -> Future[bytes]:
    """Run `read_video` in its own thread, which does not delay the end of the process."""
    return _in_a_thread(functools.partial(read_video, video))


def read(
    path: str,
    start: int = 0,
    end: int | None = None,
    timeout: float = DataConfig.read_timeout,
    max_bytes: int = DataConfig.max_bytes,
) -> bytes:
    """Bytes `start` to `end` of a file or URL; without `end`, a URL may have at most `max_bytes`.

    Raises OSError; for a URL after ATTEMPTS attempts or `timeout` seconds, with the error of each attempt. An answer of
    the wrong length is a failed attempt, since connections break. Raises TooLarge, and CannotReach for a URL that is
    not allowed or needs a missing package.
    """
    if not is_url(path):
        check_regular(path)
        with open(path, "rb") as file:
            if start:
                file.seek(start)
            return file.read() if end is None else file.read(end - start)
    if end is not None and end <= start:
        return b""

    def attempt(seconds: float) -> bytes:
        most = max_bytes if end is None else end - start
        content = _fetch(path, start, end, most, seconds)
        if end is None and len(content) > most:
            raise _too_large(path, most)
        if end is not None and len(content) != most:
            hint = "; does the server answer range requests?" if len(content) > most else ""
            came = f"more than {most}" if len(content) > most else f"{len(content)}"
            raise OSError(f"{came} bytes came, but {most} were requested{hint}")
        return content

    return _persist(path, attempt, timeout)


def _too_large(path: str, most: int) -> TooLarge:
    return TooLarge(f"{path}: larger than --data.max-bytes {most}")


def url_size(url: str, timeout: float = DataConfig.read_timeout) -> int:
    """Size of a URL's content in bytes. Raises the same errors as `read`."""

    def attempt(seconds: float) -> int:
        check_url(url)
        system, path = _open(url.rpartition("::")[2])
        size = _call(system, "size", path, seconds)
        if size is None:
            raise OSError("the server does not give its size")
        return size

    return _persist(url, attempt, timeout)


def _persist(url: str, attempt: Callable[[float], T], timeout: float) -> T:
    """The result of the first successful attempt. `attempt` gets its time limit in seconds. Raises OSError."""
    reasons: list[str] = []
    begun = time.monotonic()
    for number in range(ATTEMPTS):
        if number:
            time.sleep(FIRST_PAUSE * 2 ** (number - 1))
        left = begun + timeout - time.monotonic()
        if left <= 0:
            break
        try:
            return attempt(SHARE * left)
        except FileNotFoundError:
            raise FileNotFoundError(2, "no such file", url) from None
        except (CannotReach, TooLarge):
            raise
        except _TOO_LATE:
            reasons.append(f"no answer in time (read timeout {timeout:g} s)")
            _report_silence(_server_of(url), SHARE * left)
        except Exception as error:  # each file system has its own error classes
            reasons.append(f"{type(error).__name__}: {error}")
    tried = f"{len(reasons)} attempts in {time.monotonic() - begun:.1f} s"
    raise OSError(f"{url}: given up after {tried}: {'; '.join(dict.fromkeys(reasons))}")


_silent: set[str] = set()
"""Servers that were already reported as silent."""


def _server_of(url: str) -> str:
    """The server of a URL; for a chain such as `filecache::https://...`, the server of its last part."""
    return urllib.parse.urlsplit(url.rpartition("::")[2]).netloc or url


def _report_silence(server: str, seconds: float) -> None:
    """Print why the run waits, once per server and process: it may take a minute until the video counts as bad."""
    if server not in _silent:
        _silent.add(server)
        print(f"note: {server} did not answer for {seconds:.0f} s; trying again", file=sys.stderr, flush=True)


def check_url(url: str) -> None:
    """Raise CannotReach unless a URL names an allowed file system, possibly behind caches."""
    from fsspec.registry import known_implementations, registry

    *caches, inner = url.split("::")
    scheme = inner.partition("://")[0].lower()
    # A file system that the program itself has registered is allowed.
    own = scheme in registry and scheme not in known_implementations
    if "://" not in inner or not (scheme in SCHEMES or own) or not CACHES.issuperset(caches):
        raise CannotReach(
            f"cannot open {url}: allowed are {', '.join(sorted(SCHEMES - {'memory'}))}, and of chains only "
            f"{', '.join(sorted(CACHES))} before one of them"
        )


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises CannotReach."""
    import fsspec

    check_url(url)
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise CannotReach(f"cannot open {url}: {error}") from None
    if "file" in system.protocol:
        try:
            check_regular(path)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise CannotReach(f"cannot open {url}: {error}") from None
    return system, path


def _fetch(url: str, start: int, end: int | None, most: int, timeout: float) -> bytes:
    """Bytes from `start` to `end`; without `end` at most `most` + 1, so that the caller notices a too large file."""
    if "::" in url:
        with open(_local_copy(url, most if end is None else None, timeout), "rb") as file:
            file.seek(start)
            return file.read(most + (end is None))
    system, path = _open(url)
    if "http" in system.protocol:
        from fsspec.asyn import sync

        return sync(system.loop, _get, system, path, start, end, most, timeout, timeout=timeout)
    return _call(system, "cat_file", path, timeout, start=start, end=start + most + (end is None))


def _local_copy(url: str, most: int | None, timeout: float) -> Path:
    """The local copy of a file behind a cache, `filecache::https://...`; it is made on first use.

    Raises TooLarge for a file of more than `most` bytes, or larger than its server announced.
    """
    check_url(url)
    caches, _, inner = url.rpartition("::")
    copy = (
        _cache_folder(caches.partition("::")[0]) / hashlib.sha256(inner.encode("utf-8", "surrogateescape")).hexdigest()
    )
    if copy.exists():
        return copy
    system, path = _open(inner)
    size = _call(system, "size", path, timeout)
    if size is None or (most is not None and size > most):
        raise _too_large(url, most or 0)
    aside = copy.with_name(f"{copy.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        if "http" in system.protocol:
            from fsspec.asyn import sync

            sync(system.loop, _download, system, path, aside, size, timeout, timeout=timeout)
        else:
            _call(system, "get_file", path, timeout, str(aside))
        if aside.stat().st_size != size:
            raise OSError(f"{aside.stat().st_size} bytes came of {size}")
        os.replace(aside, copy)
    finally:
        aside.unlink(missing_ok=True)
    return copy


def _cache_folder(cache: str) -> Path:
    """The folder of a cache's copies: fsspec's setting `cache_storage`, else a temporary folder of this process."""
    from fsspec.config import conf

    stored = conf.get(cache, {}).get("cache_storage", "TMP")
    folder = stored[-1] if isinstance(stored, list) else stored
    folder = expand_home(_temporary_folder() if folder == "TMP" else folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="umt-fast-copies-")
    # Not `atexit`, which worker processes do not run. A forked process must not remove the folder of its parent.
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)
    return folder


async def _blocks(system: Any, url: str, start: int, end: int | None) -> AsyncGenerator[bytes, None]:
    """The blocks of an HTTP answer, which may be endless."""
    options = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers=headers, **options) as answer:
        if answer.status == 404:
            raise FileNotFoundError(url)
        answer.raise_for_status()
        encoding = answer.headers.get("Content-Encoding", "identity")
        if encoding != "identity":  # could be a decompression bomb
            raise OSError(f"the answer is compressed ({encoding}), which was not requested")
        async for block in answer.content.iter_chunked(_BLOCK):
            yield block


async def _download(system: Any, url: str, target: Path, size: int, timeout: float) -> None:
    """Write an answer of `size` bytes to a file. Raises TooLarge for a longer one."""

    async def write() -> None:
        done = 0
        with open(target, "wb") as file:
            async with contextlib.aclosing(_blocks(system, url, 0, None)) as blocks:
                async for block in blocks:
                    done += file.write(block)
                    if done > size:
                        raise TooLarge(f"{url}: more than the {size} bytes that its server announced")

    await asyncio.wait_for(write(), timeout)


async def _get(system: Any, url: str, start: int, end: int | None, most: int, timeout: float) -> bytes:
    """An HTTP answer; reading stops when it is longer than `most` bytes."""

    async def get(content: bytearray) -> bytes:
        async with contextlib.aclosing(_blocks(system, url, start, end)) as blocks:
            async for block in blocks:
                content += block
                if len(content) > most:
                    break
                while sum(map(len, _unfinished)) > _MOST_AT_ONCE and _unfinished[0] is not content:
                    await asyncio.sleep(0.05)
        return bytes(content)

    content = bytearray()
    _unfinished.append(content)
    try:
        return await asyncio.wait_for(get(content), timeout)
    finally:
        _unfinished[:] = [other for other in _unfinished if other is not content]


_unfinished: list[bytearray] = []
"""Bytes received so far of each unfinished answer, the oldest first. All are read in fsspec's thread."""
os.register_at_fork(after_in_child=_unfinished.clear)  # fsspec's thread does not exist in a forked child


def _call(system: Any, method: str, path: str, timeout: float, *more: Any, **options: Any) -> Any:
    """Call a method of a file system. Raises TimeoutError if the answer is late."""
    from fsspec.asyn import AsyncFileSystem, sync

    if isinstance(system, AsyncFileSystem):
        return sync(system.loop, getattr(system, f"_{method}"), path, *more, timeout=timeout, **options)
    return _in_a_thread(functools.partial(getattr(system, method), path, *more, **options)).result(timeout)


def _in_a_thread(function: Callable[[], T]) -> Future[T]:
    """Run `function` in a daemon thread: unlike an executor's, it does not delay the end of the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

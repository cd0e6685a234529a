"""Folders and files that survive several writers and killed processes undamaged."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from umt_fast.errors import RunError


class FolderInUse(RunError):
    """A folder that another process has locked."""


LOCK_NAMES = (".lock", ".lock.owner")
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_SECOND_ATTEMPT = 0.2
"""Seconds to wait for the lock file at least: the first attempt only removes the file of a dead owner."""


@contextlib.contextmanager
def lock_folder(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Make `folder` and lock it against other processes. The lock ends with the process that holds it.

    On a file system without `flock`, the file `.lock.owner` with the process number is the lock. A note is printed,
    because another machine cannot see whether that process still runs. Raises FolderInUse if another process keeps
    the lock for `patience` seconds.
    """
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock: BaseFileLock = FileLock(folder / LOCK_NAMES[0], patience, fallback_to_soft=False)
    try:
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            owner = folder / LOCK_NAMES[1]
            note = f"note: the file system of {folder} has no flock; should a run on another machine be killed, "
            print(f"{note}remove {owner}", file=sys.stderr)
            lock = SoftFileLock(owner, max(patience, _SECOND_ATTEMPT))
            lock.acquire()
    except Timeout:
        raise FolderInUse(f"another process is using {folder}") from None
    try:
        yield
    finally:
        lock.release()


def expand_home(path: str | Path) -> Path:
    """`path` with a leading `~` replaced; a name such as `~a.pth` stays as it is. Raises RunError if the home folder
    is unknown: a container's user may have neither HOME nor an entry in /etc/passwd."""
    expanded = os.path.expanduser(path)
    if expanded.split(os.sep)[0] == "~":
        raise RunError(f"{path}: no home folder is known for ~; set HOME, or give the whole path")
    return Path(expanded)


_FROM_THE_SHELL = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def check_regular(path: str | Path) -> None:
    """Raise OSError if `path` is not a regular file: reading a pipe can hang, reading a device may never end.

    Pipes of the shell, `<(...)`, are allowed.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a directory", str(path))
    if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and str(path).startswith(_FROM_THE_SHELL)):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_small(path: str | Path, most: int = 64 << 20) -> bytes:
    """Content of a regular file of names or settings. Raises OSError if it has more than `most` bytes."""
    check_regular(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes", str(path))
    return content


def put_in_place(aside: Path, path: Path) -> None:
    """Sync `aside` and rename it to `path`: after a power cut, `path` is either complete or absent."""
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync folders; the file itself was synced above
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, locked: bool = True) -> Iterator[Path]:
    """Yield a temporary name to write to; it is renamed to `path` on success and removed on failure.

    At any moment `path` has the whole old content or the whole new content. `locked` says that no other process writes
    to the folder, so the temporary name can be fixed and a killed process leaves one file at most. Raises OSError that
    names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{'new' if locked else os.getpid()}")
    try:
        yield aside
        put_in_place(aside, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def _open_own(path: str, flags: int) -> int:
    """Open a file, but not through a link, which may lead elsewhere, and no pipe, which waits for a reader."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def append_whole(path: Path, content: bytes) -> None:
    """Append all of `content` to a file, or nothing. Makes the file and its folder if needed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0, opener=_open_own) as file:
        before = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise


def write_whole(path: Path, content: bytes) -> None:
    """Replace the content of a file; a reader sees the whole old or the whole new content. Raises OSError."""
    with replacing(path) as aside:
        aside.write_bytes(content)


_UNSAFE = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udc7f\udd00-\udfff]")
"""Characters to escape, including lone surrogates, except the surrogates that encode the bytes of a file name."""
_ESCAPE = re.compile(r"\\(?:([\\tnr])|x([0-9a-f]{2})|u([0-9a-f]{4}))")
_NAMED = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}
_NAMES = {character: name for name, character in _NAMED.items()}


def escape(text: str) -> str:
    r"""`text` in one column of one line: `\\`, `\t`, `\n`, `\r`, `\xNN` and `\uNNNN` for backslashes and controls."""

    def write(found: re.Match[str]) -> str:
        code = ord(found[0])
        return "\\" + (_NAMES.get(found[0]) or (f"x{code:02x}" if code < 256 else f"u{code:04x}"))

    return _UNSAFE.sub(write, text)


def unescape(text: str) -> str:
    """Inverse of `escape`."""
    return _ESCAPE.sub(lambda found: _NAMED.get(found[1]) or chr(int(found[2] or found[3], 16)), text)


def write_reasons(reasons: Iterable[tuple[str, str]]) -> bytes:
    """One line per file: escaped name, tab, escaped reason. A name that is not valid UTF-8 keeps its bytes."""
    lines = (f"{escape(name)}\t{escape(' '.join(reason.split()))}\n" for name, reason in reasons)
    return "".join(lines).encode("utf-8", "surrogateescape")


def read_reasons(content: bytes) -> dict[str, str]:
    """The reasons that `write_reasons` wrote, by file."""
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    return {unescape(name): unescape(reason) for name, _, reason in (line.partition("\t") for line in lines) if name}

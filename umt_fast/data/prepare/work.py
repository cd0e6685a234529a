"""The worker processes of `prepare`, and their tasks: copy a video, pack copies into a shard."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from umt_fast.data.index import describe
from umt_fast.data.prepare.encode import Recipe, write_copy
from umt_fast.data.prepare.plan import Item, Shard
from umt_fast.data.shards import Sample, write_shard
from umt_fast.data.shared_memory import check_locks
from umt_fast.data.storage import file_size, read_video
from umt_fast.data.video import BadVideo, Video
from umt_fast.files import put_in_place

TIME_LIMIT = 3600.0
"""Seconds for copying one video: enough for a feature-length video on a slow core."""
ATTEMPTS = 2
"""How many workers a task may kill before it counts as failed. The out-of-memory killer picks its victim at random, so
one death proves nothing."""
_NEARLY_FULL = 1 << 20  # bytes
_NOT_THE_VIDEOS_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


@dataclass(frozen=True)
class CopyTask:
    """A video to copy: the copy is written under a temporary name, then moved to `target`."""

    item: Item
    temporary: str
    target: str
    root: str
    """Folder of all copies; none may be written outside it."""
    recipe: Recipe


@dataclass(frozen=True)
class PackTask:
    """Copies to pack into a shard, which is written under a temporary name, then moved to `target`."""

    shard: Shard
    samples: list[Sample]
    names: list[str]
    """Names of the sources of the samples."""
    temporary: str
    target: str


@dataclass(frozen=True)
class Failed:
    """A task failed."""

    reason: str
    hopeless: bool = False
    """Whether the other tasks would fail too."""


def run_task(task: CopyTask | PackTask) -> dict[str, Any] | Failed:
    """Do a task in a worker process. Returns the journal's record of the new file."""
    os.environ["SVT_LOG"] = "1"  # SVT-AV1 prints to the terminal: errors only
    try:
        return _make_shard(task) if isinstance(task, PackTask) else _make_copy(task)
    except BadVideo as error:
        return Failed(str(error))
    except OSError as error:
        return Failed(error.strerror or str(error), hopeless=error.errno in _NOT_THE_VIDEOS_FAULT)
    except Exception as error:
        full = shutil.disk_usage(os.path.dirname(task.temporary)).free < _NEARLY_FULL
        return Failed("no space left" if full else f"{type(error).__name__}: {error}", hopeless=full)
    finally:
        Path(task.temporary).unlink(missing_ok=True)


def _make_copy(task: CopyTask) -> dict[str, Any]:
    video = task.item.video
    try:
        content = read_video(video) if video.remote else None
        source_bytes = file_size(video) if content is None else len(content)
    except (OSError, ValueError) as error:
        raise BadVideo(getattr(error, "strerror", None) or str(error)) from None
    facts, seconds = write_copy(video, task.temporary, task.recipe, content)
    size, digest = hash_bytes(Video(task.temporary))
    target = Path(task.target)
    make_inside(target.parent, Path(task.root))
    if not video.remote and target.exists() and target.samefile(video.path):
        raise BadVideo("its copy would replace it")
    put_in_place(Path(task.temporary), target)
    row = {"path": task.item.path, "bytes": size, "sha256": digest, **describe(facts)}
    return {"row": row, "source_bytes": source_bytes, "seconds": seconds}


def make_inside(folder: Path, root: Path) -> None:
    """Make `folder`, a subfolder of `root`. Raises BadVideo if a link leads outside `root`."""
    real = root.resolve()
    for part in [*reversed(folder.parents), folder]:
        if root in part.parents and not part.resolve().is_relative_to(real):
            raise BadVideo(f"its copy would lie outside {root}: {part} is a link")
    folder.mkdir(parents=True, exist_ok=True)
    if not folder.resolve().is_relative_to(real):
        raise BadVideo(f"its copy would lie outside {root}")


def _make_shard(task: PackTask) -> dict[str, Any]:
    offsets = write_shard(task.temporary, task.samples)
    size = os.path.getsize(task.temporary)
    put_in_place(Path(task.temporary), Path(task.target))
    return {"bytes": size, "offsets": dict(zip(task.names, offsets, strict=True))}


def hash_bytes(video: Video) -> tuple[int, str]:
    """Size and SHA-256 of a local video, also of one in a shard. Raises OSError."""
    digest, left = hashlib.sha256(), file_size(video)
    size = left
    with open(video.path, "rb") as file:
        file.seek(video.offset or 0)
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return size, digest.hexdigest()


class Died(Exception):
    """The workers that did a task were killed, crashed or took too long; the message says which."""


@dataclass(frozen=True)
class _Assignment:
    task: Any
    time_limit: float | None
    deaths: int = 0
    """Number of workers that died while doing this task."""


def progress_bar(task: str, total: int, done: int = 0) -> tqdm:
    """A bar of videos; in a file, such as a job's log, it is written every 10 seconds."""
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=done, unit="video", desc=task, smoothing=0.1, mininterval=seconds)


class Workers:
    """Runs `function(task)` for each added task in one of `size` processes. Use as a context manager.

    pebble's pool knows each worker's task, so the death of a worker costs its task only. Workers ignore Ctrl-C and end
    with this process. `function` should not raise.
    """

    def __init__(self, function: Callable[[Any], Any], size: int) -> None:
        self._function = function
        self._size = size
        self._waiting: deque[_Assignment] = deque()
        self._running: dict[Future[Any], _Assignment] = {}
        self._pool = self._new_pool()
        # tqdm would start a thread and a lock that forked workers inherit; a killed worker could keep the lock
        tqdm.monitor_interval = 0
        tqdm.set_lock(threading.RLock())

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def add(self, task: Any, first: bool = False, time_limit: float | None = None) -> None:
        """Queue a task, as the next one if `first`. After `time_limit` seconds its worker is killed."""
        (self._waiting.appendleft if first else self._waiting.append)(_Assignment(task, time_limit))

    def results(self) -> Iterator[tuple[Any, Any]]:
        """Each task with the result of `function`, as they finish; Died for a task that killed its workers.

        Tasks may be added meanwhile.
        """
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._size:
                given = self._waiting.popleft()
                self._running[self._pool.schedule(self._function, (given.task,), timeout=given.time_limit)] = given
            done, _ = concurrent.futures.wait(self._running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                given = self._running.pop(future)
                outcome = self._outcome(future, given)
                if outcome is not None:
                    yield given.task, outcome[0]

    def _outcome(self, future: Future[Any], given: _Assignment) -> tuple[Any] | None:
        """The outcome of a task, in a tuple; None if the task is tried again."""
        try:
            return (future.result(),)
        except concurrent.futures.TimeoutError:
            return (Died(f"not done after {given.time_limit:g} seconds; damaged, or in need of a longer --time-limit"),)
        except ProcessExpired as error:
            code = error.exitcode or 0
            ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except BrokenProcessPool:  # an idle worker died
            ending = "an unknown cause"
            if not self._pool.active:
                self.__exit__()
                self._pool = self._new_pool()
        if given.deaths + 1 < ATTEMPTS:
            self._waiting.appendleft(replace(given, deaths=given.deaths + 1))
            return None
        return (Died(f"its worker process ended by {ending}, {ATTEMPTS} times; is there memory enough?"),)

    def _new_pool(self) -> ProcessPool:
        check_locks()
        return ProcessPool(self._size, initializer=_begin_worker)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)

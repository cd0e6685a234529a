"""What the worker processes of `prepare` do: copy a video, pack copies into a shard."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umt_fast.data.index import BadVideo, Video, describe
from umt_fast.data.prepare.encode import Recipe, write_copy
from umt_fast.data.prepare.plan import Item, Shard
from umt_fast.data.shards import Sample, write_shard
from umt_fast.data.storage import file_size, read_video
from umt_fast.files import put_in_place

_NEARLY_FULL = 1 << 20  # bytes
_NOT_THE_VIDEOS_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


@dataclass(frozen=True)
class CopyTask:
    """A video to copy: written aside, then put in place."""

    item: Item
    aside: str
    target: str
    recipe: Recipe


@dataclass(frozen=True)
class PackTask:
    """Copies to put into a shard, likewise."""

    shard: Shard
    samples: list[Sample]
    names: list[str]
    """Of the sources that the samples are of."""
    aside: str
    target: str


@dataclass(frozen=True)
class Failed:
    """A task that could not be done."""

    reason: str
    hopeless: bool = False
    """The others would fail too."""


def work(task: CopyTask | PackTask) -> dict[str, Any] | Failed:
    """Do a task, in a process of its own. Returns the journal's record of the file that was made."""
    os.environ["SVT_LOG"] = "1"  # errors alone; it writes to the terminal by itself
    try:
        return _make_shard(task) if isinstance(task, PackTask) else _make_copy(task)
    except BadVideo as error:
        return Failed(str(error))
    except OSError as error:
        return Failed(error.strerror or str(error), hopeless=error.errno in _NOT_THE_VIDEOS_FAULT)
    except Exception as error:
        full = shutil.disk_usage(os.path.dirname(task.aside)).free < _NEARLY_FULL
        return Failed("no space left" if full else f"{type(error).__name__}: {error}", hopeless=full)
    finally:
        Path(task.aside).unlink(missing_ok=True)


def _make_copy(task: CopyTask) -> dict[str, Any]:
    video = task.item.video
    try:
        content = read_video(video) if video.remote else None
        source_bytes = file_size(video) if content is None else len(content)
    except (OSError, ValueError) as error:
        raise BadVideo(getattr(error, "strerror", None) or str(error)) from None
    facts, seconds = write_copy(video, task.aside, task.recipe, content)
    size, digest = hash_bytes(Video(task.aside))
    target = Path(task.target)
    target.parent.mkdir(parents=True, exist_ok=True)
    put_in_place(Path(task.aside), target)
    row = {"path": task.item.path, "bytes": size, "sha256": digest, **describe(facts)}
    return {"row": row, "source_bytes": source_bytes, "seconds": seconds}


def _make_shard(task: PackTask) -> dict[str, Any]:
    offsets = write_shard(task.aside, task.samples)
    size = os.path.getsize(task.aside)
    put_in_place(Path(task.aside), Path(task.target))
    return {"bytes": size, "offsets": dict(zip(task.names, offsets, strict=True))}


def hash_bytes(video: Video) -> tuple[int, str]:
    """Size of a local video, or one in a shard, and its SHA-256. Raises OSError."""
    digest, left = hashlib.sha256(), file_size(video)
    size = left
    with open(video.path, "rb") as file:
        file.seek(video.offset or 0)
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return size, digest.hexdigest()

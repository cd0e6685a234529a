"""Check the copies of `prepare`: they must decode, match the index and resemble their sources."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from umt_fast.config import DataConfig
from umt_fast.data.captions import CaptionError, read_videos
from umt_fast.data.decode import probe, read_frames
from umt_fast.data.decode.by_index import find_packets
from umt_fast.data.decode.container import each_frame
from umt_fast.data.index import INDEX_NAME, STATE_NAME, parse_index
from umt_fast.data.list_forms import ManifestError
from umt_fast.data.prepare.encode import BadCopy
from umt_fast.data.prepare.journal import Journal
from umt_fast.data.prepare.plan import CannotPrepare
from umt_fast.data.prepare.work import TIME_LIMIT, Died, Workers, hash_bytes, progress_bar
from umt_fast.data.shards import list_shard
from umt_fast.data.video import BadVideo, Facts, Video, is_url
from umt_fast.files import lock_folder

LEAST_PSNR = 20.0
"""dB of the luma, over the compared frames of a video. Copies at the default quality reached 34 to 50; a wrong video of
the same size reaches 13 at most."""
COMPARED = 8
"""Number of frames of each copy that are compared with the source."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue (BT.601). 4:2:0 halves the resolution of colour, which can cost strong colours, as in
a GIF, 20 dB."""


@dataclass(frozen=True)
class Verdict:
    checked: int
    compared: int
    """Number of copies that were compared with their sources."""
    lowest: tuple[float, str] | None
    """The lowest PSNR of a copy against its source, dB, and its name."""
    problems: list[tuple[str, str]]
    """File and problem of each bad copy."""
    note: str = ""

    @property
    def nothing_compared(self) -> bool:
        """Whether no source was found for any copy."""
        return self.checked > 0 and self.compared == 0

    def __str__(self) -> str:
        lines = [f"{file}: {problem}" for file, problem in self.problems]
        least = f", PSNR {self.lowest[0]:.1f} dB or more ({self.lowest[1]})" if self.lowest else ""
        lines.append(f"{self.checked} copies decoded, {self.compared} compared with their sources{least}")
        lines += [self.note] if self.note else []
        bad = sorted({file for file, _ in self.problems})
        if bad:
            some = " ".join(bad[:3]) + (" ..." if len(bad) > 3 else "")
            what = "file is" if len(bad) == 1 else "files are"
            lines.append(f"{len(bad)} {what} not right: rm {some}, and run prepare again as before")
        elif self.nothing_compared:
            lines.append("nothing was compared with a source: run it where prepare was run, with the sources in place")
        else:
            lines.append("all is right")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Task:
    copy: Video
    file: str
    """File name of the copy, or of its shard."""
    digest: str
    source: Video | None


def verify(
    out: str,
    workers: int | None = None,
    time_limit: float = TIME_LIMIT,
    read_timeout: float = DataConfig.read_timeout,
) -> Verdict:
    """Decode every copy in the folder `out`, and compare it with the index and, if it still exists, with its source.

    `time_limit`: seconds for checking one copy; `read_timeout`: seconds for fetching a source from a URL. Raises
    CannotPrepare if there are no finished copies, FolderInUse while they are being made.
    """
    index, state = Path(out) / INDEX_NAME, Path(out) / STATE_NAME
    if not index.is_file():
        raise CannotPrepare(f"{out} has no {INDEX_NAME}: prepare has not finished there")
    content = index.read_bytes()
    copies = parse_index(content, str(index))
    rows = [row for row in content.split(b"\n")[1:] if row.strip()]
    sources, note = (
        _find_sources(state, read_timeout) if state.is_dir() else ({}, f"no {STATE_NAME} here: sources are not known")
    )
    tasks = {}
    for copy, row in zip(copies, rows, strict=True):
        local = os.path.relpath(copy.path, out)
        tasks[copy.name] = _Task(copy, copy.path, str(json.loads(row).get("sha256")), sources.get(copy.member or local))
    problems = _check_shards(copies)
    compared, lowest = 0, None
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a folder that cannot be written to needs no lock
            held.enter_context(lock_folder(Path(out)))
        pool = held.enter_context(Workers(_work, workers or len(os.sched_getaffinity(0))))
        for task in tasks.values():
            pool.add(task, time_limit=time_limit)
        bar = held.enter_context(progress_bar("verify", len(tasks)))
        for task, outcome in pool.results():
            bar.update()
            if isinstance(outcome, Died | str):
                problems.append((task.file, f"{task.copy.member} {outcome}".strip()))
            elif outcome is not None:
                compared += 1
                lowest = min(lowest or (outcome, task.copy.name), (outcome, task.copy.name))
    return Verdict(len(tasks), compared, lowest, sorted(problems), note)


def _find_sources(state: Path, read_timeout: float) -> tuple[dict[str, Video], str]:
    """The sources that still exist, by the paths of their copies; and a note about missing sources."""
    journal = Journal(state / "journal.jsonl")
    journal.close()
    try:
        settings = json.loads((state / "settings.json").read_bytes())
        listed = read_videos(settings["SOURCE"], settings["--prefix"], read_timeout)
        videos = {video.name: video for video in listed}
    except (ManifestError, CaptionError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return {}, f"not compared with the sources: {error}"
    paths = {name: copy["row"]["path"] for name, copy in journal.copies.items()}
    there = {name for name in paths if name in videos and (is_url(name) or os.path.exists(videos[name].path))}
    gone = f"{len(paths) - len(there)} sources are gone" if len(there) < len(paths) else ""
    return {paths[name]: videos[name] for name in there}, gone


def _check_shards(copies: Sequence[Video]) -> list[tuple[str, str]]:
    """Shards whose members are not at the offsets of the index."""
    wanted: dict[str, set[tuple[Any, ...]]] = {}
    for copy in copies:
        if copy.offset is not None:
            wanted.setdefault(copy.path, set()).add((copy.member, copy.offset, copy.size))
    problems = []
    for shard, members in wanted.items():
        try:
            rows = list_shard(shard, {".mp4"})
        except OSError as error:
            problems.append((shard, f"does not read: {error.strerror or error}"))
            continue
        if {(row["path"], row["offset"], row["bytes"]) for row in rows} != members:
            problems.append((shard, "does not hold the videos of the index"))
    return problems


def _work(task: _Task) -> float | str | None:
    """PSNR of a good copy, None without a source to compare with; or the problem, as text."""
    try:
        return _check(task)
    except (BadCopy, BadVideo) as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _check(task: _Task) -> float | None:
    copy = task.copy
    if copy.refused:
        raise BadCopy(copy.refused)
    try:
        size, digest = hash_bytes(copy)
    except OSError as error:
        raise BadCopy(error.strerror or str(error)) from None
    if size != copy.size:
        raise BadCopy(f"has {size} bytes, the index says {copy.size}")
    if digest != task.digest:
        raise BadCopy(f"has SHA-256 {digest[:12]}..., the index says {task.digest[:12]}...: its bytes have changed")
    bare = replace(copy, facts=None)
    facts = probe(bare)
    assert copy.facts is not None
    _compare_facts(facts, copy.facts)
    if copy.facts.packets not in (None, find_packets(bare, facts)):
        raise BadCopy("its packets are not at the offsets of the index")
    for _ in each_frame(bare):  # raises BadVideo unless every frame decodes
        pass
    return None if task.source is None else _psnr(copy, task.source, facts.frames)


def _compare_facts(found: Facts, indexed: Facts) -> None:
    for name in ("frames", "codec", "width", "height"):
        if getattr(found, name) != getattr(indexed, name):
            raise BadCopy(f"has {name} = {getattr(found, name)}, the index says {getattr(indexed, name)}")
    for name in ("times", "keys"):
        if not np.array_equal(getattr(found, name), getattr(indexed, name)):
            raise BadCopy(f"its {name} are not those of the index")


def _psnr(copy: Video, source: Video, frames: int) -> float:
    """PSNR of the luma over evenly spaced frames; the source is resized by Pillow, not by FFmpeg as the copy was."""
    wanted = sorted({int(place) for place in np.linspace(0, frames - 1, COMPARED)})
    counts: list[int] = []

    def choose(count: int) -> list[int]:
        counts.append(count)
        return wanted if count == frames else []

    try:
        before = read_frames(source, choose)
    except BadVideo as error:
        raise BadCopy(f"its source {source.name} cannot be read any more: {error}") from None
    if counts[0] != frames:
        raise BadCopy(f"has {frames} frames, its source {source.name} {counts[0]}")
    squares = []
    for old, new in zip(before, read_frames(copy, lambda _count: wanted), strict=True):
        resized = np.asarray(Image.fromarray(old).resize(new.shape[1::-1], Image.Resampling.BICUBIC))
        squares.append(np.square((resized.astype(np.float32) - new) @ _LUMA).mean())
    psnr = float(10 * np.log10(255**2 / max(float(np.mean(squares)), 1e-2)))
    if psnr < LEAST_PSNR:
        raise BadCopy(f"is not like its source {source.name}: PSNR {psnr:.1f} dB, less than {LEAST_PSNR:g}")
    return psnr

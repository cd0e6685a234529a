"""Training copies of a data set, in which a random frame is cheap to decode, and their index.

`python -m umt_fast.data.prepare` is the command; `prepare` is the same as a function.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umt_fast.config import ConfigError, DataConfig
from umt_fast.data.captions import read_videos
from umt_fast.data.index import INDEX_NAME, STATE_NAME, describe_part, write_index
from umt_fast.data.manifest import check_files
from umt_fast.data.prepare.encode import Recipe
from umt_fast.data.prepare.journal import Journal
from umt_fast.data.prepare.plan import CannotPrepare, Item, Plan, Shard, make_plan
from umt_fast.data.prepare.work import TIME_LIMIT, CopyTask, Died, Failed, PackTask, Workers, progress_bar, run_task
from umt_fast.data.shards import Sample
from umt_fast.data.video import Limits, is_url
from umt_fast.files import LOCK_NAMES, lock_folder, write_reasons, write_whole

FAILED_NAME = "failed.txt"
_LOCK_PATIENCE = 2.0  # seconds; a killed run takes a moment to disappear


@dataclass(frozen=True)
class Settings:
    """Settings of `prepare`. Raises ConfigError for numbers out of range."""

    source: str
    """A folder of videos, a list, shards or an index, or a list with captions, as `captions.read_videos` reads them."""
    out: str
    """A new folder for the copies, or the folder of an interrupted run."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    prefix: str = ""
    """Folder that relative paths of a list start from."""
    per_shard: int | None = None
    """Videos per WebDataset shard; None: plain files."""
    workers: int | None = None
    """Processes; None: one per core."""
    read_timeout: float = DataConfig.read_timeout
    """Seconds for fetching a video from a URL."""
    time_limit: float = TIME_LIMIT
    """Seconds for copying one video."""
    max_bytes: int = DataConfig.max_bytes
    """Largest video or list that is read from a URL."""
    max_pixels: int = DataConfig.max_pixels
    """Largest frame, width times height."""

    def __post_init__(self) -> None:
        for name in ("per_shard", "workers", "max_bytes", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be an integer >= 1")
        for name in ("read_timeout", "time_limit"):
            if not getattr(self, name) > 0:  # nor NaN
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name):g}: must be a number > 0")

    @property
    def processes(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Report:
    copies: int
    fresh: int
    """Copies made by this run."""
    failures: dict[str, str]
    """Reason of each failed copy, by the source's name."""
    bytes_before: int
    bytes_after: int
    seconds: float
    """Total duration of all copies."""
    fresh_seconds: float
    elapsed: float
    workers: int
    out: str

    def __str__(self) -> str:
        there = f" ({self.copies - self.fresh} were there already)" if self.copies > self.fresh else ""
        ratio = self.bytes_after / max(self.bytes_before, 1)
        lines = [
            f"{self.copies + len(self.failures)} videos: {self.copies} copied{there}, {len(self.failures)} failed",
            f"{self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB after: {ratio:.2f} times",
            f"{self.seconds:.1f} seconds of video, {self.fresh_seconds:.1f} of them copied in {self.elapsed:.1f} s "
            f"by {self.workers} processes",
        ]
        reasons = collections.Counter(self.failures.values())
        if reasons:
            lines.append(
                f"failures, listed in {os.path.join(self.out, FAILED_NAME)} and tried again on the next start:"
            )
            lines += [f"{count:8d}  {reason}" for reason, count in reasons.most_common(10)]
            lines += [f"          and {len(reasons) - 10} other reasons"] if len(reasons) > 10 else []
        return "\n".join([*lines, f"train with: python -m train.pretrain --data.train {self.out}"])


def prepare(settings: Settings) -> Report:
    """Make the missing copies, and the index. Raises CannotPrepare, ManifestError or FolderInUse."""
    source, out = settings.source, Path(settings.out)
    if os.path.isdir(source) and Path(source).resolve() in (out.resolve(), *out.resolve().parents):
        raise CannotPrepare(f"OUT {out} lies in SOURCE {source}: the copies would be copied too; choose another")
    limits = Limits(settings.max_bytes, settings.max_pixels)
    videos = read_videos(source, settings.prefix, settings.read_timeout, limits)
    check_files(videos, source, settings.prefix)
    plan = make_plan(videos, source, settings.per_shard)
    if out.exists() and not out.is_dir():
        raise CannotPrepare(f"OUT {out} is a file; give a folder")
    try:
        if (
            out.is_dir()
            and not (out / STATE_NAME).is_dir()
            and any(file.name not in LOCK_NAMES for file in out.iterdir())
        ):
            raise CannotPrepare(f"{out} holds other files, which copies could overwrite; give a new folder")
        with lock_folder(out, _LOCK_PATIENCE):
            if (out / STATE_NAME).is_symlink():  # files in it are removed, so a link could delete other folders
                raise CannotPrepare(f"{out / STATE_NAME} is a link; give a new folder")
            (out / STATE_NAME).mkdir(exist_ok=True)
            _keep_settings(out / STATE_NAME / "settings.json", settings, plan)
            return _Preparation(settings, plan).run()
    except OSError as error:
        raise CannotPrepare(f"cannot write to {out}: {error.strerror or error}") from None


def _keep_settings(path: Path, settings: Settings, plan: Plan) -> None:
    """Store the settings in the folder. Raises CannotPrepare if the folder has other settings."""
    source = settings.source if is_url(settings.source) else os.path.abspath(settings.source)
    now = {"SOURCE": source, "--prefix": settings.prefix, "--per-shard": settings.per_shard, "base folder": plan.base}
    recipe = settings.recipe.resolved()
    settings_of_recipe = dataclasses.asdict(recipe)
    if not recipe.square_pixels:  # earlier versions did not store it
        del settings_of_recipe["square_pixels"]
    now |= {f"--{key.replace('_', '-')}": value for key, value in settings_of_recipe.items()}
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        write_whole(path, json.dumps(now, indent=1).encode())
        return
    except (ValueError, RecursionError) as error:
        raise CannotPrepare(f"{path} is damaged ({error}); choose another OUT, or remove this one") from None
    if not isinstance(before, dict):
        raise CannotPrepare(f"{path} is damaged; choose another OUT, or remove this one")
    keys = dict.fromkeys((*now, *before))
    other = [f"{key} was {before.get(key)}, now {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
    if other:
        raise CannotPrepare(
            f"{settings.out} was begun with other settings: {'; '.join(other)}. Choose another OUT, or remove it"
        )


class _Preparation:
    """One run in a locked folder."""

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self.settings = settings
        self.plan = plan
        self.out = Path(settings.out)
        self.temporary = self.out / STATE_NAME / "aside"
        self.unpacked = self.out / STATE_NAME / "copies"
        self.failures = dict(plan.failures)
        self.fresh: set[str] = set()
        shutil.rmtree(self.temporary, ignore_errors=True)  # files that a killed run was writing
        self.temporary.mkdir()
        self.unpacked.mkdir(exist_ok=True)
        self.journal = Journal(self.out / STATE_NAME / "journal.jsonl")
        self.shard_of = {item.number: shard for shard in plan.shards for item in shard.items}
        self.open_items: dict[str, set[str]] = {}
        """Videos that still have to be copied before their shard can be written, by shard."""

    def run(self) -> Report:
        started = time.monotonic()
        waiting = list(self._waiting())
        total = len(self.plan.items)
        bar = progress_bar("prepare", total, total - len(waiting))
        try:
            with bar, Workers(run_task, self.settings.processes) as pool:
                for item in waiting:
                    self._add(item, pool)
                for shard in self.plan.shards:
                    self._pack_if_complete(shard, pool)
                for task, outcome in pool.results():
                    if isinstance(outcome, Died):
                        outcome = Failed(str(outcome))
                    if isinstance(outcome, Failed) and outcome.hopeless:
                        raise CannotPrepare(self._stopped(f"cannot write to {self.out}: {outcome.reason}"))
                    if isinstance(task, PackTask):
                        self._packed(task, outcome)
                    else:
                        self._copied(task, outcome, pool)
                        bar.update()
                        bar.set_postfix({"failed": len(self.failures)} if self.failures else {})
            return self._finish(time.monotonic() - started)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._stopped("stopped")) from None
        finally:
            self.journal.close()
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _stopped(self, why: str) -> str:
        done = sum(item.name in self.journal.copies for item in self.plan.items)
        return f"{why}. {done} of {len(self.plan.items)} videos are copied; the same command continues from there"

    def _waiting(self) -> Iterator[Item]:
        """The videos without a copy. Drops the journal's records of files that are gone or changed in size."""
        for shard in self.plan.shards:
            self.open_items[shard.name] = set()
            found = self.journal.shards.get(shard.name)
            if found is not None and not (
                found["digest"] == shard.digest and _has_size(self.out / shard.name, found["bytes"])
            ):
                self.journal.add("shard", shard.name, None)
        for item in self.plan.items:
            if not self._is_copied(item):
                if item.number in self.shard_of:
                    self.open_items[self.shard_of[item.number].name].add(item.name)
                yield item

    def _is_copied(self, item: Item) -> bool:
        found = self.journal.copies.get(item.name)
        if found is None:
            return False
        shard = self.shard_of.get(item.number)
        packed = shard is not None and item.name in self.journal.shards.get(shard.name, {}).get("offsets", ())
        if found["row"]["path"] == item.path and (packed or _has_size(self._target(item), found["row"]["bytes"])):
            return True
        self.journal.add("copy", item.name, None)
        return False

    def _target(self, item: Item) -> Path:
        return (self.unpacked if self.plan.shards else self.out) / item.path

    def _add(self, item: Item, pool: Workers) -> None:
        temporary = self.temporary / f"{item.number}.mp4"
        root = self.unpacked if self.plan.shards else self.out
        task = CopyTask(item, str(temporary), str(root / item.path), str(root), self.settings.recipe)
        pool.add(task, time_limit=self.settings.time_limit)

    def _copied(self, task: CopyTask, outcome: Any, pool: Workers) -> None:
        item = task.item
        if isinstance(outcome, Failed):
            self.failures[item.name] = outcome.reason
        else:
            self.fresh.add(item.name)
            self.journal.add("copy", item.name, outcome)
        shard = self.shard_of.get(item.number)
        if shard is None:
            return
        waiting = self.open_items[shard.name]
        waiting.discard(item.name)
        if item.name in self.fresh and shard.name in self.journal.shards:
            # The video had failed before: its shard is written again, so the other copies are needed again.
            self.journal.add("shard", shard.name, None)
            for other in shard.items:
                if other.name not in waiting and other.name not in self.failures and not self._is_copied(other):
                    waiting.add(other.name)
                    self._add(other, pool)
        self._pack_if_complete(shard, pool)

    def _pack_if_complete(self, shard: Shard, pool: Workers) -> None:
        if self.open_items[shard.name] or shard.name in self.journal.shards:
            return
        names, samples = [], []
        for item, line in zip(shard.items, shard.lines, strict=True):
            if item.name in self.journal.copies:
                row = self.journal.copies[item.name]["row"]
                facts = {key: row[key] for key in ("codec", "width", "height", "fps", "frames", "sha256")}
                sample = Sample(item.path[: -len(".mp4")], str(self._target(item)), facts, line.label, line.caption)
                names.append(item.name)
                samples.append(sample)
        if samples:
            temporary, target = str(self.temporary / shard.name), str(self.out / shard.name)
            pool.add(PackTask(shard, samples, names, temporary, target), first=True)

    def _packed(self, task: PackTask, outcome: Any) -> None:
        if isinstance(outcome, Failed):
            raise CannotPrepare(self._stopped(f"cannot write {task.target}: {outcome.reason}"))
        self.journal.add("shard", task.shard.name, {**outcome, "digest": task.shard.digest})
        for sample in task.samples:
            os.unlink(sample.video)

    def _finish(self, elapsed: float) -> Report:
        rows = []
        for line in self.plan.lines:
            item = self.plan.items[line.item]
            if item.name not in self.journal.copies:
                continue
            row = dict(self.journal.copies[item.name]["row"])
            if item.number in self.shard_of:
                shard = self.shard_of[item.number].name
                row |= {"shard": shard, "offset": self.journal.shards[shard]["offsets"][item.name]}
            key = "class" if isinstance(line.label, str) else "label"
            given = {key: line.label, "caption": line.caption, **describe_part(line.part)}
            rows.append(row | {key: value for key, value in given.items() if value is not None})
        failed = [*self.plan.failures]
        failed += [item.name for item in self.plan.items if item.name in self.failures]
        if failed:
            write_whole(self.out / FAILED_NAME, write_reasons((name, self.failures[name]) for name in failed))
        else:
            (self.out / FAILED_NAME).unlink(missing_ok=True)
        if not rows:
            raise CannotPrepare(f"none of the {len(failed)} videos could be copied; see {self.out / FAILED_NAME}")
        self.journal.compact(item.name for item in self.plan.items)
        write_whole(self.out / INDEX_NAME, write_index(rows))
        shutil.rmtree(self.unpacked)
        copies = {item.name: self.journal.copies[item.name] for item in self.plan.items if item.name not in failed}
        return Report(
            copies=len(copies),
            fresh=len(self.fresh),
            failures={name: self.failures[name] for name in failed},
            bytes_before=sum(copy["source_bytes"] for copy in copies.values()),
            bytes_after=sum(copy["row"]["bytes"] for copy in copies.values()),
            seconds=sum(copy["seconds"] for copy in copies.values()),
            fresh_seconds=sum(copies[name]["seconds"] for name in self.fresh),
            elapsed=elapsed,
            workers=self.settings.processes,
            out=self.settings.out,
        )


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False

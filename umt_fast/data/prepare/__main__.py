"""Training copies of a data set, in which a random frame costs few frames of decoding, and their index.

    python -m umt_fast.data.prepare SOURCE OUT              a folder or list of videos -> OUT/index.jsonl and copies
    python -m umt_fast.data.prepare --verify OUT            decode the copies and compare them with their sources

Interrupted, it goes on where it was when the same command is given again. Train with --data.train OUT.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from umt_fast.arguments import number_above, whole_number_from
from umt_fast.config import DataConfig
from umt_fast.data.index import INDEX_NAME, STATE_NAME, is_url, write_index
from umt_fast.data.manifest import read_manifest
from umt_fast.data.prepare.encode import CODECS, Recipe
from umt_fast.data.prepare.plan import TIME_LIMIT, CannotPrepare, Item, Journal, Plan, Shard, make_plan
from umt_fast.data.prepare.pool import Died, Pool, keep_bars_here
from umt_fast.data.prepare.work import CopyTask, Failed, PackTask, work
from umt_fast.data.shards import Sample
from umt_fast.errors import RunError
from umt_fast.files import lock_folder, write_reasons, write_whole

FAILED_NAME = "failed.txt"
_LOCK_PATIENCE = 2.0  # seconds; the workers of a killed run take a moment to notice


@dataclass(frozen=True)
class Settings:
    source: str
    """A folder of videos, a list, shards or an index; what `read_manifest` takes."""
    out: str
    """A new folder for the copies, or one to go on in."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    prefix: str = ""
    """Folder that relative paths of a list start from."""
    per_shard: int | None = None
    """Videos per WebDataset shard; None: plain files."""
    workers: int | None = None
    """Processes; None: one per core."""
    read_timeout: float = DataConfig.read_timeout
    """Seconds within which a video must have come from a URL."""
    time_limit: float = TIME_LIMIT
    """Seconds that one video may take."""


@dataclass(frozen=True)
class Report:
    copies: int
    fresh: int
    """Of these, made by this run."""
    failures: dict[str, str]
    """Why there is no copy, by the source's name."""
    bytes_before: int
    bytes_after: int
    seconds: float
    """Of video."""
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
    """Make what is missing of the copies, and the index. Raises CannotPrepare, ManifestError or FolderInUse."""
    source, out = settings.source, Path(settings.out)
    if os.path.isdir(source) and Path(source).resolve() in (out.resolve(), *out.resolve().parents):
        raise CannotPrepare(f"OUT {out} lies in SOURCE {source}: the copies would be copied too; choose another")
    plan = make_plan(read_manifest(source, settings.prefix, settings.read_timeout), source, settings.per_shard)
    if out.exists() and not out.is_dir():
        raise CannotPrepare(f"OUT {out} is a file; give a folder")
    try:
        if out.is_dir() and not (out / STATE_NAME).is_dir() and any(file.name != ".lock" for file in out.iterdir()):
            raise CannotPrepare(f"{out} holds other files, which copies could overwrite; give a new folder")
        with lock_folder(out, _LOCK_PATIENCE):
            (out / STATE_NAME).mkdir(exist_ok=True)
            _keep_settings(out / STATE_NAME / "settings.json", settings, plan)
            return _Preparation(settings, plan).run()
    except OSError as error:
        raise CannotPrepare(f"cannot write to {out}: {error.strerror or error}") from None


def _keep_settings(path: Path, settings: Settings, plan: Plan) -> None:
    """Note what is made in this folder. Raises CannotPrepare when something else was begun in it."""
    source = settings.source if is_url(settings.source) else os.path.abspath(settings.source)
    now = {"SOURCE": source, "--prefix": settings.prefix, "--per-shard": settings.per_shard, "base folder": plan.base}
    recipe = settings.recipe.resolved()
    now |= {f"--{key.replace('_', '-')}": value for key, value in dataclasses.asdict(recipe).items()}
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        write_whole(path, json.dumps(now, indent=1).encode())
        return
    other = [f"{key} was {before.get(key)}, now {value}" for key, value in now.items() if before.get(key) != value]
    if other:
        raise CannotPrepare(f"{settings.out} was begun otherwise: {'; '.join(other)}. Choose another OUT, or remove it")


class _Preparation:
    """One run over the folder, which is locked."""

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self.settings = settings
        self.plan = plan
        self.out = Path(settings.out)
        self.aside = self.out / STATE_NAME / "aside"
        self.unpacked = self.out / STATE_NAME / "copies"
        self.failures: dict[str, str] = {}
        self.fresh: set[str] = set()
        shutil.rmtree(self.aside, ignore_errors=True)  # what a killed run was writing
        self.aside.mkdir()
        self.unpacked.mkdir(exist_ok=True)
        self.journal = Journal(self.out / STATE_NAME / "journal.jsonl")
        self.shard_of = {item.number: shard for shard in plan.shards for item in shard.items}
        self.open_items: dict[str, set[str]] = {}
        """By shard: the videos still to be tried before it can be written."""

    def run(self) -> Report:
        started = time.monotonic()
        workers = self.settings.workers or len(os.sched_getaffinity(0))
        waiting = list(self._waiting())
        total = len(self.plan.items)
        keep_bars_here()
        bar = tqdm(total=total, initial=total - len(waiting), unit="video", desc="prepare", smoothing=0.1)
        try:
            with bar, Pool(work, workers) as pool:
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
            return self._finish(time.monotonic() - started, workers)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._stopped("stopped")) from None
        finally:
            self.journal.close()
            shutil.rmtree(self.aside, ignore_errors=True)

    def _stopped(self, why: str) -> str:
        done = sum(item.name in self.journal.copies for item in self.plan.items)
        return f"{why}. {done} of {len(self.plan.items)} videos are copied; the same command again goes on from there"

    def _waiting(self) -> Iterator[Item]:
        """The videos without a copy. Forgets what the journal has of files that are gone or changed in size."""
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

    def _add(self, item: Item, pool: Pool) -> None:
        aside = self.aside / f"{item.number}.mp4"
        task = CopyTask(item, str(aside), str(self._target(item)), self.settings.recipe)
        pool.add(task, time_limit=self.settings.time_limit)

    def _copied(self, task: CopyTask, outcome: Any, pool: Pool) -> None:
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
            # It had failed before: the shard is to hold it too, so that the others are needed anew.
            self.journal.add("shard", shard.name, None)
            for other in shard.items:
                if other.name not in waiting and other.name not in self.failures and not self._is_copied(other):
                    waiting.add(other.name)
                    self._add(other, pool)
        self._pack_if_complete(shard, pool)

    def _pack_if_complete(self, shard: Shard, pool: Pool) -> None:
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
            aside, target = str(self.aside / shard.name), str(self.out / shard.name)
            pool.add(PackTask(shard, samples, names, aside, target), first=True)

    def _packed(self, task: PackTask, outcome: Any) -> None:
        if isinstance(outcome, Failed):
            raise CannotPrepare(self._stopped(f"cannot write {task.target}: {outcome.reason}"))
        self.journal.add("shard", task.shard.name, {**outcome, "digest": task.shard.digest})
        for sample in task.samples:
            os.unlink(sample.video)

    def _finish(self, elapsed: float, workers: int) -> Report:
        rows = []
        for line in self.plan.lines:
            item = self.plan.items[line.item]
            if item.name not in self.journal.copies:
                continue
            row = dict(self.journal.copies[item.name]["row"])
            if item.number in self.shard_of:
                shard = self.shard_of[item.number].name
                row |= {"shard": shard, "offset": self.journal.shards[shard]["offsets"][item.name]}
            said = {"label": line.label, "caption": line.caption}
            rows.append(row | {key: value for key, value in said.items() if value is not None})
        failed = [item.name for item in self.plan.items if item.name in self.failures]
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
            workers=workers,
            out=self.settings.out,
        )


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "umt_fast.data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive, seconds = whole_number_from(1), number_above(0)
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="a folder of videos, a list, shards or an index")
    parser.add_argument("out", metavar="OUT", nargs="?", help="a new folder for the copies, or one to go on in")
    parser.add_argument("--codec", choices=list(CODECS), default="h264", help="default %(default)s")
    parser.add_argument("--short-side", type=int, default=256, help="pixels, default %(default)s; none is enlarged")
    parser.add_argument("--gop", type=int, help="frames from one key frame to the next, 1 to 8; default 4, mjpeg 1")
    parser.add_argument("--quality", type=int, help="the encoder's own scale, smaller is better; default by codec")
    parser.add_argument("--per-shard", type=positive, help="write WebDataset shards of so many videos; default: files")
    parser.add_argument("--prefix", default="", help="folder that relative paths of a list start from")
    parser.add_argument("--workers", type=positive, help="processes; default: one per core")
    parser.add_argument(
        "--time-limit",
        type=seconds,
        default=TIME_LIMIT,
        help="seconds that a video may take, default %(default)g",
    )
    parser.add_argument(
        "--read-timeout",
        type=seconds,
        default=DataConfig.read_timeout,
        help="seconds within which a video must have come from a URL, default %(default)g",
    )
    parser.add_argument("--verify", metavar="OUT", help="check the copies in OUT and compare them with their sources")
    found = parser.parse_args(arguments)
    if (found.verify is None) == (found.out is None):
        parser.error("give SOURCE and OUT, or --verify OUT")
    return found


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts what runs in the background deaf to it
        signal.signal(number, _interrupt)
    try:
        if given.verify is not None:
            from umt_fast.data.prepare.verify import verify

            found = verify(given.verify, given.workers, given.time_limit, given.read_timeout)
            print(found)
            sys.exit(1 if found.problems else 0)
        recipe = Recipe(given.codec, given.short_side, given.gop, given.quality)
        limits = {"read_timeout": given.read_timeout, "time_limit": given.time_limit}
        print(
            prepare(Settings(given.source, given.out, recipe, given.prefix, given.per_shard, given.workers, **limits))
        )
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

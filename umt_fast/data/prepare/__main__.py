"""Training copies of a data set, in which a random frame is cheap to decode, and their index.

    python -m umt_fast.data.prepare SOURCE OUT              a folder or list of videos -> OUT/index.jsonl and copies
    python -m umt_fast.data.prepare --verify OUT            decode the copies and compare them with their sources
    python -m umt_fast.data.prepare --list SOURCE FILE.videos        no copies: a list of millions that opens at once

The same command continues an interrupted run. Train with --data.train OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from types import FrameType

from umt_fast.config import ConfigError
from umt_fast.data.manifest import check_files, read_manifest
from umt_fast.data.mapped_list import MAPPED_SUFFIX, write_mapped
from umt_fast.data.prepare import Settings, prepare
from umt_fast.data.prepare.encode import CODECS, Recipe
from umt_fast.data.prepare.verify import verify
from umt_fast.errors import RunError


def parse(arguments: list[str] | None = None) -> tuple[Settings, str]:
    """The settings, and the job: `copy`, `verify` the copies in `out`, or write a `list` to `out`."""
    parser = argparse.ArgumentParser(
        "python -m umt_fast.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the dataclasses have the defaults
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", help="a folder of videos, a list, shards or an index")
    add("out", metavar="OUT", nargs="?", help="a new folder for the copies, or that of an interrupted run")
    add("--codec", choices=list(CODECS), help=f"default {Recipe.codec}")
    add("--short-side", type=int, help=f"pixels, default {Recipe.short_side}; no video is enlarged")
    add("--gop", type=int, help="frames from one key frame to the next, 1 to 8; default 4, mjpeg 1")
    add("--quality", type=int, help="the encoder's own scale, smaller is better; default by codec")
    add("--square-pixels", action="store_true", help="widen videos with non-square pixels; default: as they are stored")
    add("--per-shard", type=int, help="write WebDataset shards of this many videos; default: files")
    add("--prefix", help="folder that relative paths of a list start from")
    add("--workers", type=int, help="processes; default: one per core")
    add("--time-limit", type=float, help=f"seconds for copying one video, default {Settings.time_limit:g}")
    add(
        "--read-timeout",
        type=float,
        help=f"seconds for fetching a video from a URL, default {Settings.read_timeout:g}",
    )
    add(
        "--max-bytes",
        type=int,
        help=f"most bytes of a video or list from a URL, default {Settings.max_bytes >> 20} MiB",
    )
    add("--max-pixels", type=int, help=f"largest frame, pixels, default {Settings.max_pixels} (8K)")
    add("--verify", metavar="OUT", help="check the copies in OUT and compare them with their sources")
    add(
        "--list",
        action="store_true",
        help=f"write a list OUT, *{MAPPED_SUFFIX}, for --data.train; no copies",
    )
    given = vars(parser.parse_args(arguments))
    lists = given.pop("list", False)
    if ("verify" in given) == ("out" in given):
        parser.error("give SOURCE and OUT, or --verify OUT")
    job = "verify" if "verify" in given else "list" if lists else "copy"
    if job == "list" and not given["out"].endswith(MAPPED_SUFFIX):
        parser.error(f"--list writes a file: give it a name that ends in {MAPPED_SUFFIX}")
    if job == "verify":
        given |= {"source": "", "out": given.pop("verify")}
    recipe = {field.name: given.pop(field.name) for field in dataclasses.fields(Recipe) if field.name in given}
    try:
        return Settings(recipe=Recipe(**recipe), **given), job
    except ConfigError as error:
        parser.error(str(error))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    settings, job = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, _interrupt)
    try:
        if job == "copy":
            print(prepare(settings))
            return
        if job == "list":
            videos = read_manifest(settings.source, settings.prefix, settings.read_timeout)
            check_files(videos, settings.source, settings.prefix)
            print(f"{write_mapped(videos, settings.out)} videos; train with: --data.train {settings.out}")
            return
        found = verify(settings.out, settings.processes, settings.time_limit, settings.read_timeout)
        print(found)
        sys.exit(1 if found.problems or found.nothing_compared else 0)
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""Start and end of every training program: recipe and flags, processes, lock of the folder, exit status."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from umt_fast import recipe
from umt_fast.config import ConfigError
from umt_fast.errors import RunError
from umt_fast.files import expand_home
from umt_fast.packages import explain_missing
from umt_fast.run import world as processes
from umt_fast.run.checkpoint import flatten
from umt_fast.run.folder import hold_folder
from umt_fast.run.lost_rank import end_without, is_lost_rank
from umt_fast.run.stop import EXIT_STOPPED
from umt_fast.run.world import World

T = TypeVar("T")


def read_settings(
    kind: type[T] | Mapping[str, type[T]],
    recipes: Path,
    default: str,
    prog: str,
    description: str,
    arguments: list[str] | None,
) -> tuple[T, argparse.Namespace]:
    """The settings of the recipe in --recipe, overridden by the flags; and the values of --dry-run and --gpu-memory.

    `kind` is the class of the settings, or a class for each value of the recipe's `objective` (the first is the
    default). `recipes` is the folder of the job's recipes, `default` the name of one. Raises ConfigError.
    """
    first = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=default)
    first.add_argument("--dry-run", action="store_true")
    first.add_argument("--gpu-memory", type=float)
    named, flags = first.parse_known_args(arguments)
    if named.gpu_memory is not None and not (named.dry_run and 0 < named.gpu_memory < math.inf):
        raise ConfigError(f"--gpu-memory {named.gpu_memory:g}: give GiB above 0, with --dry-run")
    path = expand_home(named.recipe) if named.recipe.endswith(".toml") else recipes / f"{named.recipe}.toml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in recipes.glob("*.toml")))
        raise ConfigError(f"no recipe {named.recipe}; there are {known}, or give the path of a .toml file")
    if isinstance(kind, Mapping):
        objective = recipe.read_key(path, "objective") or next(iter(kind))
        if objective not in kind:
            raise ConfigError(f"{path}: objective = {objective!r}; there are {', '.join(kind)}")
        kind = kind[objective]
    return recipe.parse(kind, path, flags, prog, description), named


def read_flag(arguments: list[str] | None, flag: str, default: str) -> tuple[str, list[str]]:
    """The value of one flag, which decides how the others are read; and the other arguments."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(flag, dest="value", default=default)
    named, others = first.parse_known_args(arguments)
    return named.value, others


def run(config: Any, train: Callable[[Any, World], bool]) -> None:
    """Train in the run's folder, with all processes. Exits with EXIT_STOPPED if `train` returns False (a signal)."""
    world = processes.start(config.run.device, config.run.start_timeout)
    try:
        if world.main and (note := processes.advise_restarts(os.environ)) is not None:
            print(note, file=sys.stderr)
        check_alike(config, world)
        with hold_folder(config.run.folder, world):
            finished = train(config, world)
        # torchrun does not restart a rank when its other ranks have finished, so all ranks finish together.
        world.gather(None)
    except RuntimeError as error:
        if world.size == 1 or not is_lost_rank(error):
            raise
        end_without(world, error)
    finally:
        world.close()
    if not finished:
        sys.exit(EXIT_STOPPED)


def check_alike(config: Any, world: World) -> None:
    """Raise ConfigError, on every rank, unless all ranks were started with the same settings."""
    every = [flatten(settings) for settings in world.gather(dataclasses.asdict(config))]
    for rank, settings in enumerate(every):
        for key, value in settings.items():
            if value != every[0].get(key):
                raise ConfigError(
                    f"rank {rank} was started with {key} = {value}, rank 0 with {every[0].get(key)}; start all ranks "
                    "with the same command"
                )


def as_program(main: Callable[[], None]) -> NoReturn:
    """Run `main` and end the process at once, with the status that Python would give.

    With torch imported, Python's normal exit takes seconds. torchrun could not restart a rank that dies in this time,
    after the other ranks have finished.
    """
    status: Any = 0
    try:
        main()
    except SystemExit as ended:
        status = 0 if ended.code is None else ended.code
        if not isinstance(status, int):
            status = 1
            with contextlib.suppress(OSError, ValueError):
                print(ended.code, file=sys.stderr)
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors that a user can repair in one line and exit; exit with 130 for Ctrl-C before the first step."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        yield
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        if (missing := explain_missing(error)) is None:
            raise
        sys.exit(f"error: {missing}")
    except KeyboardInterrupt:
        sys.exit(130)

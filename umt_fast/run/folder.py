"""The lock on a run's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from umt_fast.config import ConfigError
from umt_fast.files import FolderInUse, lock_folder
from umt_fast.run.world import World


@contextlib.contextmanager
def hold_folder(folder: Path, world: World, option: str = "--run.name") -> Iterator[None]:
    """Make the folder of a run and lock it against other runs.

    Raises ConfigError if another run uses the folder; the message names the `option` that chooses the folder.
    """
    if not world.main:
        yield
        return
    try:
        with lock_folder(folder):
            yield
    except FolderInUse:
        raise ConfigError(f"another run is using {folder}; stop it, or choose another {option}") from None

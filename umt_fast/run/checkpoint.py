"""Checkpoints of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umt_fast.files import put_in_place
from umt_fast.weights import WeightsError

FORMAT = 1


def get_rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of this process's default random generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def checkpoint_path(folder: Path, clips_seen: int) -> Path:
    """Checkpoints are named by clips, not steps: a run resumed with another batch size counts other steps."""
    return folder / f"clips_{clips_seen:010d}.pth"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    named = ((re.fullmatch(r"clips_(\d{10,})\.pth", path.name), path) for path in folder.glob("clips_*.pth"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def save_checkpoint(folder: Path, clips_seen: int, content: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint so that a crash or a full disk at any moment leaves the earlier ones whole.

    The file is written aside, flushed to disk and renamed; then all but it and the newest `keep` are removed. Raises
    OSError, with the part that was written removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, clips_seen)
    aside = folder / f".{path.name}.{os.getpid()}"
    try:
        with open(aside, "wb") as file:
            try:
                torch.save({"format": FORMAT, "clips_seen": clips_seen, **content}, file)
            except RuntimeError as error:  # torch's writer turns a failed write into this
                raise OSError(f"cannot write {path}, is the disk full? {error}") from error
        put_in_place(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    for old in list_checkpoints(folder)[:-keep]:
        if old != path:
            old.unlink()
    return path


def remove_unfinished(folder: Path) -> None:
    """Remove what a save left that was killed half-way. No other run may be saving there."""
    for aside in folder.glob(".clips_*.pth.*"):
        aside.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote. Raises WeightsError if the file is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, missing, not a checkpoint
        mend = "remove it to go on from the one before, or name another with --run.resume"
        raise WeightsError(f"cannot read checkpoint {path}, {mend}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise WeightsError(f"{path} is no checkpoint of a run (format {FORMAT}); for weights alone use read_weights")
    return content

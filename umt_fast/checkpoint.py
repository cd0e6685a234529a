"""Student and teacher weights under their published names, and checkpoints of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umt_fast.files import put_in_place
from umt_fast.models.student import bare_student
from umt_fast.models.teacher import ClipTeacher
from umt_fast.weights import WeightsError, clip_image_tower, inflate, resample_positions

FORMAT = 1


def umt_state_dict(student: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the student on the CPU under UMT's checkpoint keys. Published files hold them under `model`."""
    return {key: value.detach().to("cpu", copy=True) for key, value in bare_student(student).state_dict().items()}


def load_umt_student(student: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load UMT's checkpoint keys, bare or under `model`. Raises WeightsError naming what is missing or misshapen."""
    state = state_dict.get("model", state_dict)
    _load(bare_student(student), {key.removeprefix("module."): value for key, value in state.items()}, "student")


def load_clip_teacher(teacher: ClipTeacher, state_dict: Mapping[str, Any]) -> None:
    """Load a CLIP image tower under OpenAI's, open_clip's, UMT's or Hugging Face's keys.

    Positions of another grid are resampled bicubically and 2-D patch weights inflated in time, as UMT does. Raises
    WeightsError naming what is missing or misshapen.
    """
    state = clip_image_tower(dict(state_dict))
    if "positional_embedding" in state:
        state["positional_embedding"] = resample_positions(state["positional_embedding"], teacher.config.grid)
    if "conv1.weight" in state:
        state["conv1.weight"] = inflate(state["conv1.weight"], teacher.config.tubelet_size)
    _load(teacher, state, "teacher")


def _load(module: torch.nn.Module, state: Mapping[str, Any], name: str) -> None:
    own = module.state_dict()
    problems = [f"missing {key} {list(own[key].shape)}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {list(state[key].shape)}, this {name} has {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise WeightsError(f"these weights do not fit the {name}: {shown}")
    module.load_state_dict(state)


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

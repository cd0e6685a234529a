"""Checkpoints of a run: written atomically, checked when they are read."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from umt_fast.errors import RunError
from umt_fast.files import check_regular, escape, expand_home, replacing
from umt_fast.run.world import World
from umt_fast.weights import WeightsError
from umt_fast.weights.files import find_not_finite, refuse_odd_tensors
from umt_fast.weights.torchscript import refuse_bomb

_MOST_CLIPS = 10**15
FORMAT = 2
"""Format 2 keys the optimiser's state by parameter name, format 1 (version 0.1) by number. Both are read."""


@dataclass
class Checkpoint:
    """Content of a checkpoint, and its path."""

    path: Path
    content: dict[str, Any]

    @property
    def clips_seen(self) -> int:
        return self.content["clips_seen"]

    @property
    def attention(self) -> dict[str, str]:
        """The attention backends of the run, by use; empty for version 0.1."""
        return self.content.get("attention", {})


def checkpoint_path(folder: Path, clips_seen: int) -> Path:
    """Path of a checkpoint. Its name counts clips: step numbers change if a run resumes with another batch size."""
    return folder / f"clips_{clips_seen:010d}.pth"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    named = ((re.fullmatch(r"clips_(\d{10,})\.pth", path.name), path) for path in folder.glob("clips_*.pth"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def save_checkpoint(folder: Path, clips_seen: int, content: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint; a crash or a full disk at any moment leaves the earlier ones intact.

    The file is written under a temporary name, synced and renamed. Then the oldest checkpoints are removed until `keep`
    are left. Raises OSError.
    """
    path = checkpoint_path(folder, clips_seen)
    write_tensors(path, {"format": FORMAT, "clips_seen": clips_seen, **content})
    for old in list_checkpoints(folder)[:-keep]:
        if old != path:
            old.unlink(missing_ok=True)
    return path


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write a torch file atomically, and make its folder if needed. Raises OSError, such as for a full disk."""
    with replacing(path) as aside, open(aside, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch raises this for a failed write
            raise OSError(f"cannot write {path}, is the disk full? {error}") from error


def prepare_folder(folder: Path) -> None:
    """Make the folder of checkpoints and remove what an interrupted save left; only this run may be saving there.

    Raises OSError for a folder that nothing can be written to, at the start of a run and not at its first save.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for aside in folder.glob(".clips_*.pth.*"):
        aside.unlink(missing_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def find_checkpoint(
    folder: Path, world: World, resume: str = "auto", say: Callable[[str], None] = print
) -> Checkpoint | None:
    """The checkpoint from which a run in `folder` resumes, the same on every rank; None if it starts from step 0.

    resume  auto: the newest intact checkpoint in `folder`; a damaged one is renamed to *.damaged, which `say` reports,
            and the one before is tried. never: none; raises RunError if the folder has one. Otherwise a file's path.
    """
    outcome: tuple[Path | None, Exception | None] = (None, None)
    content = None
    if world.main:
        try:
            path, content = _find(folder, resume, say)
            outcome = (path, None)
        except (RunError, OSError) as error:
            outcome = (None, error)
    path, problem = world.gather(outcome)[0]
    if problem is not None:
        raise problem
    if path is None:
        return None
    return Checkpoint(path, load_checkpoint(path) if content is None else content)


def find_own_checkpoint(
    config: Any, world: World, fixed: tuple[str, ...], say: Callable[[str], None]
) -> Checkpoint | None:
    """`find_checkpoint` for a run's settings. Raises RunError if a setting named in `fixed` differs."""
    found = find_checkpoint(config.run.checkpoints, world, config.run.resume, say)
    if found is not None:
        check_same(found, config, fixed)
    return found


def _find(folder: Path, resume: str, say: Callable[[str], None]) -> tuple[Path | None, dict[str, Any] | None]:
    existing = list_checkpoints(folder)
    if resume == "never":
        if existing:
            raise RunError(f"{folder} already holds {existing[-1].name}; choose another --run.name or remove it")
        return None, None
    if resume != "auto":
        source = expand_home(resume)
        if existing and existing[-1].resolve() != source.resolve():
            raise RunError(f"{folder} already holds {existing[-1].name}; to resume from {source}, add --run.name NEW")
        return source, load_checkpoint(source)
    for path in reversed(existing):
        try:
            return path, load_checkpoint(path)
        except WeightsError as error:
            aside = path.with_name(f"{path.name}.damaged")
            with contextlib.suppress(OSError):
                path.rename(aside)
            say(f"damaged checkpoint set aside as {aside}: {error}")
    return None, None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Raises WeightsError if the file is not a checkpoint or is damaged.

    torch's files are zip archives with a CRC-32 of every member, which torch does not check; this function does.
    """
    try:
        check_regular(path)
        refuse_bomb(path)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, missing, not a checkpoint
        fix = "remove it to resume from the one before, or name another with --run.resume"
        raise WeightsError(f"cannot read checkpoint {path}, {fix}: {error}") from error
    if not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] not in (1, FORMAT):
        raise WeightsError(f"{path} is not a checkpoint of a run (format 1 or {FORMAT}); for weights use read_weights")
    kinds = {"clips_seen": int, "model": dict, "optimizer": dict, "rng": list, "config": dict, "schedule": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if "clips_seen" not in wrong and not 0 <= content["clips_seen"] <= _MOST_CLIPS:
        wrong.append("clips_seen")
    if wrong:
        raise WeightsError(f"{path} is not a checkpoint of a run: {', '.join(wrong)} missing or of another kind")
    refuse_odd_tensors({key: value for key, value in content["model"].items() if isinstance(value, Tensor)}, path)
    bad = find_not_finite(content["model"])
    if bad is not None:
        raise WeightsError(f"cannot resume from {path}: {bad} holds values that are not finite")
    try:
        for name in ("config", "schedule", "attention"):
            check_plain(flatten(content.get(name, {})))
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{path} is not a checkpoint of a run: {name} does not hold settings: {error}") from None
    try:
        return _upgrade(content) if content["format"] == 1 else content
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path} is not a checkpoint of a run: its settings lack {error}") from error


def _upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Convert the settings of a checkpoint of version 0.1 to the present sections."""
    config = dict(content["config"])
    train, model, run = config.pop("train"), config.pop("model"), dict(config["run"])
    config["mask"] = {**config["mask"], "masks_per_clip": train["masks_per_clip"]}
    config["compute"] = {**model, "cuda_graph": train["cuda_graph"], "precision": run.pop("precision")}
    return {**content, "config": {**config, "run": run}}


def check_same(checkpoint: Checkpoint, config: Any, names: tuple[str, ...]) -> None:
    """Raise RunError if a setting in `names` (dotted) differs from the checkpoint's.

    A setting that did not exist when the checkpoint was made counts with its default value.
    """
    then = {**flatten(asdict(type(config)())), **flatten(checkpoint.content["config"])}
    for key, value in flatten(asdict(config)).items():
        if then.get(key) != value and any(key == name or key.startswith(f"{name}.") for name in names):
            raise RunError(
                f"{checkpoint.path} was made with {key} = {_short(then.get(key))}, this run has {_short(value)}; "
                "choose another --run.name"
            )


def list_changes(
    checkpoint: Checkpoint, config: Any, plan: Mapping[str, Any], attention: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """A line for each setting, value of the plan or attention backend that differs from the checkpoint's."""
    then, now = (flatten(tree) for tree in (checkpoint.content["config"], asdict(config)))
    then |= {name.replace("_", " "): value for name, value in checkpoint.content["schedule"].items()}
    now |= {name.replace("_", " "): value for name, value in plan.items()}
    then |= {f"attention of {name}": backend for name, backend in checkpoint.attention.items()}
    now |= {f"attention of {name}": backend for name, backend in attention.items()}
    return [
        f"note: {key} was {_short(then[key])} when it was saved, now {_short(value)}"
        for key, value in now.items()
        if key in then and then[key] != value and key not in _FREE
    ]


def _short(value: Any) -> str:
    text = escape(str(value))
    return text if len(text) <= 100 else f"{text[:100]}..."


_FREE = ("run.stop_at", "run.resume", "run.name", "run.dir")
"""Settings that may change without a note: the results do not depend on them."""


_DEEPEST = 3
"""Most dots in the name of a setting."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; lists become tuples.

    Raises ValueError for deeper nesting than in settings: a file may have a dictionary that contains itself.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ValueError(f"{prefix}{key} is not a name")
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            if name.count(".") >= _DEEPEST:
                raise ValueError(f"{name} is nested too deep")
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            if any(isinstance(part, list | tuple | dict) for part in value):
                raise ValueError(f"{name} is nested too deep")
            flat[name] = tuple(value)
        else:
            flat[name] = value
    return flat


def check_plain(flat: Mapping[str, Any]) -> None:
    """Raise ValueError unless all values are those of settings: numbers, words, None, or lists of them."""
    for name, value in flat.items():
        for part in value if isinstance(value, tuple) else (value,):
            plain = part is None or isinstance(part, bool | float | str)
            if not plain and not (isinstance(part, int) and abs(part) < 1 << 63):
                raise ValueError(f"{escape(name)} is a {type(part).__name__}")

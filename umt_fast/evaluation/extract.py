"""Features of a list's videos in a folder of shards, computed once; an interrupted extraction can be continued.

features.json              settings, and the numbers of videos and shards
features_00000.safetensors features [n,V,D] (or [n,V,N,D] of all tokens), rows [n], labels [n] of up to
                           `shard` videos; its metadata lists the unreadable videos
features_00000.npz         the same as NumPy arrays, with `unreadable`, if format = npz
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from umt_fast.config import DataConfig
from umt_fast.data.index import VideoList
from umt_fast.data.labels import MOST_CLASSES
from umt_fast.data.loader import ClipLoader
from umt_fast.errors import RunError
from umt_fast.evaluation.views import Views, view_stream
from umt_fast.files import expand_home, read_small, replacing, write_whole
from umt_fast.models.encoder import VideoEncoder
from umt_fast.run.folder import hold_folder
from umt_fast.run.progress import OnProgress, Progress, silent
from umt_fast.run.world import World
from umt_fast.weights.files import save_safetensors
from umt_fast.weights.torchscript import refuse_bomb

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Format = Literal["safetensors", "npz"]
INDEX = "features.json"
NO_LABEL = -1
_MOST_SHARDS = 1 << 20


class FeaturesError(RunError, ValueError):
    """A folder of features is incomplete, damaged, or made with other settings."""


@dataclass(frozen=True)
class Extraction:
    """Settings of an extraction: which features of each video are stored."""

    views: Views
    kind: Literal["pooled", "tokens"] = "pooled"
    """One vector for each view, or one for each token."""
    layer: int = -1
    """Block whose outputs are stored, after the encoder's last norm; negative counts from the end."""
    shard: int = 512
    """Videos per file."""
    half: bool = False
    """Store float16 instead of float32."""
    clips_per_pass: int = 16
    format: Format = "safetensors"
    """File format; npz is NumPy's, not compressed."""


@dataclass
class Features:
    """Features of the videos that could be read, in the order of the list."""

    features: Float[Tensor, "n v ..."]
    rows: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    """Labels; -1 for a list without labels."""
    classes: list[str]


@torch.inference_mode()
def extract(
    encoder: VideoEncoder,
    videos: VideoList,
    labels: Sequence[int] | None,
    settings: Extraction,
    config: DataConfig,
    world: World,
    folder: Path,
    about: dict[str, Any],
    *,
    bf16: bool = False,
    say: Callable[[str], None] = print,
) -> list[tuple[str, str]]:
    """Write the features of all videos to `folder`. Processes divide the shards among them; existing shards are kept.

    `about` is stored in features.json. It, the settings and the list must be the same when an extraction is continued.
    Raises FeaturesError if they differ, ConfigError while another extraction writes to the folder. Returns name and
    reason of each unreadable video of the shards that were written now.
    """
    count = -(-len(videos) // settings.shard)
    facts = asdict(settings)
    index = {"format": facts.pop("format"), "list": videos.digest(), "videos": len(videos), "shards": count}
    index |= {"settings": facts, **about}
    index = json.loads(json.dumps(index))
    with contextlib.ExitStack() as held:
        problem = None
        try:
            held.enter_context(hold_folder(folder, world, "--out"))
            if world.main:
                check_same(folder / INDEX, index)
                write_whole(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        except (RunError, OSError) as error:
            problem = error
        if (problem := world.gather(problem)[0]) is not None:
            raise problem
        bad = _write_missing(encoder, videos, labels, settings, config, world, folder, bf16, say)
        return [one for part in world.gather(bad) for one in part]


def _write_missing(
    encoder: VideoEncoder,
    videos: VideoList,
    labels: Sequence[int] | None,
    settings: Extraction,
    config: DataConfig,
    world: World,
    folder: Path,
    bf16: bool,
    say: Callable[[str], None],
) -> list[tuple[str, str]]:
    """Write this process's share of the missing shards. Returns the unreadable videos."""
    share = range(world.rank, -(-len(videos) // settings.shard), world.size)
    own = [number for number in share if not shard_path(folder, number, settings.format).exists()]
    if world.main and len(own) < len(share):
        say(f"{len(share) - len(own)} of {len(share)} shards are there already")
    bad: list[tuple[str, str]] = []
    for done, number in enumerate(own, 1):
        first = number * settings.shard
        last = min(first + settings.shard, len(videos))
        progress = Progress(f"shard {done} of {len(own)}", say=say) if world.main else silent
        rows = range(first, last)
        bad += _write_shard(encoder, videos, labels, rows, settings, config, world, folder, number, bf16, progress)
        if world.main:
            say(f"shard {done} of {len(own)}: videos {first + 1} to {last}")
    return bad


def check_same(path: Path, index: dict[str, Any]) -> None:
    """Raise FeaturesError if the folder has features of another list, checkpoint or setting."""
    if not path.exists():
        return
    before = _read_index(path)
    for key, value in index.items():
        if before.get(key) != value:
            raise FeaturesError(
                f"{path.parent} holds features with {key} = {before.get(key)}, these have {value}; give another --out"
            )


def shard_path(folder: Path, number: int, format: Format = "safetensors") -> Path:
    return folder / f"features_{number:05d}.{format}"


def _write_shard(
    encoder: VideoEncoder,
    videos: VideoList,
    labels: Sequence[int] | None,
    rows: range,
    settings: Extraction,
    config: DataConfig,
    world: World,
    folder: Path,
    number: int,
    bf16: bool,
    on_progress: OnProgress,
) -> list[tuple[str, str]]:
    views, parts, found, bad = settings.views, [], [], []
    group = max(settings.clips_per_pass // views.clips, 1)
    batches = -(-len(rows) // group)
    loader = ClipLoader(
        view_stream(videos, views, config),
        start=rows.start * views.clips,
        end=rows.stop,
        batches=batches,
        batch_size=group * views.clips,
        pin_memory=world.device.type == "cuda",
    )
    with loader:
        for done, batch in enumerate(loader, 1):
            bad += batch.bad
            if batch.rows:
                made = features_of(encoder, batch.clip.to(world.device), settings, bf16)
                parts.append(made.unflatten(0, (len(batch.rows), views.clips)).cpu())
                found += batch.rows
            on_progress(len(rows) * done // batches, len(rows))
    tensors = {
        "features": torch.cat(parts) if parts else torch.zeros(0, views.clips, encoder.config.width),
        "rows": torch.tensor(found, dtype=torch.int64),
        "labels": torch.tensor([NO_LABEL if labels is None else int(labels[row]) for row in found], dtype=torch.int64),
    }
    _write_tensors(shard_path(folder, number, settings.format), tensors, json.dumps(bad))
    return bad


def _write_tensors(path: Path, tensors: dict[str, Tensor], unreadable: str) -> None:
    """Write a shard atomically. Raises OSError."""
    if path.suffix != ".npz":
        save_safetensors(path, tensors, {"unreadable": unreadable})
        return
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in tensors.items()}
    with replacing(path) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays, unreadable=np.array(unreadable))


def _read_tensors(path: Path, classes: int) -> dict[str, Tensor]:
    """Read a shard. Raises FeaturesError if it cannot be read or is not a shard of an extraction."""
    from safetensors.torch import load_file

    try:
        if path.suffix != ".npz":
            return _check_shard(load_file(path), classes)
        refuse_bomb(path)
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name != "unreadable"]
            return _check_shard({name: torch.from_numpy(arrays[name]) for name in names}, classes)
    except Exception as error:  # numpy parses array headers as Python literals, which can raise any error
        raise FeaturesError(f"cannot read {path}: {type(error).__name__}: {error}") from None


def features_of(encoder: VideoEncoder, clips: Tensor, settings: Extraction, bf16: bool) -> Tensor:
    """Features of clips, in passes of the same size."""
    made = []
    for part in clips.split(settings.clips_per_pass):
        with torch.autocast(part.device.type, torch.bfloat16, enabled=bf16):
            (hidden,) = encoder.hidden(part, (settings.layer,))
            made.append(encoder.norm(hidden) if settings.kind == "tokens" else encoder.pool_tokens(hidden))
    return torch.cat(made).to(torch.float16 if settings.half else torch.float32)


def read_features(folder: str | Path) -> Features:
    """All features of a folder. Raises FeaturesError if it is missing, damaged or incomplete."""
    folder = expand_home(folder)
    index = _read_index(folder / INDEX)
    count, classes = index.get("shards"), index.get("classes") or []
    if type(count) is not int or not 0 < count <= _MOST_SHARDS:
        raise FeaturesError(f"{folder / INDEX}: shards = {str(count)[:30]} is not a number of files")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise FeaturesError(f"{folder / INDEX}: classes is not a list of names")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    paths = [shard_path(folder, number, index["format"]) for number in range(min(count, len(present)))]
    missing = count - sum(path.name in present for path in paths)
    if missing:
        raise FeaturesError(f"{folder} lacks {missing} of {count} shards; run the extraction again")
    shards = [shard for path in paths if len((shard := _read_tensors(path, len(classes)))["rows"])]
    if not shards:
        raise FeaturesError(f"{folder}: none of the videos could be read")
    shapes = {shard["features"].shape[1:] for shard in shards}
    if len(shapes) > 1:
        raise FeaturesError(f"{folder}: its shards hold features of {len(shapes)} shapes")
    features, rows, labels = (torch.cat([shard[key] for shard in shards]) for key in ("features", "rows", "labels"))
    return Features(features, rows, labels, classes)


def _check_shard(shard: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    """The tensors of a shard, checked. Raises ValueError for wrong names, shapes, dtypes or values."""
    if shard.keys() != {"features", "rows", "labels"}:
        raise ValueError(f"it holds {sorted(shard)}, not features, rows and labels")
    features, rows, labels = shard["features"], shard["rows"], shard["labels"]
    if features.dim() not in (3, 4) or not features.is_floating_point():
        raise ValueError(f"features of {list(features.shape)}, {features.dtype}")
    if any(x.dtype != torch.int64 or x.shape != features.shape[:1] for x in (rows, labels)):
        raise ValueError(f"rows and labels are not {len(features)} integers")
    if len(labels) and (int(labels.min()) < NO_LABEL or int(labels.max()) >= (classes or MOST_CLASSES)):
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())} of {classes} classes")
    if not bool(features.isfinite().all()):
        raise ValueError("its features hold values that are not finite")
    return shard


def _read_index(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        raise FeaturesError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise FeaturesError(f"{path} is not an index of features")
    content.setdefault("format", "safetensors")  # earlier versions had no other format
    if content["format"] not in get_args(Format):
        raise FeaturesError(f"{path}: format = {content['format']!r}: must be {' or '.join(get_args(Format))}")
    return content

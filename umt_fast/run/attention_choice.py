"""Choice of the fastest attention backend: measured once on the shapes of the run, then remembered.

The times are in `attention.json` of the folder UMT_FAST_CACHE, by default ~/.cache/umt-fast. They hold for one GPU,
shape, dtype and set of versions. Delete the file to measure again.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umt_fast.config import ConfigError, StudentConfig, TeacherConfig, VitConfig
from umt_fast.errors import RunError
from umt_fast.files import expand_home, replacing
from umt_fast.models.attention import LIBRARIES, NAMES, Backend, attention, fault, load, self_attention

REPEATS = 10
LONGEST = 0.5  # seconds spent on one backend; the first calls compile kernels and do not count


@dataclass(frozen=True)
class Use:
    """One shape in which a model calls attention."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    gradients: bool

    @classmethod
    def within(cls, sizes: VitConfig, clips: int, tokens: int, gradients: bool = True) -> Use:
        """The self-attention of a video ViT over `tokens` tokens of each clip."""
        return cls(clips, tokens, tokens, sizes.heads, sizes.width // sizes.heads, gradients)


@dataclass(frozen=True)
class Choice:
    """The backend of one use, and the reason for it."""

    backend: Backend
    reason: str


def uses(
    student: StudentConfig, teacher: TeacherConfig, clips: int, student_clips: int, seen: int, finished: int
) -> dict[str, Use]:
    """The attention calls of a stage-1 step: `clips` clips in the teacher, `student_clips` with `seen` tokens each.

    `finished` is the number of patches per frame that the teacher's last block finishes.
    """
    frames, tokens = clips * student.tokens // student.grid**2, teacher.grid**2 + 1
    teacher_heads = (teacher.heads, teacher.width // teacher.heads, False)
    return {
        "teacher": Use(frames, tokens, tokens, *teacher_heads),
        "teacher's last block": Use(frames, finished, tokens, *teacher_heads),
        "student": Use.within(student, student_clips, seen),
    }


def choose(wanted: str, use: Use, device: torch.device, dtype: torch.dtype, compiled: bool) -> Choice:
    """The backend called `wanted`; `auto`: the fastest one. `compiled` leaves out backends that break a graph.

    Raises ConfigError if `wanted` cannot be used, with the reason or the install command.
    """
    if wanted != "auto":
        try:
            backend = load(wanted)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"compute.attention = {wanted}: {error}") from None
        reason = fault(backend, device, dtype, use.head_dim, use.gradients, compiled)
        if reason is not None:
            raise ConfigError(f"compute.attention = {wanted} does not run on this {device.type} in {dtype}: {reason}")
        return Choice(backend, "set")
    key = _key(use, device, dtype, compiled)
    milliseconds, origin = _read_cache().get(key), "measured before"
    if milliseconds is None:
        seconds = measure(use, device, dtype, compiled)
        milliseconds, origin = {name: round(1e3 * second, 4) for name, second in seconds.items()}, "measured"
        _remember(key, milliseconds)
    best = min(milliseconds, key=milliseconds.__getitem__)
    times = ", ".join(f"{name} {took:.3g}" for name, took in sorted(milliseconds.items(), key=lambda item: item[1]))
    return Choice(load(best), f"fastest; ms {origin}: {times}")


def keep(stored: str | None, use: Use, device: torch.device, dtype: torch.dtype, compiled: bool) -> Choice | None:
    """The backend stored in a checkpoint, so that a resumed run computes the same bits; None if it cannot run here."""
    try:
        backend = load(stored or "")
    except (ImportError, ValueError):
        return None
    if fault(backend, device, dtype, use.head_dim, use.gradients, compiled) is not None:
        return None
    return Choice(backend, "as in the checkpoint")


def measure(use: Use, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> dict[str, float]:
    """Median seconds of one call (with its backward if the use has one) by each backend that runs here."""
    seconds = {}
    for name in NAMES:
        try:
            backend = load(name)
        except ImportError:
            continue
        if name == "heads" and device.type != "cpu":  # on a GPU it is many small launches
            continue
        if fault(backend, device, dtype, use.head_dim, use.gradients, compiled) is not None:
            continue
        try:
            seconds[name] = _median_seconds(backend, use, device, dtype)
        except Exception:  # errors of any class at this size; `math` may need too much memory
            continue
    if not seconds:
        raise ConfigError(f"no attention backend runs on this {device.type} in {dtype} with head dim {use.head_dim}")
    return seconds


def _median_seconds(backend: Backend, use: Use, device: torch.device, dtype: torch.dtype) -> float:
    """Times a call as in the models: on one packed qkv tensor, unless there are fewer queries than keys."""
    shape = (use.heads, use.head_dim)
    packed = torch.randn(use.batch, use.keys, 3, *shape, device=device, dtype=dtype)
    inputs: tuple[Tensor, ...] = (packed,)
    call: Callable[..., Tensor] = self_attention
    if use.queries != use.keys:
        q = torch.randn(use.batch, use.queries, *shape, device=device, dtype=dtype)
        inputs, call = (q, *packed.unbind(2)[1:]), attention
    grad = torch.randn(use.batch, use.queries, *shape, device=device, dtype=dtype)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < REPEATS + 1 and (len(times) < 2 or time.perf_counter() - started < LONGEST):
        inputs = tuple(x.detach().requires_grad_(use.gradients) for x in inputs)
        _wait(device)
        begun = time.perf_counter()
        with torch.set_grad_enabled(use.gradients):
            out = call(*inputs, backend=backend)
            if use.gradients:
                out.backward(grad)
        _wait(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_path() -> Path:
    """Path of the file with the measured times. Raises RunError if the home folder is unknown."""
    folder = os.environ.get("UMT_FAST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "umt-fast"
    return expand_home(folder) / "attention.json"


def _key(use: Use, device: torch.device, dtype: torch.dtype, compiled: bool) -> str:
    """Everything that the times depend on, as one line."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"
    versions = {"torch": str(torch.__version__)}
    for library in LIBRARIES.values():
        try:
            versions[library.distribution] = importlib.metadata.version(library.distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return json.dumps([gpu, asdict(use), str(dtype), compiled, versions, NAMES])


def _read_cache() -> dict[str, dict[str, float]]:
    """Remembered milliseconds by key and backend, without invalid entries and backends that are not installed."""
    try:
        content = json.loads(cache_path().read_text())
    except (RunError, OSError, ValueError, RecursionError):
        return {}
    return {key: times for key, times in content.items() if _usable(times)} if isinstance(content, dict) else {}


def _usable(times: Any) -> bool:
    if not isinstance(times, dict) or not times:
        return False
    for name, took in times.items():
        if name not in NAMES or not isinstance(took, int | float):
            return False
        try:
            load(name)
        except ImportError:
            return False
    return True


def _remember(key: str, milliseconds: dict[str, float]) -> None:
    """Replace the file atomically: two runs at once lose at most one entry. Ignores a folder that is not writable."""
    try:
        with replacing(cache_path(), locked=False) as aside:
            aside.write_text(json.dumps({**_read_cache(), key: milliseconds}, indent=1))
    except (RunError, OSError):
        return

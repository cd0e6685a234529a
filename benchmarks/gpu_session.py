"""All measurements that need a GPU, most important first, in one command with a time limit:

    python -m benchmarks.gpu_session --minutes 9 --out DIR      # the same command continues
    python -m benchmarks.gpu_session --rehearse --out DIR       # the same stages on a CPU, tiny models, 3 minutes

    1  smoke       one step of every rung on UMT-B with its loss, and the numbers of each op against float64
    2  best        the baseline against the best rung, UMT-B/16, then UMT-L/16
    3  ladder      the other rungs
    4  kernels     each op beside eager, torch.compile and other libraries
    5  decoding    the loader, on NVDEC where DALI is installed

Writes session.json, session.md and session.log to DIR, and compile_cache.tar.gz if it is under 15 MiB; no subfolders,
for machines that return only a few files. session.json and session.md are written every few seconds, so a killed
session keeps its results; its stages end with it. A session continues from session.json in DIR, else from the one in
benchmarks/results/<gpu>: results of the same sources and device are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

from benchmarks import gpu_session_page
from benchmarks.environment import RESULTS, ROOT, describe, gpu_name
from benchmarks.step_time.ladder import BEST, ladder

GRACE = 10
"""Seconds that a stage has after its interrupt to write its results."""
RESERVE = 15
"""Seconds reserved for the end of the session: the last results, the page, the cache."""
LEAST = 10
"""No stage begins with fewer remaining seconds."""
SAVE_EVERY = 5
LARGEST_CACHE = 15 * 2**20
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
PARTS = {
    "smoke": "smoke/step_time.json",
    "checks": "checks/kernels.json",
    "step_time": "step_time/step_time.json",
    "kernels": "kernels/kernels.json",
    "decoding": "decoding/input_pipeline.json",
}
"""The results in session.json, and the file in the work folder for each."""


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]
    limit: float = float("inf")
    """Seconds."""
    needs: tuple[str, ...] = ()
    """Packages that the stage needs; it is skipped without them."""


@dataclass
class StageEnd:
    """How a stage ended."""

    name: str
    state: str
    seconds: float


def stages(work: Path, rehearse: bool) -> list[Stage]:
    """The stages in the order in which they run, with results below `work`."""
    run = (sys.executable, "-u", "-m")
    time_step: tuple[str, ...] = (*run, "benchmarks.step_time", "--resume", "--no-decoding")
    base, large = "umt_b16", "umt_l16"
    check_kernels: tuple[str, ...] = (*run, "benchmarks.kernels", "--resume")
    decode: tuple[str, ...] = (*run, "benchmarks.input_pipeline", "--rounds", "1", "--out", str(work / "decoding"))
    if rehearse:
        quick = ("--device", "cpu", "--batch", "2", "--repeats", "2", "--compile-backend", "aot_eager")
        time_step, base, large = (*time_step, *quick), "tiny", "tiny"
        decode = (*decode, "--as-they-are", "--seconds", "0.2", "--workers", "1", "--batch", "2")
        models: tuple[str, ...] = ()
    else:
        models = ("--models", "umt_b16")
        decode = (*decode, "--seconds", "3")
    first = ("baseline", "+ lean math, eager", BEST)  # then the others, until the minute is over
    rest = (rung.name for rung in ladder(torch.device("cpu" if rehearse else "cuda")) if rung.name not in first)
    time_smoke = (*time_step, "--rungs", *first, *rest)
    smoke = (*time_smoke, "--check-only", "1", "--models", base, "--out", str(work / "smoke"))
    timed = (*time_step, "--out", str(work / "step_time"), "--models")
    best = ("--rungs", "baseline", BEST)
    return [
        Stage("smoke: rungs", smoke, 100),
        Stage("smoke: ops", (*check_kernels, "--check", *models, "--out", str(work / "checks")), 60),
        Stage("best: UMT-B", (*timed, base, *best)),
        Stage("best: UMT-L", (*timed, large, *best)),
        Stage("ladder: UMT-B", (*timed, base, "--fp8-student")),
        Stage("ladder: UMT-L", (*timed, large, "--fp8-student")),
        Stage("kernels", (*check_kernels, "--out", str(work / "kernels"))),
        Stage("decoding", decode, needs=("av", "PIL")),
    ]


class Session:
    """One call: its folder, deadline, log and results so far."""

    def __init__(self, folder: Path, work: Path, seconds: float, facts: dict[str, Any], log: IO[str]) -> None:
        self.folder, self.work, self.log = folder, work, log
        self.deadline = time.monotonic() + seconds - RESERVE
        self.content: dict[str, Any] = {"facts": facts, "stages": []}

    def seed(self, before: dict[str, Any]) -> None:
        """Give the stages the results of an earlier session. They keep those of these sources and this device."""
        for part, place in PARTS.items():
            found = before.get(part)
            if not found or (part == "decoding" and found["facts"].get("sources") != self.content["facts"]["sources"]):
                continue
            path = self.work / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))

    def save(self) -> None:
        """Write session.json from the files of the stages, by an atomic rename."""
        for part, place in PARTS.items():
            with contextlib.suppress(OSError, ValueError):  # not there yet, or being written
                self.content[part] = json.loads((self.work / place).read_text())
        self._write("session.json", json.dumps(self.content, indent=1) + "\n")
        with contextlib.suppress(
            Exception
        ):  # a partial result may lack fields of the page; errors of the last call are not suppressed
            self._write("session.md", gpu_session_page.page(self.content))

    def _write(self, name: str, text: str) -> None:
        new = self.folder / f"{name}.new"
        new.write_text(text)
        new.replace(self.folder / name)

    def run(self, stage: Stage) -> StageEnd:
        """Run one stage until its limit or the session's deadline. Its output goes to the log."""
        begun = time.monotonic()
        end = StageEnd(stage.name, "running", 0.0)
        left = self.deadline - begun
        if stage.name == "decoding" and (self.work / PARTS["decoding"]).exists():
            end.state = "done before"
        elif lacks := [name for name in stage.needs if importlib.util.find_spec(name) is None]:
            end.state = f"left out: needs {', '.join(lacks)}"
        elif left < LEAST:
            end.state = "not begun: no time left"
        else:
            self.content["stages"].append(asdict(end))
            end.state = self._wait(stage, begun + min(stage.limit, left))
            self.content["stages"].pop()
        end.seconds = round(time.monotonic() - begun, 1)
        self.content["stages"].append(asdict(end))
        self.save()
        return end

    def _wait(self, stage: Stage, until: float) -> str:
        self.log.write(f"\n=== {stage.name}: {' '.join(stage.command)}\n")
        self.log.flush()
        env = {**os.environ, **{name: str(self.work / "cache" / place) for name, place in CACHES.items()}}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH", "")])
        if self.content["facts"]["rehearsal"]:
            env["CUDA_VISIBLE_DEVICES"] = ""
        child = subprocess.Popen(
            stage.command, cwd=ROOT, env=env, stdout=self.log, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
        )
        try:
            while (left := until - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = child.wait(min(SAVE_EVERY, left))
                    return "done" if status == 0 else f"failed with {status}; see session.log"
                self.save()
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            return "out of time"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _end_with_parent() -> None:
    """Run in a stage's process: give it its own process group, and kill it when this program is killed.

    Otherwise a stage would continue after a kill -9 and share the GPU with the next call's measurements. It does not
    get its own session, because machines that end a command's leftover processes may spare other sessions.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGINT ends a stage, but background processes ignore it by default
    if _LIBC is not None:
        parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        _LIBC.prctl(parent_death_signal, signal.SIGKILL)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def unpack_cache(archive: Path, work: Path) -> None:
    """Unpack the compiled kernels of an earlier session, from a folder of the user or from the tree's results."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
    except (OSError, tarfile.TarError, TypeError) as error:  # TypeError: Python before 3.10.12 and 3.11.4 has no filter
        print(f"{archive} is not used: {error}")


def pack_cache(work: Path, archive: Path) -> str:
    """Pack the compiled kernels beside the results if they are small enough. Returns a text for the user."""
    if not (work / "cache").is_dir():
        return "no compile cache"
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / archive.name
        with tarfile.open(packed, "w:gz") as tar:
            tar.add(work / "cache", "cache")
        size = packed.stat().st_size
        if size > LARGEST_CACHE:
            return f"compile cache left out: {size / 2**20:.1f} MiB, the limit is {LARGEST_CACHE / 2**20:.0f}"
        archive.write_bytes(packed.read_bytes())
    return f"compile cache: {size / 2**20:.1f} MiB"


def read_before(*folders: Path) -> tuple[dict[str, Any], Path | None]:
    """The session.json of the first folder that has one, and this folder."""
    for folder in folders:
        try:
            return json.loads((folder / "session.json").read_text()), folder
        except OSError:
            continue
        except ValueError as error:
            print(f"{folder / 'session.json'} is not used: {error}")
    return {}, None


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside this context SIGTERM raises SystemExit, so that the results so far are written."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(f"ended by signal {number}")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_session", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="the session ends by itself in this time (default 9; 3)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<gpu>")
    parser.add_argument("--rehearse", action="store_true", help="the same stages on the CPU, with tiny models")
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = 3.0 if options.rehearse else 9.0
    if not options.minutes * 60 > RESERVE + LEAST:  # NaN included
        parser.error(f"--minutes {options.minutes:g}: must be above {(RESERVE + LEAST) / 60:.2f}")
    if options.rehearse and options.out is None:
        parser.error("--rehearse: give a folder by --out; a rehearsal has no place among the results")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    started = time.monotonic()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no CUDA GPU, and every stage needs one; --rehearse tries them on the CPU")
    facts = {**describe(), "date": time.strftime("%Y-%m-%d %H:%M"), "rehearsal": options.rehearse}
    own = RESULTS / ("cpu" if options.rehearse else gpu_name(facts["device"]))
    folder: Path = options.out or own
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="gpu-session-") as temporary,
        open(folder / "session.log", "a") as log,
        _ended_by_signals(),
    ):
        work = Path(temporary)
        session = Session(folder, work, 60 * options.minutes - (time.monotonic() - started), facts, log)
        before, place = read_before(folder) if options.rehearse else read_before(folder, own)
        session.seed(before)
        if place is not None and (place / "compile_cache.tar.gz").exists():
            unpack_cache(place / "compile_cache.tar.gz", work)
        ends = []
        try:
            for stage in stages(work, options.rehearse):
                ends.append(session.run(stage))
                print(f"{stage.name}: {ends[-1].state} ({ends[-1].seconds:.0f} s)", flush=True)
        finally:
            session.save()
            (folder / "session.md").write_text(gpu_session_page.page(session.content))
            print(pack_cache(work, folder / "compile_cache.tar.gz"))
    print(f"in {folder}: session.json, session.md, session.log")
    if any(not end.state.startswith(("done", "left out")) for end in ends):
        sys.exit("not everything is done; the same command continues")


if __name__ == "__main__":
    main()

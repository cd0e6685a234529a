"""Everything that wants a GPU, most important first: `make bench-gpu`, or python -m benchmarks.gpu_session.

Each stage gets at most 8 minutes, so that a borrowed GPU gives what it can. A stage that was cut off or failed is
gone through again by the next call, a finished one is not while the commit stays the same. Step times that were cut
off go on where they were; kernel times leave what they had and begin anew. Results and logs are in
benchmarks/results/<gpu>, ready to commit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, describe, gpu_name

LIMIT = 8 * 60
GRACE = 20
"""Seconds that a stage which is out of time gets to write what it has."""
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]


def stages(folder: Path) -> list[Stage]:
    python, pytest = (sys.executable, "-m"), (sys.executable, "-m", "pytest", "-q")
    step_time = (*python, "benchmarks.step_time", "--resume", "--fp8-student", "--models")
    ladder = (folder / "kernels.json").as_posix()
    return [
        Stage("tests of the models on the GPU", (*pytest, "tests/models", "tests/run/test_compute.py")),
        Stage("step time of UMT-B", (*step_time, "umt_b16", "--out", str(folder / "umt_b16"))),
        Stage("step time of UMT-L", (*step_time, "umt_l16", "--out", str(folder / "umt_l16"))),
        Stage("tests of the kernels on the GPU", (*pytest, "kernels/tests", "-m", "gpu")),
        Stage("memory and low precision", (*pytest, "tests/run/test_costs.py", "tests/run/test_low_precision.py")),
        Stage("losses of the rungs", (*pytest, "tests/benchmarks/step_time/test_step_time.py", "-k", "rung_of_a_gpu")),
        Stage("kernel times", (*pytest, "benchmarks/kernels", f"--benchmark-json={ladder}")),
        Stage("table of the kernels", (*python, "benchmarks.kernels.report", ladder)),
    ]


def run(stage: Stage, folder: Path, commit: str, limit: float = LIMIT) -> str:
    """One stage: done, failed, out of time, or done before. Its output is in a log beside the results."""
    place = folder / "logs" / stage.name.replace(" ", "_")
    place.parent.mkdir(parents=True, exist_ok=True)
    stamp = place.with_suffix(".done")
    if stamp.exists() and stamp.read_text() == commit and not commit.endswith("+"):
        return "done before"
    with open(place.with_suffix(".log"), "w") as log:
        child = subprocess.Popen(stage.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)  # pytest then writes what was measured
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            return f"out of time after {limit:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if status:
        return f"failed with {status}; see {place.with_suffix('.log')}"
    stamp.write_text(commit)
    return "done"


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU is visible to PyTorch, and everything here wants one")
    folder, commit = RESULTS / gpu_name(torch.cuda.get_device_name()), describe()["commit"]
    ends = []
    for stage in stages(folder):
        started = time.monotonic()
        ends.append(run(stage, folder, commit))
        print(f"{stage.name}: {ends[-1]} ({time.monotonic() - started:.0f} s)", flush=True)
    if any(not end.startswith("done") for end in ends):
        sys.exit("not everything is done; the same command goes on")


if __name__ == "__main__":
    main()

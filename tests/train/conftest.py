"""Runs of the trainer as a user starts them: in processes of their own."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from train import pretrain

ROOT = Path(__file__).parents[2]

SMALL = ROOT / "tests" / "support" / "small.toml"


class Trainer:
    """Starts `train.pretrain` on the small recipe in `folder`."""

    def __init__(self, folder: Path, videos: Path) -> None:
        self.folder = folder
        self.recipe = SMALL
        self.videos = videos
        self.children: list[subprocess.Popen[str]] = []

    def arguments(self, *options: str) -> list[str]:
        given = ["--recipe", str(self.recipe), "--run.dir", str(self.folder), *options]
        return given if "--data.train" in options else [*given, "--data.train", str(self.videos)]

    def run_here(self, *options: str) -> tuple[int, str]:
        """Exit status and output of a run in this process, which saves the seconds that another takes to start."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                pretrain.main(self.arguments(*options))
                status: int | str | None = 0
            except SystemExit as ended:
                status = ended.code
        if isinstance(status, str):
            return 1, printed.getvalue() + status
        return status or 0, printed.getvalue()

    def start(
        self,
        *options: str,
        processes: int = 1,
        limit: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
        launcher: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        """A run of its own; `launcher`: the options of torchrun, if it starts the run."""
        if processes > 1 and not launcher:
            launcher = ("--standalone", "--nproc-per-node", str(processes))
        command = [sys.executable, *(("-m", "torch.distributed.run", *launcher) if launcher else ())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | (
            environment or {}
        )
        child = subprocess.Popen(
            [*command, "-m", "train.pretrain", *self.arguments(*options)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=limit,
            start_new_session=True,
        )
        self.children.append(child)
        return child

    def run(self, *options: str, processes: int = 1, limit: Callable[[], None] | None = None) -> tuple[int, str]:
        """Exit status and output of a run that ends by itself; in this process if it is one without a limit."""
        if processes == 1 and limit is None:
            return self.run_here(*options)
        child = self.start(*options, processes=processes, limit=limit)
        output, _ = child.communicate(timeout=120)
        return child.returncode, output

    def checkpoints(self, name: str) -> list[Path]:
        return sorted((self.folder / name / "checkpoints").glob("*"))

    def wait_for_step(self, child: subprocess.Popen[str], step: int) -> str:
        """Read the output until the log line of `step`."""
        assert child.stdout is not None
        seen = ""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            line = child.stdout.readline()
            seen += line
            if line.startswith(f"step {step}/") or not line:
                return seen
        raise AssertionError(f"step {step} was not reached: {seen}")


@pytest.fixture
def trainer(tmp_path: Path, demo_videos: Path) -> Iterator[Trainer]:
    pytest.importorskip("tyro")
    made = Trainer(tmp_path, demo_videos)
    yield made
    for child in made.children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()

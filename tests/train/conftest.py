"""Runs of the trainer as a user starts them; most are forked, which saves Python's start-up time."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import forked
import pytest

from train import pretrain

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "support" / "small.toml"

Child = subprocess.Popen[str] | forked.Forked


class Trainer:
    """Starts `train.pretrain` on the small recipe in `folder`."""

    def __init__(self, folder: Path, videos: Path) -> None:
        self.folder = folder
        self.recipe = SMALL
        self.videos = videos
        self.children: list[Child] = []

    def arguments(self, *options: str) -> list[str]:
        given = ["--recipe", str(self.recipe), "--run.dir", str(self.folder), *options]
        return given if "--data.train" in options else [*given, "--data.train", str(self.videos)]

    def run_here(self, *options: str) -> tuple[int, str]:
        """Exit status and output of a run in this process."""
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

    def start(self, *options: str) -> forked.Forked:
        """Start a run in another process."""
        (child,) = self.start_ranks(options)
        return child

    def start_ranks(
        self,
        *options: Sequence[str],
        largest_file: int | None = None,
        main: Callable[[list[str]], None] = pretrain.main,
    ) -> list[forked.Forked]:
        """The ranks of a run, one for each tuple of options, without torchrun. `largest_file`: bytes."""
        ranks = forked.start_ranks(main, [(self.arguments(*each),) for each in options], largest_file)
        self.children += ranks
        return ranks

    def start_program(
        self, *options: str, torchrun: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """`python -m train.pretrain`, by itself or under torchrun with these options."""
        launcher = () if torchrun is None else ("-m", "torch.distributed.run", "--standalone", *torchrun)
        paths = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        child = subprocess.Popen(
            [sys.executable, *launcher, "-m", "train.pretrain", *self.arguments(*options)],
            cwd=ROOT,
            env={**os.environ, **paths, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.children.append(child)
        return child

    def run(self, *options: str, processes: int = 1, largest_file: int | None = None) -> tuple[int, str]:
        """Exit status and output of a run that ends by itself; a single process without a limit runs here."""
        if processes == 1 and largest_file is None:
            return self.run_here(*options)
        ranks = self.start_ranks(*[options] * processes, largest_file=largest_file)
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
        return max(abs(rank.returncode or 0) for rank in ranks), "".join(outputs)

    def checkpoints(self, name: str) -> list[Path]:
        return sorted((self.folder / name / "checkpoints").glob("*"))

    def wait_for_step(self, child: Child, step: int) -> str:
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

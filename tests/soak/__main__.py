"""Kill runs at random and compare what they leave with an undisturbed run: `make soak`, a quarter of an hour.

    python -m tests.soak [kill] [elastic] [agents] [end] [--tries N] [--seed N] [--folder DIR]

kill     kill -9 of the training process, its workers left alone, and the same command again at once
elastic  kill -9 of a rank under one torchrun with --max-restarts
agents   the same under two torchruns that meet at a c10d rendezvous, as on two nodes
end      the same at most a second after the last step, while the ranks end

Prints a line per try and a table at the end. Exits with 1 if a run hung, failed, left a damaged checkpoint or ended
with other weights than the undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from umt_fast.data import synthetic
from umt_fast.run import checkpoint

ROOT = Path(__file__).parents[2]
SILENCE = 120.0
"""Seconds without a line after which a run counts as hung."""
PATIENCE = 3.0
"""Most seconds between a step and the next kill."""
STEPS = 90
"""Steps of a run; a checkpoint every 3."""
RECIPE = ROOT / "tests" / "support" / "small.toml"


@dataclass
class Tally:
    """What came of the tries of one kind."""

    attack: str
    tries: int = 0
    runs: int = 0
    hung: int = 0
    failed: int = 0
    damaged: int = 0
    different: int = 0

    def __str__(self) -> str:
        faults = f"{self.hung} | {self.failed} | {self.damaged} | {self.different}"
        return f"| {self.attack} | {self.tries} | {self.runs} | {faults} |"


class Run:
    """The processes of one run, and what they print."""

    def __init__(self, log: Path, commands: list[list[str]]) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        with open(log, "ab") as output:
            self.processes = [
                subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
                for command in commands
            ]

    def steps(self) -> int:
        return self.log.read_text(errors="replace").count("\nstep ")

    def wait_for_steps(self, more: int) -> bool:
        """Whether the run makes so many steps more before it ends. Raises TimeoutError when it is silent for long."""
        begun = self.steps()
        size, since = self.log.stat().st_size, time.monotonic()
        while self.steps() < begun + more:
            if all(process.poll() is not None for process in self.processes):
                return False
            if self.log.stat().st_size != size:
                size, since = self.log.stat().st_size, time.monotonic()
            if time.monotonic() - since > SILENCE:
                self.end()
                raise TimeoutError
            time.sleep(0.05)
        return True

    def finish(self) -> bool:
        """Whether all processes end well. Raises TimeoutError."""
        self.wait_for_steps(10**9)
        return not any(process.returncode for process in self.processes)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Soak:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.videos = synthetic.write_videos(folder / "videos", count=8)

    def start(self, name: str, ranks: int, agents: int = 1, restarts: int = 0) -> Run:
        options = {"--recipe": RECIPE, "--data.train": self.videos, "--run.dir": self.folder, "--run.name": name}
        options |= {"--optim.epochs": 60, "--optim.batch-size": 4 // ranks, "--compute.attention": "math"}
        options |= {"--run.stop-at": STEPS, "--run.log-every": 1, "--run.save-every": 3}
        train = ["-m", "train.pretrain", *(str(part) for option in options.items() for part in option)]
        torchrun = []
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                meeting = f"127.0.0.1:{free.getsockname()[1]}"
            torchrun = ["-m", "torch.distributed.run", "--nnodes", str(agents), "--max-restarts", str(restarts)]
            torchrun += ["--nproc-per-node", str(ranks // agents), "--rdzv-backend", "c10d", "--rdzv-id", name]
            torchrun += ["--rdzv-endpoint", meeting]
        return Run(self.folder / f"{name}.log", [[sys.executable, *torchrun, *train]] * agents)

    def undisturbed(self, ranks: int) -> Path:
        """Checkpoints of a run that nobody kills."""
        name = f"whole-{ranks}"
        if not (self.folder / name).exists() and not self.start(name, ranks).finish():
            raise SystemExit(f"the undisturbed run failed: {self.folder / name}.log")
        return self.folder / name / "checkpoints"

    def judge(self, tally: Tally, name: str, ranks: int, ended: bool) -> None:
        folder, whole = self.folder / name / "checkpoints", self.undisturbed(ranks)
        tally.runs += 1
        tally.failed += not ended
        tally.damaged += len(list(folder.glob("*.damaged")))
        if not ended:
            print(f"  {name}: failed, see {self.folder / name}.log", flush=True)
            return
        left, right = (checkpoint.load_checkpoint(checkpoint.list_checkpoints(path)[-1]) for path in (folder, whole))
        same = left["clips_seen"] == right["clips_seen"]
        same = same and all(torch.equal(value, right["model"][key]) for key, value in left["model"].items())
        tally.different += not same
        print(f"  {name}: {'bit-identical to' if same else 'DIFFERS from'} the undisturbed run", flush=True)

    def kill(self, tries: int) -> Tally:
        tally = Tally("kill -9 of the process, the same command at once")
        self.undisturbed(1)
        while tally.tries < tries:
            name, ended = f"kill-{tally.runs}", False
            while not ended:
                run = self.start(name, 1)
                try:
                    # One in five dies before its first step.
                    if tally.tries < tries and (self.random.random() < 0.2 or run.wait_for_steps(1)):
                        time.sleep(self.random.uniform(0, PATIENCE))
                        if run.processes[0].poll() is None:
                            run.processes[0].kill()  # not its workers
                            tally.tries += 1
                            print(f"  try {tally.tries} after {run.steps()} lines", flush=True)
                            run.processes[0].wait()
                            continue
                    ended = run.finish()
                except TimeoutError:
                    tally.hung += 1
                    break
                if not ended:
                    break
            self.judge(tally, name, 1, ended)
        return tally

    def kill_rank(self, run: Run) -> bool:
        """Kill one rank of a run under torchrun, if any is there."""
        ranks = [pid for process in run.processes for pid in _children(process.pid)]
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if ranks:
                os.kill(self.random.choice(ranks), signal.SIGKILL)
                return True
        return False

    def elastic(self, agents: int, tries: int) -> Tally:
        tally = Tally(f"kill -9 of a rank, {agents} torchrun{'s' if agents > 1 else ''} with --max-restarts")
        self.undisturbed(2)
        while tally.tries < tries:
            name, ended = f"elastic-{agents}-{tally.runs}", False
            run = self.start(name, 2, agents, restarts=100)
            try:
                while tally.tries < tries and run.wait_for_steps(1):
                    time.sleep(self.random.uniform(0, PATIENCE))
                    if self.kill_rank(run):
                        tally.tries += 1
                        print(f"  try {tally.tries} after {run.steps()} lines", flush=True)
                        time.sleep(1)  # the lines of the dead attempt
                ended = run.finish()
            except TimeoutError:
                tally.hung += 1
            self.judge(tally, name, 2, ended)
        return tally

    def end(self, tries: int) -> Tally:
        tally = Tally("kill -9 of a rank after the last step, 2 torchruns with --max-restarts")
        whole = self.undisturbed(2)
        while tally.runs < tries:
            name, ended = f"end-{tally.runs}", False
            folder = self.folder / name / "checkpoints"
            folder.mkdir(parents=True)
            shutil.copy(checkpoint.list_checkpoints(whole)[-2], folder)  # three steps are left
            run = self.start(name, 2, 2, restarts=5)
            try:
                if run.wait_for_steps(3):
                    time.sleep(self.random.uniform(0, 1))
                    tally.tries += self.kill_rank(run)
                ended = run.finish()
            except TimeoutError:
                tally.hung += 1
            self.judge(tally, name, 2, ended)
        return tally


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in found.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["kill", "elastic", "agents", "end"])
    parser.add_argument("--tries", type=int, help="kills of each kind; by default 30 of the first and 20 of the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    os.environ["UMT_FAST_CACHE"] = tempfile.mkdtemp(prefix="umt-fast-soak-")
    soak = Soak(given.folder or Path(tempfile.mkdtemp(prefix="umt-fast-soak-")), given.seed)
    print(f"runs and logs in {soak.folder}", flush=True)
    tallies = []
    for kind in given.kinds:
        print(kind, flush=True)
        tries = given.tries or (30 if kind == "kill" else 20)
        attacks = {
            "kill": soak.kill,
            "elastic": partial(soak.elastic, 1),
            "agents": partial(soak.elastic, 2),
            "end": soak.end,
        }
        tallies.append(attacks[kind](tries))
    print(
        "| attack | tries | runs | hung | failed | damaged checkpoints | other weights |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(map(str, tallies)))
    sys.exit(any(tally.hung or tally.failed or tally.damaged or tally.different for tally in tallies))


if __name__ == "__main__":
    main()

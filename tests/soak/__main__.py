"""Interrupt runs at random and compare their files with those of an undisturbed run: `make soak`, half an hour.

    python -m tests.soak [KIND ...] [--job pretrain finetune stage2] [--tries N] [--seed N] [--folder DIR]

Kinds for each job, on one rank and, with `-2`, on two ranks; the same command restarts each ended run at once:
process  kill -9 of one rank, its workers left alone
saving   kill -9 while a checkpoint is being written
worker   kill -9 of a data worker
node     kill -9 of everything at once
stop     SIGTERM or SIGINT
Kinds of pre-training under torchrun:
elastic  kill -9 of a rank under one torchrun with --max-restarts
agents   kill -9 of a rank under two torchruns with a c10d rendezvous, as on two nodes
end      kill -9 of a rank at most a second after the last step, while the ranks end

Prints a line per try and a table at the end. Exits with 1 if a run hung, failed, damaged a checkpoint, left a process,
shared memory or a file behind, or has other results than the undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forked import Forked, start_ranks

from tests.soak.jobs import MAINS, ROOT, Jobs, differences, run_job
from umt_fast.run import checkpoint
from umt_fast.run.stop import EXIT_STOPPED

SILENCE = 120.0
"""Seconds without a line after which a run counts as hung."""
PATIENCE = 4.0
"""Most seconds per rank from the start of a run, or from the last kill, to the next kill."""
LINGER = 3.0
"""Most seconds that a process may outlive its run."""
KINDS = ("process", "saving", "worker", "node", "stop")
TORCHRUN_KINDS = ("elastic", "agents", "end")


@dataclass
class Tally:
    """Results of the tries of one kind."""

    attack: str
    tries: int = 0
    runs: int = 0
    hung: int = 0
    failed: int = 0
    damaged: int = 0
    left: int = 0
    """Processes and shared memory that outlived their run."""
    different: int = 0

    def __str__(self) -> str:
        faults = f"{self.hung} | {self.failed} | {self.damaged} | {self.left} | {self.different}"
        return f"| {self.attack} | {self.tries} | {self.runs} | {faults} |"

    @property
    def bad(self) -> bool:
        return bool(self.hung or self.failed or self.damaged or self.left or self.different)


class Run:
    """The processes of one run, and their output."""

    def __init__(self, log: Path, processes: Sequence[subprocess.Popen[bytes] | Forked]) -> None:
        self.log, self.processes = log, processes
        self._shared = set(os.listdir("/dev/shm"))

    def steps(self) -> int:
        return self.log.read_text(errors="replace").count("\nstep ") if self.log.exists() else 0

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def wait_for_steps(self, more: int) -> bool:
        """Whether the run makes `more` steps before it ends. Raises TimeoutError after a long silence."""
        begun, size, since = self.steps(), -1, time.monotonic()
        while self.steps() < begun + more:
            if not self.running():
                return False
            if self.log.exists() and self.log.stat().st_size != size:
                size, since = self.log.stat().st_size, time.monotonic()
            if time.monotonic() - since > SILENCE:
                self.end()
                raise TimeoutError
            time.sleep(0.02)
        return True

    def finish(self) -> list[int]:
        """Exit statuses of all processes. Raises TimeoutError."""
        self.wait_for_steps(10**9)
        return [process.returncode or 0 for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def leftovers(self) -> list[str]:
        """Processes and shared memory that remain `LINGER` seconds after the run's end."""
        sessions, until = {process.pid for process in self.processes}, time.monotonic() + LINGER
        while (found := _sessions(sessions)) and time.monotonic() < until:
            time.sleep(0.05)
        shared = set(os.listdir("/dev/shm")) - self._shared
        dead = [name for name in shared if (pid := re.search(r"_(\d+)_", name)) and not Path("/proc", pid[1]).exists()]
        return [f"process {pid}" for pid in found] + dead


class Soak:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.jobs = Jobs(folder)

    def start(self, job: str, name: str, ranks: int) -> Run:
        """A run without torchrun, forked from a process that has imported everything."""
        log = self.folder / f"{name}.log"
        given = (job, self.jobs.arguments(job, name, ranks), str(log))
        return Run(log, start_ranks(run_job, [given] * ranks))

    def start_torchrun(self, name: str, agents: int = 1, restarts: int = 0) -> Run:
        """Pre-training on two ranks under torchrun."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(agents), "--rdzv-id", name]
        command += ["--nproc-per-node", str(2 // agents), "--max-restarts", str(restarts), "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", meeting, "-m", "train.pretrain", *self.jobs.arguments("pretrain", name, 2)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        log = self.folder / f"{name}.log"
        with open(log, "ab") as output:
            processes = [
                subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
                for _ in range(agents)
            ]
        return Run(log, processes)

    def undisturbed(self, job: str, ranks: int) -> Path:
        """Folder of an uninterrupted run."""
        name = f"{job}-{ranks}-whole"
        if not (self.folder / name).exists() and any(self.start(job, name, ranks).finish()):
            raise SystemExit(f"the undisturbed run failed: {self.folder / name}.log")
        return self.folder / name

    def judge(self, tally: Tally, job: str, name: str, ranks: int, ended: bool) -> None:
        folder = self.folder / name
        tally.runs += 1
        tally.failed += not ended
        tally.damaged += len(list((folder / "checkpoints").glob("*.damaged")))
        if not ended:
            print(f"  {name}: failed, see {folder}.log", flush=True)
            return
        found = differences(folder, self.undisturbed(job, ranks))
        tally.different += bool(found)
        print(f"  {name}: {'DIFFERS: ' + ', '.join(found) if found else 'as the undisturbed run'}", flush=True)

    def interrupt(self, job: str, kind: str, ranks: int, tries: int) -> Tally:
        """Attack runs until `tries` attacks are made, restarting each run until it ends by itself."""
        tally = Tally(f"{job}, {kind}, {ranks} rank{'s' if ranks > 1 else ''}")
        self.undisturbed(job, ranks)
        while tally.tries < tries:
            name, ended = f"{job}-{kind}-{ranks}-{tally.runs}", False
            while not ended:
                run = self.start(job, name, ranks)
                before, allowed = tally.tries, {0}
                try:
                    if tally.tries < tries:
                        allowed |= self.attack(run, kind, name, tally)
                    statuses = run.finish()
                except TimeoutError:
                    tally.hung += 1
                    break
                if tally.tries > before:
                    print(f"  try {tally.tries} after {run.steps()} lines: {statuses}", flush=True)
                for left in run.leftovers():
                    tally.left += 1
                    print(f"  {left} is left", flush=True)
                ended = not any(statuses)
                if not set(statuses) <= allowed:
                    break
            self.judge(tally, job, name, ranks, ended)
        return tally

    def attack(self, run: Run, kind: str, name: str, tally: Tally) -> set[int]:
        """Interrupt a run at a random time, unless it ends before. Returns the allowed exit statuses."""
        victim = self.random.choice(run.processes)
        if kind == "worker":
            while run.wait_for_steps(self.random.randrange(1, 12)):
                workers = [pid for pid in _sessions({victim.pid}) if pid != victim.pid]
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(self.random.choice(workers), signal.SIGKILL)
                    tally.tries += 1
            return set()
        if kind == "saving":
            victim = run.processes[0]
            run.wait_for_steps(self.random.randrange(1, 9))
            _wait_for_aside(self.folder / name / "checkpoints", run)
        else:
            time.sleep(self.random.uniform(0.2, PATIENCE * len(run.processes)))
        if not run.running():
            return set()
        tally.tries += 1
        if kind == "node":
            for process in run.processes:
                os.killpg(process.pid, signal.SIGKILL)
        elif kind == "stop":
            number = self.random.choice((signal.SIGTERM, signal.SIGINT))
            for process in run.processes if number == signal.SIGINT else [victim]:  # Ctrl-C reaches all
                process.send_signal(number)
            early = {-signal.SIGTERM, 130}  # before the first step
            return {EXIT_STOPPED} | early | ({1} if len(run.processes) > 1 else set())
        else:
            victim.kill()
        return {-signal.SIGKILL} | ({1} if len(run.processes) > 1 else set())

    def kill_rank(self, run: Run) -> bool:
        """Kill one rank of a run under torchrun, if one is alive."""
        ranks = [pid for process in run.processes for pid in _children(process.pid)]
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if ranks:
                os.kill(self.random.choice(ranks), signal.SIGKILL)
                return True
        return False

    def elastic(self, agents: int, tries: int) -> Tally:
        tally = Tally(f"kill -9 of a rank, {agents} torchrun{'s' if agents > 1 else ''} with --max-restarts")
        self.undisturbed("pretrain", 2)
        while tally.tries < tries:
            name, ended = f"elastic-{agents}-{tally.runs}", False
            run = self.start_torchrun(name, agents, restarts=100)
            try:
                while tally.tries < tries and run.wait_for_steps(1):
                    time.sleep(self.random.uniform(0, PATIENCE))
                    if self.kill_rank(run):
                        tally.tries += 1
                        print(f"  try {tally.tries} after {run.steps()} lines", flush=True)
                        time.sleep(1)  # the lines of the dead attempt
                ended = not any(run.finish())
            except TimeoutError:
                tally.hung += 1
            tally.left += len(run.leftovers())
            self.judge(tally, "pretrain", name, 2, ended)
        return tally

    def end(self, tries: int) -> Tally:
        tally = Tally("kill -9 of a rank after the last step, 2 torchruns with --max-restarts")
        whole = self.undisturbed("pretrain", 2)
        while tally.runs < tries:
            name, ended = f"end-{tally.runs}", False
            folder = self.folder / name / "checkpoints"
            folder.mkdir(parents=True)
            for path in checkpoint.list_checkpoints(whole / "checkpoints")[:-1]:  # three steps are left
                shutil.copy(path, folder)
            shutil.copy(whole / "metrics.jsonl", folder.parent)
            run = self.start_torchrun(name, 2, restarts=5)
            try:
                if run.wait_for_steps(3):
                    time.sleep(self.random.uniform(0, 1))
                    tally.tries += self.kill_rank(run)
                ended = not any(run.finish())
            except TimeoutError:
                tally.hung += 1
            tally.left += len(run.leftovers())
            self.judge(tally, "pretrain", name, 2, ended)
        return tally


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in found.split()]


def _sessions(leaders: set[int]) -> list[int]:
    """Living processes of these sessions."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) in leaders and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def _wait_for_aside(folder: Path, run: Run) -> None:
    """Wait until a checkpoint is being written, or the run ends."""
    while run.running():
        with contextlib.suppress(OSError):
            if any(name.startswith(".clips_") for name in os.listdir(folder)):
                return
        time.sleep(0.0002)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [kind + ranks for ranks in ("", "-2") for kind in KINDS]
    parser.add_argument("kinds", nargs="*", default=[*every, *TORCHRUN_KINDS], metavar="KIND")
    parser.add_argument("--job", nargs="*", default=list(MAINS), choices=list(MAINS))
    parser.add_argument("--tries", type=int, default=10, help="interruptions of each kind and job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if unknown := set(given.kinds) - {*every, *TORCHRUN_KINDS}:
        parser.error(f"no kind {', '.join(unknown)}")
    os.environ["UMT_FAST_CACHE"] = tempfile.mkdtemp(prefix="umt-fast-soak-")
    soak = Soak(given.folder or Path(tempfile.mkdtemp(prefix="umt-fast-soak-")), given.seed)
    print(f"runs and logs in {soak.folder}", flush=True)
    tallies = []
    for kind in given.kinds:
        print(kind, flush=True)
        if kind in TORCHRUN_KINDS:
            tallies.append(
                soak.end(given.tries) if kind == "end" else soak.elastic(1 + (kind == "agents"), given.tries)
            )
            continue
        name, _, ranks = kind.partition("-")
        tallies += [soak.interrupt(job, name, int(ranks or 1), given.tries) for job in given.job]
    print(
        "| attack | tries | runs | hung | failed | damaged checkpoints | left behind | different |\n" + 8 * "|---" + "|"
    )
    print("\n".join(map(str, tallies)))
    sys.exit(any(tally.bad for tally in tallies))


if __name__ == "__main__":
    main()

"""Processes forked from one that has imported torch and the programs of train/, which saves 3 s per start.

A test of a program's start (environment, `python -m`, torchrun) needs a new process instead.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train.pretrain", "train.finetune", "train.stage2", "umt_fast.data.loader"])


class Forked:
    """`function(*arguments)` in a forked process with its own session and a part of subprocess.Popen's interface.

    `function` is named by its module. Its output is in `stdout`; an exception ends it with 1, as a program.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any] = (),
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
    ) -> None:
        """`environment`: additional variables; `largest_file`: most bytes that it may write to a file."""
        _start_server()
        reader, writer = _context.Pipe(duplex=False)
        variables = {**os.environ, **(environment or {})}
        self._process = _context.Process(
            target=_run,
            args=(function, tuple(arguments), variables, largest_file, multiprocessing.get_start_method(), writer),
        )
        self._process.start()
        writer.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.stdout = os.fdopen(os.dup(reader.fileno()), "r", encoding="utf-8", errors="replace")
        reader.close()

    @property
    def returncode(self) -> int | None:
        """Exit status, or the negative number of the signal that killed it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for the end of the process. Returns the remaining output."""
        parts: list[str] = []
        reading = threading.Thread(target=lambda: parts.append(self.stdout.read()), daemon=True)
        reading.start()
        reading.join(timeout)
        if not parts:
            raise subprocess.TimeoutExpired("forked", timeout)
        self.wait(timeout)
        return parts[0], None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_ranks(
    function: Callable[..., Any], arguments: Sequence[Sequence[Any]], largest_file: int | None = None
) -> list[Forked]:
    """Start the ranks of a run like torchrun, one for each list of arguments."""
    if len(arguments) == 1:
        return [Forked(function, arguments[0], largest_file=largest_file)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(len(arguments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Forked(function, given, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, largest_file)
        for rank, given in enumerate(arguments)
    ]


def run_ranks(function: Callable[..., Any], arguments: Sequence[Any] = (), count: int = 2, timeout: float = 120) -> str:
    """Output of `count` ranks with the same arguments. Raises AssertionError if one fails."""
    ranks = start_ranks(function, [arguments] * count)
    outputs = [rank.communicate(timeout)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(outputs)
    return "\n".join(outputs)


def _start_server() -> None:
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    largest_file: int | None,
    start_method: str,
    output: Connection,
) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    # New objects, because the inherited ones keep their position in a file.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    multiprocessing.set_start_method(start_method, force=True)  # of its own children; else as it was started itself
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore SIGINT by default
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    function(*arguments)

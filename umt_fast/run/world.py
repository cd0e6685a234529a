"""The processes of a run and their communication: torchrun's environment, or one process."""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from umt_fast.config import ConfigError

T = TypeVar("T")

ANSWER_SECONDS = 10.0
"""Seconds that the main rank waits for the other ranks' answers when it searches for a lost rank."""

_POLL_SECONDS = 0.05
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Number of processes that mpirun started: Open MPI, MPICH and Intel MPI, MVAPICH."""


@dataclass(frozen=True)
class World:
    """This process among the run's processes."""

    rank: int
    size: int
    device: torch.device
    host_group: Any = None
    """A gloo group for host data, which does not use the device."""
    roll_call_group: Any = None
    """A second gloo group, only for finding a lost rank: a group cannot be used after its collective has failed."""

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def set_timeout(self, seconds: float) -> None:
        """Set how long a rank waits for the others from now on."""
        if self.size > 1:
            for group in {dist.group.WORLD, self.host_group}:
                _set_pg_timeout(timedelta(seconds=seconds), group)

    def find_lost(self) -> str:
        """On the main rank: a text with the ranks that do not answer. All ranks call this after a failed collective."""
        try:
            limit = timedelta(seconds=ANSWER_SECONDS)
            dist.monitored_barrier(self.roll_call_group, limit, wait_all_ranks=self.main)
        except RuntimeError as error:
            found = re.search(r"[Rr]anks? ([\d, ]*\d) failed to pass", str(error))
            found = found or re.search(r"errors while waiting for send/recv from rank (\d+)", str(error))
            return f"rank {found[1]} does not answer" if found else shorten(error)
        return "every rank answers now"

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def start(device: str, timeout: float = 1800.0) -> World:
    """Join the run's processes; wait for them up to `timeout` seconds.

    `device` is auto, cpu or cuda; auto chooses a GPU if there is one. Raises ConfigError for an incomplete environment
    or a missing device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device = cuda, but torch sees no GPU; use --run.device cpu, or see python -m umt_fast.doctor"
        )
    rank, size, local = read_environment(os.environ)
    place = torch.device(device)
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(f"LOCAL_RANK = {local}, but torch sees {torch.cuda.device_count()} GPUs on this node")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if size == 1:
        return World(rank, size, place)
    limit = timedelta(seconds=timeout)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(agree_on_attempt(store, rank, size, timeout), store)
        options: dict[str, Any] = {"store": store, "rank": rank, "world_size": size, "timeout": limit}
        if device == "cuda":
            dist.init_process_group("nccl", device_id=place, **options)
            return World(rank, size, place, *(dist.new_group(backend="gloo", timeout=limit) for _ in range(2)))
        dist.init_process_group("gloo", **options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"rank {rank} of {size} cannot join the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            f"{reason}"
        ) from error
    return World(rank, size, place, dist.group.WORLD, dist.new_group(timeout=limit))


def agree_on_attempt(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A name for this start of the ranks: the same on all ranks, and different from all earlier starts.

    torchrun may keep one store over all restarts, in which a new attempt would read the keys of the last one.
    TORCHELASTIC_RESTART_COUNT does not identify an attempt: each node's torchrun counts its own failures. Therefore
    every rank writes a random number, and the main rank publishes lists of all numbers until every rank has confirmed
    its own number in the same list. Raises DistStoreError after `timeout` seconds.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"umt_fast/start/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0:
            numbers = [store.get(f"umt_fast/start/{other}").decode() for other in range(size)]  # waits for the first
            attempt = hashlib.sha256("".join(numbers).encode()).hexdigest()
            store.set("umt_fast/numbers", " ".join(numbers))
            if store.check([f"umt_fast/found/{attempt}/{other}" for other in range(1, size)]):
                store.set(f"umt_fast/agreed/{attempt}", "")
                return attempt
        elif store.check(["umt_fast/numbers"]):
            numbers = store.get("umt_fast/numbers").decode().split()
            if len(numbers) == size and numbers[rank] == own:
                attempt = hashlib.sha256("".join(numbers).encode()).hexdigest()
                store.set(f"umt_fast/found/{attempt}/{rank}", "")
                if store.check([f"umt_fast/agreed/{attempt}"]):
                    return attempt
        time.sleep(_POLL_SECONDS)
    raise dist.DistStoreError(f"the ranks did not find each other within {timeout:g} seconds")


def shorten(error: RuntimeError) -> str:
    """The first line of an error of gloo or NCCL, without source locations and advice."""
    first = str(error).strip().splitlines()[0]
    return re.sub(r"\[[^\]]*\.cc:\d+\] ", "", first).partition(". This is typically")[0]


def advise_restarts(environment: Mapping[str, str]) -> str | None:
    """A note for elastic runs on several nodes whose restarts may hang, with the variable that prevents it."""
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts, nodes = environment.get("TORCHELASTIC_MAX_RESTARTS", "0"), environment.get("GROUP_WORLD_SIZE", "1")
    if not shared or restarts == "0" or nodes == "1" or environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1":
        return None
    return (
        "note: a restart of several nodes may hang in torchrun's shared store; start torchrun with "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
    )


def read_environment(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of ranks and local rank, as torchrun sets them. Raises ConfigError if only some are set."""
    numbers: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", *_MPI_SIZES):
        if (text := environment.get(name)) is not None:
            numbers[name] = _read_number(name, text)
    if "RANK" not in numbers:
        if (size := numbers.get("WORLD_SIZE", 1)) != 1:
            raise ConfigError(f"WORLD_SIZE = {size}, but RANK is not set: start with torchrun, or unset WORLD_SIZE")
        if numbers.get("SLURM_NTASKS", 1) > 1 and "SLURM_PROCID" in numbers:
            raise ConfigError(
                f"SLURM started {numbers['SLURM_NTASKS']} tasks, but RANK is not set: start one torchrun per node with "
                "srun --ntasks-per-node 1 (docs/reliability.md), or unset SLURM_PROCID to train in this process alone"
            )
        for name in _MPI_SIZES:
            if (size := numbers.get(name, 1)) > 1:
                raise ConfigError(
                    f"mpirun started {size} processes ({name}), but RANK is not set: start one torchrun per node with "
                    f"mpirun --map-by ppr:1:node, or unset {name} to train in this process alone"
                )
    rank, size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    if not 0 <= rank < size:
        has = f"WORLD_SIZE = {size}" if "WORLD_SIZE" in numbers else "WORLD_SIZE is not set"
        raise ConfigError(f"RANK = {rank}, but {has}: start with torchrun, or unset RANK")
    if (local := numbers.get("LOCAL_RANK", 0)) < 0:
        raise ConfigError(f"LOCAL_RANK = {local}: start with torchrun, or unset LOCAL_RANK")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise ConfigError(f"WORLD_SIZE = {size}, but {name} is not set: start with torchrun")
        if not 0 <= (port := _read_number("MASTER_PORT", environment["MASTER_PORT"])) < 1 << 16:
            raise ConfigError(f"MASTER_PORT = {port} is not a port, 0 to 65535: start with torchrun")
    return rank, size, local


def _read_number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} = {text[:40]!r} is not a number: start with torchrun, or unset {name}") from None

"""The processes of a run, and how they agree: torchrun's environment, or one process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from umt_fast.config import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the run's processes."""

    rank: int
    size: int
    device: torch.device
    host_group: Any = None
    """A gloo group for talk between hosts, which keeps the device out of it."""

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

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def start(device: str) -> World:
    """Join the run's processes. `device` is auto, cpu or cuda; auto takes a GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device = cuda, but torch sees no GPU; use --run.device cpu, or see python -m umt_fast.doctor"
        )
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    if size == 1:
        return World(rank, size, place)
    if device == "cuda":
        dist.init_process_group("nccl", device_id=place)
        return World(rank, size, place, dist.new_group(backend="gloo"))
    dist.init_process_group("gloo")
    return World(rank, size, place, dist.group.WORLD)

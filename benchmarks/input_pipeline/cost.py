"""Memory of the host and the GPU, and use of the decoding engines, while a loader runs."""

from __future__ import annotations

import multiprocessing
import subprocess
from pathlib import Path

import torch

EVERYTHING = ("Pss:",)
NO_FILES = ("Pss_Anon:", "Pss_Shmem:")
"""Without the pages of program files: a process's share of these changes by tens of MB whenever another program with
the same libraries starts or ends."""


def own_memory(process: int | str = "self", kinds: tuple[str, ...] = EVERYTHING) -> float:
    """MB of a process, with its share of shared pages."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process has ended
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(kinds))


def memory(kinds: tuple[str, ...] = EVERYTHING) -> float:
    """MB of this process and its child processes."""
    processes = [process.pid for process in multiprocessing.active_children()]
    return own_memory(kinds=kinds) + sum(own_memory(process, kinds) for process in processes if process is not None)


def gpu_memory(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**20


def nvdec_use() -> float:
    query = ["nvidia-smi", "--query-gpu=utilization.decoder", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])

"""Every use of a private API of PyTorch in the data path. `tests/data/test_torch_private.py` runs each of them.

Checked with torch 2.8 to 2.13.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

if TYPE_CHECKING:
    from jaxtyping import UInt8


def resize_antialiased(clip: UInt8[Tensor, "t c h w"], out: UInt8[Tensor, "t c i j"]) -> None:
    """What `F.interpolate(mode="bilinear", antialias=True)` calls, which cannot write into a given tensor."""
    torch.ops.aten._upsample_bilinear2d_aa.out(clip, out.shape[2:], False, None, None, out=out)


def empty_shared(shape: tuple[int, ...]) -> UInt8[Tensor, ...]:
    """Bytes in shared memory. `Tensor.share_memory_` would copy a tensor that is already written.

    Raises RuntimeError where /dev/shm is full.
    """
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def stop_workers(batches: Iterator[Any], grace: float) -> None:
    """Stop the worker processes of a DataLoader's iterator; those still busy after `grace` seconds are killed.

    Not left to the garbage collector: after an error the traceback keeps the iterator, and Python's exit then waits
    for workers that nobody asked to stop.
    """
    if not isinstance(batches, _MultiProcessingDataLoaderIter):
        return
    late = threading.Timer(grace, _kill, (batches._workers,))
    late.start()
    try:
        batches._shutdown_workers()
    except RuntimeError as error:  # torch reports the killed ones
        if not is_dead_worker(error):
            raise
    finally:
        late.cancel()


def is_dead_worker(error: BaseException | None) -> bool:
    """Whether this is DataLoader's error about a worker that was killed; it has no class of its own."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


@contextlib.contextmanager
def ignore_dead_workers() -> Iterator[None]:
    """Around the making of a DataLoader's iterator: keep it from handling SIGCHLD.

    Its handler raises an error wherever the program is when a worker ends. Without it the error is raised where the
    next batch is awaited, within 5 seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()

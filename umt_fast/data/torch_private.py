"""All uses of private PyTorch APIs in the data path. `tests/data/test_torch_private.py` runs each of them.

Checked with torch 2.8 to 2.13.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

if TYPE_CHECKING:
    from jaxtyping import UInt8


def resize_antialiased(clip: UInt8[Tensor, "t c h w"], out: UInt8[Tensor, "t c i j"]) -> None:
    """`F.interpolate(mode="bilinear", antialias=True)`, but written into a given tensor."""
    torch.ops.aten._upsample_bilinear2d_aa.out(clip, out.shape[2:], False, None, None, out=out)


def empty_shared(shape: tuple[int, ...]) -> UInt8[Tensor, ...]:
    """Uninitialised bytes in shared memory; `Tensor.share_memory_` would copy an existing tensor.

    Raises RuntimeError if /dev/shm is full.
    """
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def stop_workers(batches: Iterator[Any], grace: float) -> None:
    """Stop the worker processes of a DataLoader's iterator; kill those that are still busy after `grace` seconds.

    The garbage collector may be too late: after an error the traceback keeps the iterator alive, and Python's exit then
    waits for workers that were never stopped.
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


def end_if_one_died(batches: Iterator[Any] | None) -> None:
    """Where a worker of a DataLoader's iterator was killed, end the others, and with them the wait for their batches.

    A worker that is killed in the middle of a message never releases the lock of the pipe, and the reader waits for the
    rest of the message. When no process can write to the pipe, the reader gets an error and notices the dead worker.
    """
    if isinstance(batches, _MultiProcessingDataLoaderIter) and any(worker.exitcode for worker in batches._workers):
        _kill(batches._workers)
        # Not closed: torch may still write to it when it shuts the workers down.
        queue: Any = batches._worker_result_queue
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), queue._writer.fileno(), inheritable=False)


def is_dead_worker(error: BaseException | None) -> bool:
    """Whether this is DataLoader's error about a killed worker, which has no class of its own."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


@contextlib.contextmanager
def ignore_dead_workers() -> Iterator[None]:
    """Use this around the creation of a DataLoader's iterator, to undo its SIGCHLD handler.

    The handler raises an error at any point of the program when a worker dies. Without it the error is raised by the
    next request for a batch, within 5 seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()

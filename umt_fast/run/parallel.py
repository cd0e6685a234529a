"""One model on several processes: replicated (DDP) or sharded (FSDP2), behind the same functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from umt_fast.config import Parallel
from umt_fast.run.cuda_graph import capture_stream
from umt_fast.run.world import World


def wrap(
    model: nn.Module, world: World, kind: Parallel, blocks: Iterable[nn.Module] = (), cuda_graph: bool = False
) -> nn.Module:
    """Prepare `model` for training on all processes; with one process, return it unchanged.

    ddp returns a wrapper and does not change `model`. fsdp shards `model` in place, each of `blocks` separately, and
    returns it; build the optimiser afterwards.
    """
    if world.size == 1:
        return model
    if kind == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    with capture_stream(cuda_graph):
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def reduce_if(model: nn.Module, last: bool) -> Iterator[None]:
    """Use this around a micro-batch: gradients are averaged over the processes only after the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of a sharded one, on every process; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

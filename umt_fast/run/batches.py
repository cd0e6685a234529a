"""The batches of a run: the loader, opened at the clip where the run starts or resumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from umt_fast.config import OptimConfig
from umt_fast.data import open_loader
from umt_fast.data.clips import ClipStream
from umt_fast.run.world import World

if TYPE_CHECKING:
    from umt_fast.data.loader import Loader


def open_batches(
    stream: ClipStream, optim: OptimConfig, world: World, say: Callable[[str], None], first_clip: int, steps: int
) -> Loader:
    """A loader of this rank's share of `steps` steps, from clip number `first_clip` of the stream on.

    The section `data` of the run is `stream.config`: its `decoder` chooses the loader, and `workers` processes decode.
    """
    return open_loader(
        stream,
        world.device,
        say,
        start=first_clip,
        batches=max(steps, 0) * optim.accumulate,
        batch_size=optim.batch_size,
        rank=world.rank,
        world_size=world.size,
    )

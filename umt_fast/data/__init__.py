"""From video files to uint8 clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from umt_fast.data.decode import choose_decoder

if TYPE_CHECKING:
    from umt_fast.data.clips import ClipStream
    from umt_fast.data.loader import Loader

__all__ = ["open_loader"]


def open_loader(stream: ClipStream, device: torch.device, say: Callable[[str], None] = print, **options: Any) -> Loader:
    """The loader of the decoder that `stream.config.decoder` chooses; the options are those of `workers.WorkerBatches`.

    A stream that makes more than views of frames is decoded by PyAV.
    """
    choice = choose_decoder("pyav" if stream.needs_pyav else stream.config.decoder, device)
    pinned = device.type == "cuda"
    if not choice.dali:
        from umt_fast.data.loader import ClipLoader  # it imports PyAV; doctor reports where that is missing

        return ClipLoader(stream, pin_memory=pinned, say=say, **options)
    from umt_fast.data.dali_loader import DaliLoader

    return DaliLoader(stream, device, choice.engines, say=say, pin_memory=pinned, **options)

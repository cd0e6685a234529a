"""From video files to uint8 clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import torch

from umt_fast.config import FileDecoder
from umt_fast.data.decode.choice import choose_decoder

if TYPE_CHECKING:
    from umt_fast.data.clips import ClipStream
    from umt_fast.data.loader import Loader

__all__ = ["open_loader"]


def open_loader(stream: ClipStream, device: torch.device, say: Callable[[str], None] = print, **options: Any) -> Loader:
    """The loader of the decoder that `stream.config.decoder` chooses; of files for a stream that needs whole frames.

    The options are those of `workers.WorkerBatches`: `batches` and `batch_size` (clips), and `start`, the clip to begin
    at. Worker processes, prefetched batches and time limits are in `stream.config`, the run's section `data`. Use the
    loader in a `with`, or close it.
    """
    choice = choose_decoder(stream.file_decoder if stream.needs_frames else stream.config.decoder, device)
    pinned = device.type == "cuda"
    if choice.name in get_args(FileDecoder):
        from umt_fast.data.loader import ClipLoader  # imports PyAV, which may be missing

        return ClipLoader(stream, pin_memory=pinned, say=say, **options)
    if choice.name == "dali":
        from umt_fast.data.dali_loader import DaliLoader

        return DaliLoader(stream, device, choice.engines, say=say, pin_memory=pinned, **options)
    raise AssertionError(f"no loader of decoder {choice.name}")

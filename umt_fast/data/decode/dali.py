"""One DALI pipeline: it decodes, crops and resizes a group of videos."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from umt_fast.data.clips import ClipStream, ViewTransform
from umt_fast.data.crops import View

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from nvidia.dali import Pipeline


@dataclass
class VisitRequest:
    """Request to DALI to decode one visit."""

    place: int
    """Position of the visit in its batch."""
    codec: str
    content: UInt8[np.ndarray, " bytes"]
    frames: list[int]
    views: list[View]
    bt709: bool
    """Whether the colours are BT.709; BT.601 otherwise."""


def build_pipeline(stream: ClipStream, device: torch.device, requests: int, threads: int) -> Pipeline:
    """A DALI pipeline that makes uint8 clips [R,T,side,side,3] of up to `requests` videos at a time.

    For a stream with a `ViewTransform` it only crops, to [T,h,w,3]: the transform resizes with torch, because DALI's
    cubic filter differs from torch's.

    Differences from PyAV and torch, measured on the CPU (tests/data/test_dali_loader.py):
    - the decoded frames are bit-identical if chroma is not subsampled. From 4:2:0, DALI interpolates chroma, while
      FFmpeg's fast conversion repeats it: edges of colours differ, brightness by 3 of 255 at most;
    - DALI reads every video as BT.601, so colours of BT.709 are wrong by up to 38 of 255; a matrix corrects them;
    - DALI's resize repeats a crop's outermost pixels, torch leaves them out: when a clip is made smaller, its outermost
      rows and columns differ by up to 18, all others by 2.
    """
    # DALI's own pool holds only buffers above 32 MB by default. malloc's arenas, one per thread, then grow by unused
    # gaps: 434 MB after 9000 clips of 340x256.
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "128k")
    from nvidia.dali import Pipeline, fn, types

    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=requests,
        num_threads=threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=1,  # the loader keeps several pipelines busy instead
        exec_dynamic=True,  # outputs stay valid while a tensor uses them
    )
    with pipeline:
        # DALI reads the bytes in place; `DecodingPipeline` holds them until it has decoded them.
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        colours = fn.external_source(name="colours", dtype=types.FLOAT, ndim=2)
        video = fn.decoders.video(
            encoded, frames=frames, device="mixed" if on_gpu else "cpu", pad_mode="none", affine=False
        )
        clips = []
        for number in range(stream.config.crops_per_clip):
            corner = fn.external_source(name=f"corner{number}", dtype=types.INT32, ndim=1)
            extent = fn.external_source(name=f"extent{number}", dtype=types.INT32, ndim=1)
            part = fn.slice(video, corner, extent, axis_names="HW")
            if stream.transform is not None:
                clips.append(part)
                continue
            flip = fn.external_source(name=f"flip{number}", dtype=types.INT32, ndim=0)
            part = fn.resize(part, size=(stream.side, stream.side), interp_type=types.INTERP_LINEAR, antialias=True)
            clips.append(fn.flip(part, horizontal=flip))
        made = clips[0] if stream.transform is not None else fn.stack(*clips)
        pipeline.set_outputs(fn.coord_transform(made, M=colours, dtype=types.UINT8))
    pipeline.build()
    return pipeline


def _inputs(requests: Sequence[VisitRequest], flips: bool) -> dict[str, list[np.ndarray]]:
    """The inputs of `build_pipeline` by name, one array per request; `flips`: whether the pipeline has flips."""
    inputs = {
        "encoded": [request.content for request in requests],
        "frames": [np.array(request.frames, np.int32) for request in requests],
        "colours": [BT709_FROM_BT601 if request.bt709 else np.eye(3, dtype=np.float32) for request in requests],
    }
    for number in range(len(requests[0].views)):
        views = [request.views[number] for request in requests]
        inputs[f"corner{number}"] = [np.array((view.y, view.x), np.int32) for view in views]
        inputs[f"extent{number}"] = [np.array((view.height, view.width), np.int32) for view in views]
        if flips:
            inputs[f"flip{number}"] = [np.array(view.flip, np.int32) for view in views]
    return inputs


def to_rgb(red: float, blue: float) -> np.ndarray:
    """Matrix from (Y, Cb, Cr), on the same scale, to RGB for these weights of red and blue (ITU-R BT.601, BT.709)."""
    green = 1 - red - blue
    return np.array(
        [
            (1, 0, 2 * (1 - red)),
            (1, -2 * (1 - blue) * blue / green, -2 * (1 - red) * red / green),
            (1, 2 * (1 - blue), 0),
        ]
    )


BT709_FROM_BT601 = (to_rgb(0.2126, 0.0722) @ np.linalg.inv(to_rgb(0.299, 0.114))).astype(np.float32)
"""Corrects the RGB of BT.709 pictures that were decoded as BT.601."""


class DecodeFailed(Exception):
    """DALI failed on a video of a group."""


class DecodingPipeline:
    """One DALI pipeline, which decodes one group of requests at a time."""

    def __init__(self, stream: ClipStream, device: torch.device, requests: int, threads: int) -> None:
        self._arguments = stream, device, requests, threads
        self._pipeline: Pipeline | None = None
        self._at_work: Sequence[VisitRequest] = ()

    @property
    def idle(self) -> bool:
        return not self._at_work

    def start(self, requests: Sequence[VisitRequest]) -> None:
        """Begin to decode; returns at once."""
        if self._pipeline is None:
            self._pipeline = build_pipeline(*self._arguments)
        self._at_work = requests
        for name, values in _inputs(requests, flips=self._arguments[0].transform is None).items():
            self._pipeline.feed_input(name, values)
        self._pipeline.schedule_run()

    def finish(self) -> UInt8[Tensor, "n r t h w 3"]:
        """The clips of the requests, in memory that DALI frees with the tensor.

        On a GPU the current stream waits for the clips, and DALI reuses the memory only after the work on that stream.
        Raises DecodeFailed.
        """
        assert self._pipeline is not None
        clip_stream, device = self._arguments[:2]
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        requests = self._at_work
        try:
            (clips,) = self._pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:
            self.close()  # DALI does not guarantee that a pipeline works after an error
            raise DecodeFailed(str(error)) from None
        finally:
            self._at_work = ()
        if clip_stream.transform is None:
            return torch.from_dlpack(clips.as_tensor())
        assert isinstance(clip_stream.transform, ViewTransform)
        parts = [torch.from_dlpack(part) for part in clips]
        resize = clip_stream.transform.resize
        return torch.stack([resize(part, of.views[0].flip) for part, of in zip(parts, requests, strict=True)])[:, None]

    def decode(self, request: VisitRequest) -> UInt8[Tensor, "r t h w 3"]:
        """Decode one request and wait for its clips. Raises DecodeFailed."""
        self.start([request])
        return self.finish()[0]

    def close(self) -> None:
        self._pipeline = None
        self._at_work = ()

"""Clips decoded, cropped and resized by NVIDIA DALI: on a GPU's decoding engines (NVDEC), or on the CPU.

Worker processes choose the frames and crops of each clip as for PyAV, and copy the packets of these frames out of the
files; the training process feeds the packets to DALI's pipelines. DALI never reads a file itself, since a damaged file
can end the process: in DALI 2.4.0 an AVI with a wrong offset does, and a frame of another size than the header says.
PyAV decodes in the workers what DALI does not support. Both give the same frames of the same videos;
`decode.dali.build_pipeline` lists how pixels differ.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset

from umt_fast.data.batch import Batch, VisitedVideo
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import IMAGE_SUFFIXES, nvdec
from umt_fast.data.decode.container import Storage, look_up
from umt_fast.data.decode.dali import DecodeFailed, DecodingPipeline, VisitRequest
from umt_fast.data.decode.excerpt import cut_excerpt
from umt_fast.data.decode.ffmpeg import fetch
from umt_fast.data.index import suffix_of
from umt_fast.data.loader import ClipDataset, Loader, fetch_ahead, make_clips, nothing_readable, read_visit
from umt_fast.data.shared_memory import empty_for_parent
from umt_fast.data.video import Video
from umt_fast.data.workers import WorkerBatches

if TYPE_CHECKING:
    from jaxtyping import UInt8

CPU_CODECS = frozenset(("vp8", "vp9", "mjpeg"))
CPU_PIXELS = frozenset(f"yuv{j}{chroma}p" for j in ("", "j") for chroma in (420, 422, 444))
GPU_PIXELS = frozenset(("yuv420p", "yuvj420p"))
"""Pixel formats that DALI can convert from NVDEC's output to RGB."""
NOT_PLAIN = "interlaced, turned, cut by an edit list, with hidden frames, of changing size or damaged"

_BT601 = (2, 5, 6)  # numbers of ITU-T H.273; 2 means unknown, which FFmpeg also reads as BT.601
_BT709 = 1
_ALWAYS_BT601 = ("vp8", "mjpeg")  # these ignore the matrix that the container names

THREADS_PER_ENGINE = 2
"""So that one video is unpacked while another is decoded. Not measured."""
CHECKED_VISITS = 8
"""Number of first visits of a run that DALI and PyAV both decode, to compare their frames."""
LARGEST_LUMA_ERROR = 4.0
"""Mean over a frame, of 255. Rounding and edges cause less than 2; a wrong frame mostly causes more than 4."""


@dataclass
class DecodedVisit:
    """Clips that PyAV decoded for one visit."""

    place: int
    reason: str
    """Reason why DALI did not decode it."""
    clips: UInt8[np.ndarray, "r t h w 3"]


@dataclass
class BatchPlan:
    """A batch before DALI has decoded its share. Large content is in tensors, which workers pass by shared memory."""

    visits: list[int]
    found: list[tuple[VisitedVideo | None, list[tuple[str, str]]]]
    """For each visit the video that is used, and the unreadable videos with their reasons."""
    requests: list[VisitRequest]
    """Requests to DALI, without their content."""
    content: UInt8[Tensor, " bytes"]
    """Packets of all requests, concatenated; `sizes` has the length of each."""
    sizes: list[int]
    decoded: UInt8[Tensor, "n r t h w 3"]
    """Clips that PyAV decoded for the other visits, at `places`."""
    places: list[int]
    reasons: Counter[str]
    """Number of visits that PyAV decoded, by reason."""

    def pin_memory(self) -> BatchPlan:
        self.decoded = self.decoded.pin_memory()
        return self

    def requests_with_content(self) -> list[VisitRequest]:
        ends = list(itertools.accumulate(self.sizes))
        content = self.content.numpy()
        return [
            replace(request, content=content[end - size : end])
            for request, size, end in zip(self.requests, self.sizes, ends, strict=True)
        ]


@dataclass(frozen=True)
class DaliSupport:
    """Decides which videos DALI can decode. `engines`: limits of NVDEC by codec; None for DALI on the CPU."""

    engines: dict[str, nvdec.Limits] | None = None
    square_pixels: bool = False
    """Whether frames with non-square pixels must be widened, which only PyAV does."""
    distrusted: frozenset[str] = frozenset()
    """Codecs for which DALI's frames differ from PyAV's."""

    def why_not(self, stored: Storage) -> str | None:
        """Reason why PyAV has to decode the video, judged by its header; None if DALI can."""
        codec, size = stored.codec, (stored.width, stored.height)
        if codec not in (CPU_CODECS if self.engines is None else self.engines):
            return codec
        if self.square_pixels and stored.pixel_aspect != 1:
            return f"{codec} with non-square pixels"
        if codec in self.distrusted:
            return f"{codec} that DALI decodes to other frames"
        if stored.pixels not in (CPU_PIXELS if self.engines is None else GPU_PIXELS):
            return f"{codec} in {stored.pixels}"
        if stored.matrix not in (*_BT601, _BT709) and codec not in _ALWAYS_BT601:
            return f"{codec} in colour space {stored.matrix}"
        if self.engines is not None and (size[0] % 2 or size[1] % 2 or not self.engines[codec].fit(*size)):
            return f"{codec} of a size that NVDEC does not support"
        return None


class BatchPlanDataset(Dataset[BatchPlan]):
    """Batch plans of a stream by visit numbers: requests for DALI, and clips that PyAV has decoded."""

    def __init__(self, stream: ClipStream, support: DaliSupport) -> None:
        self.stream = stream
        self.support = support

    def __getitem__(self, visits: list[int]) -> BatchPlan:
        found = []
        made: list[VisitRequest | DecodedVisit] = []
        for place, (visit, content) in enumerate(zip(visits, fetch_ahead(self.stream, visits), strict=True)):

            def read(video: Video, rng: Generator, held: bytes | None, place: int = place) -> None:
                made.append(self._request_or_decode(place, video, rng, held))

            found.append(read_visit(self.stream, visit, content, read))
            if found[-1][0] is None and self.stream.replace:
                break
        requests = [one for one in made if isinstance(one, VisitRequest)]
        decoded = [one for one in made if isinstance(one, DecodedVisit)]
        return BatchPlan(
            visits=visits,
            found=found,
            requests=[replace(request, content=np.empty(0, np.uint8)) for request in requests],
            content=_shared([request.content for request in requests], (-1,)),
            sizes=[len(request.content) for request in requests],
            decoded=_shared([one.clips for one in decoded], (len(decoded), *self.stream.clips_shape)),
            places=[one.place for one in decoded],
            reasons=Counter(one.reason for one in decoded),
        )

    def _request_or_decode(
        self, place: int, video: Video, rng: Generator, content: bytes | None
    ) -> VisitRequest | DecodedVisit:
        """Raises BadVideo and OSError in the same cases as PyAV's loader."""
        if content is None and not video.remote and video.offset is None and os.path.isdir(video.path):
            return self._decode(place, "folders of frames", video, rng, content)
        if suffix_of(video.member or video.path) in IMAGE_SUFFIXES:
            return self._decode(place, "pictures", video, rng, content)
        content, _ = fetch(video, content)
        stored = look_up(video, content)
        if reason := self.support.why_not(stored):
            return self._decode(place, reason, video, rng, content)
        before = rng.bit_generator.state
        excerpt = cut_excerpt(video, lambda timeline: self.stream.choose_frames(video, timeline, rng), content)
        if excerpt is None:
            rng.bit_generator.state = before
            return self._decode(place, f"{stored.codec} {NOT_PLAIN}", video, rng, content)
        return VisitRequest(
            place=place,
            codec=stored.codec,
            content=np.frombuffer(excerpt.content, np.uint8),
            frames=excerpt.frames,
            views=self.stream.draw_views(excerpt.width, excerpt.height, rng),
            bt709=stored.matrix == _BT709 and stored.codec not in _ALWAYS_BT601,
        )

    def _decode(self, place: int, reason: str, video: Video, rng: Generator, content: bytes | None) -> DecodedVisit:
        clips = np.empty(self.stream.clips_shape, np.uint8)
        make_clips(self.stream, video, rng, content, clips)
        return DecodedVisit(place, reason, clips)


def _shared(parts: list[np.ndarray], shape: tuple[int, ...]) -> Tensor:
    """`parts` concatenated in memory that a worker shares with the training process."""
    joined = empty_for_parent((sum(part.size for part in parts),))
    if parts:
        np.concatenate([part.reshape(-1) for part in parts], out=joined.numpy())
    return joined.view(shape)


@dataclass
class _Group:
    """Requests of a batch that a pipeline decodes at once."""

    requests: list[VisitRequest]
    pipeline: DecodingPipeline | None = None
    """None: not started."""


@dataclass
class _Job:
    """A batch being made."""

    plan: BatchPlan
    groups: list[_Group]


class DaliLoader(Loader):
    """Batches of one rank, decoded by DALI where possible. The options are those of `WorkerBatches`.

    The batches have the same videos, frames, crops and replacements as those of the PyAV loader, for any number of
    pipelines and workers. If a GPU decodes, they are CUDA tensors. `say` prints each reason for decoding by PyAV once.
    """

    def __init__(
        self,
        stream: ClipStream,
        device: torch.device,
        engines: dict[str, nvdec.Limits] | None,
        *,
        batch_size: int,
        say: Callable[[str], None] = print,
        **options: Any,
    ) -> None:
        config = stream.config
        self.stream = stream
        self._device = device if engines is not None else torch.device("cpu")
        self._say = say
        self._reported: set[str] = set()
        visits = batch_size // stream.clips_per_visit
        self._group = min(config.pipeline_visits or visits, visits)
        threads = max(config.workers, 1) if engines is None else THREADS_PER_ENGINE
        count = config.pipelines or (1 if engines is None else nvdec.count_engines(engines))
        self._pipelines = [DecodingPipeline(stream, self._device, self._group, threads) for _ in range(count)]
        self._turn = itertools.cycle(self._pipelines)
        self._next = next(self._turn)
        support = DaliSupport(engines, config.square_pixels)
        if engines is not None:
            first = options["start"] // stream.clips_per_visit
            support = replace(support, distrusted=self._find_wrong(support, range(first, first + CHECKED_VISITS)))
        self._plans = WorkerBatches(
            BatchPlanDataset(stream, support), stream, batch_size=batch_size, say=say, **options
        )
        self._jobs: deque[_Job] = deque()
        self._waiting: deque[_Group] = deque()
        self._ended = False

    def __next__(self) -> Batch:
        self._keep_busy()
        if not self._jobs:
            raise StopIteration
        job = self._jobs.popleft()
        if self.stream.replace and job.plan.found[-1][0] is None:
            raise nothing_readable(job.plan.found[-1][1])
        batch = self._finish(job)
        self._keep_busy()
        return batch

    def close(self) -> None:
        self._plans.close()
        self._jobs.clear()
        self._waiting.clear()
        for pipeline in self._pipelines:
            pipeline.close()
        self._ended = True

    def _keep_busy(self) -> None:
        """Give every idle pipeline work. Pipelines take turns, so groups end in the order in which they are needed."""
        while self._next.idle and (self._waiting or self._fetch()):
            if self._waiting:
                self._start(self._waiting.popleft())

    def _start(self, group: _Group) -> None:
        group.pipeline = self._next
        self._next.start(group.requests)
        self._next = next(self._turn)

    def _fetch(self) -> bool:
        """Get a plan from the workers, if one is left and not too many are waiting."""
        if self._ended or len(self._jobs) > len(self._pipelines):
            return False
        try:
            plan = next(self._plans)
        except StopIteration:
            self._ended = True
            return False
        self._report(plan)
        requests = plan.requests_with_content()
        groups = [_Group(requests[i : i + self._group]) for i in range(0, len(requests), self._group)]
        self._jobs.append(_Job(plan, groups))
        self._waiting += groups
        return True

    def _report(self, plan: BatchPlan) -> None:
        fresh = {reason: count for reason, count in plan.reasons.items() if reason not in self._reported}
        if fresh:
            self._reported |= fresh.keys()
            where = "NVDEC" if self._device.type == "cuda" else "DALI on the CPU"
            listed = ", ".join(f"{count} x {reason}" for reason, count in fresh.items())
            self._say(f"{where} does not support every video; PyAV decodes, of {len(plan.visits)} in a batch: {listed}")

    def _finish(self, job: _Job) -> Batch:
        """Collect the pipelines' clips. If DALI failed, PyAV finds the bad video and replaces it."""
        plan = job.plan
        found = list(plan.found)
        made: list[tuple[Sequence[int], Tensor]] = []
        for group in job.groups:
            while group.pipeline is None:
                self._start(self._waiting.popleft())
            places = [request.place for request in group.requests]
            try:
                made.append((places, group.pipeline.finish()))
            except DecodeFailed:
                for request in group.requests:
                    clips, found[request.place] = self._decode_alone(group.pipeline, request, plan)
                    made.append(([request.place], clips.unsqueeze(0)))
        videos = [video for video, _ in found if video is not None]
        bad = [one for _, many in found for one in many]
        joined = self._join(plan, made)
        if len(videos) < len(found):  # a stream that does not replace leaves out what could not be read
            joined = joined[[place for place, (video, _) in enumerate(found) if video is not None]]
        return Batch(joined.flatten(0, 1), videos, bad)

    def _decode_alone(
        self, pipeline: DecodingPipeline, request: VisitRequest, plan: BatchPlan
    ) -> tuple[Tensor, tuple[VisitedVideo | None, list[tuple[str, str]]]]:
        try:
            return pipeline.decode(request), plan.found[request.place]
        except DecodeFailed:
            batch = ClipDataset(self.stream)[[plan.visits[request.place]]]
        if batch.videos:
            return batch.clip, (batch.videos[0], batch.bad)
        if self.stream.replace:
            raise nothing_readable(batch.bad)
        return torch.empty(self.stream.clips_shape, dtype=torch.uint8), (None, batch.bad)

    def _join(self, plan: BatchPlan, made: Iterable[tuple[Sequence[int], Tensor]]) -> UInt8[Tensor, "n r t h w 3"]:
        """The clips in the order of the visits. A single group that is the whole batch is not copied."""
        made = list(made)
        if len(made) == 1 and len(made[0][0]) == len(plan.visits):
            return made[0][1]
        clips = torch.empty((len(plan.visits), *self.stream.clips_shape), dtype=torch.uint8, device=self._device)
        for places, part in (*made, (plan.places, plan.decoded)):
            for place, one in zip(places, part, strict=True):
                clips[place].copy_(one, non_blocking=True)
        return clips

    def _find_wrong(self, support: DaliSupport, visits: Iterable[int]) -> frozenset[str]:
        """Codecs for which this GPU's frames differ from PyAV's in the first videos of the run."""
        wrong = set()
        dataset, pipeline = BatchPlanDataset(self.stream, support), self._pipelines[0]
        for visit in visits:
            plan = dataset[[visit]]
            for request in plan.requests_with_content():
                try:
                    clips = pipeline.decode(request).cpu()
                except DecodeFailed:
                    continue  # probably a bad video; the run will decode it with PyAV
                expected = ClipDataset(self.stream)[[visit]].clip
                if expected.shape == clips.shape and _luma_error(clips, expected) > LARGEST_LUMA_ERROR:
                    wrong.add(request.codec)
        pipeline.close()  # before the workers are forked
        if wrong:
            self._say(f"DALI gives other frames than PyAV of {', '.join(sorted(wrong))}: PyAV decodes those")
        return frozenset(wrong)


def _luma_error(clips: UInt8[Tensor, "r t h w 3"], expected: UInt8[Tensor, "r t h w 3"]) -> float:
    """Mean absolute difference of luma per frame, the largest of all frames, of 255."""
    weights = torch.tensor((0.299, 0.587, 0.114))
    return float(((clips.float() - expected.float()) @ weights).abs().mean(dim=(-2, -1)).max())

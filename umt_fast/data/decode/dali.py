"""Clips decoded, cropped and resized by NVIDIA DALI: on a GPU's decoding engines (NVDEC), or on the CPU.

Worker processes choose the frames and crops of each clip as for PyAV and cut the packets that they need out of the
files; the training process feeds those to DALI's pipelines. DALI never sees a file itself: a damaged one can end the
process, as an AVI with a wrong offset and a frame of another size than the header's do in DALI 2.4.0. What DALI does
not take, PyAV decodes in the workers, and its clips go to their place in the batch. Both give the same frames of the
same videos; what differs in a pixel is said at `dali_pipeline.build_pipeline`.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset

from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import container as pyav
from umt_fast.data.decode import nvdec
from umt_fast.data.decode.dali_pipeline import DecodeFailed, DecodingPipeline, Order
from umt_fast.data.decode.excerpt import cut_excerpt
from umt_fast.data.index import Video
from umt_fast.data.loader import (
    Batch,
    ClipDataset,
    Loader,
    Prepared,
    decode,
    empty_for_parent,
    fetch_ahead,
    nothing_readable,
    try_candidates,
)
from umt_fast.data.storage import read_video

if TYPE_CHECKING:
    from jaxtyping import UInt8

CPU_CODECS = frozenset(("vp8", "vp9", "mjpeg"))
CPU_PIXELS = frozenset(f"yuv{j}{chroma}p" for j in ("", "j") for chroma in (420, 422, 444))
GPU_PIXELS = frozenset(("yuv420p", "yuvj420p"))
"""DALI's kernel that makes RGB of NVDEC's pictures knows no others."""
NOT_PLAIN = "interlaced, turned, cut by an edit list, with hidden frames, of changing size or damaged"

_BT601 = (2, 5, 6)  # as ITU-T H.273 numbers them; 2 is unknown, which FFmpeg reads as BT.601 too
_BT709 = 1
_ALWAYS_BT601 = ("vp8", "mjpeg")  # whatever the container says

THREADS_PER_ENGINE = 2
"""So that one video is unpacked while another is decoded. Not measured."""
CHECKED_VISITS = 8
"""First visits of a run that are decoded by both, to see whether a GPU gives the frames that PyAV gives."""
LARGEST_LUMA_ERROR = 4.0
"""Mean over a frame, of 255: rounding and the edges stay below 2, a frame of another moment is mostly above."""


@dataclass
class ByPyav:
    """What PyAV made of one visit."""

    place: int
    reason: str
    """Why it was not DALI's."""
    clips: UInt8[np.ndarray, "r t h w 3"]


@dataclass
class Plan:
    """A batch of which DALI has still to decode its share. What is large lies in tensors, which workers share."""

    visits: list[int]
    found: list[tuple[str | None, list[tuple[str, str]]]]
    """For each visit the video that is read and those that cannot be, with the reasons."""
    orders: list[Order]
    """Without their content."""
    content: UInt8[Tensor, " bytes"]
    """Of the orders, one behind the other, `sizes` each."""
    sizes: list[int]
    decoded: UInt8[Tensor, "n r t h w 3"]
    """What PyAV made of the other visits, at `places`."""
    places: list[int]
    reasons: Counter[str]
    """Why those were not DALI's, and how many."""

    def pin_memory(self) -> Plan:
        self.decoded = self.decoded.pin_memory()
        return self

    def take_orders(self) -> list[Order]:
        ends = list(itertools.accumulate(self.sizes))
        content = self.content.numpy()
        return [
            replace(order, content=content[end - size : end])
            for order, size, end in zip(self.orders, self.sizes, ends, strict=True)
        ]


@dataclass(frozen=True)
class Takes:
    """Which videos go to DALI. `engines`: what NVDEC takes; None for DALI on the CPU."""

    engines: dict[str, nvdec.Limits] | None = None
    distrusted: frozenset[str] = frozenset()
    """Codecs that DALI gives other frames of than PyAV."""

    def refuse(self, stored: pyav.Storage) -> str | None:
        """Why a video goes to PyAV, as far as its header tells."""
        codec, size = stored.codec, (stored.width, stored.height)
        if codec not in (CPU_CODECS if self.engines is None else self.engines):
            return codec
        if codec in self.distrusted:
            return f"{codec} that DALI decodes to other frames"
        if stored.pixels not in (CPU_PIXELS if self.engines is None else GPU_PIXELS):
            return f"{codec} in {stored.pixels}"
        if stored.matrix not in (*_BT601, _BT709) and codec not in _ALWAYS_BT601:
            return f"{codec} in colour space {stored.matrix}"
        if self.engines is not None and (size[0] % 2 or size[1] % 2 or not self.engines[codec].take(*size)):
            return f"{codec} of a size that NVDEC does not take"
        return None


class PlanDataset(Dataset[Plan]):
    """Batches of a stream by the numbers of their visits, planned for DALI; what is not for DALI is decoded."""

    def __init__(self, stream: ClipStream, takes: Takes) -> None:
        self.stream = stream
        self.takes = takes

    def __getitem__(self, visits: list[int]) -> Plan:
        found, orders, decoded = [], [], []
        for place, (visit, content) in enumerate(zip(visits, fetch_ahead(self.stream, visits), strict=True)):
            made: list[Order | ByPyav] = []

            def read(video: Video, rng: Generator, held: bytes | None, place: int = place, made: list = made) -> None:
                made.append(self._choose(place, video, rng, held))

            found.append(try_candidates(self.stream, visit, content, read))
            orders += [one for one in made if isinstance(one, Order)]
            decoded += [one for one in made if isinstance(one, ByPyav)]
            if found[-1][0] is None:
                break
        return Plan(
            visits=visits,
            found=found,
            orders=[replace(order, content=np.empty(0, np.uint8)) for order in orders],
            content=_shared([order.content for order in orders], (-1,)),
            sizes=[len(order.content) for order in orders],
            decoded=_shared([one.clips for one in decoded], (len(decoded), *self.stream.clips_shape)),
            places=[one.place for one in decoded],
            reasons=Counter(one.reason for one in decoded),
        )

    def _choose(self, place: int, video: Video, rng: Generator, content: bytes | None) -> Order | ByPyav:
        """Raises pyav.BadVideo and OSError where PyAV's loader does."""
        if content is None and video.remote:
            content = _read(video)
        stored = pyav.look_up(video, content)
        if reason := self.takes.refuse(stored):
            return self._decode(place, reason, video, rng, content)
        before = rng.bit_generator.state
        excerpt = cut_excerpt(video, lambda count: self.stream.draw_frames(count, rng), content)
        if excerpt is None:
            rng.bit_generator.state = before
            return self._decode(place, f"{stored.codec} {NOT_PLAIN}", video, rng, content)
        return Order(
            place=place,
            codec=stored.codec,
            content=np.frombuffer(excerpt.content, np.uint8),
            frames=excerpt.frames,
            views=self.stream.draw_views(excerpt.width, excerpt.height, rng),
            bt709=stored.matrix == _BT709 and stored.codec not in _ALWAYS_BT601,
        )

    def _decode(self, place: int, reason: str, video: Video, rng: Generator, content: bytes | None) -> ByPyav:
        clips = np.empty(self.stream.clips_shape, np.uint8)
        decode(self.stream, video, rng, content, clips)
        return ByPyav(place, reason, clips)


def _read(video: Video) -> bytes:
    try:
        return read_video(video)
    except (OSError, ValueError) as error:
        raise pyav.BadVideo(getattr(error, "strerror", None) or str(error)) from None


def _shared(parts: list[np.ndarray], shape: tuple[int, ...]) -> Tensor:
    """`parts` behind one another, in memory that a worker shares with the training process."""
    joined = empty_for_parent((sum(part.size for part in parts),))
    if parts:
        np.concatenate([part.reshape(-1) for part in parts], out=joined.numpy())
    return joined.view(shape)


@dataclass
class _Group:
    """Orders of a batch that a pipeline decodes at once."""

    orders: list[Order]
    pipeline: DecodingPipeline | None = None
    """None: not begun."""


@dataclass
class _Job:
    """A batch in the making."""

    plan: Plan
    groups: list[_Group]


class DaliLoader(Loader):
    """Batches of one rank, decoded by DALI where it can. The options are those of `Prepared`.

    The batches are those of the PyAV loader, whatever the number of pipelines and workers: the same videos, frames,
    crops and replacements. A batch is a CUDA tensor where a GPU decodes. `say` is told, once for each reason, what
    goes to PyAV.
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
        self._told: set[str] = set()
        visits = batch_size // config.crops_per_clip
        self._group = min(config.pipeline_visits or visits, visits)
        threads = max(config.workers, 1) if engines is None else THREADS_PER_ENGINE
        count = config.pipelines or (1 if engines is None else nvdec.count_engines(engines))
        self._pipelines = [DecodingPipeline(stream, self._device, self._group, threads) for _ in range(count)]
        self._turn = itertools.cycle(self._pipelines)
        self._next = next(self._turn)
        takes = Takes(engines)
        if engines is not None:
            first = options["start"] // config.crops_per_clip
            takes = replace(takes, distrusted=self._find_wrong(takes, range(first, first + CHECKED_VISITS)))
        self._plans = Prepared(PlanDataset(stream, takes), config, batch_size=batch_size, **options)
        self._jobs: deque[_Job] = deque()
        self._waiting: deque[_Group] = deque()
        self._ended = False

    def __next__(self) -> Batch:
        self._keep_busy()
        if not self._jobs:
            raise StopIteration
        job = self._jobs.popleft()
        if job.plan.found[-1][0] is None:
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
        """Give every idle pipeline work. They take turns, so that groups end in the order in which they are needed."""
        while self._next.idle and (self._waiting or self._fetch()):
            if self._waiting:
                self._start(self._waiting.popleft())

    def _start(self, group: _Group) -> None:
        group.pipeline = self._next
        self._next.start(group.orders)
        self._next = next(self._turn)

    def _fetch(self) -> bool:
        """Take a plan from the workers, if one is left and not too many are waiting."""
        if self._ended or len(self._jobs) > len(self._pipelines):
            return False
        try:
            plan = next(self._plans)
        except StopIteration:
            self._ended = True
            return False
        self._tell(plan)
        orders = plan.take_orders()
        groups = [_Group(orders[i : i + self._group]) for i in range(0, len(orders), self._group)]
        self._jobs.append(_Job(plan, groups))
        self._waiting += groups
        return True

    def _tell(self, plan: Plan) -> None:
        fresh = {reason: count for reason, count in plan.reasons.items() if reason not in self._told}
        if fresh:
            self._told |= fresh.keys()
            where = "NVDEC" if self._device.type == "cuda" else "DALI on the CPU"
            listed = ", ".join(f"{count} x {reason}" for reason, count in fresh.items())
            self._say(f"{where} does not take every video; PyAV decodes, of {len(plan.visits)} in a batch: {listed}")

    def _finish(self, job: _Job) -> Batch:
        """Collect what the pipelines have made. Where DALI gave up, PyAV says which video is bad and replaces it."""
        plan = job.plan
        found = list(plan.found)
        made: list[tuple[Sequence[int], Tensor]] = []
        for group in job.groups:
            while group.pipeline is None:
                self._start(self._waiting.popleft())
            places = [order.place for order in group.orders]
            try:
                made.append((places, group.pipeline.finish()))
            except DecodeFailed:
                for order in group.orders:
                    clips, found[order.place] = self._decode_alone(group.pipeline, order, plan)
                    made.append(([order.place], clips.unsqueeze(0)))
        paths = [name for name, _ in found if name is not None]
        bad = [one for _, many in found for one in many]
        rows = [self.stream.row_of(visit, len(bad)) for visit, (_, bad) in zip(plan.visits, found, strict=True)]
        return Batch(self._join(plan, made).flatten(0, 1), paths, bad, plan.visits, rows)

    def _decode_alone(
        self, pipeline: DecodingPipeline, order: Order, plan: Plan
    ) -> tuple[Tensor, tuple[str | None, list[tuple[str, str]]]]:
        try:
            return pipeline.decode(order), plan.found[order.place]
        except DecodeFailed:
            batch = ClipDataset(self.stream)[[plan.visits[order.place]]]
        if not batch.paths:
            raise nothing_readable(batch.bad)
        return batch.clip, (batch.paths[0], batch.bad)

    def _join(self, plan: Plan, made: Iterable[tuple[Sequence[int], Tensor]]) -> UInt8[Tensor, "n r t h w 3"]:
        """The clips at their places. Nothing is copied where one group is the batch."""
        made = list(made)
        if len(made) == 1 and len(made[0][0]) == len(plan.visits):
            return made[0][1]
        clips = torch.empty((len(plan.visits), *self.stream.clips_shape), dtype=torch.uint8, device=self._device)
        for places, part in (*made, (plan.places, plan.decoded)):
            for place, one in zip(places, part, strict=True):
                clips[place].copy_(one, non_blocking=True)
        return clips

    def _find_wrong(self, takes: Takes, visits: Iterable[int]) -> frozenset[str]:
        """Codecs of which this GPU gives other frames than PyAV, judged by the first videos of the run."""
        wrong = set()
        dataset, pipeline = PlanDataset(self.stream, takes), self._pipelines[0]
        for visit in visits:
            plan = dataset[[visit]]
            for order in plan.take_orders():
                try:
                    clips = pipeline.decode(order).cpu()
                except DecodeFailed:
                    continue  # a bad video is no proof; the run decodes it with PyAV
                expected = ClipDataset(self.stream)[[visit]].clip
                if expected.shape == clips.shape and _luma_error(clips, expected) > LARGEST_LUMA_ERROR:
                    wrong.add(order.codec)
        pipeline.close()  # before the workers are forked
        if wrong:
            self._say(f"DALI gives other frames than PyAV of {', '.join(sorted(wrong))}: PyAV decodes those")
        return frozenset(wrong)


def _luma_error(clips: UInt8[Tensor, "r t h w 3"], expected: UInt8[Tensor, "r t h w 3"]) -> float:
    """Largest mean difference of brightness of a frame, of 255."""
    weights = torch.tensor((0.299, 0.587, 0.114))
    return float(((clips.float() - expected.float()) @ weights).abs().mean(dim=(-2, -1)).max())

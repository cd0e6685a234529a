"""Frames of training copies, read without a demuxer: the index has the offsets of their packets.

If every frame is a key frame, opening, seeking and demultiplexing would take a quarter of the time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import av
import numpy as np

from umt_fast.data.decode.container import opened as in_container
from umt_fast.data.decode.demux import decode, demux
from umt_fast.data.decode.ffmpeg import as_bad_video, fetch
from umt_fast.data.decode.motion_vectors import EXPORT, MotionMaps
from umt_fast.data.decode.orientation import orientation_of
from umt_fast.data.decode.rgb import RgbConverter
from umt_fast.data.decode.time_limit import current_limit
from umt_fast.data.video import BadVideo, Facts, Packets, Video

_DECODERS = {**{name: name for name in ("h264", "hevc", "vp9", "mjpeg")}, "av1": "libdav1d"}
"""FFmpeg's decoder for each codec of the copies; FFmpeg's native AV1 decoder needs a GPU."""
_CHANGED = "it has changed since it was indexed"


def can_read(video: Video) -> bool:
    """Whether the index lists the video's packets and FFmpeg can decode its codec."""
    return video.facts is not None and video.facts.packets is not None and _decoder_of(video.facts.codec) is not None


@contextlib.contextmanager
def opened(video: Video, content: bytes | None, motion: MotionMaps | None = None) -> Iterator[Reader]:
    """A reader of a video that `can_read` accepts. Raises BadVideo."""
    assert video.facts is not None
    assert video.facts.packets is not None
    content, size = fetch(video, content)
    with _bytes_of(video, content) as read:
        with as_bad_video():
            reader = Reader(video.facts, video.facts.packets, read, video.limits.max_pixels, motion)
        if reader.bounds[-1] > size:
            raise BadVideo(f"its frames would end after its {size} bytes: {_CHANGED}")
        yield reader


@contextlib.contextmanager
def _bytes_of(video: Video, content: bytes | None) -> Iterator[Callable[[int, int], bytes]]:
    """A function that reads bytes `start` to `end` of a video and raises BadVideo if they are missing."""

    def whole(part: bytes, start: int, end: int) -> bytes:
        if start < 0 or len(part) != end - start:
            raise BadVideo(f"there are no bytes {start} to {end}: {_CHANGED}")
        return part

    if content is not None:
        yield lambda start, end: whole(content[start:end], start, end)
        return
    with as_bad_video():
        file = open(video.path, "rb", buffering=0)  # noqa: SIM115, closed below
    with file:
        number, offset = file.fileno(), video.offset or 0
        yield lambda start, end: whole(os.pread(number, max(end - start, 0), offset + start), start, end)


class Reader:
    """A video's decoder and the offsets of its packets."""

    def __init__(
        self,
        facts: Facts,
        packets: Packets,
        read: Callable[[int, int], bytes],
        max_pixels: int,
        motion: MotionMaps | None = None,
    ) -> None:
        self.facts = facts
        self.timeline = facts.timeline
        self.read_bytes = read
        self._limit = current_limit()
        self.bounds = np.empty(facts.frames + 1, np.int64)
        self.bounds[0] = packets.first
        self.bounds[1:] = np.frombuffer(read(packets.sizes, packets.sizes + 4 * facts.frames), ">u4")
        np.add.accumulate(self.bounds, out=self.bounds)
        self.motion = motion
        self.decoder = _open_decoder(facts.codec, packets.setup, max_pixels, None if motion is None else EXPORT)

    def read(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """The frames at ascending `indices`, one by one, as uint8 RGB [H,W,3]."""
        to_rgb = RgbConverter(indexed=True, motion=self.motion)
        times, keys = self.facts.times, self.facts.keys
        begins = np.searchsorted(times, keys[np.searchsorted(keys, times[indices], "right") - 1]).tolist()
        fed = 0  # the decoder has got the packets before this frame, from their key frame on
        with as_bad_video():
            for index, begin in zip(indices, begins, strict=True):
                if fed <= begin:
                    self.decoder.flush_buffers()
                    fed = begin
                frame = self._decode(fed, index)
                if frame is None:
                    raise BadVideo(f"frame {index} of {self.facts.frames} does not decode")
                fed = index + 1
                yield index, to_rgb(frame, index)

    def _decode(self, first: int, last: int) -> av.VideoFrame | None:
        """Decode the packets of frames `first` to `last`; returns frame `last`, or None if it is damaged."""
        bounds = self.bounds[first : last + 2].tolist()
        content = self.read_bytes(bounds[0], bounds[-1])
        shown: list[av.VideoFrame] = []
        for number, (begin, end) in enumerate(itertools.pairwise(bounds), first):
            self._limit.check()
            packet = _packet(content[begin - bounds[0] : end - bounds[0]])
            packet.pts = number
            shown = self.decoder.decode(packet)
        return next((frame for frame in shown if frame.pts == last and not frame.is_corrupt), None)


def _packet(content: bytes) -> av.Packet:
    """A packet with zero padding, which decoders read beyond its end; `av.Packet(content)` has no padding."""
    packet = av.Packet(len(content))
    packet.update(content)
    return packet


def _decoder_of(codec: str) -> str | None:
    """FFmpeg's name of the decoder; None if this FFmpeg does not have it."""
    name = _DECODERS.get(codec)
    return name if name in av.codecs_available else None


def _open_decoder(
    codec: str, setup: bytes, max_pixels: int, options: dict[str, str] | None = None
) -> av.VideoCodecContext:
    """Open a decoder for a codec that FFmpeg can decode."""
    decoder = av.CodecContext.create(_decoder_of(codec) or codec, "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.extradata = setup
    decoder.options = {"max_pixels": str(max_pixels), **(options or {})}
    decoder.thread_count = 1  # the workers are the parallelism
    return decoder


def find_packets(video: Video, facts: Facts) -> Packets | None:
    """The position of the packets of a local video with these facts. Raises BadVideo as `open_video` does.

    None unless the packets follow each other in presentation order, after a table of their sizes, and the first packet
    decodes to the same picture with and without the container.
    """
    with in_container(replace(video, facts=facts), None) as reader, _bytes_of(video, None) as read:
        container, stream = reader.container, reader.stream
        rows = []
        for packet in demux(container, stream):
            if not packet.size:  # the flush at the end
                continue
            place = packet.pos or 0
            rows.append((place, packet.size, packet.pts or 0))
            if read(place, place + packet.size) != bytes(packet):
                return None
        places, sizes, times = np.array(rows, np.int64).T
        if not np.array_equal(times, facts.times) or np.any(places[1:] != places[:-1] + sizes[:-1]):
            return None
        first = int(places[0])
        table = read(0, first).find(sizes.astype(">u4").tobytes())
        if table < 0:
            return None
        if _decoder_of(facts.codec) is None:
            return None
        setup = bytes(stream.codec_context.extradata or b"")
        shown = _open_decoder(facts.codec, setup, video.limits.max_pixels).decode(
            _packet(read(first, first + int(sizes[0])))
        )
        container.seek(int(times[0]), stream=stream)
        expected = next(decode(container, stream))
        same = len(shown) == 1 and _is_like(shown[0], expected)
        return Packets(table, first, setup) if same else None


def _is_like(one: av.VideoFrame, other: av.VideoFrame) -> bool:
    """Whether two frames give the same RGB."""
    kinds = [(frame.format.name, frame.colorspace, frame.color_range, orientation_of(frame)) for frame in (one, other)]
    return kinds[0] == kinds[1] and np.array_equal(one.to_ndarray(), other.to_ndarray())

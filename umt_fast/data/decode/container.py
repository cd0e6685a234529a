"""Frames of a video file by index, decoded by FFmpeg on the CPU (PyAV)."""

from __future__ import annotations

import bisect
import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from umt_fast.data.decode.demux import decode, demux
from umt_fast.data.decode.ffmpeg import (
    as_bad_video,
    find_video_stream,
    open_container,
    opened_container,
    pixel_aspect,
)
from umt_fast.data.decode.motion_vectors import EXPORT, MotionMaps
from umt_fast.data.decode.orientation import UPRIGHT
from umt_fast.data.decode.rgb import RgbConverter
from umt_fast.data.decode.truncation import read_tail, refuse_cut_off, refuse_early_end
from umt_fast.data.sampling import Timeline
from umt_fast.data.video import BadVideo, Facts, Video

_CUT_ANYWHERE = ("mpegts", "mpeg")
"""Containers that recorders cut at any packet."""


@dataclass(frozen=True)
class Storage:
    """Storage format of a video's pictures, from its header."""

    codec: str
    pixels: str
    """FFmpeg's name of the pixel format."""
    matrix: int
    """YCbCr-to-RGB matrix, by its number in ITU-T H.273: 1 is BT.709, 2 unknown, 5 and 6 are BT.601."""
    width: int
    """Pixels, before any rotation."""
    height: int
    pixel_aspect: Fraction = Fraction(1)
    """Width / height of a pixel."""


def probe(video: Video, content: bytes | None = None) -> Facts:
    """List the packets and decode the first frame. Raises BadVideo as `decode.open_video`."""
    with opened(video, content) as reader:
        return reader.facts()


def look_up(video: Video, content: bytes | None = None) -> Storage:
    """Read only the header. Raises BadVideo as `decode.open_video` does."""
    with opened_container(video, content) as container:
        context = find_video_stream(container).codec_context
        pixels = context.format.name if context.format else ""
        codec = context.codec.canonical_name
        aspect = pixel_aspect(find_video_stream(container))
        return Storage(codec, pixels, int(context.colorspace), context.width, context.height, aspect)


def each_frame(video: Video, content: bytes | None = None) -> Iterator[av.VideoFrame]:
    """Every frame in presentation order, decoded in one pass, as it is stored (not rotated).

    Raises BadVideo as `decode.open_video` does, and at the first frame that does not decode.
    """
    with opened(video, content) as reader:
        yield from reader.read_all()


@contextlib.contextmanager
def opened(
    video: Video, content: bytes | None, square_pixels: bool = False, motion: MotionMaps | None = None
) -> Iterator[Reader]:
    """A reader of any file that FFmpeg can demultiplex. Raises BadVideo."""
    with opened_container(video, content) as container:
        with as_bad_video():
            reader = Reader(container, video.facts, lambda: open_container(video, content), square_pixels, motion)
            if video.facts is None:
                refuse_cut_off(container.format.name, lambda count: read_tail(video, content, count))
        try:
            yield reader
        finally:
            if reader.to_rgb.read_side_data:
                # The first frame and its side data refer to each other, so only a collection frees their memory.
                del reader.to_rgb
                gc.collect(0)


class Reader:
    """The video stream of an open container, and the presentation times of its frames."""

    def __init__(
        self,
        container: av.container.InputContainer,
        facts: Facts | None,
        reopen: Callable[[], av.container.InputContainer],
        square_pixels: bool = False,
        motion: MotionMaps | None = None,
    ) -> None:
        self.container = container
        self.indexed = facts
        self.reopen = reopen
        self.seeks = True
        self.stream = find_video_stream(container)
        # One thread per worker process: the workers are the parallelism.
        self.stream.codec_context.thread_count = 1
        self.motion = motion
        self._export_motion(self.stream)
        aspect = pixel_aspect(self.stream) if square_pixels else Fraction(1)
        self.to_rgb = RgbConverter(facts is not None, aspect, motion)
        if facts is None:
            self._list_packets()
        else:
            self.timed, self.pts, self.keys, self.plain = True, facts.times.tolist(), facts.keys.tolist(), True

    def _list_packets(self) -> None:
        vp8 = self.stream.codec_context.codec.canonical_name == "vp8"
        times: list[int | None] = []
        keys = []
        packets, starts_with_key = 0, True
        for packet in demux(self.container, self.stream):
            if packet.size == 0:  # the flush at the end
                continue
            starts_with_key = packet.is_keyframe if not packets else starts_with_key
            packets += 1
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if not packet.is_discard and not (vp8 and _is_hidden(packet)):  # discard: removed by an edit list
                times.append(packet.pts)
        if not times:
            raise BadVideo("no frames")
        known = [time for time in times if time is not None]
        # AVI has no presentation times: with reordered frames, the times that FFmpeg derives are wrong.
        reordered_avi = self.container.format.name == "avi" and self.stream.codec_context.has_b_frames
        self.timed = bool(keys) and not reordered_avi and len(set(known)) == len(times)
        self.pts = sorted(known) if self.timed else list(range(len(times)))
        self.keys = sorted(keys)
        refuse_early_end(self.container, self.stream, packets, known)
        if (
            self.timed
            and self.container.format.name in _CUT_ANYWHERE
            and (not starts_with_key or self.pts[0] < min(keys))
        ):
            # The file may begin inside a group of pictures, with packets that refer to frames before its start
            shown = (frame.pts for frame in self._rewind() if not frame.is_corrupt and frame.pts is not None)
            start = next(shown, None)
            if start is None:
                raise BadVideo("no frame decodes")
            self.pts = [time for time in self.pts if time >= start]
        self.plain = self.timed and packets == len(self.pts)

    @functools.cached_property
    def timeline(self) -> Timeline:
        if self.indexed is not None:
            return self.indexed.timeline
        tick = float(self.stream.time_base or 0) if self.timed else 1 / (self._rate() or 25)
        return Timeline(self.pts, lambda: tick)

    def _export_motion(self, stream: av.VideoStream) -> None:
        if self.motion is not None:
            stream.codec_context.options = {**stream.codec_context.options, **EXPORT}

    def _rate(self) -> float:
        return float(self.stream.average_rate or 0)

    @as_bad_video()
    def facts(self) -> Facts:
        """Index entry of this video. Raises BadVideo."""
        frames = self._rewind() if self.timed else self._decode_all()
        first = next((frame for frame in frames if not self.timed or frame.pts == self.pts[0]), None)
        if first is None:
            raise BadVideo("no frame decodes")
        orientation = self.to_rgb.orientation(first)
        width, height = orientation.size(first.width, first.height)
        return Facts(
            width=width,
            height=height,
            fps=self._rate(),
            codec=self.stream.codec_context.codec.canonical_name,
            times=np.array(self.pts, np.int64),
            keys=np.array(self.keys if self.timed else [], np.int64),
            plain=self.plain and orientation == UPRIGHT and not self._is_interlaced(first),
        )

    def _is_interlaced(self, first: av.VideoFrame) -> bool:
        """Whether frames are stored or flagged as fields; decoders treat them differently."""
        order = getattr(self.stream.codec_context, "field_order", 0)  # PyAV before 18 lacks it
        return bool(first.interlaced_frame) or order > 1  # 0: unknown, 1: progressive

    def read(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """The frames at ascending `indices`, one by one. Raises BadVideo."""
        frames = self._by_time(indices) if self.timed else self._by_count(indices)
        for index in indices:
            with as_bad_video():
                found = next(frames, None)
            if found is None or found[0] != index:
                raise BadVideo(f"frame {index} of {len(self.pts)} does not decode")
            yield found

    def key_of(self, time: int) -> int:
        """Time of the key frame at or before a frame."""
        return self.keys[max(bisect.bisect_right(self.keys, time) - 1, 0)]

    def _by_time(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        decoder: Iterator[av.VideoFrame] = iter(())
        last: int | None = None  # time of the frame decoded last
        for index in indices:
            wanted = self.pts[index]
            key = self.key_of(wanted)
            if last is None or (key > last and self.seeks):
                decoder = self._decode_from(key)
            for frame in decoder:
                last = frame.pts
                if last is not None and last >= wanted:
                    break
            else:
                break
            if last == wanted and not frame.is_corrupt:
                yield index, self.to_rgb(frame, index)

    def _decode_from(self, key: int) -> Iterator[av.VideoFrame]:
        """Decoded frames from the key frame at time `key` on; if a seek lands after it, from the start of the file."""
        self.container.seek(key, stream=self.stream)
        decoder = decode(self.container, self.stream)
        for frame in decoder:
            if frame.pts is None or frame.pts > key:
                break
            yield frame
            if frame.pts == key:
                yield from decoder
                return
        self.seeks = False
        yield from self._rewind()

    @property
    def before_start(self) -> int:
        """A time to seek to that lies before every packet."""
        start = min(self.keys[0], self.pts[0], 0)
        if start < 0 and self.container.format.name in _CUT_ANYWHERE:
            # The 33-bit clock wrapped round during the recording, and the demuxer seeks by decoding times.
            start -= round(1 / (self.stream.time_base or 1))
        return start

    def _rewind(self) -> Iterator[av.VideoFrame]:
        """All frames of a stream with times, from the start."""
        self.container.seek(self.before_start, stream=self.stream)
        yield from decode(self.container, self.stream)

    def _decode_all(self) -> Iterator[av.VideoFrame]:
        """All frames from the start, in a newly opened container: a stream without times cannot be rewound."""
        with self.reopen() as container:
            stream = container.streams[self.stream.index]
            assert isinstance(stream, av.VideoStream)
            stream.codec_context.thread_count = 1
            self._export_motion(stream)
            yield from decode(container, stream)

    def _by_count(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """For a file without times: decode from the start and count frames."""
        wanted = set(indices)
        for index, frame in enumerate(self._decode_all()):
            if index in wanted and not frame.is_corrupt:
                yield index, self.to_rgb(frame, index)
            if index >= indices[-1]:
                break

    def read_all(self) -> Iterator[av.VideoFrame]:
        """Every frame, as it is stored. Raises BadVideo."""
        frames = self._all()
        while True:
            with as_bad_video():
                frame = next(frames, None)
            if frame is None:
                return
            yield frame

    def _all(self) -> Iterator[av.VideoFrame]:
        done = 0
        for frame in self._decode_all():
            if self.timed and frame.pts is not None and done < len(self.pts) and frame.pts < self.pts[done]:
                continue  # removed by an edit list, or before the first frame that decodes
            if done == len(self.pts) or frame.is_corrupt or (self.timed and frame.pts != self.pts[done]):
                break
            yield frame
            done += 1
        if done < len(self.pts):
            raise BadVideo(f"frame {done} of {len(self.pts)} does not decode")


def _is_hidden(packet: av.Packet) -> bool:
    """Whether a VP8 frame is never shown (its show_frame bit, RFC 6386 section 9.1)."""
    return not memoryview(packet)[0] & 0x10

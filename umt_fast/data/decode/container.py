"""Frames of a video file by index, decoded by FFmpeg on the CPU (PyAV)."""

from __future__ import annotations

import bisect
import contextlib
import functools
import io
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import av
import numpy as np

from umt_fast.data.decode.demux import decode, demux
from umt_fast.data.index import BadVideo, Facts, Video
from umt_fast.data.sampling import Timeline
from umt_fast.data.storage import file_size, read_video

# How much shorter than its header says a video may be: less is a last frame's duration, more is a cut-off file.
_SLACK_SECONDS = 0.5
_SLACK_SHARE = 0.05

ONE_THREAD = 1
"""For `VideoReformatter.reformat`: waking one thread per core costs ten times what a small frame does."""


@dataclass(frozen=True)
class Storage:
    """How a video's pictures are stored, as its header says."""

    codec: str
    pixels: str
    """FFmpeg's name of the pixel format."""
    matrix: int
    """From which YCbCr to which RGB, as ITU-T H.273 numbers them: 1 is BT.709, 2 unknown, 5 and 6 are BT.601."""
    width: int
    """Pixels, before any turning."""
    height: int


def probe(video: Video, content: bytes | None = None) -> Facts:
    """List the packets and decode the first frame. Raises BadVideo as `decode.open_video`."""
    with opened(video, content) as reader:
        return reader.facts()


def look_up(video: Video, content: bytes | None = None) -> Storage:
    """Read the header; no packet is listed. Raises BadVideo as `decode.open_video`."""
    with _container(video, content) as container:
        context = container.streams.video[0].codec_context
        pixels = context.format.name if context.format else ""
        codec = context.codec.canonical_name
        return Storage(codec, pixels, int(context.colorspace), context.width, context.height)


def each_frame(video: Video, content: bytes | None = None) -> Iterator[av.VideoFrame]:
    """Every frame in order of presentation, decoded in one pass, as it is stored (not yet turned).

    Raises BadVideo as `decode.open_video`, at the first frame that does not decode.
    """
    with opened(video, content) as reader:
        yield from reader.read_all()


@contextlib.contextmanager
def opened(video: Video, content: bytes | None) -> Iterator[Reader]:
    """A reader of any file that FFmpeg can demultiplex. Raises BadVideo."""
    with _container(video, content) as container:
        with as_bad_video():
            reader = Reader(container, video.facts, lambda: _open(video, content))
        yield reader


@contextlib.contextmanager
def _container(video: Video, content: bytes | None) -> Iterator[av.container.InputContainer]:
    content, _ = fetch(video, content)
    with as_bad_video():
        container = _open(video, content)
    with container:
        if not container.streams.video or container.streams.video[0].codec_context is None:
            raise BadVideo("no video stream that can be decoded")
        yield container


def fetch(video: Video, content: bytes | None) -> tuple[bytes | None, int]:
    """The video's bytes, if it is remote or they are given, and their number. Raises BadVideo if the index says
    another."""
    try:
        if content is None and video.remote:
            content = read_video(video)
        size = file_size(video) if content is None else len(content)
    except (OSError, ValueError) as error:  # ValueError: not a possible file name
        raise BadVideo(getattr(error, "strerror", None) or str(error)) from None
    if size == 0:
        raise BadVideo("empty file")
    if video.size is not None and size != video.size:
        raise BadVideo(f"{size} bytes, but the index says {video.size}: it has changed since")
    return content, size


@contextlib.contextmanager
def as_bad_video() -> Iterator[None]:
    """Turn errors of FFmpeg and the system into BadVideo."""
    try:
        yield
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        # IndexError: PyAV's own, where a damaged file grows a stream while it is read
        reason = getattr(error, "strerror", None) or str(error)
        raise BadVideo(f"not readable as video: {reason}") from error


def _open(video: Video, content: bytes | None) -> av.container.InputContainer:
    if content is not None:
        return av.open(io.BytesIO(content), "r")
    path = "file:" + video.path  # otherwise FFmpeg reads what precedes a colon in a name as a protocol
    if video.offset is not None:
        path = f"subfile,,start,{video.offset},end,{video.offset + (video.size or 0)},,:{path}"
    return av.open(path, "r")


class Reader:
    """The first video stream of an open container, and the presentation times of its frames."""

    def __init__(
        self,
        container: av.container.InputContainer,
        facts: Facts | None,
        reopen: Callable[[], av.container.InputContainer],
    ) -> None:
        self.container = container
        self.indexed = facts
        self.reopen = reopen
        self.seeks = True
        self.stream = container.streams.video[0]
        # One worker process is one thread: the workers are the parallelism.
        self.stream.codec_context.thread_count = 1
        self.reformatter = av.video.reformatter.VideoReformatter()
        if facts is None:
            self._list_packets()
        else:
            self.timed, self.pts, self.keys, self.plain = True, facts.times.tolist(), facts.keys.tolist(), True

    def _list_packets(self) -> None:
        vp8 = self.stream.codec_context.codec.canonical_name == "vp8"
        times: list[int | None] = []
        keys = []
        packets = 0
        for packet in demux(self.container, self.stream):
            if packet.size == 0:  # the flush at the end
                continue
            packets += 1
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if not packet.is_discard and not (vp8 and _is_hidden(packet)):  # discard: cut away by an edit list
                times.append(packet.pts)
        if not times:
            raise BadVideo("no frames")
        known = [time for time in times if time is not None]
        # AVI stores frames in decoding order and no presentation times: with reordering, FFmpeg's are wrong.
        reordered_avi = self.container.format.name == "avi" and self.stream.codec_context.has_b_frames
        self.timed = bool(keys) and not reordered_avi and len(set(known)) == len(times)
        self.pts = sorted(known) if self.timed else list(range(len(times)))
        self.keys = sorted(keys)
        self.plain = self.timed and packets == len(times)
        self._refuse_truncated(packets, known)

    @functools.cached_property
    def timeline(self) -> Timeline:
        if self.indexed is not None:
            return self.indexed.timeline
        tick = float(self.stream.time_base or 0) if self.timed else 1 / (self._rate() or 25)
        return Timeline(self.pts, lambda: tick)

    def _rate(self) -> float:
        return float(self.stream.average_rate or 0)

    @as_bad_video()
    def facts(self) -> Facts:
        """What an index holds of this video. Raises BadVideo."""
        self.container.seek(min(self.keys[0], self.pts[0], 0) if self.timed else 0, stream=self.stream)
        first = next(decode(self.container, self.stream), None)
        if first is None:
            raise BadVideo("no frame decodes")
        height, width = _upright(first, np.empty((first.height, first.width))).shape
        return Facts(
            width=width,
            height=height,
            fps=self._rate(),
            codec=self.stream.codec_context.codec.canonical_name,
            times=np.array(self.pts, np.int64),
            keys=np.array(self.keys if self.timed else [], np.int64),
            plain=self.plain and not first.rotation and not self._is_interlaced(first),
        )

    def _is_interlaced(self, first: av.VideoFrame) -> bool:
        """Whether frames are stored as fields or flagged as such, of which every decoder makes something else."""
        order = getattr(self.stream.codec_context, "field_order", 0)  # PyAV before 18 does not tell
        return bool(first.interlaced_frame) or order > 1  # 0: unknown, 1: progressive

    def _refuse_truncated(self, packets: int, times: list[int]) -> None:
        """Raise if the video ends well before its header says.

        Fewer packets than the header counts are no proof: an edit list may hide the rest, an AVI may leave gaps.
        """
        if not times or 0 < self.stream.frames <= packets:
            return
        expected = self._header_end()
        if expected is None:
            return
        times = sorted(times)
        origin = (self.stream.start_time or 0) if self.stream.frames else 0
        longest = max((after - before for before, after in itertools.pairwise(times)), default=0)
        end = float((times[-1] - origin + longest) * (self.stream.time_base or 0))
        if end < expected * (1 - _SLACK_SHARE) - _SLACK_SECONDS:
            raise BadVideo(f"truncated: it ends at {end:.1f} of {expected:.1f} seconds")

    def _header_end(self) -> float | None:
        """When the header says the video stream ends, in seconds, where it says so."""
        stream, base = self.stream, float(self.stream.time_base or 0)
        if self.container.format.name == "avi":  # FFmpeg guesses its duration from the size of the file
            return stream.frames * base
        if stream.frames:
            return stream.duration * base if stream.duration else None
        tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
        if tag:  # Matroska, WebM
            return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
        only_stream = len(self.container.streams) == 1
        if self.container.format.name == "matroska,webm" and only_stream and self.container.duration:
            return self.container.duration / av.time_base
        return None

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
        """Time of the key frame that a frame is decoded from."""
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
                yield index, to_array(frame, self.reformatter)

    def _decode_from(self, key: int) -> Iterator[av.VideoFrame]:
        """Decoded frames from the key frame at time `key` on; from the start, once, where a seek lands behind it."""
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
        self.container.seek(min(self.keys[0], self.pts[0], 0), stream=self.stream)
        yield from decode(self.container, self.stream)

    def _by_count(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Without times to seek by: decode from the start and count."""
        wanted = set(indices)
        with self.reopen() as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for index, frame in enumerate(decode(container, stream)):
                if index in wanted and not frame.is_corrupt:
                    yield index, to_array(frame, self.reformatter)
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
        with self.reopen() as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for frame in decode(container, stream):
                if done == len(self.pts) or frame.is_corrupt:
                    break
                if self.timed and frame.pts != self.pts[done]:
                    if frame.pts is None or frame.pts > self.pts[done]:
                        break
                    continue  # cut away by an edit list
                yield frame
                done += 1
        if done < len(self.pts):
            raise BadVideo(f"frame {done} of {len(self.pts)} does not decode")


def to_array(frame: av.VideoFrame, reformatter: av.video.reformatter.VideoReformatter) -> np.ndarray:
    """uint8 RGB [H,W,3], upright. A reformatter keeps what it has worked out for frames of one kind."""
    rgb = reformatter.reformat(frame, format="rgb24", threads=ONE_THREAD)
    (plane,) = rgb.planes  # not to_ndarray, which copies it where lines end in padding
    return _upright(
        frame, np.ndarray((rgb.height, rgb.width, 3), np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))
    )


def _is_hidden(packet: av.Packet) -> bool:
    """Whether a VP8 frame is never shown (its show_frame bit, RFC 6386 section 9.1)."""
    return not memoryview(packet)[0] & 0x10


def _upright(frame: av.VideoFrame, pixels: np.ndarray) -> np.ndarray:
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise, as the file asks players to turn it
    return np.rot90(pixels, quarter_turns) if quarter_turns else pixels

"""Frames of a video file by index, decoded by FFmpeg on the CPU (PyAV)."""

from __future__ import annotations

import bisect
import contextlib
import functools
import gc
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

from umt_fast.data.decode.demux import decode, demux
from umt_fast.data.decode.motion_vectors import EXPORT, MotionMaps
from umt_fast.data.decode.orientation import UPRIGHT
from umt_fast.data.decode.rgb import RgbConverter
from umt_fast.data.decode.truncation import read_tail, refuse_cut_off, refuse_early_end
from umt_fast.data.sampling import Timeline
from umt_fast.data.storage import CannotReach, file_size, read_video
from umt_fast.data.video import BadVideo, Facts, Video

_CUT_ANYWHERE = ("mpegts", "mpeg")
"""Containers that recorders cut at any packet."""
CONTAINERS = (
    # Not the formats that name other files to open: playlists (hls, dash, concat), SDP and scripts.
    "3gp asf av1 avi dv dvd flv gif gxf h261 h263 h264 hevc ivf m4v matroska mjpeg mov mpeg mpegts mpegvideo mpjpeg "
    "mxf nut obu ogg rm swf vc1 vob wtv y4m yuv4mpegpipe aac ac3 aiff amr caf flac mp3 wav"
).replace(" ", ",")
"""FFmpeg's names of allowed formats. Audio formats are included so that the error can say "no video"."""


@dataclass(frozen=True)
class Storage:
    """How a video's pictures are stored, as its header says."""

    codec: str
    pixels: str
    """FFmpeg's name of the pixel format."""
    matrix: int
    """YCbCr-to-RGB matrix, by its number in ITU-T H.273: 1 is BT.709, 2 unknown, 5 and 6 are BT.601."""
    width: int
    """Pixels, before any turning."""
    height: int
    pixel_aspect: Fraction = Fraction(1)
    """Width of a pixel by its height."""


def probe(video: Video, content: bytes | None = None) -> Facts:
    """List the packets and decode the first frame. Raises BadVideo as `decode.open_video`."""
    with opened(video, content) as reader:
        return reader.facts()


def look_up(video: Video, content: bytes | None = None) -> Storage:
    """Read the header; no packet is listed. Raises BadVideo as `decode.open_video`."""
    with _container(video, content) as container:
        context = find_film(container).codec_context
        pixels = context.format.name if context.format else ""
        codec = context.codec.canonical_name
        aspect = pixel_aspect(find_film(container))
        return Storage(codec, pixels, int(context.colorspace), context.width, context.height, aspect)


def each_frame(video: Video, content: bytes | None = None) -> Iterator[av.VideoFrame]:
    """Every frame in order of presentation, decoded in one pass, as it is stored (not yet turned).

    Raises BadVideo as `decode.open_video`, at the first frame that does not decode.
    """
    with opened(video, content) as reader:
        yield from reader.read_all()


@contextlib.contextmanager
def opened(
    video: Video, content: bytes | None, square_pixels: bool = False, motion: MotionMaps | None = None
) -> Iterator[Reader]:
    """A reader of any file that FFmpeg can demultiplex. Raises BadVideo."""
    with _container(video, content) as container:
        with as_bad_video():
            reader = Reader(container, video.facts, lambda: _open(video, content), square_pixels, motion)
            if video.facts is None:
                refuse_cut_off(container.format.name, lambda count: read_tail(video, content, count))
        try:
            yield reader
        finally:
            if reader.to_rgb.read_side_data:
                # The first frame and its side data refer to each other; they would wait for some later collection
                del reader.to_rgb
                gc.collect(0)


@contextlib.contextmanager
def _container(video: Video, content: bytes | None) -> Iterator[av.container.InputContainer]:
    content, _ = fetch(video, content)
    with as_bad_video():
        container = _open(video, content)
    with container:
        context = find_film(container).codec_context
        if context.width * context.height > video.limits.max_pixels:
            raise BadVideo(
                f"frames of {context.width} x {context.height}, more than --data.max-pixels {video.limits.max_pixels}"
            )
        yield container


def find_film(container: av.container.InputContainer) -> av.VideoStream:
    """The video stream that FFmpeg considers the best, but never a cover picture. Raises BadVideo if there is none."""
    films = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    if not films:
        only_covers = bool(container.streams.video)
        raise BadVideo("no video but a cover picture" if only_covers else "no video stream that can be decoded")
    best = container.streams.best("video")
    if best in films:
        return best
    return max(films, key=lambda film: (bool(film.disposition & Disposition.default), film.frames, -film.index))


def pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Width of a pixel by its height, 1 where the file does not say."""
    return stream.sample_aspect_ratio or Fraction(1)


def fetch(video: Video, content: bytes | None) -> tuple[bytes | None, int]:
    """The video's bytes, if it is remote or they are given, and their number. Raises BadVideo if the index says
    another."""
    if video.refused:
        raise BadVideo(video.refused)
    try:
        if content is None and video.remote:
            content = read_video(video)
        size = file_size(video) if content is None else len(content)
    except (OSError, ValueError, CannotReach) as error:  # ValueError: not a possible file name
        raise BadVideo(getattr(error, "strerror", None) or str(error)) from None
    if size == 0:
        raise BadVideo("empty file")
    if video.size is not None and size != video.size:
        raise BadVideo(f"{size} bytes, but the index says {video.size}: it has changed since")
    return content, size


class as_bad_video(contextlib.ContextDecorator):
    """Turn errors of FFmpeg and the system into BadVideo.

    A class: the generator of a contextmanager costs a microsecond, and every clip needs several.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        # IndexError: PyAV's own, where a damaged file grows a stream while it is read
        if not isinstance(error, (av.error.FFmpegError, OSError, ValueError, IndexError)):
            return
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, av.error.ArgumentError):  # how decoders and demuxers answer to the limits set in `_open`
            reason = "not a video format that is read here, or frames larger than --data.max-pixels"
        raise BadVideo(f"not readable as video: {reason}") from error


def _open(video: Video, content: bytes | None) -> av.container.InputContainer:
    # What a file says is not trusted: which other files FFmpeg opens for it, nor the memory for its frames.
    options = {"format_whitelist": CONTAINERS, "max_pixels": str(video.limits.max_pixels)}
    options["protocol_whitelist"] = "file,subfile" if content is None else "none"
    if content is not None:
        return _limited(av.open(io.BytesIO(content), "r", options=options), options)
    path = "file:" + video.path  # otherwise FFmpeg reads what precedes a colon in a name as a protocol
    if video.offset is not None:
        path = f"subfile,,start,{video.offset},end,{video.offset + (video.size or 0)},,:{path}"
    return _limited(av.open(path, "r", options=options), options)


def _limited(container: av.container.InputContainer, options: dict[str, str]) -> av.container.InputContainer:
    """The container, its decoders limited too: frames may grow behind the header."""
    for stream in container.streams.video:
        if stream.codec_context is not None:
            stream.codec_context.options = {"max_pixels": options["max_pixels"]}
    return container


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
        self.stream = find_film(container)
        # One worker process is one thread: the workers are the parallelism.
        self.stream.codec_context.thread_count = 1
        self.motion = motion
        self._export_motion(self.stream)
        self.to_rgb = RgbConverter(facts is not None, pixel_aspect(self.stream) if square_pixels else Fraction(1))
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
        # AVI stores frames in decoding order and no presentation times: with reordering, FFmpeg's are wrong.
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
            # It may begin inside a group of pictures, with packets that refer to frames before it
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

    def _convert(self, index: int, frame: av.VideoFrame) -> tuple[int, np.ndarray]:
        if self.motion is not None:
            self.motion.add(index, frame, self.to_rgb.orientation(frame))
        return index, self.to_rgb(frame)

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
        """Whether frames are stored as fields or flagged so; decoders differ in what they make of them."""
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
                yield self._convert(index, frame)

    def _decode_from(self, key: int) -> Iterator[av.VideoFrame]:
        """Decoded frames from the key frame at time `key` on; from the start, once, if a seek lands after it."""
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
        """A time to seek to from which every packet follows."""
        start = min(self.keys[0], self.pts[0], 0)
        if start < 0 and self.container.format.name in _CUT_ANYWHERE:
            # A recording during which the clock of 33 bits began anew. Its demuxer seeks by times of decoding.
            start -= round(1 / (self.stream.time_base or 1))
        return start

    def _rewind(self) -> Iterator[av.VideoFrame]:
        """All frames of a stream with times, from the start."""
        self.container.seek(self.before_start, stream=self.stream)
        yield from decode(self.container, self.stream)

    def _decode_all(self) -> Iterator[av.VideoFrame]:
        """All frames from the start, in a container of its own: a stream without times cannot be rewound."""
        with self.reopen() as container:
            stream = container.streams[self.stream.index]
            assert isinstance(stream, av.VideoStream)
            stream.codec_context.thread_count = 1
            self._export_motion(stream)
            yield from decode(container, stream)

    def _by_count(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Without times to seek by: decode from the start and count."""
        wanted = set(indices)
        for index, frame in enumerate(self._decode_all()):
            if index in wanted and not frame.is_corrupt:
                yield self._convert(index, frame)
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
                continue  # cut away by an edit list, or before the first frame that decodes
            if done == len(self.pts) or frame.is_corrupt or (self.timed and frame.pts != self.pts[done]):
                break
            yield frame
            done += 1
        if done < len(self.pts):
            raise BadVideo(f"frame {done} of {len(self.pts)} does not decode")


def _is_hidden(packet: av.Packet) -> bool:
    """Whether a VP8 frame is never shown (its show_frame bit, RFC 6386 section 9.1)."""
    return not memoryview(packet)[0] & 0x10

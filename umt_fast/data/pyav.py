"""Frames of a video file by index, decoded by FFmpeg on the CPU (PyAV)."""

from __future__ import annotations

import bisect
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence

import av
import numpy as np

# How much shorter than its header says a video may be: less is a last frame's duration, more is a cut-off file.
_SLACK_SECONDS = 0.5
_SLACK_SHARE = 0.05


_PROTOCOL = "file:"  # else FFmpeg takes what is before a colon in a name for one


class BadVideo(Exception):
    """A file that gives no clip; the message says why."""


def read_frames(path: str, choose: Callable[[int], Sequence[int]]) -> list[np.ndarray]:
    """Frames of the video at `path`, as uint8 RGB [H,W,3], upright.

    `choose` gets the number of frames and returns the wanted indices, in presentation order from 0, in any order and
    with repeats; an index asked for twice is the same array. Only what is needed is decoded: from the key frame
    before each wanted frame to that frame.

    Raises BadVideo for a file that is missing, empty, truncated, no video, or does not decode at a wanted frame.
    """
    try:
        if os.path.getsize(path) == 0:
            raise BadVideo("empty file")
    except (OSError, ValueError) as error:  # ValueError: no possible name
        raise BadVideo(getattr(error, "strerror", None) or str(error)) from None
    try:
        with av.open(_PROTOCOL + path) as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise BadVideo("no video stream that can be decoded")
            video = _Video(path, container)
            indices = list(choose(len(video.pts)))
            frames = video.read(sorted(set(indices)))
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        # IndexError: PyAV's own, where a damaged file grows a stream while it is read
        reason = getattr(error, "strerror", None) or str(error)
        raise BadVideo(f"not readable as video: {reason}") from error
    return [frames[index] for index in indices]


class _Video:
    """The first video stream of an open container, and the presentation times of its frames."""

    def __init__(self, path: str, container: av.container.InputContainer) -> None:
        self.path = path
        self.container = container
        self.seeks = True
        self.stream = container.streams.video[0]
        # One worker process is one thread: the workers are the parallelism.
        self.stream.codec_context.thread_count = 1
        vp8 = self.stream.codec_context.codec.canonical_name == "vp8"
        times: list[int | None] = []
        keys = []
        packets = 0
        for packet in container.demux(self.stream):
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
        reordered_avi = container.format.name == "avi" and self.stream.codec_context.has_b_frames
        self.timed = bool(keys) and not reordered_avi and len(set(known)) == len(times)
        self.pts = sorted(known) if self.timed else list(range(len(times)))
        self.keys = sorted(keys)
        self._refuse_truncated(packets, known)

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

    def read(self, indices: list[int]) -> dict[int, np.ndarray]:
        """The frames at ascending `indices`."""
        found = self._by_time(indices) if self.timed else self._by_count(indices)
        missing = [index for index in indices if index not in found]
        if missing:
            raise BadVideo(f"frame {missing[0]} of {len(self.pts)} does not decode")
        return found

    def _by_time(self, indices: list[int]) -> dict[int, np.ndarray]:
        found = {}
        decoder: Iterator[av.VideoFrame] = iter(())
        last: int | None = None  # time of the frame decoded last
        for index in indices:
            wanted = self.pts[index]
            key = self.keys[max(bisect.bisect_right(self.keys, wanted) - 1, 0)]
            if last is None or (key > last and self.seeks):
                decoder = self._decode_from(key)
            for frame in decoder:
                last = frame.pts
                if last is not None and last >= wanted:
                    break
            else:
                break
            if last == wanted and not frame.is_corrupt:
                found[index] = _to_rgb(frame)
        return found

    def _decode_from(self, key: int) -> Iterator[av.VideoFrame]:
        """Decoded frames from the key frame at time `key` on; from the start, once, where a seek lands behind it."""
        self.container.seek(key, stream=self.stream)
        decoder = self.container.decode(self.stream)
        for frame in decoder:
            if frame.pts is None or frame.pts > key:
                break
            yield frame
            if frame.pts == key:
                yield from decoder
                return
        self.seeks = False
        self.container.seek(min(self.keys[0], self.pts[0], 0), stream=self.stream)
        yield from self.container.decode(self.stream)

    def _by_count(self, indices: list[int]) -> dict[int, np.ndarray]:
        """Without times to seek by: decode from the start and count."""
        found = {}
        wanted = set(indices)
        with av.open(_PROTOCOL + self.path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for index, frame in enumerate(container.decode(stream)):
                if index in wanted and not frame.is_corrupt:
                    found[index] = _to_rgb(frame)
                if index >= indices[-1]:
                    break
        return found


def _is_hidden(packet: av.Packet) -> bool:
    """Whether a VP8 frame is never shown (its show_frame bit, RFC 6386 section 9.1)."""
    return not memoryview(packet)[0] & 0x10


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    rgb = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise, as the file asks players to turn it
    return np.rot90(rgb, quarter_turns) if quarter_turns else rgb

"""Files opened by FFmpeg, within limits: what a file says is not trusted."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from fractions import Fraction

import av
from av.stream import Disposition

from umt_fast.data.storage import CannotReach, file_size, read_video
from umt_fast.data.video import BadVideo, Video

CONTAINERS = (
    # Not the formats that name other files to open: playlists (hls, dash, concat), SDP and scripts.
    "3gp asf av1 avi dv dvd flv gif gxf h261 h263 h264 hevc ivf m4v matroska mjpeg mov mpeg mpegts mpegvideo mpjpeg "
    "mxf nut obu ogg rm swf vc1 vob wtv y4m yuv4mpegpipe aac ac3 aiff amr caf flac mp3 wav"
).replace(" ", ",")
"""FFmpeg's names of allowed formats. Audio formats are included so that the error can say "no video"."""


@contextlib.contextmanager
def opened_container(video: Video, content: bytes | None) -> Iterator[av.container.InputContainer]:
    """The container of a video with a stream whose frames are within `--data.max-pixels`. Raises BadVideo."""
    content, _ = fetch(video, content)
    with as_bad_video():
        container = open_container(video, content)
    with container:
        context = find_video_stream(container).codec_context
        if context.width * context.height > video.limits.max_pixels:
            raise BadVideo(
                f"frames of {context.width} x {context.height}, more than --data.max-pixels {video.limits.max_pixels}"
            )
        yield container


def find_video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The video stream that FFmpeg considers the best, but never a cover picture. Raises BadVideo if there is none."""
    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        only_covers = bool(container.streams.video)
        raise BadVideo("no video but a cover picture" if only_covers else "no video stream that can be decoded")
    best = container.streams.best("video")
    if best in streams:
        return best
    return max(streams, key=lambda one: (bool(one.disposition & Disposition.default), one.frames, -one.index))


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
        if isinstance(error, av.error.ArgumentError):  # what FFmpeg raises at the limits of `open_container`
            reason = "not a video format that is read here, or frames larger than --data.max-pixels"
        raise BadVideo(f"not readable as video: {reason}") from error


def open_container(video: Video, content: bytes | None) -> av.container.InputContainer:
    """Open a file so that FFmpeg opens no other for it and takes no more memory for a frame than the limits allow."""
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

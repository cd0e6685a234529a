"""Detection of truncated files, which FFmpeg decodes to their end without an error."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import av

from umt_fast.data.storage import file_size
from umt_fast.data.video import BadVideo, Video

# A video may end this much before its header says, such as by a last frame's duration; otherwise it is truncated.
_SLACK_SECONDS = 0.5
_SLACK_SHARE = 0.05

_LARGEST_OGG_PAGE = 27 + 255 + 255 * 255
_OGG_END_OF_STREAM = 4
"""RFC 3533, section 6: header type flag of a stream's last page."""


def refuse_early_end(
    container: av.container.InputContainer, stream: av.VideoStream, packets: int, times: list[int]
) -> None:
    """Raise BadVideo if a video with `packets` packets and these presentation times ends well before its header says.

    Fewer packets than in the header are not enough: an edit list may hide the rest, an AVI may have gaps.
    """
    if not times or 0 < stream.frames <= packets:
        return
    expected = _header_end(container, stream)
    if expected is None:
        return
    times = sorted(times)
    origin = (stream.start_time or 0) if stream.frames else 0
    longest = max((after - before for before, after in itertools.pairwise(times)), default=0)
    end = float((times[-1] - origin + longest) * (stream.time_base or 0))
    if end < expected * (1 - _SLACK_SHARE) - _SLACK_SECONDS:
        raise BadVideo(f"truncated: it ends at {end:.1f} of {expected:.1f} seconds")


def _header_end(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """End of the video stream in seconds according to the header; None if it does not say."""
    base = float(stream.time_base or 0)
    if container.format.name == "avi":  # FFmpeg guesses its duration from the size of the file
        return stream.frames * base
    if stream.frames:
        return stream.duration * base if stream.duration else None
    tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    if tag:  # Matroska, WebM
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    only_stream = len(container.streams) == 1
    if container.format.name == "matroska,webm" and only_stream and container.duration:
        return container.duration / av.time_base
    return None


def read_tail(video: Video, content: bytes | None, count: int) -> bytes:
    """The last `count` bytes of a video. Raises OSError."""
    if content is not None:
        return content[-count:]
    size = file_size(video)
    with open(video.path, "rb") as file:
        file.seek((video.offset or 0) + max(size - count, 0))
        return file.read(min(count, size))


def refuse_cut_off(container: str, tail: Callable[[int], bytes]) -> None:
    """Raise BadVideo for an Ogg or GIF file without its end mark: their headers have no duration."""
    if container == "ogg":
        end = tail(_LARGEST_OGG_PAGE)
        page = end.rfind(b"OggS")
        flags, lacing = end[page + 5 : page + 6], end[page + 26 : page + 27]
        whole = page >= 0 and lacing and page + 27 + lacing[0] + sum(end[page + 27 :][: lacing[0]]) <= len(end)
        if not whole or not flags[0] & _OGG_END_OF_STREAM:
            raise BadVideo("truncated: its last Ogg page does not end the stream")
    if container == "gif" and not tail(4096).rstrip(b"\0").endswith(b";"):
        raise BadVideo("truncated: it lacks GIF's trailer byte")

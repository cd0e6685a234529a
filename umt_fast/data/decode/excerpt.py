"""Excerpts for DALI: a file with only the packets that the requested frames of a video need."""

from __future__ import annotations

import bisect
import contextlib
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av

from umt_fast.data.decode.bitstream import read_formats
from umt_fast.data.decode.container import Reader, opened
from umt_fast.data.decode.demux import demux
from umt_fast.data.decode.ffmpeg import as_bad_video
from umt_fast.data.sampling import Timeline
from umt_fast.data.video import BadVideo, Video

_STEP = Fraction(1, 25)
"""Seconds between frames of an excerpt; its times are not used."""


@dataclass(frozen=True)
class Excerpt:
    """The packets of some frames of a video, and of the frames that they refer to."""

    content: bytes
    """A Matroska file of these packets, one per frame, with times from 0 on."""
    frames: list[int]
    """Indices of the requested frames in `content`, in the requested order."""
    width: int
    """Pixels."""
    height: int


def cut_excerpt(
    video: Video, choose: Callable[[Timeline], Sequence[int]], content: bytes | None = None
) -> Excerpt | None:
    """The excerpt of a video with the frames that `choose` returns, by index, in any order, repeats allowed.

    None if a packet is not exactly one shown frame (edit lists), frames are rotated or change in size, frames refer to
    others before an H.264 key frame, or the first frame does not decode. Only the first frame is decoded, and none if
    the video has facts. Raises BadVideo as `decode.open_video` does, except for errors that only decoding reveals.
    """
    with opened(video, content) as reader, as_bad_video():
        try:
            facts = video.facts or reader.facts()
        except (BadVideo, av.error.FFmpegError):
            return None
        if not facts.plain:
            return None
        indices = list(choose(reader.timeline))
        cut = _cut(reader, indices)
        return cut and Excerpt(*cut, facts.width, facts.height)


def _cut(reader: Reader, indices: list[int]) -> tuple[bytes, list[int]] | None:
    """The packets that the frames need, as Matroska, and the frames' indices in it. None if the format changes."""
    wanted = [reader.pts[index] for index in indices]
    packets = _collect(reader, wanted, seek=True)
    if not packets.keys() >= set(wanted):  # a seek landed after its key frame
        packets = _collect(reader, wanted, seek=False)
    times = sorted(packets)
    for index, time in zip(indices, wanted, strict=True):
        if time not in packets:
            raise BadVideo(f"frame {index} of {len(reader.pts)} is missing")
    if not _keeps_its_format(reader, packets.values()):
        return None
    return _mux(reader, packets, times), [bisect.bisect_left(times, time) for time in wanted]


def _collect(reader: Reader, times: Iterable[int], seek: bool) -> dict[int, av.Packet]:
    """Packets by time, in decoding order: from the key frame before each given time up to that time."""
    waiting: dict[int, set[int]] = {}
    for time in times:
        waiting.setdefault(reader.key_of(time), set()).add(time)
    packets: dict[int, av.Packet] = {}
    while waiting:
        start = min(waiting) if seek else reader.before_start
        reader.container.seek(start, stream=reader.stream)
        wanted: set[int] = set()
        first = start
        for packet in demux(reader.container, reader.stream):
            if packet.pts is None:
                continue
            if packet.pts in waiting:
                first = first if wanted else packet.pts
                wanted |= waiting.pop(packet.pts)
            if wanted and packet.pts >= first:  # earlier, leading frames refer to the previous group
                packets[packet.pts] = packet
                wanted.discard(packet.pts)
                if not wanted and (seek or not waiting):
                    break
        else:
            break  # the end of the file
    return packets


def _keeps_its_format(reader: Reader, packets: Collection[av.Packet]) -> bool:
    """Whether all frames have the size and pixel format of the file's header, and H.264's key frames are IDR pictures:
    otherwise frames after a key frame may refer to the previous group, which an excerpt leaves out."""
    context = reader.stream.codec_context
    if context.codec.canonical_name == "h264" and not all(_has_idr(one) for one in packets if one.is_keyframe):
        return False
    if context.codec.canonical_name == "vp9":  # FFmpeg decodes VP9 in spite of `skip_frame`
        try:
            found = [one for packet in packets for one in read_formats(bytes(packet))]
        except ValueError:
            return False
        colours = {form for _, _, form in found if len(form) > 1}
        profiles = {form[0] for _, _, form in found}
        sizes = {(width, height) for width, height, _ in found}
        return sizes == {(context.width, context.height)} and len(profiles) == len(colours) == 1
    before = context.width, context.height, context.pix_fmt
    context.skip_frame = "ALL"  # the decoder reads only headers
    for packet in packets:
        with contextlib.suppress(av.error.FFmpegError):
            context.decode(packet)
        if (context.width, context.height, context.pix_fmt) != before:
            return False
    return True


def _mux(reader: Reader, packets: dict[int, av.Packet], times: list[int]) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="matroska", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream_from_template(reader.stream, opaque=True)
        ranks = [bisect.bisect_left(times, time) for time in packets]
        delay = max(number - rank for number, rank in enumerate(ranks))
        for number, (packet, rank) in enumerate(zip(packets.values(), ranks, strict=True)):
            packet.stream = stream
            packet.time_base = _STEP
            packet.dts, packet.pts, packet.duration = number, rank + delay, 1
            container.mux(packet)
    return target.getvalue()


def _has_idr(packet: av.Packet) -> bool:
    """Whether an H.264 packet has an IDR picture: a NAL unit of type 5, after a start code or a 4-byte length."""
    data, place, kinds = bytes(packet), 0, set()
    while place + 4 < len(data):
        kinds.add(data[place + 4] & 31)
        place += 4 + int.from_bytes(data[place : place + 4], "big")
    if place != len(data):  # start codes, not lengths
        kinds = {unit[0] & 31 for unit in data.split(b"\0\0\1")[1:] if unit}
    return 5 in kinds

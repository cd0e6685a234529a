"""Packets and frames of an open video; the loops may be left early.

PyAV's own `demux` leaves 150 bytes allocated each time that it is neither read to its end nor closed (18.1), and its
`decode` even where it is closed. Few, but they lie between the buffers of frames, so that glibc finds ever fewer gaps
that are large enough: a worker grew by 54 MB over 20,000 clips, half of it such bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from umt_fast.data.decode.time_limit import current_limit


def demux(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    # Python closes a generator that is dropped, which PyAV's compiled ones are not, and with it what it yields from.
    packets: Any = container.demux(stream)
    limit = current_limit()
    try:
        for packet in packets:
            limit.check()
            yield packet
    finally:
        packets.close()


def decode(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    for packet in demux(container, stream):
        yield from packet.decode()

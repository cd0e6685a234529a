"""Sizes in the headers of VP9 frames (VP9 bitstream specification, 6.2 and annex B)."""

from __future__ import annotations

from collections.abc import Iterator

_SYNC = 0x498342
_SRGB = 7


def read_formats(packet: bytes) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Width, height and pixel format (profile and, in key frames, colours) of each frame whose header has them.

    Frames without it have the size of a reference frame. Raises ValueError if the packet is not VP9.
    """
    for frame in _split(packet):
        found = _read_header(frame)
        if found is not None:
            yield found


def _split(packet: bytes) -> Iterator[bytes]:
    """The frames of a superframe, or the packet itself."""
    mark = packet[-1] if packet else 0
    count, width = (mark & 7) + 1, (mark >> 3 & 3) + 1
    size = 2 + width * count
    if mark & 0xE0 != 0xC0 or len(packet) < size or packet[-size] != mark:
        yield packet
        return
    index, place = packet[-size + 1 : -1], 0
    for number in range(count):
        length = int.from_bytes(index[number * width : (number + 1) * width], "little")
        if length:
            yield packet[place : place + length]
        place += length


class _Bits:
    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data[:24].ljust(24, b"\0"), "big")  # enough for a header
        self._left = 24 * 8

    def read(self, count: int) -> int:
        self._left -= count
        return self._value >> self._left & (1 << count) - 1


def _read_header(frame: bytes) -> tuple[int, int, tuple[int, ...]] | None:
    bits = _Bits(frame)
    if bits.read(2) != 2:
        raise ValueError("not a VP9 frame")
    profile = bits.read(1) + 2 * bits.read(1)
    if profile == 3 and bits.read(1):
        raise ValueError("VP9 of a later profile")
    if bits.read(1):  # shows an earlier frame again
        return None
    inter, shown, resilient = bits.read(1), bits.read(1), bits.read(1)
    colours: tuple[int, ...] = ()
    if inter:
        intra = 0 if shown else bits.read(1)
        if not resilient:
            bits.read(2)
        if not intra:
            bits.read(8 + 3 * 4)
            if any(bits.read(1) for _ in range(3)):  # the frame has the size of a reference frame
                return None
            return bits.read(16) + 1, bits.read(16) + 1, (profile,)
    if bits.read(24) != _SYNC:
        raise ValueError("not a VP9 key frame")
    if not inter or profile:
        colours = _read_colours(bits, profile)
    if inter:
        bits.read(8)
    return bits.read(16) + 1, bits.read(16) + 1, (profile, *colours)


def _read_colours(bits: _Bits, profile: int) -> tuple[int, ...]:
    depth = bits.read(1) if profile >= 2 else 0
    if bits.read(3) == _SRGB:
        return depth, bits.read(1) if profile in (1, 3) else 0
    bits.read(1)  # the range
    return (depth, bits.read(3)) if profile in (1, 3) else (depth,)

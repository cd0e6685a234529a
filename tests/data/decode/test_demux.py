"""Loops over packets and frames that end early leak no memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import av
import pytest

from umt_fast.data.decode import probe, read_frames
from umt_fast.data.decode.demux import decode, demux
from umt_fast.data.decode.excerpt import cut_excerpt
from umt_fast.data.prepare.encode import Recipe, write_copy
from umt_fast.data.video import Video

TIMES = 100
LEFT_BY_PYAV = 128
"""Smallest number of bytes that each early end must leak to count as a leak."""


class _Heap(ctypes.Structure):
    """glibc's report on its heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    ] + [("rest", ctypes.c_size_t * 2)]


def _allocated() -> int:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Heap
    return libc.mallinfo2().uordblks


def _left_by(call: Callable[[], object]) -> float:
    """Bytes that each call leaks, after the first calls have made their permanent allocations."""
    for _ in range(TIMES):
        call()
    before = _allocated()
    for _ in range(TIMES):
        call()
    return (_allocated() - before) / TIMES


def _first_of(loop: Callable, video: Video) -> object:
    with av.open(video.path) as container:
        return next(loop(container, container.streams.video[0]))


READ = {
    "a packet": lambda video: _first_of(demux, video),
    "a frame": lambda video: _first_of(decode, video),
    "frames": lambda video: read_frames(Video(video.path), lambda _count: [0, 5, 9]),
    "frames of a copy": lambda video: read_frames(video, lambda _count: [0, 5, 9]),
    "facts": probe,
    "an excerpt": lambda video: cut_excerpt(video, lambda _count: [0, 5, 9]),
}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 tells")
@pytest.mark.parametrize("what", READ)
def test_readers_closed_early_free_their_memory(what, write_video, tmp_path):
    source = Video(str(write_video(tmp_path / "source.mkv", frames=12)))
    facts, _seconds = write_copy(source, str(tmp_path / "a.mp4"), Recipe(gop=1))
    video = Video(str(tmp_path / "a.mp4"), facts=facts)
    assert _left_by(lambda: READ[what](video)) < LEFT_BY_PYAV / 2

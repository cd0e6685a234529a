"""A time limit for the decoding of one video."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextvars import ContextVar

from umt_fast.data.video import BadVideo

_limit: ContextVar[tuple[float, float]] = ContextVar("limit", default=(math.inf, math.inf))
"""When decoding must be done, and the seconds that it was given."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise BadVideo from any decoding inside that takes longer."""
    before = _limit.set((time.monotonic() + seconds, seconds))
    try:
        yield
    finally:
        _limit.reset(before)


def check_time() -> None:
    """Raise BadVideo when the time is over. Decoders ask between packets; the frame's size bounds what one costs."""
    due, seconds = _limit.get()
    if time.monotonic() > due:
        raise BadVideo(f"not decoded within {seconds:g} seconds (--data.time-limit)")

"""A time limit for the decoding of one video."""

from __future__ import annotations

import math
import time
from contextvars import ContextVar, Token
from dataclasses import dataclass, field

from umt_fast.data.video import BadVideo


@dataclass
class TimeLimit:
    """Raises BadVideo from any decoding inside its `with` that takes longer."""

    seconds: float
    _end: float = field(default=math.inf, init=False)

    def __enter__(self) -> None:
        self._end = time.monotonic() + self.seconds
        self._before: Token[TimeLimit] = _current.set(self)

    def __exit__(self, *_: object) -> None:
        _current.reset(self._before)

    def check(self) -> None:
        """Raise BadVideo if the time is over. Decoders ask between packets; the frame's size bounds what one costs."""
        if time.monotonic() > self._end:
            raise BadVideo(f"not decoded within {self.seconds:g} seconds (--data.time-limit)")


_NO_LIMIT = TimeLimit(math.inf)
_current: ContextVar[TimeLimit] = ContextVar("limit", default=_NO_LIMIT)


def current_limit() -> TimeLimit:
    """The limit of the video that is decoded now."""
    return _current.get()

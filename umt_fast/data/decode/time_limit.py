"""A time limit for the decoding of one video."""

from __future__ import annotations

import math
import time
from contextvars import ContextVar, Token
from dataclasses import dataclass, field

from umt_fast.data.video import BadVideo


@dataclass
class TimeLimit:
    """Decoding inside its `with` block raises BadVideo after this time."""

    seconds: float
    _end: float = field(default=math.inf, init=False)

    def __enter__(self) -> None:
        self._end = time.monotonic() + self.seconds
        self._before: Token[TimeLimit] = _current.set(self)

    def __exit__(self, *_: object) -> None:
        _current.reset(self._before)

    def check(self) -> None:
        """Raise BadVideo if the time is over. Decoders check between packets; `max_pixels` bounds the cost of one."""
        if time.monotonic() > self._end:
            raise BadVideo(f"not decoded within {self.seconds:g} seconds (--data.time-limit)")


_NO_LIMIT = TimeLimit(math.inf)
_current: ContextVar[TimeLimit] = ContextVar("limit", default=_NO_LIMIT)


def current_limit() -> TimeLimit:
    """The limit of the video that is decoded now."""
    return _current.get()

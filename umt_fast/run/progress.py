"""Lines that say how far a long task is, such as a test of a list, which would else be silent for minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

OnProgress = Callable[[int, int], None]
"""Called with how many items are done, and how many there are."""


def silent(done: int, total: int) -> None:
    """An OnProgress that prints nothing."""


class Progress:
    """An OnProgress that prints a line every `seconds` at most, with the time that is left; none for a short task."""

    def __init__(
        self, task: str, unit: str = "videos", say: Callable[[str], None] = print, seconds: float = 10.0
    ) -> None:
        self._task, self._unit, self._say, self._seconds = task, unit, say, seconds
        self._begun = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < self._seconds or not 0 < done < total:
            return
        self._last = now
        left = timedelta(seconds=round((now - self._begun) * (total - done) / done))
        self._say(f"{self._task}: {done} of {total} {self._unit}, ETA {left}")

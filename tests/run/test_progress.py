"""Lines about long tasks."""

from __future__ import annotations

import pytest

from umt_fast.run import progress
from umt_fast.run.progress import Progress


def test_a_line_every_ten_seconds_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Progress("test", "videos", lines.append)
    for now, done in ((101, 1), (110, 5), (111, 6), (119.9, 10), (120, 11), (140, 20)):
        clock[0] = now
        shown(done, 20)
    assert lines == ["test: 5 of 20 videos, ETA 0:00:30", "test: 11 of 20 videos, ETA 0:00:16"]


def test_nothing_done_yet_has_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    shown = Progress("test", say=lines.append, seconds=0)
    shown(0, 20)
    shown(0, 0)
    assert lines == []

"""Time and MFU of steps by the kind of their batch, with a fake clock."""

from __future__ import annotations

import pytest
import torch

from umt_fast.run import kind_clock
from umt_fast.run.kind_clock import KindClock


@pytest.fixture
def now(monkeypatch) -> list[float]:
    times = [0.0]
    monkeypatch.setattr(kind_clock.time, "perf_counter", lambda: times[0])
    return times


def test_each_kind_has_its_own_time_and_share(now):
    clock = KindClock(torch.device("cpu"), peak_flops=1000.0)
    assert clock.take() == {}
    for kind, seconds, flops in (("video", 2.0, 900), ("image", 1.0, 100), ("video", 4.0, 900)):
        now[0] += seconds
        clock.add(kind, flops)
    assert clock.take() == {
        "mfu": 0.2714,
        "image_ms": 1000.0,
        "image_mfu": 0.1,
        "video_ms": 3000.0,
        "video_mfu": 0.3,
    }
    now[0] += 1.0
    clock.add("video", 500)
    assert clock.take() == {"mfu": 0.5}  # from the end of the step before; of one kind


def test_what_came_before_a_start_is_left_out(now):
    clock = KindClock(torch.device("cpu"), peak_flops=10.0)
    now[0] = 5.0
    clock.add("video", 100)
    now[0] = 60.0  # a checkpoint
    clock.start()
    now[0] = 61.0
    clock.add("video", 5)
    assert clock.take() == {"mfu": 0.5}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed_by_events():
    device = torch.device("cuda", 0)
    clock = KindClock(device, peak_flops=1e12)
    x = torch.randn(2048, 2048, device=device)
    for _ in range(3):
        x = (x @ x).clamp(-1, 1)
        clock.add("video", 2 * 2048**3)
    assert 0 < clock.take()["mfu"] < 1000

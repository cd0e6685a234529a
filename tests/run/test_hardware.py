"""Peak FLOP/s of a device."""

from __future__ import annotations

import pytest
import torch

from umt_fast.run import hardware


@pytest.mark.parametrize(
    ("seconds", "side"), [({512: 0.001, 1024: 0.02}, 512), ({512: 0.001, 1024: 0.004}, 1024)], ids=["busy", "idle"]
)
def test_the_peak_is_that_of_the_faster_matmul(monkeypatch, seconds, side):
    clock = [0.0]

    def mm(left, right):
        clock[0] += seconds[len(left)]

    monkeypatch.setattr(hardware.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", mm)
    peak = hardware.peak_flops(torch.device("cpu"), bf16=True)
    assert peak.flops == pytest.approx(2 * side**3 / seconds[side])
    assert peak.source == f"measured on a {side} x {side} matmul"

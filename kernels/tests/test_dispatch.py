"""Calls that share a plan, and calls that must not."""

from __future__ import annotations

import pytest
import torch
from umt_kernels import backend, gather_layer_norm, launch
from umt_kernels.dispatch import call_key


@pytest.mark.parametrize(
    ("tensor", "settings"),
    [
        (torch.empty(3, 2), (1,)),
        (torch.empty(3, 2).T, (1,)),
        (torch.empty(2, 3, dtype=torch.float64), (1,)),
        (torch.empty(2, 3, device="meta"), (1,)),
        (torch.empty(2, 3, requires_grad=True), (1,)),
        (None, (1,)),
        (torch.empty(2, 3), (2,)),
        (torch.empty(2, 3), (1, None)),
    ],
)
def test_different_calls_have_different_keys(tensor, settings):
    key = call_key("op", (torch.empty(2, 3),), (1,))
    assert key == call_key("op", (torch.zeros(2, 3),), (1,))
    assert key != call_key("op", (tensor,), settings)
    with torch.no_grad():
        assert key != call_key("op", (torch.empty(2, 3),), (1,))
    assert key != call_key("another", (torch.empty(2, 3),), (1,))


def test_settings_of_a_key(monkeypatch):
    x = torch.empty(2)
    assert call_key("op", (x,), ([1, 2], "a")) == call_key("op", (x,), ([1, 2], "a"))
    assert hash(call_key("op", (x,), ([0.5], torch.float16, None, True)))
    kinds = ((4,), (4.0,), ((4, 4),), ((4, 4.0),), ((4, 5),), (1,), (True,))
    assert len({call_key("op", (x,), settings) for settings in kinds}) == len(kinds)
    for unknown in ([x], {1: 2}, x, object()):
        assert call_key("op", (x,), (unknown,)) is None
    assert call_key("op", ([1.0],), ()) is None
    monkeypatch.setattr(backend, "REFERENCE_ONLY", True)
    assert call_key("op", (x,), ()) is None


def test_a_kept_plan_copies_what_its_kernel_cannot_read(device, needs_kernels, fresh_plans, assert_near):
    generator = torch.Generator().manual_seed(0)

    def call() -> None:
        """Columns of x are not contiguous, nor are the weights."""
        x = torch.randn(2, 6, 5, generator=generator).to(device).mT.requires_grad_()
        weight = torch.randn(12, generator=generator).to(device)[::2].requires_grad_()
        y = gather_layer_norm(x, weight, None, 1e-3)
        expected = torch.nn.functional.layer_norm(x.double(), (6,), weight.double(), None, 1e-3)
        ours = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
        theirs = torch.autograd.grad(expected, (x, weight), torch.ones_like(expected))
        for found, wanted in zip((y, *ours), (expected, *theirs), strict=True):
            assert_near(found, wanted)

    call()
    plans = dict(launch.PLANS)
    call()
    assert plans == launch.PLANS

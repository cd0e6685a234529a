"""Sums of partial sums, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from umt_kernels.reductions import add_up, plan_sums


@pytest.mark.parametrize(("programs", "width"), [(1, 1), (128, 32), (129, 33), (300, 70)])
def test_each_plane_is_added_up_in_the_dtype_of_its_place(device, needs_kernels, assert_near, programs, width):
    generator = torch.Generator().manual_seed(programs)
    partial = torch.randn(3, programs, width, generator=generator).to(device)
    like = [torch.empty(width, device=device, dtype=torch.bfloat16), None, torch.empty(width, device=device)]
    first, second, third = add_up(plan_sums(programs, width), partial, *like)
    assert (first.dtype, third.dtype) == (torch.bfloat16, torch.float32)
    assert_near(first, partial[0].double().sum(0))
    assert_near(third, partial[2].double().sum(0))
    assert second.numel() == 0

"""Plans: when a kept kernel is launched directly, and when Triton must inspect the arguments again."""

from __future__ import annotations

import pytest
import torch
from umt_kernels import launch


class Compiled:
    """The return value of Triton's launch."""

    def __init__(self, calls: list) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments: self.calls.append(("kept", grid, arguments))


class Kernel:
    """A kernel that records how it is launched."""

    arg_names = ("x_ptr", "y_ptr", "n", "FLAG", "BLOCK")

    def __init__(self) -> None:
        self.calls: list = []

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*arguments, **settings):
            self.calls.append(("looked at", grid, (*arguments, settings)))
            return Compiled(self.calls)

        return run


def test_a_kept_kernel_gets_what_the_first_launch_got():
    kernel = Kernel()
    plan = launch.Plan(kernel, (3,), (7,), {"BLOCK": 8, "FLAG": True, "num_warps": 4})
    x = torch.empty(16)
    for _ in range(2):
        plan.launch((x,), (None,))
    first, second = kernel.calls
    assert first == ("looked at", (3, 1, 1), (x, None, 7, {"BLOCK": 8, "FLAG": True, "num_warps": 4}))
    assert second == ("kept", (3, 1, 1), (x, None, 7, True, 8))  # settings in the kernel's order, without Triton's own


@pytest.mark.parametrize("place", [0, 1])
def test_pointers_off_the_16_byte_grid_are_looked_at(place):
    """Triton compiles another kernel for them, with narrower loads."""
    kernel = Kernel()
    plan = launch.Plan(kernel, (1,), (), {"BLOCK": 8})
    aligned, off = torch.empty(16), torch.empty(17)[1:]
    given = [aligned, aligned]
    given[place] = off
    plan.launch(given)
    plan.launch((aligned, aligned))
    plan.launch(given)
    plan.launch((aligned, aligned))
    assert [call[0] for call in kernel.calls] == ["looked at"] * 3 + ["kept"]


def test_plans_do_not_grow_without_limit(monkeypatch, fresh_plans):
    monkeypatch.setattr(launch, "MOST_PLANS", 3)
    for i in range(5):
        launch.keep((i,), launch.Plan(Kernel(), (1,), (), {}))
    assert set(launch.PLANS) == {(3,), (4,)}


@pytest.mark.parametrize(
    ("shape", "strides", "found"),
    [
        ((2, 3, 4), (12, 4, 1), 4),
        ((2, 3, 4), (30, 10, 1), 10),  # columns of a wider matrix
        ((2, 3, 4), (36, 10, 1), None),  # rows of a longer one, too
        ((2, 3, 4), (12, 1, 3), None),
        ((2, 1, 4), (10, 99, 1), 10),  # the stride of a single row is any number
        ((1, 3, 4), (99, 10, 1), 10),
        ((3, 4), (0, 1), 0),
        ((4,), (1,), 4),
        ((4,), (2,), None),
    ],
)
def test_rows_at_equal_distances(shape, strides, found):
    x = torch.empty(100).as_strided(shape, strides)
    assert launch.row_stride(x) == found
    assert (launch.as_rows(x) is x) == (found is not None)


@pytest.mark.parametrize(
    ("warps", "registers", "per_multiprocessor"), [(4, 64, 8), (4, 32, 16), (16, 64, 2), (1, 32, 32), (4, 255, 2)]
)
def test_programs_follow_the_device(warps, registers, per_multiprocessor):
    assert launch.resident_programs(torch.device("cpu"), warps, registers) == 132 * per_multiprocessor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is asked for its size")
def test_programs_of_a_gpu():
    device = torch.device("cuda")
    count = torch.cuda.get_device_properties(device).multi_processor_count
    assert launch.resident_programs(device, 4, 64) % count == 0

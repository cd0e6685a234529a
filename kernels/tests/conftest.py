"""Fixtures of the kernel tests: the device, fresh memory full of NaN, and the tolerance of a comparison."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from umt_kernels import launch
from umt_kernels.backend import INTERPRETED, triton

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this setting

if INTERPRETED and triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    # Before 3.7 the interpreter converts a loop's bounds, arrays of one number, by int(), which numpy 2.4 refuses.
    from triton.runtime import interpreter

    def _patch_lang_tensor(tensor: Any, *scope: Any, patch: Callable = interpreter._patch_lang_tensor) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = _patch_lang_tensor

ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a GPU where there is one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use `device`, so that `pytest -m gpu` runs all tests that can run on a GPU."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """A GPU if there is one. On the CPU, TRITON_INTERPRET=1 decides whether the kernels or the reference run."""
    return torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")


@pytest.fixture
def kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run."""
    return triton is not None and (INTERPRETED or device.type == "cuda")


@pytest.fixture
def needs_kernels(kernels: bool) -> None:
    if not kernels:
        pytest.skip("the Triton kernels run on a GPU or with TRITON_INTERPRET=1")


SHARING = (
    "add_layer_norm",
    "add_layer_norm_backward",
    "cosine_alignment_loss_op",
    "eight_bit",
    "gather_layer_norm",
    "gather_layer_norm_backward",
)
"""Modules whose kernels divide rows among programs."""


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch, fresh_plans: None) -> None:
    """Kernels that divide rows among programs run two programs, so that each loops."""
    for name in SHARING:
        module = importlib.import_module(f"umt_kernels.{name}")
        monkeypatch.setattr(module, "resident_programs", lambda *_: 2)


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Tests share no plans with this test."""
    launch.PLANS.clear()
    yield
    launch.PLANS.clear()


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """Fill tensors of torch.empty and similar functions with NaN (the largest int), to show unwritten elements.

    torch does so only for deterministic algorithms; operators without one only warn.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.fixture
def assert_near() -> Callable[..., None]:
    """Equal to float64 except for `roundings` to the dtype of `actual`, and float32 arithmetic before them.

    One unit in the last place, not half: Triton's interpreter truncates to bfloat16.
    """

    def check(actual: Tensor, expected: Tensor, arithmetic: float = 1e-5, roundings: int = 1) -> None:
        assert actual.shape == expected.shape
        if actual.numel() == 0:
            return
        wide = expected.double()
        floor = 6e-8 if actual.dtype == torch.float16 else 1e-12  # 6e-8 is float16's smallest number
        allowed = roundings * ULP[actual.dtype] * wide.abs() + arithmetic * wide.abs().max() + floor
        assert ((actual.double() - wide).abs() <= allowed).all()  # false for NaN

    return check


@pytest.fixture
def spread() -> Callable[[Tensor], Tensor]:
    """The same values as a view into a larger tensor of NaN (255 for uint8): strides as of a slice, offset not 0."""

    def view(x: Tensor) -> Tensor:
        outer = [n + 3 if axis == x.dim() - 1 else 2 * n + 1 for axis, n in enumerate(x.shape)]
        fill = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
        big = torch.full(outer, fill, dtype=x.dtype, device=x.device)
        part = big[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape[:-1])][..., 2 : 2 + x.shape[-1]]
        part.copy_(x)
        return part.requires_grad_(x.requires_grad) if x.is_leaf else part

    return view

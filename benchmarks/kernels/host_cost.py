"""`python -m benchmarks.kernels.host_cost`: microseconds of a CPU core that calling each op costs, without its launch.

Triton's own launcher is replaced by a function that does nothing, so this is the price of checks, allocations, autograd
and looking up the compiled kernel. In a CUDA graph none of it is paid. F.layer_norm with gradients is timed in turn
with the ops, as a measure of how fast and how busy the machine is. patch_embed and the loss include the arithmetic of
PyTorch's own operations (a matmul; two sums), which on a GPU are launches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from umt_kernels import (
    backend,
    checks,
    cls_scores,
    cosine_alignment_loss,
    gather_layer_norm,
    gather_patches,
    launch,
    patch_embed,
    sample_visible,
)

YARDSTICK = "F.layer_norm"


class _Nothing:
    """A compiled kernel that does nothing, on any grid."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: None


@contextlib.contextmanager
def launches_stubbed() -> Iterator[None]:
    """Inside, CPU tensors go the way of CUDA tensors up to the launch; the ops return whatever was in memory."""
    make = launch.Plan.__init__

    def stubbed(self: launch.Plan, *arguments: Any) -> None:
        make(self, *arguments)
        self.compiled = _Nothing()

    with (
        mock.patch.object(launch.Plan, "__init__", stubbed),
        mock.patch.object(backend, "INTERPRETED", True),
        mock.patch.object(checks, "reads_values", return_value=False),  # as on a GPU, where nothing is read
        mock.patch.object(launch, "PLANS", {}),
    ):
        yield


def calls() -> dict[str, Callable[[], object]]:
    """Each op as pre-training calls it, on tensors so small that arithmetic costs nothing."""
    x = torch.rand(2, 5, 64, requires_grad=True)
    weight, bias = torch.rand(64, requires_grad=True), torch.rand(64, requires_grad=True)
    table, ids = torch.rand(8, 64), torch.zeros(2, 5, dtype=torch.int64)
    clip = torch.zeros(2, 2, 32, 32, 3, dtype=torch.uint8)
    conv = torch.rand(64, 3, 1, 16, 16, requires_grad=True)
    q, k = torch.rand(4, 2, 16), torch.rand(4, 2, 5, 16)
    predictions = torch.rand(3, 2, 5, 64, requires_grad=True)
    targets = torch.rand(3, 2, 5, 64)
    gain, shift = torch.rand(3, 64, requires_grad=True), torch.rand(3, 64, requires_grad=True)
    scores = torch.rand(4, 16)
    return {
        YARDSTICK: lambda: F.layer_norm(x, (64,), weight, bias),
        "gather_layer_norm": lambda: gather_layer_norm(x, weight, bias, 1e-6),
        "gather_layer_norm, position": lambda: gather_layer_norm(
            x, weight, bias, 1e-6, position=table, position_ids=ids
        ),
        "cls_scores": lambda: cls_scores(q, k),
        "sample_visible": lambda: sample_visible(scores, 4),
        "gather_patches": lambda: gather_patches(clip, 16, token_ids=ids),
        "patch_embed": lambda: patch_embed(clip, conv, bias, 16, token_ids=ids),
        "cosine_alignment_loss": lambda: cosine_alignment_loss(predictions, targets, weight=gain, bias=shift),
    }


def measure(rounds: int = 30, repeats: int = 100) -> dict[str, float]:
    """Microseconds per call: of rounds in turn the fastest, which other work on the machine disturbed least."""
    with launches_stubbed():
        functions = calls()
        best = dict.fromkeys(functions, float("inf"))
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                for _ in range(repeats):
                    function()
                best[name] = min(best[name], 1e6 * (time.perf_counter() - start) / repeats)
    return best


def main() -> None:
    torch.set_num_threads(1)
    for name, cost in measure().items():
        print(f"{name:32}{cost:6.1f} us")


if __name__ == "__main__":
    main()

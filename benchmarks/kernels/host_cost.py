"""`python -m benchmarks.kernels.host_cost`: CPU time of a call of each op in microseconds, without its launch.

Two figures for each: the call, with gradients recorded, and its backward through autograd.

Triton's own launcher is replaced by a function that does nothing, so the time is that of checks, allocations, autograd
and the lookup of the compiled kernel. A CUDA graph has none of it. F.layer_norm with gradients is timed in turn with
the ops, to show the speed and load of the machine. patch_embed and pixel_loss include PyTorch's own operations
(reordering the weight and a matmul, also timed alone; a mean), which compute here and are only launches on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from umt_kernels import (
    add_layer_norm,
    add_layer_norm_8bit,
    backend,
    checks,
    cls_scores,
    cosine_alignment_loss,
    gather_layer_norm,
    gather_patches,
    launch,
    linear,
    linear_8bit,
    mlp,
    patch_embed,
    pixel_loss,
    quantize_rows,
    sample_visible,
)
from umt_kernels.gather_patches import weight_matrix

YARDSTICK = "F.layer_norm"


class _Nothing:
    """A compiled kernel that does nothing, on any grid."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: None


def _unread(x: Tensor) -> bool:
    return False


@contextlib.contextmanager
def launches_stubbed() -> Iterator[None]:
    """Inside this context CPU tensors are handled like CUDA tensors, without launches. Results are uninitialised."""
    make = launch.Plan.__init__

    def stubbed(self: launch.Plan, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        self.compiled = _Nothing()

    with (
        mock.patch.object(launch.Plan, "__init__", stubbed),
        mock.patch.object(backend, "INTERPRETED", True),
        mock.patch.object(checks, "reads_values", _unread),  # as on a GPU; a Mock would take as long as an op
        mock.patch.dict(launch.PLANS, clear=True),
    ):
        yield


def calls() -> dict[str, Callable[[], object]]:
    """Each op as in training, on tensors so small that arithmetic takes no time."""
    x, branch = torch.rand(2, 5, 64, requires_grad=True), torch.rand(2, 5, 64, requires_grad=True)
    weight, bias = torch.rand(64, requires_grad=True), torch.rand(64, requires_grad=True)
    table, ids, scale = torch.rand(8, 64), torch.zeros(2, 5, dtype=torch.int64), torch.rand(2)
    clip = torch.zeros(2, 2, 32, 32, 3, dtype=torch.uint8)
    conv, small_bias = torch.rand(8, 3, 1, 4, 4, requires_grad=True), torch.rand(8, requires_grad=True)
    patches = torch.rand(2, 5, 48)
    q, k = torch.rand(4, 2, 16), torch.rand(4, 2, 5, 16)
    predictions = torch.rand(3, 2, 5, 64, requires_grad=True)
    targets = torch.rand(3, 2, 5, 64)
    gain, shift = torch.rand(3, 64, requires_grad=True), torch.rand(3, 64, requires_grad=True)
    pixels = torch.rand(2, 5, 3 * 2 * 16**2, requires_grad=True)
    up, down = torch.rand(256, 64, requires_grad=True), torch.rand(64, 256, requires_grad=True)
    up_bias = torch.rand(256, requires_grad=True)
    rows, matrix = quantize_rows(torch.rand(2, 5, 64), torch.int8), quantize_rows(torch.rand(256, 64), torch.int8)
    plain, vector = torch.rand(2, 5, 64), torch.rand(64)
    scores = torch.rand(4, 16)
    return {
        YARDSTICK: lambda: F.layer_norm(x, (64,), weight, bias),
        "gather_layer_norm": lambda: gather_layer_norm(x, weight, bias, 1e-6),
        "gather_layer_norm, position": lambda: gather_layer_norm(
            x, weight, bias, 1e-6, position=table, position_ids=ids
        ),
        "add_layer_norm": lambda: add_layer_norm(x, branch, weight, bias, 1e-6)[1],
        "add_layer_norm, drop path": lambda: add_layer_norm(x, branch, weight, bias, 1e-6, scale=scale)[1],
        "cls_scores": lambda: cls_scores(q, k),
        "sample_visible": lambda: sample_visible(scores, 4),
        "gather_patches": lambda: gather_patches(clip, 16, token_ids=ids),
        "patch_embed": lambda: patch_embed(clip, conv, small_bias, 4, token_ids=ids),
        "patch_embed, PyTorch's part": lambda: F.linear(patches, weight_matrix(conv, clip), small_bias),
        "linear": lambda: linear(x, up, up_bias, activation="gelu", backend="triton"),
        "mlp": lambda: mlp(x, up, up_bias, down, bias, residual=x, backend="triton"),
        "quantize_rows": lambda: quantize_rows(plain, torch.int8),
        "add_layer_norm_8bit": lambda: add_layer_norm_8bit(plain, plain, vector, vector, 1e-6, torch.int8),
        "linear_8bit": lambda: linear_8bit(rows, matrix, activation="quick_gelu", out_dtype=torch.int8),
        "cosine_alignment_loss": lambda: cosine_alignment_loss(predictions, targets, weight=gain, bias=shift),
        "pixel_loss": lambda: pixel_loss(pixels, clip, ids, 16),
    }


def timed(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Microseconds of a call and of its backward; 0 without a backward."""
    start = time.perf_counter()
    values = [function() for _ in range(repeats)]
    forward = time.perf_counter() - start
    if not (isinstance(values[0], Tensor) and values[0].requires_grad):
        return 1e6 * forward / repeats, 0.0
    inputs = values[0].new_ones(values[0].shape)
    start = time.perf_counter()
    for value in values:
        value.backward(inputs)  # type: ignore[attr-defined]
    return 1e6 * forward / repeats, 1e6 * (time.perf_counter() - start) / repeats


def measure(rounds: int = 30, repeats: int = 50) -> dict[str, tuple[float, float]]:
    """Microseconds per call and backward of the fastest round, which other work disturbed least. Ops take turns."""
    with launches_stubbed():
        functions = calls()
        best = {name: (float("inf"), float("inf")) for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                forward, backward = timed(function, repeats)
                best[name] = min(best[name][0], forward), min(best[name][1], backward)
    return best


def main() -> None:
    argparse.ArgumentParser(
        "python -m benchmarks.kernels.host_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    torch.set_num_threads(1)
    for name, (forward, backward) in measure().items():
        print(f"{name:32}{forward:7.1f} us" + (f"{backward:9.1f} us backward" if backward else ""))


if __name__ == "__main__":
    main()

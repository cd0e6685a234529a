"""Number of reads of each input element by the kernels, counted in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from umt_kernels import (
    add_layer_norm,
    alignment_loss,
    cls_scores,
    gather_layer_norm,
    gather_patches,
    pixel_loss,
    sample_visible,
)
from umt_kernels.backend import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="only the interpreter's loads can be counted")


class Reads:
    """Addresses of all loads since the start."""

    def __init__(self) -> None:
        self.addresses: list[np.ndarray] = []

    def of(self, x: Tensor) -> float:
        """Mean number of loads per element of x."""
        first = x.data_ptr()
        found = sum(int(((a >= first) & (a < first + x.nbytes)).sum()) for a in self.addresses)
        return found / x.numel()


@pytest.fixture
def reads(monkeypatch) -> Iterator[Reads]:
    from triton.runtime.interpreter import InterpreterBuilder

    counted = Reads()
    load = InterpreterBuilder.create_masked_load

    def count(self, ptrs, mask, *rest):
        counted.addresses.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)])
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", count)
    return counted


def draw(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(grad)


IDS = torch.tensor([[4, 0, 2], [1, 3, 2]])


def test_positions_are_read_once_for_all_layers(reads, few_programs):
    x, table = draw(3, 2, 5, 40), draw(6, 40)
    y = gather_layer_norm(
        x, None, None, 1e-6, row_ids=IDS, position=table, position_ids=torch.tensor([[0, 1, 2], [3, 4, 5]])
    )
    assert y.shape == (3, 2, 3, 40)
    assert reads.of(table) == 1
    assert reads.of(x) == 3 / 5  # only rows that are kept


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_sum_and_its_norm_read_each_input_once_each_way(reads, few_programs, post_norm):
    residual, branch, weight, bias = draw(2, 20, 40, grad=True), draw(2, 20, 40, grad=True), draw(40), draw(40)
    x, y = add_layer_norm(residual, branch, weight, bias, 1e-6, post_norm=post_norm, out_dtype=torch.bfloat16)
    assert (reads.of(residual), reads.of(branch)) == (1, 1)
    upstream = draw(2, 20, 40).bfloat16()
    reads.addresses.clear()
    y.backward(upstream)
    assert reads.of(upstream) == 1
    assert reads.of(x if not post_norm else residual) == 1


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_the_loss_reads_its_inputs_once_and_a_plain_backward_nothing(reads, few_programs, distance):
    predictions, targets, gain = draw(2, 2, 3, 40, grad=True), draw(2, 2, 5, 40), draw(2, 40)
    loss = alignment_loss(predictions, targets, distance, target_ids=IDS, weight=gain, bias=gain)
    assert reads.of(predictions) == 1
    assert reads.of(targets) == 3 / 5
    reads.addresses.clear()
    loss.backward()
    assert reads.of(predictions) == reads.of(predictions.grad) == 0


def test_only_pixels_of_the_tokens_are_read(reads):
    clip = torch.randint(0, 256, (2, 2, 8, 8, 3), dtype=torch.uint8)
    gather_patches(clip, 4, token_ids=IDS)
    assert reads.of(clip) == 3 / 8


def test_pixel_loss_reads_pixels_once_each_way(reads):
    clip, predictions = torch.randint(0, 256, (2, 2, 8, 8, 3), dtype=torch.uint8), draw(2, 3, 48, grad=True)
    loss = pixel_loss(predictions, clip, IDS, 4, 1)
    assert (reads.of(clip), reads.of(predictions)) == (3 / 8, 1)
    loss.backward()
    assert (reads.of(clip), reads.of(predictions)) == (3 / 4, 2)


def test_a_draw_looks_at_each_score_once(reads):
    """Its work does not grow with the square of the row."""
    scores = torch.rand(3, 300)
    sample_visible(scores, 60)
    assert reads.of(scores) == 1


def test_scores_read_each_key_once(reads):
    q, k = draw(3, 2, 8), draw(3, 2, 17, 8)
    cls_scores(q, k)
    assert (reads.of(q), reads.of(k)) == (1, 1)

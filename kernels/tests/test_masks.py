"""mask_to_ids and ids_to_mask against a loop."""

from __future__ import annotations

import pytest
import torch
from umt_kernels import gather_layer_norm, ids_to_mask, mask_to_ids


def masks(rows: int = 6, tokens: int = 11) -> torch.Tensor:
    mask = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[1], mask[2] = False, False
    mask[2, [0, -1]] = True
    return mask


@pytest.mark.parametrize("extra", [0, 3])
def test_ids_of_a_mask_and_back(device, extra):
    mask = masks().to(device)
    width = int(mask.sum(1).max()) + extra
    ids = mask_to_ids(mask, width)
    assert ids.dtype == torch.int32
    for row, found in zip(mask.tolist(), ids.tolist(), strict=True):
        expected = [i for i, there in enumerate(row) if there]
        assert found == expected + [-1] * (width - len(expected))
    assert torch.equal(ids_to_mask(ids, 11), mask)
    assert torch.equal(ids_to_mask(ids.long().flip(1), 11), mask)


def test_a_mask_of_equal_counts_has_no_padding(device):
    mask = ids_to_mask(torch.tensor([[4, 0, 2], [1, 2, 3]], device=device), 5)
    assert mask_to_ids(mask, 3).tolist() == [[0, 2, 4], [1, 2, 3]]
    assert mask_to_ids(~mask, 2).tolist() == [[1, 3], [0, 4]]


@pytest.mark.parametrize("width", [0, 11])
def test_none_and_all(device, width):
    mask = torch.full((2, 11), width > 0, device=device)
    assert mask_to_ids(mask, width).tolist() == 2 * [list(range(width))]
    assert torch.equal(ids_to_mask(mask_to_ids(mask, width), 11), mask)


def test_ragged_rows_go_into_an_op(device):
    mask, x = masks()[:2].to(device), torch.randn(2, 11, 4, device=device)
    y = gather_layer_norm(x, None, None, 1e-6, row_ids=mask_to_ids(mask, 8), padded=True)
    expected = torch.nn.functional.layer_norm(x[mask], (4,), eps=1e-6)
    assert (y[(mask_to_ids(mask, 8) >= 0)] - expected).abs().max() < 1e-5


def test_compiled_whole(device):
    mask = masks().to(device)
    both = torch.compile(lambda m: ids_to_mask(mask_to_ids(m, 8), 11), fullgraph=True, backend="aot_eager")
    assert torch.equal(both(mask), mask)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mask_to_ids(torch.ones(2, 3), 1), TypeError, ["torch.float32", "bool"]),
        (lambda: mask_to_ids(torch.ones(3, dtype=torch.bool), 1), ValueError, ["[3]", "[rows, tokens]"]),
        (lambda: mask_to_ids(torch.ones(2, 3, dtype=torch.bool), 4), ValueError, ["num_ids = 4", "3 entries"]),
        (lambda: mask_to_ids(masks(), 1), ValueError, ["mask[0] has", "num_ids = 1"]),
        (lambda: ids_to_mask(torch.tensor([[0, 5]]), 5), ValueError, ["ids[0, 1] = 5", "5 tokens"]),
        (lambda: ids_to_mask(torch.tensor([[-2]]), 5), ValueError, ["ids[0, 0] = -2"]),
        (lambda: ids_to_mask(torch.tensor([1]), 5), ValueError, ["[1]", "m]"]),
    ],
)
def test_errors_name_the_value_and_the_place(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)

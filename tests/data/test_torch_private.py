"""The private APIs of PyTorch used by umt_fast.data exist and work as expected, in every supported version."""

from __future__ import annotations

import re
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from umt_fast.data import torch_private
from umt_fast.data.torch_private import empty_shared, is_dead_worker, resize_antialiased, stop_workers


class Sleepers(Dataset):
    """Slow items, so that workers are busy when they are stopped."""

    def __getitem__(self, index: int) -> int:
        time.sleep(60 * (index > 1))
        return index

    def __len__(self) -> int:
        return 100


def test_this_version_of_torch_was_checked():
    lowest, highest = (tuple(map(int, version.split("."))) for version in re.findall(r"2\.\d+", torch_private.__doc__))
    found = tuple(map(int, torch.__version__.split(".")[:2]))
    assert lowest <= found <= highest, "run these tests, then name the version in torch_private's docstring"


def test_resizing_into_a_given_tensor_is_interpolate():
    clip = torch.randint(0, 256, (2, 40, 30, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    out = torch.full((2, 16, 20, 3), 77, dtype=torch.uint8)
    resize_antialiased(clip, out.permute(0, 3, 1, 2))
    expected = F.interpolate(clip, (16, 20), mode="bilinear", antialias=True)
    assert torch.equal(out.permute(0, 3, 1, 2), expected)


def test_shared_bytes_are_shared():
    made = empty_shared((3, 5))
    assert made.is_shared()
    assert (made.shape, made.dtype) == ((3, 5), torch.uint8)


@pytest.mark.timeout(60)
def test_busy_workers_are_stopped():
    loader = DataLoader(Sleepers(), batch_size=None, num_workers=2)
    batches = iter(loader)
    assert next(batches) == 0
    workers = list(batches._workers)
    begun = time.monotonic()
    stop_workers(batches, 0.2)
    assert time.monotonic() - begun < 30
    assert not any(worker.is_alive() for worker in workers)
    stop_workers(iter([1]), 0.2)  # other iterators have no workers


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("dead_workers_noticed_soon")
def test_a_dead_worker_is_recognised():
    batches = iter(DataLoader(Sleepers(), batch_size=None, num_workers=1))
    next(batches)
    batches._workers[0].kill()
    with pytest.raises(RuntimeError) as caught:
        list(batches)
    assert is_dead_worker(caught.value)
    assert not is_dead_worker(RuntimeError("another"))
    stop_workers(batches, 0.2)

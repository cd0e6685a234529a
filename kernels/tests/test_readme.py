"""The README's examples run in order and give the shapes in their comments."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from umt_kernels import ids_to_mask


def test_the_examples_run():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    shapes = {
        "scores": (8, 16),
        "visible": (8, 4),
        "random": (2, 16),
        "tube": (2, 4, 4),
        "rows": (2, 16, 768),
        "embedded": (2, 16, 96),
        "x": (2, 16, 96),
        "y": (2, 5, 96),
        "features": (2, 8, 64),
        "ids": (2, 8),
    }
    assert {name: tuple(names[name].shape) for name in shapes} == shapes
    assert names["predictions"].grad is not None
    assert torch.equal(ids_to_mask(names["ragged_ids"], 64), names["seen"])
    assert (names["ragged"][~names["there"]] == 0).all()
    assert names["encoder"].conv.weight.grad.abs().sum() > 0

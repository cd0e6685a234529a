"""Masks from a seed equal those of the published code bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from umt_fast.masking import published

MASKS = json.loads((Path(__file__).parents[1] / "golden" / "pixels" / "masks.json").read_text())


def bits(text: str, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:count].astype(bool)


def draw(case: dict, rng: np.random.RandomState) -> list[np.ndarray]:
    frames, height, width = case["grid"]
    patches = height * width
    if case["kind"] == "tube":
        return [published.tube_mask(frames, patches, case["ratio"], rng)]
    if case["kind"] == "random":
        return [published.random_mask(frames * patches, case["ratio"], rng)]
    if case["kind"] == "running_cell":
        return [published.running_cell_mask(frames, height, width, case["ratio"], rng)]
    encoder = published.tube_mask(frames, patches, case["enc_ratio"], rng)
    return [encoder, published.running_cell_mask(frames, height, width, case["dec_ratio"], rng)]


def test_recorded_draws():
    kinds = set()
    for case in MASKS["cases"]:
        tokens = int(np.prod(case["grid"]))
        if case["kind"] == "running_cell_table":
            table = published.running_cell_table(*case["grid"], case["ratio"]).numpy()
            assert np.array_equal(table, np.stack([bits(phase, tokens) for phase in case["phases"]]))
            continue
        kinds.add(case["kind"])
        rng = np.random.RandomState(case["seed"])
        for call in case["calls"]:
            expected = [bits(text, tokens) for text in ([call] if isinstance(call, str) else call)]
            assert all(np.array_equal(*pair) for pair in zip(draw(case, rng), expected, strict=True))
    assert kinds == {"tube", "random", "running_cell", "v2_pair"}


def test_running_cells_on_the_device_are_rows_of_the_table():
    ids = published.draw_running_cells(64, 8, 14, 14, 0.5, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert ids.shape == (64, 784)
    assert (ids[:, 1:] > ids[:, :-1]).all()
    table = published.running_cell_table(8, 14, 14, 0.5)
    drawn = torch.ones(64, 1568, dtype=torch.bool).scatter_(1, ids, False)
    found = (drawn[:, None] == table).all(-1)
    assert (found.sum(1) == 1).all()
    assert found.any(0).all()  # every phase comes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((8, 14, 14, 0.1), "ratio = 0.1 hides 0"), ((2, 3, 4, 0.5), "3 x 4 patches has an odd side")],
)
def test_impossible_cells_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        published.running_cell_table(*arguments)

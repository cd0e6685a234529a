"""Rules that depend on the clip, against recorded draws where available."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden import read_recorded
from torch import Tensor

from umt_fast.masking import guided

GOLDEN = Path(__file__).parents[1] / "golden" / "pixels"


def read(name: str) -> tuple[dict, dict[str, Tensor]]:
    metadata, tensors = read_recorded(GOLDEN / f"{name}.safetensors")
    return json.loads(metadata["config"]), tensors


def left(mask: Tensor) -> Tensor:
    return (~mask).nonzero()[:, 1].view(len(mask), -1)


def test_redundancy_removing_as_recorded():
    settings, recorded = read("everest_masks")
    visible, decoded = guided.redundancy_removing(
        recorded["tokens"], settings["slots"], recorded["noise"], settings["candidate_ratio"], settings["mask_ratio"]
    )
    assert torch.equal(visible[:, 0], left(recorded["input_mask"]))
    assert torch.equal(decoded, left(recorded["target_mask"]))
    with pytest.raises(ValueError, match=r"noise has shape \[2, 20\]; give \[2, 21\]"):
        guided.redundancy_removing(recorded["tokens"], 8, recorded["noise"][:, :20])


def test_flow_scores_as_recorded():
    settings, recorded = read("mgmae_masks")
    flows = {tuple(pair): recorded[f"flow.{pair[0]}.{pair[1]}"] for pair in settings["calls"]}
    scores = guided.flow_scores(recorded["init"], flows, settings["frames"], settings["patch"], settings["tubelet"])
    assert (scores - recorded["scores"]).abs().max() < 1e-3 * recorded["scores"].abs().max()
    visible = guided.highest(scores, settings["n_visible_per_slot"])
    ids = (visible + torch.arange(scores.shape[1])[:, None] * scores.shape[2]).flatten(1)
    assert torch.equal(ids, left(recorded["mask"]))


def test_gaussian_map_peaks_at_its_patches():
    field = guided.gaussian_map(torch.tensor([[0, 5], [10, 10]]), 3, 4, 8)
    assert field.shape == (2, 1, 24, 32)
    assert field[0, 0, 4, 4] == 1
    assert field[0, 0, 12, 12] == 1
    assert field[1, 0, 20, 20] == 1
    # one patch away along one axis: exp(-1)
    assert abs(float(field[1, 0, 12, 20]) - 0.36788) < 1e-4


def test_motion_and_text_hide_the_highest():
    motion = torch.tensor([[[0.0, 5.0, 1.0, 3.0]]])
    assert guided.lowest(motion, 2).tolist() == [[[0, 2]]]
    with pytest.raises(ValueError, match="num_visible = 5, but a frame has 4 patches"):
        guided.lowest(motion, 5)


def test_patches_that_move_alike_are_hidden_at_random():
    still = torch.zeros(500, 2, 6)
    drawn = guided.lowest(still, 2, torch.Generator().manual_seed(0))
    counts = drawn.flatten().bincount(minlength=6)
    assert counts.min() > 250  # 333 each, had every patch its share
    assert torch.equal(drawn, guided.lowest(still, 2, torch.Generator().manual_seed(0)))
    moving = torch.rand(20, 2, 6)
    assert torch.equal(guided.lowest(moving, 2), guided.highest(-moving, 2))


def test_regions_are_shown_in_order_until_enough_is_visible():
    regions = torch.full((1, 2, 8, 8), 2)
    regions[:, :, :4] = 0  # upper half: background
    regions[:, :, 4:, :4] = 1
    generator = torch.Generator().manual_seed(0)

    def draw(regions: Tensor, order: tuple[int, ...], num_visible: int) -> Tensor:
        return guided.draw_marked(guided.regions_shown(regions, order, 2).float(), num_visible, generator)

    visible = draw(regions, (0, 1, 2), 4)
    assert visible.shape == (1, 1, 4)
    assert (visible % 16 < 8).all()  # background alone is enough
    regions[:, 0] = 2  # no background: the next label there is comes
    wanted = draw(regions, (0, 2), 24)
    assert set(wanted.flatten().tolist()) == {*range(16), *range(16, 24)}
    nothing = draw(torch.full((1, 1, 8, 8), 9), (0, 1), 16)
    assert nothing.flatten().tolist() == list(range(16))

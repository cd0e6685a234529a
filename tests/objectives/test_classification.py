from __future__ import annotations

import numpy as np
import pytest
import torch

from umt_fast.config import MixConfig
from umt_fast.objectives.classification import mix, soft_cross_entropy, soft_targets


def test_mixes_as_published(recorded):
    case = recorded("g_mixup")
    clips, labels = case.tensors["x"], case.tensors["labels"]
    before = clips.clone()
    for number, settings in enumerate(case.config["cases"]):
        chances = settings["prob"], settings["switch_prob"]
        mixing = MixConfig(settings["mixup"], settings["cutmix"], *chances, settings["mode"], settings["smoothing"])
        rng = np.random.RandomState(settings["numpy_seed"])
        mixed, targets = mix(clips, labels, case.config["classes"], mixing, rng)
        if f"x.{number}" in case.tensors:
            assert torch.equal(mixed, case.tensors[f"x.{number}"]), number
        assert torch.equal(targets, case.tensors[f"target.{number}"]), number
    assert torch.equal(clips, before)


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_mixed_clips_and_targets_agree(mode):
    """With clips filled with their class number, the mean pixel equals the target's mean class."""
    labels = torch.tensor([0, 1, 2, 3])
    clips = labels.float()[:, None, None, None, None].expand(4, 3, 2, 40, 40).contiguous()
    for seed in range(20):
        mixed, targets = mix(clips, labels, 4, MixConfig(mode=mode, smoothing=0), np.random.RandomState(seed))
        assert torch.allclose(targets.sum(-1), torch.ones(4))
        assert torch.allclose(mixed.mean((1, 2, 3, 4)), targets @ torch.arange(4.0), atol=1e-4)


def test_odd_batches_and_no_mixing():
    clips, labels = torch.randn(3, 3, 1, 4, 4), torch.tensor([0, 2, 1])
    with pytest.raises(ValueError, match="3 clips in a batch"):
        mix(clips, labels, 5, MixConfig(), np.random.RandomState(0))
    same, targets = mix(clips, labels, 5, MixConfig(0, 0), np.random.RandomState(0))
    assert same is clips
    logits = torch.randn(3, 5, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert abs(soft_cross_entropy(logits, targets) - expected) < 1e-6
    assert torch.allclose(soft_targets(labels, 5, 0.0), torch.eye(5)[labels])

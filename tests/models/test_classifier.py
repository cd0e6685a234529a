"""The classifier against the published fine-tuning model."""

from __future__ import annotations

import finetune_reference as reference
import numpy as np
import pytest
import torch

from umt_fast import ClassifierConfig, VideoClassifier
from umt_fast.config import ConfigError
from umt_fast.models.classifier import build_classifier, classifier_positions
from umt_fast.objectives.classification import soft_cross_entropy, soft_targets

TINY = {"image_size": 32, "patch_size": 16, "frames": 2, "width": 32, "depth": 2, "heads": 2, "num_classes": 5}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["a_classify", "a2_first_token"])
def test_logits_losses_and_gradients(recorded, classifier_config, name):
    case = recorded(name)
    model = VideoClassifier(classifier_config(case.config))
    assert model.state_dict().keys() == case.part("model.").keys()
    assert torch.equal(model.pos_embed, case.tensors["model.pos_embed"])
    model.load_state_dict(case.part("model."))
    features, logits = model.features(case.tensors["video"]), model(case.tensors["video"])
    assert (features - case.tensors["features"]).abs().max() < 1e-5
    assert (logits - case.tensors["logits"]).abs().max() < 1e-5
    classes, smoothing = case.config["num_classes"], case.config["label_smoothing"]
    labels = case.tensors["labels"]
    for key, share, smooth in (
        ("loss", case.config["lam"], smoothing),
        ("loss_hard", 1, 0),
        ("loss_hard_smoothing", 1, smoothing),
    ):
        targets = soft_targets(labels, classes, smooth, share)
        assert abs(soft_cross_entropy(logits, targets) - case.tensors[key]) < 1e-5, key
    targets = soft_targets(labels, classes, smoothing, case.config["lam"])
    assert torch.allclose(targets, case.tensors["soft_targets"], rtol=0, atol=1e-7)
    soft_cross_entropy(logits, targets).backward()
    parameters = dict(model.named_parameters())
    assert len(case.part("grad.")) >= 19
    for key, gradient in case.part("grad.").items():
        assert relative(parameters[key].grad, gradient) < 1e-4, key
    assert model.pos_embed.grad is None


def test_position_tables(recorded):
    case = recorded("f_pos_tables")
    for number, settings in enumerate(case.config["cases"]):
        sizes = (settings[key] for key in ("img_size", "patch_size", "tubelet_size", "all_frames", "width"))
        config = ClassifierConfig(*sizes, depth=1, heads=1, num_classes=2)
        assert torch.equal(classifier_positions(config)[None], case.tensors[f"table.{number}"]), settings
        in_state = "pos_embed" in VideoClassifier(config).state_dict()
        assert in_state == settings["is_parameter"], settings


@pytest.mark.parametrize(
    ("sizes", "pool", "learned"),
    [
        ((48, 16, 1, 3), "mean", False),
        ((48, 16, 2, 6), "first", False),
        ((32, 16, 4, 8), "mean", True),
        ((64, 16, 1, 1), "first", True),
        ((42, 14, 2, 4), "first", False),
        ((24, 8, 2, 12), "mean", False),
        ((16, 16, 1, 16), "mean", False),
    ],
)
def test_odd_sizes_against_float64(sizes, pool, learned):
    config = ClassifierConfig(*sizes, 24, 2, 3, 7, pool=pool, learnable_positions=learned)
    model = VideoClassifier(config, init_scale=1.0).eval()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.2)
    table = model.pos_embed[0].detach().double().numpy() if learned else reference.positions(config)
    clip = torch.randn(2, 3, config.frames, config.image_size, config.image_size)
    expected = reference.logits(config, model.state_dict(), clip, table)
    assert np.abs(model(clip).detach().numpy() - expected).max() < 2e-5 * np.abs(expected).max()


def test_patches_of_14_pixels_start_from_16_rows():
    config = ClassifierConfig(image_size=112, patch_size=14, frames=4, width=8, depth=1, heads=1)
    assert classifier_positions(config).shape == (4 * 8 * 8, 8)


def test_initial_values():
    model = VideoClassifier(ClassifierConfig(width=64, depth=2, heads=2, num_classes=50))
    assert float(model.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.1)
    assert float(model.blocks[0].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not model.head.bias.any()
    assert not model.blocks[0].attn.q_bias.any()


def test_uint8_clips_are_normalised_inside():
    model = VideoClassifier(ClassifierConfig(**TINY), init_scale=1.0).eval()
    clip = torch.randint(256, (2, 2, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    same = ((clip / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    assert torch.allclose(model(clip), model(same), atol=1e-5)
    with pytest.raises(ValueError, match="2, 32, 32, 3"):
        model(clip[:, :1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_classes": 0}, "num_classes = 0"),
        ({"pool": "last"}, "pool = 'last'"),
        ({"drop_path": 1}, "drop_path = 1"),
        ({"image_size": 40}, "image_size = 40"),
    ],
)
def test_refuses_impossible_sizes(change, says):
    with pytest.raises(ConfigError, match=says):
        ClassifierConfig(**{**TINY, **change})


def test_compiles_to_one_graph():
    model = VideoClassifier(ClassifierConfig(**TINY, drop_path=0.5), init_scale=1.0)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    clip = torch.randn(2, 3, 2, 32, 32)
    torch.manual_seed(3)
    expected = model(clip)
    torch.manual_seed(3)
    assert torch.allclose(compiled(clip), expected, atol=1e-6)
    model.eval()
    assert torch.allclose(compiled(clip[:1]), model(clip[:1]), atol=1e-6)


@pytest.mark.parametrize("architecture", ["umt", "mae_st"])
def test_dropout_and_stochastic_depth_of_either_architecture(architecture):
    config = ClassifierConfig(**{**TINY, "depth": 3}, architecture=architecture, drop_path=0.4, head_dropout=0.5)
    model = build_classifier(config, init_scale=1.0)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.0, 0.2, 0.4])
    assert len(model.head.weight) == 5
    clip = torch.randn(1, 3, 2, 32, 32)
    for block in model.blocks:
        block.drop_path = 0.0  # only the head's dropout remains
    torch.nn.init.normal_(model.head.weight)
    drawn = torch.stack([model(clip) for _ in range(8)])
    assert len(drawn.flatten(1).unique(dim=0)) == 8
    assert len(torch.stack([model.eval()(clip) for _ in range(2)]).unique(dim=0)) == 1

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch

import umt_fast
from umt_fast import ClassifierConfig, StudentConfig, VideoClassifier, VideoStudent
from umt_fast.evaluation.features import encoder_of
from umt_fast.weights import WeightsError, write_weights

SIZES = {"image_size": 32, "patch_size": 16, "width": 64, "depth": 2, "heads": 1}


def clip_of(frames: int, side: int = 32) -> torch.Tensor:
    return torch.randint(256, (2, frames, side, side, 3), dtype=torch.uint8)


def test_a_pre_trained_encoder(tmp_path: Path):
    student = VideoStudent(StudentConfig(**SIZES, frames=4, align_layers=1, target_width=8)).eval()
    torch.nn.init.normal_(student.encoder.norm.weight)
    torch.save({"model": student.state_dict(), "config": {"student": {**SIZES, "frames": 4}}}, tmp_path / "x.pth")
    encoder = umt_fast.load_encoder(tmp_path / "x.pth")
    clip = clip_of(4)
    every = torch.arange(16).expand(2, -1)
    (hidden,) = student.encoder.hidden_states(clip, student.position, every)
    tokens = encoder(clip)
    assert torch.allclose(tokens, student.encoder.norm(hidden), atol=1e-5)
    assert torch.allclose(encoder.pooled(clip), tokens.mean(1), atol=1e-6)
    assert encoder(clip_of(8)).shape == (2, 32, 64)  # positions are resampled in time


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("frames", [4, 16])
def test_a_fine_tuned_encoder_gives_the_features_of_its_head(tmp_path: Path, pool, frames):
    model = VideoClassifier(ClassifierConfig(**SIZES, frames=frames, num_classes=3, pool=pool)).eval()
    settings = argparse.Namespace(num_frames=frames, model="vit_base_patch16_32", input_size=999)
    torch.save({"module": model.state_dict(), "args": settings}, tmp_path / "x.pth")
    encoder, clip = umt_fast.load_encoder(str(tmp_path / "x.pth")), clip_of(frames)
    assert torch.allclose(encoder.pooled(clip), model.features(clip), atol=1e-6)
    assert encoder(clip).shape == (2, frames * 4, 64)


def test_sizes_missing_in_the_file(tmp_path: Path):
    model = VideoClassifier(ClassifierConfig(**{**SIZES, "image_size": 224}, frames=8, num_classes=3)).eval()
    write_weights(tmp_path / "x.safetensors", model.state_dict())
    encoder = umt_fast.load_encoder(tmp_path / "x.safetensors")
    assert (encoder.config.frames, encoder.config.image_size, encoder.config.heads) == (8, 224, 1)
    smaller = umt_fast.load_encoder(tmp_path / "x.safetensors", frames=2, image_size=64)
    expected = VideoClassifier(ClassifierConfig(**{**SIZES, "image_size": 64}, frames=2))
    assert torch.equal(smaller.position, expected.pos_embed[0])


def test_refuses_what_is_not_an_encoder(tmp_path: Path):
    write_weights(tmp_path / "a.pth", {"conv1.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"a\.pth is not a video encoder"):
        umt_fast.load_encoder(tmp_path / "a.pth")
    model = VideoClassifier(ClassifierConfig(**{**SIZES, "width": 48, "heads": 3}, num_classes=3))
    write_weights(tmp_path / "b.pth", model.state_dict())
    with pytest.raises(WeightsError, match="the number of heads is unknown; give heads="):
        umt_fast.load_encoder(tmp_path / "b.pth")
    assert umt_fast.load_encoder(tmp_path / "b.pth", heads=3, frames=2, image_size=32)(clip_of(2)).shape == (2, 8, 48)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("blocks.0.mlp.fc1.weight", torch.zeros(10**9, 0), "without a value"),
        ("pos_embed", torch.zeros(1, 0, 64), "without a value"),
        ("pos_embed", torch.zeros(()), "pos_embed is []"),
        ("blocks.99999999.norm1.weight", torch.zeros(64), "3 blocks, but none is number 2"),
        ("head.weight", torch.zeros(()), "head.weight"),
    ],
)
def test_huge_or_impossible_sizes_are_refused(key, value, says):
    config = ClassifierConfig(image_size=32, frames=2, width=64, depth=2, heads=1, num_classes=2)
    state = {**VideoClassifier(config).state_dict(), key: value}
    if key == "head.weight":
        assert encoder_of(state, {"classifier": {"image_size": 32, "frames": 2}}, "x").config.width == 64
        return
    with pytest.raises(WeightsError, match=re.escape(says)):
        encoder_of(state, {"classifier": {"image_size": 32, "frames": 2}}, "x")


def test_settings_of_a_file_that_would_take_the_memory():
    state = VideoClassifier(ClassifierConfig(image_size=32, frames=2, width=64, depth=1, heads=1)).state_dict()
    state.pop("pos_embed", None)
    with pytest.raises(WeightsError, match="more than 262144 tokens"):
        encoder_of(state, {"num_frames": 10**9}, "x")

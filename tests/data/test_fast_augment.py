"""The fast augmentation: operations against Pillow's, and its effect on a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from umt_fast.config import IMAGENET_STATISTICS, MAE_ST_STATISTICS, AugmentConfig, DataConfig
from umt_fast.data.augment import OPERATIONS, augment_frames, draw_operation
from umt_fast.data.fast_augment import CroppedStream, apply_to_frames, augment_batch
from umt_fast.data.loader import ClipLoader
from umt_fast.data.manifest import read_manifest
from umt_fast.data.sampling import Draws

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def pictures(count: int = 3, height: int = 37, width: int = 53) -> np.ndarray:
    """Smooth pictures, for which different interpolation kernels agree; the last one has a single colour."""
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(20, 230, (count, 3, 4, 5))).float()
    large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    large[-1] = large[-1].mean((1, 2), keepdim=True)
    return large.permute(0, 2, 3, 1).round().byte().numpy()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0.0, 3.0, 7.0, 10.0])
def test_operations_are_those_of_pillow(name, magnitude):
    frames = pictures()
    certain = AugmentConfig(chance=1, magnitude=magnitude, magnitude_std=0)
    for seed in (2, 3):
        operation = draw_operation(name, certain, Draws.seeded(seed))
        expected = augment_frames(frames, [operation])
        moved = apply_to_frames(torch.from_numpy(frames).permute(0, 3, 1, 2), operation)
        assert moved.dtype == torch.uint8
        apart = np.abs(moved.permute(0, 2, 3, 1).numpy().astype(int) - expected)
        if name in GEOMETRIC:
            assert (apart.max(-1) > 3).mean() < 0.02, (operation, apart.max())
        else:
            assert apart.max() == 0, operation


def test_a_clip_depends_on_its_seed_alone():
    clips = torch.from_numpy(np.stack([pictures(2, 32, 32), pictures(2, 32, 32)[:, ::-1]]))
    settings = AugmentConfig(erase=1)
    both = augment_batch(clips, [5, 6], settings)
    assert both.shape == (2, 3, 2, 32, 32)
    assert torch.equal(augment_batch(clips[1:], [6], settings)[0], both[1])
    assert not torch.equal(augment_batch(clips[1:], [7], settings)[0], both[1])
    off = augment_batch(clips, [5, 6], AugmentConfig(operations=0, erase=0))
    mean, std = (torch.tensor(part) for part in IMAGENET_STATISTICS)
    expected = (clips.float() / 255 - mean) / std
    assert torch.allclose(off, expected.permute(0, 4, 1, 2, 3), atol=1e-6)
    of_mae_st = augment_batch(clips, [5, 6], AugmentConfig(operations=0, erase=0), MAE_ST_STATISTICS)
    assert torch.allclose(of_mae_st, ((clips.float() / 255 - 0.45) / 0.225).permute(0, 4, 1, 2, 3), atol=1e-6)
    with pytest.raises(ValueError, match="1 seeds for 2 clips"):
        augment_batch(clips, [5], settings)


def test_crops_of_a_stream_are_drawn_for_each_clip(demo_videos: Path):
    videos = read_manifest(str(demo_videos))
    stream = CroppedStream(
        videos, DataConfig(workers=0, crops_per_clip=2), 2, 32, seed=0, augment=AugmentConfig(flip=0.5)
    )
    views = [view for seed in range(40) for view in stream.draw_views(100, 80, np.random.default_rng(seed))]
    assert 0.3 < np.mean([view.flip for view in views]) < 0.7
    assert len({(view.width, view.height) for view in views}) > 60
    assert min(view.width * view.height for view in views) < 0.3 * 8000
    with ClipLoader(stream, start=0, batches=2, batch_size=4) as loader:
        first, second = list(loader)
    assert first.clip.shape == (4, 2, 32, 32, 3)
    assert not torch.equal(first.clip[0], first.clip[1])
    assert len(set(first.rows + second.rows)) == 4

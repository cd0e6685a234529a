"""Training augmentation against the published pipeline, with the same random draws."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from umt_fast.config import AugmentConfig, DataConfig
from umt_fast.data.augment import (
    OPERATIONS,
    PublishedAugment,
    TrainSampling,
    augment_frames,
    augment_published,
    draw_crop,
    draw_erased,
    draw_operation,
    draw_operations,
)
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import read_frames
from umt_fast.data.loader import ClipLoader
from umt_fast.data.manifest import read_manifest
from umt_fast.data.sampling import Draws, train_frames
from umt_fast.data.video import BadVideo


def test_published_operations(recorded):
    case = recorded("h_augment")
    frame = case.tensors["clip"][:1].numpy()
    certain = AugmentConfig(chance=1, magnitude=case.config["op_magnitude"], magnitude_std=0)
    seen = set()
    for key, expected in case.part("op.").items():
        name, seed = re.fullmatch(r"(\w+?)(?:Increasing|Rel)?\.(\d+)", key).groups()
        operation = draw_operation(name, certain, Draws.seeded(int(seed)))
        assert np.array_equal(augment_frames(frame, [operation])[0], expected.numpy()), key
        seen.add(name)
    assert seen == set(OPERATIONS)


def test_published_clips(recorded):
    case = recorded("h_augment")
    clip, side = case.tensors["clip"].numpy(), case.config["crop"]
    checked = 0
    for number, settings in enumerate(case.config["cases"]):
        if f"full.{number}" not in case.tensors:
            continue
        flip = 0 if settings["data_set"] == "SSV2" else 0.5
        augmentation = AugmentConfig(erase=settings["reprob"], flip=flip)
        operations = draw_operations(augmentation, Draws.seeded(settings["seed"]))
        assert np.array_equal(augment_frames(clip, operations), case.tensors[f"randaug.{number}"].numpy())
        whole = augment_published(clip, side, augmentation, Draws.seeded(settings["seed"]))
        assert torch.equal(whole, case.tensors[f"full.{number}"]), number
        checked += 1
    assert checked >= 4


def test_published_crops(recorded):
    for seed, height, width, *box in recorded("h_augment").config["random_resized_crop"]["rows"]:
        assert list(draw_crop(height, width, AugmentConfig(), Draws.seeded(seed))) == box


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 5)])
def test_boxes_lie_in_frames_of_any_size(size):
    for seed in range(50):
        crop = draw_crop(*size, AugmentConfig(), Draws.seeded(seed))
        assert crop.height >= 1
        assert crop.width >= 1
        assert 0 <= crop.top <= size[0] - crop.height
        assert 0 <= crop.left <= size[1] - crop.width
        erased = draw_erased(*size, AugmentConfig(erase=1), Draws.seeded(seed))
        assert erased is None or (erased.top + erased.height <= size[0] and erased.left + erased.width <= size[1])


def test_samples_of_the_same_frames_differ_and_repeat():
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    twice = []
    for _ in range(2):
        draws = Draws.seeded(7)
        twice.append([augment_published(frames, 16, AugmentConfig(), draws) for _ in range(2)])
    assert not torch.equal(twice[0][0], twice[0][1])
    assert all(torch.equal(first, second) for first, second in zip(*twice, strict=True))


def test_nothing_is_augmented_where_all_is_off():
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    off = AugmentConfig(operations=0, crop_area=(1, 1), crop_aspect=(1, 1), flip=0, erase=0)
    clip = augment_published(frames, 16, off, Draws.seeded(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.equal(clip, ((torch.from_numpy(frames).float() / 255 - mean) / std).permute(3, 0, 1, 2))


def test_the_loader_gives_published_clips(demo_videos: Path):
    augment = PublishedAugment(frames=2, side=16, clips=2, settings=AugmentConfig())
    sampling = TrainSampling(frames=2, rule="sparse")
    videos, config = read_manifest(str(demo_videos)), DataConfig(workers=0)
    stream = ClipStream(videos, config, 2, 16, seed=3, sampling=sampling, transform=augment)
    with ClipLoader(stream, start=0, batches=1, batch_size=4) as loader:
        batch = next(loader)
    assert batch.clip.shape == (4, 3, 2, 16, 16)
    assert batch.clip.dtype == torch.float32
    rng = next(stream.attempts(1))[1]
    frame_draws, draws = (Draws.seeded(int(rng.integers(2**32))) for _ in range(2))
    frames = read_frames(videos[batch.rows[1]], lambda total: train_frames(total, 2, "sparse", frame_draws))
    for clip in batch.clip[2:]:
        assert torch.equal(clip, augment_published(np.stack(frames), 16, AugmentConfig(), draws))


def test_frames_of_different_sizes_are_a_bad_video():
    augment = PublishedAugment(frames=2, side=16, clips=1, settings=AugmentConfig())
    frames = [np.zeros((20, 20, 3), np.uint8), np.zeros((10, 20, 3), np.uint8)]
    with pytest.raises(BadVideo, match="change in size"):
        augment(frames, np.empty((1, *augment.shape), np.float32), np.random.default_rng(0))

"""Frames, crops and pictures of stage 2."""

from __future__ import annotations

import json

import numpy as np
import pytest
import stage2_cases as stage2
import torch
from PIL import Image

from umt_fast.data.pairs import ASPECT, SCALE, IntervalSampling, PairTransform, draw_crop, resize_bicubic
from umt_fast.data.sampling import Timeline, interval_frames, middle_frames, rate_frames

CASES = json.loads((stage2.GOLDEN / "data_cases.json").read_text())


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_middle_frames_are_the_published_ones():
    for total, frames, expected in CASES["middle"]:
        assert middle_frames(total, frames) == expected
    for total, fps, mode, expected in CASES["fps"]:
        assert rate_frames(total, fps, float(mode.removeprefix("fps"))) == expected


def test_training_draws_the_published_frames_of_each_interval():
    for total, frames, expected in CASES["rand_values_seen_per_slot_in_400_draws"]:
        draws = [interval_frames(total, frames, rng(seed)) for seed in range(400)]
        assert [sorted({draw[slot] for draw in draws}) for slot in range(frames)] == expected, (total, frames)


def test_the_last_frame_of_an_interval_is_drawn_where_asked():
    draws = np.array([interval_frames(8, 4, rng(seed), last=True) for seed in range(100)])
    assert [sorted(set(slot)) for slot in draws.T.tolist()] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_only_the_first_seconds_of_a_long_video_are_looked_at():
    timeline = Timeline(range(1000), lambda: 0.1)
    assert IntervalSampling(2)(timeline, rng()) == [249, 749]
    assert IntervalSampling(2, max_seconds=30)(timeline, rng()) == [74, 224]
    assert IntervalSampling(2, max_seconds=300)(timeline, rng()) == [249, 749]


def test_crops_have_the_distribution_of_random_resized_crop():
    boxes = np.array([draw_crop(120, 200, rng(seed)) for seed in range(2000)])
    top, left, rows, columns = boxes.T
    assert (top + rows <= 120).all()
    assert (left + columns <= 200).all()
    area, aspect = rows * columns / (120 * 200), columns / rows
    assert area.min() >= SCALE[0] - 0.01
    assert area.max() > 0.6
    assert aspect.min() >= ASPECT[0] - 0.02
    assert aspect.max() <= ASPECT[1] + 0.02
    assert draw_crop(10, 1000, rng()) == (0, 493, 10, 13)  # none fits: the middle, at the nearest aspect


def test_frames_are_resized_as_torchvision_resizes_tensors():
    frame = rng().integers(0, 256, (37, 53, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    for antialias in (False, True):
        exact = torch.nn.functional.interpolate(pixels, (24, 24), mode="bicubic", antialias=antialias)
        expected = exact.clamp(0, 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(resize_bicubic(frame, 24, antialias), expected)
    assert not np.array_equal(resize_bicubic(frame, 24, False), resize_bicubic(frame, 24, True))


def test_a_clip_is_cropped_and_flipped_alike_in_all_frames():
    frame = rng().integers(0, 256, (40, 40, 3), dtype=np.uint8)
    transform = PairTransform(frames=3, side=16, training=True)
    out = np.zeros((1, *transform.shape), np.uint8)
    transform([frame] * 3, out, rng(1))
    assert np.array_equal(out[0, 0], out[0, 1])
    assert np.array_equal(out[0, 0], out[0, 2])
    PairTransform(frames=3, side=16)([frame] * 3, out, rng(1))
    assert np.array_equal(out[0, 0], resize_bicubic(frame, 16, False))
    PairTransform(frames=3, side=16)([frame, frame[:20], frame], out, rng(1))  # a video that changes its size


def test_pictures_are_read_as_clips_of_one_frame(tmp_path):
    from umt_fast.config import DataConfig
    from umt_fast.data.clips import ClipStream
    from umt_fast.data.index import VideoList
    from umt_fast.data.loader import ClipDataset

    pixels = rng().integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).convert("L").save(tmp_path / "grey.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    names = ("a.png", "grey.png", "broken.jpg", "missing.jpg")
    videos = VideoList.of_rows({"path": str(tmp_path / name), "caption": name} for name in names)
    stream = ClipStream(
        videos, DataConfig(), 1, 16, 0, IntervalSampling(1), PairTransform(1, 16), shuffle=False, replace=False
    )
    batch = ClipDataset(stream)[[0, 1, 2, 3]]
    assert batch.clip.shape == (2, 1, 16, 16, 3)
    assert np.array_equal(batch.clip[0, 0].numpy(), resize_bicubic(pixels, 16, False))
    assert batch.captions == ["a.png", "grey.png"]
    assert [reason for _, reason in batch.bad] == [batch.bad[0][1], batch.bad[1][1]]
    assert "not a picture" in batch.bad[0][1]


@pytest.mark.parametrize(("total", "frames"), [(0, 4), (3, 0)])
def test_refuses_what_cannot_be_sampled(total, frames):
    with pytest.raises(ValueError, match="give numbers above 0"):
        middle_frames(total, frames)

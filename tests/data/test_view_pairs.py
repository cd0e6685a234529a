"""Pairs of views: their distributions, their crops, and resuming at any pair."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from umt_fast.config import ConfigError, DataConfig
from umt_fast.data import open_loader
from umt_fast.data.crops import Crop
from umt_fast.data.decode import read_frames
from umt_fast.data.index import VideoList
from umt_fast.data.view_pairs import CROP_MAE, SIAM_MAE, Pairing, PairStream, draw_frame_pair, draw_view_pair


@pytest.fixture
def videos(tmp_path, write_video) -> VideoList:
    return VideoList.of_paths(
        [str(write_video(tmp_path / f"{n}.mp4", frames=20 + n, size=(64, 48), seed=n)) for n in range(3)]
    )


def stream(videos: VideoList, pairing: Pairing, frames: int = 1, **settings) -> PairStream:
    config = DataConfig(**{"workers": 0, "crops_per_clip": 2, **settings})
    return PairStream(videos, config, frames, 16, seed=3, pairing=pairing)


def read(pairs: PairStream, start: int, batches: int, **options) -> list:
    with open_loader(pairs, torch.device("cpu"), start=start, batches=batches, batch_size=4, **options) as loader:
        return list(loader)


@pytest.mark.parametrize("pairing", [SIAM_MAE, CROP_MAE, Pairing("independent", gap=(0, 3), step=2)])
def test_clips_show_what_the_pairs_say(videos, pairing):
    pairs = stream(videos, pairing, frames=2)
    (batch,) = read(pairs, 0, 1)
    assert batch.clip.shape == (4, 2, 2, 16, 16, 3)
    drawn = [pair for video in batch.videos for pair in video.drawn]
    assert len(drawn) == 4
    for clip, pair, video in zip(batch.clip, drawn, np.repeat(batch.rows, 2), strict=True):
        for view in range(2):
            expected = np.empty((2, 16, 16, 3), np.uint8)
            crop = Crop(pair.views[view], expected)
            for place, frame in enumerate(read_frames(videos[int(video)], lambda _, p=pair, v=view: p.frames[v])):
                crop.add([place], frame)
            crop.finish()
            assert np.array_equal(clip[view].numpy(), expected)
    assert drawn[0].frames == drawn[1].frames
    assert drawn[0].views != drawn[1].views


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_at_any_pair_and_on_any_rank(videos, workers):
    whole = read(stream(videos, SIAM_MAE), 0, 6)
    later = read(stream(videos, SIAM_MAE, workers=workers), 8, 4)
    for one, two in zip(whole[2:], later, strict=True):
        assert torch.equal(one.clip, two.clip)
        assert [video.drawn for video in one.videos] == [video.drawn for video in two.videos]
    of_rank = read(stream(videos, SIAM_MAE), 0, 3, rank=1, world_size=2)
    assert all(torch.equal(one.clip, two.clip) for one, two in zip(whole[1::2], of_rank, strict=True))


@pytest.mark.parametrize(("total", "gaps"), [(200, set(range(4, 49))), (20, set(range(4, 20))), (3, {2, 1, 0})])
def test_frames_of_siamese_pairs(total, gaps):
    rng = np.random.default_rng(0)
    pairs = [draw_frame_pair(total, 1, SIAM_MAE, rng) for _ in range(3000)]
    found = {second[0] - first[0] for first, second in pairs}
    assert found <= gaps
    if total > 3:
        assert found == gaps
        counts = Counter(second[0] - first[0] for first, second in pairs)
        assert max(counts.values()) < 2 * min(counts.values())  # gaps that fit are equally likely
    assert min(first[0] for first, _ in pairs) == 0
    assert max(second[0] for _, second in pairs) == total - 1


def test_views_of_pairs():
    rng = np.random.default_rng(0)
    for _ in range(300):
        first, second = draw_view_pair(300, 200, CROP_MAE, rng)
        assert first.x <= second.x
        assert second.x + second.width <= first.x + first.width
        assert first.y <= second.y
        assert second.y + second.height <= first.y + first.height
        share = second.width * second.height / (first.width * first.height)
        assert 0.25 < share < 0.7
        assert len(set(draw_view_pair(300, 200, SIAM_MAE, rng))) == 1


@pytest.mark.parametrize(
    "settings",
    [{"views": "other"}, {"gap": (5, 4)}, {"step": 0}, {"area": (0.0, 1.0)}, {"inner_area": (0.6, 0.3)}, {"flip": 2.0}],
    ids=str,
)
def test_impossible_pairings_are_refused(settings):
    with pytest.raises(ConfigError, match=rf"pairing\.{next(iter(settings))}"):
        Pairing(**settings)

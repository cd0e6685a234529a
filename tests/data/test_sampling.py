from __future__ import annotations

import numpy as np
import pytest

from umt_fast.data.sampling import epoch_order, sample_rng, segment_frames


def _draws(num_frames: int, segments: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([segment_frames(num_frames, segments, rng) for _ in range(count)])


@pytest.mark.parametrize("segments", [1, 4, 8, 16])
@pytest.mark.parametrize("num_frames", [16, 17, 23, 31, 32, 33, 100, 250, 301, 9000])
def test_one_frame_in_each_segment(num_frames, segments):
    length = num_frames // segments
    draws = _draws(num_frames, segments, 100)
    assert draws.shape == (100, segments)
    starts = np.arange(segments) * length
    assert (draws >= starts).all()
    assert (draws < starts + length).all()
    assert draws.max() < num_frames


@pytest.mark.parametrize(("num_frames", "segments"), [(40, 8), (47, 8), (300, 4), (12, 1)])
def test_every_offset_of_every_segment_comes(num_frames, segments):
    length = num_frames // segments
    offsets = _draws(num_frames, segments, 3000 if length < 20 else 6000) - np.arange(segments) * length
    for column in offsets.T:
        counts = np.bincount(column, minlength=length)
        expected = len(column) / length
        assert len(counts) == length
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_segments_are_drawn_independently():
    offsets = _draws(800, 8, 2000) % 100
    correlation = np.corrcoef(offsets.T)[~np.eye(8, dtype=bool)]
    assert np.abs(correlation).max() < 0.1


@pytest.mark.parametrize("num_frames", [1, 2, 7])
def test_short_video_gives_its_first_frame(num_frames):
    assert segment_frames(num_frames, 8, np.random.default_rng(0)) == [0] * 8


@pytest.mark.parametrize("num_frames", [8, 9, 15])
def test_segments_of_one_frame(num_frames):
    assert segment_frames(num_frames, 8, np.random.default_rng(0)) == list(range(8))


def test_indices_are_plain_integers():
    assert {type(index) for index in segment_frames(100, 8, np.random.default_rng(0))} == {int}


def _numbers(*key: int) -> tuple[int, ...]:
    return tuple(sample_rng(*key).integers(2**62, size=4).tolist())


def test_sample_rng_is_a_function_of_its_key():
    assert _numbers(3, 1, 4, 1) == _numbers(3, 1, 4, 1)
    assert _numbers(3, 1, 4) == _numbers(3, 1, 4, 0)


def test_sample_rng_differs_for_every_part_of_the_key():
    keys = [(seed, epoch, index, attempt) for seed in range(3) for epoch in range(3) for index in range(5)
            for attempt in range(3)]  # fmt: skip
    assert len({_numbers(*key) for key in keys}) == len(keys)


def test_sample_rng_is_not_the_order():
    assert (sample_rng(0, 0, 0, 0).permutation(50) != epoch_order(0, 0, 50)).any()


@pytest.mark.parametrize("count", [1, 2, 37, 1000])
def test_epoch_order_is_a_permutation(count):
    assert sorted(epoch_order(0, 3, count).tolist()) == list(range(count))


def test_epoch_order_is_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): tuple(epoch_order(seed, epoch, 100)) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    assert all(tuple(epoch_order(seed, epoch, 100)) == order for (seed, epoch), order in orders.items())


def test_epoch_order_mixes():
    """Every video comes at every place, over many epochs."""
    orders = np.array([epoch_order(0, epoch, 5) for epoch in range(2000)])
    for place in orders.T:
        assert np.abs(np.bincount(place, minlength=5) - 400).max() < 100

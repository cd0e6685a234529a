from __future__ import annotations

import numpy as np
import pytest

from umt_fast.data.sampling import (
    Draws,
    epoch_order,
    published_dense_validation,
    sample_rng,
    segment_frames,
    test_frames,
    train_frames,
    validation_frames,
)


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
    """Over many epochs every video occurs at every place."""
    orders = np.array([epoch_order(0, epoch, 5) for epoch in range(2000)])
    for place in orders.T:
        assert np.abs(np.bincount(place, minlength=5) - 400).max() < 100


RULES = {"sparse": "sparse", "dense": "dense", "ssv2": "segment"}


@pytest.mark.parametrize("recorded_as", RULES)
def test_published_test_and_validation_frames(recorded_sampling, recorded_as):
    rule = RULES[recorded_as]
    for row in recorded_sampling[recorded_as]:
        total, frames, views, rate = (
            row["total"],
            row["num_frames"],
            row["test_num_segment"],
            row.get("sampling_rate", 1),
        )
        assert [test_frames(total, frames, rule, views, view, rate) for view in range(views)] == row["test"], row
        if rule == "dense":
            assert published_dense_validation(total, frames, rate) == row["validation"], row
        else:
            assert validation_frames(total, frames, rule) == row["validation"], row


def test_published_test_frames_of_raw_frames(recorded_sampling):
    for row in recorded_sampling["raw"]:
        views = row["test_num_segment"]
        frames = [test_frames(row["total"], row["num_frames"], "segment", views, view) for view in range(views)]
        assert [[index + 1 for index in view] for view in frames] == row["test_file_numbers"], row


def test_published_training_frames(recorded_sampling):
    for row in recorded_sampling["train_seeded"]["rows"]:
        rule, draws = RULES[row["kind"]], Draws.seeded(row["seed"])
        got = train_frames(row["total"], row["num_frames"], rule, draws, row.get("sampling_rate", 1))
        assert got == row["frames"], row


@pytest.mark.parametrize("rule", ["sparse", "dense", "segment"])
@pytest.mark.parametrize("rate", [1, 2.5, 4])
def test_frames_of_every_rule_are_in_the_video(rule, rate):
    for total in (1, 2, 7, 8, 9, 31, 33, 64, 300):
        for frames in (1, 4, 8):
            clips = [
                test_frames(total, frames, rule, views, view, rate) for views in (1, 2, 3, 5) for view in range(views)
            ]
            clips += [train_frames(total, frames, rule, Draws.seeded(seed), rate) for seed in range(5)]
            clips.append(validation_frames(total, frames, rule, rate))
            for clip in clips:
                assert len(clip) == frames
                assert clip == sorted(clip)
                assert 0 <= clip[0] <= clip[-1] < total


def test_one_dense_view_is_the_middle_clip():
    assert test_frames(100, 4, "dense", 1, 0, 5) == [40, 45, 50, 55]


@pytest.mark.parametrize(
    "arguments", [(0, 8, "sparse", 1, 0), (9, 0, "dense", 1, 0), (9, 8, "sparse", 4, 4), (9, 8, "uniform", 1, 0)]
)
def test_refuses_what_cannot_be_sampled(arguments):
    with pytest.raises(ValueError, match=r"give|is not in 0\.\.3"):
        test_frames(*arguments)

"""Features of the stream for jobs other than stage 1: labels, captions, other frames and clips, every video once."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from umt_fast.config import DataConfig
from umt_fast.data import open_loader
from umt_fast.data.batch import Batch
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import open_video, read_frames
from umt_fast.data.index import VideoList
from umt_fast.data.loader import ClipLoader
from umt_fast.data.sampling import Timeline
from umt_fast.data.video import Video

COUNT = 5


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_video) -> VideoList:
    folder = tmp_path_factory.mktemp("videos")
    said = [{"label": 3}, {"label": 0, "caption": "a bar"}, {"caption": "blocks"}, {}, {"label": 2**40}]
    rows = []
    for number, row in enumerate(said):
        path = write_video(folder / f"{number}.mp4", frames=10 + number, size=(48, 32), seed=number)
        rows.append({"path": str(path), **row})
    return VideoList.of_rows(rows)


class LastFrame:
    """Two float32 clips of one frame: the frame and its negative, each plus a random number."""

    clips, shape, dtype = 2, (32, 48, 3), np.dtype(np.float32)

    def __call__(self, frames, out, rng):
        out[0] = frames[-1]
        out[1] = 255 - frames[-1].astype(np.float32) + rng.random()


def _last(timeline: Timeline, rng: np.random.Generator) -> list[int]:
    return [0, timeline.num_frames - 1]


def _all(stream: ClipStream, workers: int, **options) -> list[Batch]:
    with ClipLoader(stream, start=0, batches=100, **options) as loader:
        return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_captions_and_rows_are_those_of_each_clips_video(videos, workers):
    stream = ClipStream(videos, DataConfig(workers=workers, crops_per_clip=2), 4, 32, seed=0)
    seen = {}
    with ClipLoader(stream, start=0, batches=5, batch_size=6) as loader:
        for batch in loader:
            assert len(batch.clip) == len(batch.labels) == len(batch.captions) == 2 * len(batch.rows) == 6
            for place, row in enumerate(batch.rows):
                seen[row] = (int(batch.labels[2 * place]), batch.captions[2 * place])
                assert seen[row] == (int(batch.labels[2 * place + 1]), batch.captions[2 * place + 1])
                assert batch.paths[place] == videos[row].path
    assert seen == {0: (3, ""), 1: (0, "a bar"), 2: (-1, "blocks"), 3: (-1, ""), 4: (2**40, "")}


def test_a_replacement_brings_its_own_label(videos, tmp_path):
    rows = [{"path": str(tmp_path / "missing.mp4"), "label": 9}, {"path": videos[0].path, "label": 3}]
    batch = _all(ClipStream(VideoList.of_rows(rows), DataConfig(workers=0), 4, 32, seed=0), 0, batch_size=2)[0]
    assert batch.bad
    assert batch.labels.tolist() == [3, 3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_evaluation_sees_every_video_once_in_the_lists_order(videos, workers, world_size):
    config = DataConfig(workers=workers)
    stream = ClipStream(videos, config, 2, 32, 0, sampling=_last, transform=LastFrame(), shuffle=False, replace=False)
    rows: list[list[int]] = []
    for rank in range(world_size):
        found = _all(stream, workers, batch_size=4, rank=rank, world_size=world_size, end=COUNT)
        rows.append(list(chain.from_iterable(batch.rows for batch in found)))
        for batch in found:
            assert batch.clip.dtype == torch.float32
            for clip, negative, row in zip(batch.clip[::2], batch.clip[1::2], batch.rows, strict=True):
                (frame,) = read_frames(videos[row], lambda count: [count - 1])
                assert np.array_equal(clip.numpy(), frame)
                assert 0 < float(negative.max() + clip.min()) - 255 < 1
    assert sorted(chain.from_iterable(rows)) == list(range(COUNT))
    assert all(own == sorted(own) for own in rows)


def test_an_unreadable_video_of_an_evaluation_is_left_out(videos, tmp_path):
    rows = [{"path": videos[0].path}, {"path": str(tmp_path / "missing.mp4")}, {"path": videos[1].path}]
    listed = VideoList.of_rows(rows)
    stream = ClipStream(listed, DataConfig(workers=1), 2, 32, 0, shuffle=False, replace=False)
    one, two = _all(stream, 1, batch_size=2, end=3)
    assert (one.rows, two.rows) == ([0], [2])
    assert [name for name, _ in one.bad] == [str(tmp_path / "missing.mp4")]
    only_bad = ClipStream(VideoList.of_rows(rows[1:2]), stream.config, 2, 32, 0, shuffle=False, replace=False)
    (batch,) = _all(only_bad, 1, batch_size=2, end=1)
    assert len(batch.clip) == len(batch.labels) == 0


def test_a_transform_is_left_to_pyav(videos):
    stream = ClipStream(videos, DataConfig(decoder="dali", workers=0), 2, 32, 0, transform=LastFrame())
    with open_loader(stream, torch.device("cpu"), start=0, batches=1, batch_size=2) as loader:
        assert isinstance(loader, ClipLoader)


def test_the_timeline_is_in_seconds(write_video, tmp_path):
    times = [0, 1, 2, 4, 9]
    path = write_video(tmp_path / "uneven.mkv", frames=5, fps=10, times=times, gop=2)
    with open_video(Video(str(path))) as reader:
        assert reader.timeline.num_frames == 5
        assert reader.timeline.seconds == pytest.approx(np.array(times) / 10, abs=0.002)
        assert reader.timeline.fps == pytest.approx(4 / 0.9, rel=0.01)

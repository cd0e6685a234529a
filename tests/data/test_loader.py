from __future__ import annotations

import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import random
from collections import Counter
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from umt_fast.config import DataConfig
from umt_fast.data import loader as loading
from umt_fast.data import open_loader
from umt_fast.data.batch import Batch
from umt_fast.data.clips import ClipStream
from umt_fast.data.index import VideoList
from umt_fast.data.loader import ClipDataset, ClipLoader, NothingReadable
from umt_fast.data.manifest import read_manifest
from umt_fast.data.shared_memory import BufferPool, NoSharedMemory
from umt_fast.errors import RunError

FRAMES, SIDE = 4, 32
COUNT = 6

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_video) -> list[str]:
    """Six videos of several codecs and sizes."""
    folder = tmp_path_factory.mktemp("videos")
    codecs = [("libx264", ".mp4"), ("libvpx-vp9", ".webm"), ("mpeg4", ".avi")]
    sizes = [(48, 36), (36, 48)]
    paths = []
    for number in range(COUNT):
        codec, suffix = codecs[number % 3]
        path = folder / f"{number}{suffix}"
        write_video(path, codec, frames=16 + number, size=sizes[number % 2], seed=number)
        paths.append(str(path))
    return paths


@pytest.fixture
def broken(tmp_path) -> str:
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video" * 100)
    return str(path)


def _stream(videos: list[str], workers: int = 0, seed: int = 0, frames: int = FRAMES, **config) -> ClipStream:
    return ClipStream(VideoList.of_paths(videos), DataConfig(workers=workers, **config), frames, SIDE, seed)


def _batches(stream: ClipStream, *, batches: int, batch_size: int, start: int = 0, **ranks: int) -> list[Batch]:
    with ClipLoader(stream, start=start, batches=batches, batch_size=batch_size, **ranks) as loader:
        return list(loader)


def _joined(batches: list[Batch]) -> tuple[torch.Tensor, list[str]]:
    return torch.cat([batch.clip for batch in batches]), list(chain.from_iterable(batch.paths for batch in batches))


def _assert_same(one: list[Batch], other: list[Batch]) -> None:
    clips, paths = _joined(one)
    other_clips, other_paths = _joined(other)
    assert paths == other_paths
    assert torch.equal(clips, other_clips)
    assert [bad for batch in one for bad in batch.bad] == [bad for batch in other for bad in batch.bad]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_shape_and_type(videos, batch_size):
    batches = _batches(_stream(videos), batches=2, batch_size=batch_size)
    assert len(batches) == 2
    for batch in batches:
        assert batch.clip.shape == (batch_size, FRAMES, SIDE, SIDE, 3)
        assert batch.clip.dtype == torch.uint8
        assert batch.clip.is_contiguous()
        assert len(batch.paths) == batch_size
        assert batch.bad == []


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(videos, broken, workers):
    listed = [*videos, broken]
    alone = _batches(_stream(listed), batches=5, batch_size=3)
    assert any(batch.bad for batch in alone)
    others = _batches(_stream(listed, workers), batches=5, batch_size=3)
    _assert_same(others, alone)
    for batch in (*alone, *others):
        assert [listed[row] for row in batch.rows] == batch.paths
    assert [visit for batch in others for visit in batch.visits] == list(range(15))


def test_prefetch_changes_nothing(videos):
    alone = _batches(_stream(videos), batches=4, batch_size=2)
    _assert_same(_batches(_stream(videos, workers=1, prefetch=1), batches=4, batch_size=2), alone)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 3), (3, 2), (4, 1)])
def test_ranks_share_out_one_stream(videos, world_size, batch_size):
    together = _batches(_stream(videos), batches=3, batch_size=world_size * batch_size, start=4)
    ranks = [
        _batches(_stream(videos), batches=3, batch_size=batch_size, start=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for number, batch in enumerate(together):
        _assert_same([batches[number] for batches in ranks], [batch])


@pytest.mark.parametrize("start", [1, COUNT - 1, COUNT, 2 * COUNT + 3])
def test_a_later_start_skips_clips(videos, start):
    clips, paths = _joined(_batches(_stream(videos), batches=start + 4, batch_size=1))
    later, later_paths = _joined(_batches(_stream(videos), batches=2, batch_size=2, start=start))
    assert later_paths == paths[start:]
    assert torch.equal(later, clips[start:])


def test_an_epoch_visits_each_video_once(videos):
    _, paths = _joined(_batches(_stream(videos), batches=2 * COUNT, batch_size=2))  # four epochs
    epochs = [paths[first : first + COUNT] for first in range(0, 4 * COUNT, COUNT)]
    assert all(sorted(epoch) == sorted(videos) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_video_listed_twice_is_visited_twice(videos):
    _, paths = _joined(_batches(_stream([*videos[:2], videos[0]]), batches=3, batch_size=1))
    assert Counter(paths) == {videos[0]: 2, videos[1]: 1}


def test_clips_of_a_video_differ_by_epoch(videos):
    clips, _ = _joined(_batches(_stream(videos[:1]), batches=6, batch_size=1))
    assert len({clip.numpy().tobytes() for clip in clips}) > 3


def test_seeds_differ(videos):
    clips, paths = _joined(_batches(_stream(videos), batches=COUNT, batch_size=1))
    other, other_paths = _joined(_batches(_stream(videos, seed=1), batches=COUNT, batch_size=1))
    assert paths != other_paths
    assert not torch.equal(clips, other)


def test_two_runs_are_alike(videos):
    _assert_same(*(_batches(_stream(videos), batches=3, batch_size=2) for _ in range(2)))


def test_reading_out_of_order_changes_nothing(videos):
    dataset, other = ClipDataset(_stream(videos)), ClipDataset(_stream(videos))
    forwards = {number: dataset[[number]] for number in range(2 * COUNT)}
    for number in (11, 0, 7, 3, 6, 5):
        _assert_same([other[[number]]], [forwards[number]])


@pytest.fixture(scope="module")
def square(tmp_path_factory, write_video, decode_all) -> tuple[str, torch.Tensor]:
    """A video of the clips' size, and its frames: without flips a clip is a subset of these frames."""
    path = write_video(tmp_path_factory.mktemp("square") / "square.mp4", frames=22, size=(SIDE, SIDE))
    return str(path), torch.from_numpy(np.stack(decode_all(path)))


def test_a_clip_has_one_frame_of_each_segment(square):
    path, frames = square
    dataset = ClipDataset(_stream([path], crop_scales=(1.0,), flip=0.0))
    chosen = set()
    for number in range(30):
        (clip,) = dataset[[number]].clip
        places = [(frames == frame).flatten(1).all(1).nonzero().flatten().tolist() for frame in clip]
        assert all(len(place) == 1 for place in places)
        segments = [place[0] // (22 // FRAMES) for place in places]
        assert segments == list(range(FRAMES))
        chosen.update(place[0] for place in places)
    assert chosen == set(range(20))


def test_frames_of_a_clip_are_mirrored_alike(square):
    path, frames = square
    mirrored = Counter()
    for number in range(40):
        (clip,) = ClipDataset(_stream([path], crop_scales=(1.0,), flip=0.5))[[number]].clip
        straight = [bool((frames == frame).flatten(1).all(1).any()) for frame in clip]
        flipped = [bool((frames == frame.flip(1)).flatten(1).all(1).any()) for frame in clip]
        assert straight in ([True] * FRAMES, [False] * FRAMES)
        assert flipped == [not one for one in straight]
        mirrored[flipped[0]] += 1
    assert min(mirrored[True], mirrored[False]) > 8


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_short_video_gives_copies_of_its_first_frame(tmp_path, write_video, decode_all, count):
    path = write_video(tmp_path / "short.mp4", frames=count, size=(SIDE, SIDE))
    (batch,) = _batches(_stream([str(path)], frames=8, crop_scales=(1.0,), flip=0.0), batches=1, batch_size=1)
    first = torch.from_numpy(decode_all(path)[0])
    assert batch.bad == []
    assert torch.equal(batch.clip[0], first.expand(8, -1, -1, -1))


def test_a_turned_video(tmp_path, write_video):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV writes no rotation")
    path = write_video(tmp_path / "turned.mp4", frames=8, size=(64, 48), rotation=90)
    (batch,) = _batches(_stream([str(path)]), batches=1, batch_size=4)
    assert batch.clip.shape == (4, FRAMES, SIDE, SIDE, 3)
    assert batch.bad == []


# Several clips of one video.


@pytest.mark.parametrize("workers", [0, 2])
def test_the_crops_of_a_video_stand_together(square, workers):
    path, frames = square
    stream = _stream([path, path], workers, crops_per_clip=3, crop_scales=(1.0,), flip=0.5)
    flips = Counter()
    for batch in _batches(stream, batches=10, batch_size=6):
        assert batch.clip.shape == (6, FRAMES, SIDE, SIDE, 3)
        assert batch.paths == [path, path]
        for visit in batch.clip.unflatten(0, (2, 3)):
            kept = [bool((frames == clip[0]).flatten(1).all(1).any()) for clip in visit]
            upright = [clip if straight else clip.flip(2) for clip, straight in zip(visit, kept, strict=True)]
            assert torch.equal(upright[0], upright[1])
            assert torch.equal(upright[0], upright[2])
            flips[sum(kept)] += 1
        assert not torch.equal(batch.clip[0], batch.clip[3])  # another visit, other frames
    assert len(flips) > 2  # each crop draws its own


def test_the_first_crop_is_the_only_crop(videos):
    alone, _ = _joined(_batches(_stream(videos), batches=COUNT, batch_size=1))
    several, _ = _joined(_batches(_stream(videos, crops_per_clip=2), batches=COUNT, batch_size=2))
    assert torch.equal(several[::2], alone)


def test_a_later_start_with_several_crops(videos):
    clips, _ = _joined(_batches(_stream(videos, crops_per_clip=2), batches=6, batch_size=2))
    later, _ = _joined(_batches(_stream(videos, crops_per_clip=2), batches=2, batch_size=4, start=4))
    assert torch.equal(later, clips[4:])


# Files that cannot be read.


def test_a_broken_file_is_replaced_and_reported(videos, broken):
    listed = [*videos, broken]
    batches = _batches(_stream(listed), batches=2 * len(listed), batch_size=1)
    _assert_same(_batches(_stream(listed), batches=2 * len(listed), batch_size=1), batches)
    replaced = [batch for batch in batches if batch.bad]
    assert all(batch.clip.shape == (1, FRAMES, SIDE, SIDE, 3) for batch in batches)
    assert broken not in [path for batch in batches for path in batch.paths]
    assert len(replaced) == 2  # it comes once an epoch
    for batch in replaced:
        assert {path for path, _ in batch.bad} == {broken}
        assert all("Invalid data" in reason for _, reason in batch.bad)
        assert set(batch.paths) <= set(videos)


@pytest.mark.parametrize(
    "row", [b'{"path": "a.mp4", "fra', b"[1, 2]", b'{"path": "a.mp4", "frames": 2, "times": [0, [1, 1]]}']
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_row_of_an_index_is_a_bad_video(videos, row, workers):
    rows = [json.dumps({"path": path}).encode() for path in videos]
    stream = ClipStream(
        VideoList.of_bytes([*rows[:3], row, *rows[3:]]), DataConfig(workers=workers), FRAMES, SIDE, seed=0
    )
    batches = _batches(stream, batches=COUNT + 1, batch_size=1)
    ((name, reason),) = {bad for batch in batches for bad in batch.bad}
    assert name == "row 4 of the list"
    assert "row 4 is not a row of an index" in reason
    assert {path for batch in batches for path in batch.paths} == set(videos)


def test_replacements_differ_by_epoch(videos, broken):
    listed = [*videos, broken]
    batches = _batches(_stream(listed), batches=8 * len(listed), batch_size=1)
    assert len({batch.paths[0] for batch in batches if batch.bad}) > 1


def test_other_clips_stay_when_a_file_breaks(videos, tmp_path):
    """A replacement of one video does not change the other clips."""
    last = tmp_path / "last.mp4"
    last.write_bytes(Path(videos[0]).read_bytes())
    listed = [*videos, str(last)]
    whole = _batches(_stream(listed), batches=len(listed), batch_size=1)
    last.write_bytes(b"")
    for before, after in zip(whole, _batches(_stream(listed), batches=len(listed), batch_size=1), strict=True):
        if before.paths != [str(last)]:
            _assert_same([before], [after])
        else:
            assert after.bad[0] == (str(last), "empty file")


def test_an_unexpected_error_of_a_decoder_is_reported_too(videos, monkeypatch):
    open_video = loading.open_video

    def fail(video, *options):
        if video.path == videos[0]:
            raise AttributeError("no such thing")
        return open_video(video, *options)

    monkeypatch.setattr(loading, "open_video", fail)
    batches = _batches(_stream(videos), batches=COUNT, batch_size=1)
    bad = {bad for batch in batches for bad in batch.bad}
    assert bad == {(videos[0], "AttributeError: no such thing")}


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable(tmp_path, broken, workers):
    listed = [broken, str(tmp_path / "missing.mp4")]
    with (
        ClipLoader(_stream(listed, workers), start=0, batches=2, batch_size=2) as loader,
        pytest.raises(NothingReadable) as caught,
    ):
        next(loader)
    assert isinstance(caught.value, RunError)
    assert any(path in str(caught.value) for path in listed)
    assert "Invalid data" in str(caught.value) or "No such file" in str(caught.value)


# Processes and random states.


def _no_children_left() -> bool:
    gc.collect()
    return not multiprocessing.active_children()


@pytest.mark.parametrize("taken", [0, 1, 6])
def test_closing_leaves_no_process(videos, taken):
    assert _no_children_left()
    loader = ClipLoader(_stream(videos, workers=2), start=0, batches=6, batch_size=2)
    assert len(multiprocessing.active_children()) == 2
    for _ in range(taken):
        next(loader)
    loader.close()
    assert _no_children_left()
    loader.close()  # once more does no harm
    with pytest.raises(StopIteration):
        next(loader)


def test_leaving_the_block_by_an_error_leaves_no_process(videos):
    def train() -> None:
        with ClipLoader(_stream(videos, workers=2), start=0, batches=50, batch_size=2) as loader:
            next(loader)
            raise RuntimeError("step")

    with pytest.raises(RuntimeError, match="step"):
        train()
    assert _no_children_left()


def test_an_error_in_a_worker_leaves_no_process_while_its_traceback_lives(videos, monkeypatch):
    """The traceback holds the iterator, and workers ignore the SIGTERM of Python's exit."""

    def fail(self, visits):
        raise RuntimeError("worker")

    monkeypatch.setattr(ClipDataset, "__getitem__", fail)
    loader = ClipLoader(_stream(videos, workers=1), start=0, batches=50, batch_size=2)
    with loader, pytest.raises(RuntimeError, match="worker") as kept:
        next(loader)
    assert kept.tb is not None
    assert not multiprocessing.active_children()


def test_a_forgotten_loader_leaves_no_process(videos):
    loader = ClipLoader(_stream(videos, workers=1), start=0, batches=50, batch_size=2)
    next(loader)
    del loader
    assert _no_children_left()


@pytest.mark.parametrize("workers", [0, 1])
def test_random_states_are_left_alone(videos, broken, workers):
    """Masks of a run come from torch's generator, so a new loader in a resumed run must not change its state."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    _batches(_stream([*videos, broken], workers), batches=4, batch_size=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


@pytest.mark.parametrize("workers", [0, 1])
def test_random_states_do_not_matter(videos, workers):
    one = _batches(_stream(videos, workers), batches=3, batch_size=2)
    torch.manual_seed(99)
    random.seed(99)
    _assert_same(_batches(_stream(videos, workers), batches=3, batch_size=2), one)


def test_the_end(videos):
    with ClipLoader(_stream(videos), start=0, batches=0, batch_size=2) as loader:
        assert list(loader) == []


def test_the_settings_are_the_runs(videos):
    config = dataclasses.replace(DataConfig(), workers=0, crop_scales=(0.5,), flip=1.0)
    stream = ClipStream(VideoList.of_paths(videos), config, 2, 16, 0)
    assert ClipDataset(stream)[[0]].clip.shape == (1, 2, 16, 16, 3)


def test_garbage_collection_keeps_shared_memory(videos):
    gc.unfreeze()
    with ClipLoader(_stream(videos, workers=1), start=0, batches=2, batch_size=2) as loader:
        next(loader)
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0


# Memory of batches.


def test_memory_of_batches_is_used_again(videos):
    """Otherwise torch shares fresh memory."""
    with ClipLoader(_stream(videos, workers=2), start=0, batches=40, batch_size=2) as loader:
        assert not any(batch.clip.is_shared() for batch in loader)
    assert any(batch.clip.is_shared() for batch in _batches(_stream(videos, workers=2), batches=40, batch_size=2))


@pytest.mark.parametrize(
    "keep", [torch.Tensor.detach, torch.Tensor.numpy, lambda clip: clip[1:, :, 3], lambda clip: clip]
)
def test_memory_in_use_is_left_alone(videos, keep):
    """Also if only a view of a batch is kept, and if more batches are kept than there are buffers."""
    alone = [keep(batch.clip) for batch in _batches(_stream(videos), batches=30, batch_size=2)]
    kept = []
    with ClipLoader(_stream(videos, workers=2), start=0, batches=30, batch_size=2) as loader:
        for batch in loader:
            kept.append(keep(batch.clip))
            del batch
    assert all(np.array_equal(one, other) for one, other in zip(alone, kept, strict=True))


def test_a_pinned_batch_gives_its_memory_back(videos, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # as it does where there is a GPU
    alone = _batches(_stream(videos), batches=30, batch_size=2)
    with ClipLoader(_stream(videos, workers=1), start=0, batches=30, batch_size=2) as loader:
        pinned = []
        for batch in loader:
            assert not batch.clip.is_shared()
            pinned.append(batch.pin_memory())
    _assert_same(pinned, alone)


def test_a_copy_in_a_forked_process_gives_nothing_back():
    """A copy that is dropped there: this process may still use the memory."""
    buffers = BufferPool(1, 1, 10)
    _, lease = buffers.lease((10,), np.dtype(np.uint8))
    clip = lease.open((10,), np.dtype(np.uint8))
    child = os.fork()
    if not child:
        del clip
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert buffers.lease((10,), np.dtype(np.uint8)) is None
    del clip
    assert buffers.lease((10,), np.dtype(np.uint8)) is not None


def test_the_loader_works_without_enough_shared_memory():
    """The loader continues with fresh memory."""
    assert BufferPool.for_workers(1 << 10, 1 << 10, 1 << 36) is None
    assert BufferPool.for_workers(0, 4, 10) is None


def test_error_names_a_small_dev_shm(videos, monkeypatch):
    def full(size):
        raise RuntimeError("No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(NoSharedMemory) as caught:
        _batches(_stream(videos, workers=1), batches=40, batch_size=1)  # more than there are buffers
    said = f"a decoding process found no {FRAMES * SIDE * SIDE * 3} bytes in /dev/shm (No space left on device (28)); "
    assert str(caught.value).startswith(said + "enlarge that")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_change_nothing(videos, monkeypatch, method):
    """They do not inherit memory."""
    alone = _batches(_stream(videos), batches=4, batch_size=2)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(
        "umt_fast.data.workers.DataLoader", functools.partial(DataLoader, multiprocessing_context=context)
    )
    _assert_same(_batches(_stream(videos, workers=1), batches=4, batch_size=2), alone)


def test_a_library_opens_a_loader_at_the_first_clip_without_a_word(demo_videos, capsys, recwarn):
    """With more workers than cores, of which torch would warn at each start."""
    stream = ClipStream(read_manifest(str(demo_videos)), DataConfig(workers=8), FRAMES, SIDE, seed=0)
    with open_loader(stream, torch.device("cpu"), batches=1, batch_size=2, start=0) as loader:
        first = next(loader)
    with open_loader(stream, torch.device("cpu"), batches=1, batch_size=2) as loader:
        assert torch.equal(next(loader).clip, first.clip)
    assert not [warning for warning in recwarn if "DataLoader" in str(warning.message)]
    assert capsys.readouterr().out == ""

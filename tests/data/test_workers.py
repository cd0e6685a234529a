"""Workers that are killed, stall or lose their parent."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from umt_fast.config import DataConfig
from umt_fast.data import loader
from umt_fast.data.clips import ClipStream
from umt_fast.data.loader import ClipLoader
from umt_fast.data.manifest import read_manifest
from umt_fast.data.prepare import Settings, prepare
from umt_fast.data.shared_memory import NoSharedMemory
from umt_fast.data.watch import WorkerWatch
from umt_fast.data.workers import WorkerBatches, WorkerDied

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("dead_workers_noticed_soon")


def open_loader(videos: Path, batches: int = 6, workers: int = 2, **settings) -> ClipLoader:
    config = DataConfig(workers=workers, prefetch=1, **settings)
    stream = ClipStream(read_manifest(str(videos)), config, 2, 32, seed=0)
    return ClipLoader(stream, start=0, batches=batches, batch_size=2, say=said.append)


said: list[str] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    said.clear()


def test_a_killed_worker_is_replaced_and_the_clips_stay_the_same(demo_videos):
    with open_loader(demo_videos) as undisturbed:
        expected = [(batch.clip.clone(), batch.paths) for batch in undisturbed]
    got = []
    with open_loader(demo_videos) as batches:
        got.append(next(batches))
        workers = [worker.pid for worker in batches._batches._items._workers]
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        got += list(batches)
    assert len(got) == len(expected)
    for batch, (clip, paths) in zip(got, expected, strict=True):
        assert torch.equal(batch.clip, clip)
        assert batch.paths == paths
    assert any("begin again at the same clips" in line for line in said)


class LargeBatches(Dataset[tuple[list[int], str]]):
    """Batches larger than a pipe's buffer, as with many long names and captions."""

    def __getitem__(self, visits: list[int]) -> tuple[list[int], str]:
        return visits, "x" * 200_000


@pytest.mark.timeout(60)
def test_workers_that_are_killed_in_the_middle_of_a_message_are_replaced(demo_videos):
    stream = ClipStream(read_manifest(str(demo_videos)), DataConfig(workers=2), 2, 32, seed=0)
    batches = WorkerBatches(LargeBatches(), stream, start=0, batches=6, batch_size=1, say=said.append)
    reader, waiting, before = batches._items._worker_result_queue._reader, 0, -1
    while waiting == 0 or waiting > before:  # until the pipe is full, and the writers wait
        time.sleep(0.2)
        before = waiting
        waiting = int.from_bytes(fcntl.ioctl(reader.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)
    for worker in batches._items._workers:
        worker.kill()
    assert [visits for visits, _ in batches] == [[visit] for visit in range(6)]
    assert len(said) == 1
    batches.close()


def test_workers_that_are_killed_again_and_again_end_the_run(demo_videos, monkeypatch):
    monkeypatch.setattr(loader, "make_clips", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with open_loader(demo_videos) as batches, pytest.raises(WorkerDied, match="3 times at the same batch"):
        next(batches)
    assert len(said) == 2


def test_a_stalled_video_is_named_and_left_out(demo_videos, monkeypatch):
    real = loader.make_clips

    def stall(stream, video, *rest, **options):
        if "003_" in video.name:
            time.sleep(600)
        real(stream, video, *rest, **options)

    monkeypatch.setattr(loader, "make_clips", stall)
    with open_loader(demo_videos, batches=4, stall_timeout=1) as batches:
        got = list(batches)
    assert len(got) == 4
    bad = [name for batch in got for name, _ in batch.bad]
    assert len(set(bad)) == 1
    assert "003_" in bad[0]
    assert any(f"{bad[0]} has stalled a decoding process" in line for line in said)


def test_workers_end_with_their_parent(demo_videos):
    code = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; from umt_fast.config import DataConfig\n"
        "from umt_fast.data import loader; from umt_fast.data.clips import ClipStream\n"
        "from umt_fast.data.manifest import read_manifest\n"
        "loader.make_clips = lambda *a, **k: time.sleep(600)\n"  # a worker that hangs
        "stream = ClipStream(read_manifest(sys.argv[1]), DataConfig(workers=2), 2, 32, seed=0)\n"
        "batches = loader.ClipLoader(stream, start=0, batches=6, batch_size=2)\n"
        "print(*(worker.pid for worker in batches._batches._items._workers), flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(demo_videos), str(ROOT), str(ROOT / "kernels")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.05)


def no_lock() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_system_without_room_for_locks_is_one_line(demo_videos, tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, "Lock", no_lock)
    with pytest.raises(NoSharedMemory, match=r"need locks in /dev/shm.* No space left on device; .*--data.workers 0"):
        open_loader(demo_videos)
    with pytest.raises(NoSharedMemory, match="need locks in /dev/shm"):
        prepare(Settings(str(demo_videos), str(tmp_path / "out")))


def test_a_watch_that_never_started_closes():
    WorkerWatch(0, 1.0).close()


def test_workers_that_have_not_joined_are_left_alone(monkeypatch):
    killed = []
    monkeypatch.setattr("umt_fast.data.watch._own", None)
    monkeypatch.setattr("umt_fast.data.watch.os.kill", lambda *arguments: killed.append(arguments))
    watch = WorkerWatch(2, limit=0.05)
    watch.start()
    time.sleep(0.3)
    assert watch.take_killed() == []
    watch.join(1)
    watch.begin(1, 7)
    time.sleep(0.3)
    watch.close()
    assert killed == [(os.getpid(), signal.SIGKILL)]
    assert [activity.row for activity in watch.take_killed()] == [7]

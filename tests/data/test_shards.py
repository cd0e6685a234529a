"""Shards and files, local and from a server with occasional failures."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from umt_fast.config import DataConfig
from umt_fast.data import storage
from umt_fast.data.batch import Batch
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import probe, read_frames
from umt_fast.data.index import VideoList, describe, write_index
from umt_fast.data.loader import ClipLoader, NothingReadable
from umt_fast.data.manifest import ManifestError, read_manifest
from umt_fast.data.video import BadVideo

COUNT = 7
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, write_video) -> Path:
    """A folder of three shards, `s-008.tar` to `s-010.tar`, with COUNT videos, and those videos as files."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [write_video(folder / f"{n}.mp4", frames=16, size=(48, 36), seed=n) for n in range(COUNT)]
    for shard in range(3):
        with tarfile.open(folder / f"s-{shard + 8:03d}.tar", "w") as tar:
            for path in paths[shard::3]:
                tar.add(path, path.name)
                label = tarfile.TarInfo(f"{path.stem}.cls")
                label.size = 2
                tar.addfile(label, io.BytesIO(b"%d\n" % (int(path.stem) % 10)))
    return folder


def _same_frames(one, other) -> bool:
    frames = [read_frames(video, lambda count: list(range(count))) for video in (one, other)]
    return len(frames[0]) == len(frames[1]) and all(map(np.array_equal, *frames))


def test_shards_without_an_index_are_listed(shards):
    videos = read_manifest(f"{shards}/s-{{008..010}}.tar")
    assert [video.member for video in videos] == [f"{n}.mp4" for n in (0, 3, 6, 1, 4, 2, 5)]
    for video in videos:
        number = int(video.member[:-4])
        assert video.path == f"{shards}/s-{number % 3 + 8:03d}.tar"
        assert video.label == number
        (file,) = VideoList.of_paths([f"{shards}/{video.member}"])
        assert _same_frames(video, file)


def test_one_shard(shards):
    assert len(read_manifest(f"{shards}/s-009.tar")) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot read the shard .*: No such file"),
        (lambda path: path.write_bytes(b"no tar" * 1000), "cannot read the shard .*: not a tar file"),
        (lambda path: tarfile.open(path, "w").close(), "no video in the shards"),
    ],
)
def test_a_shard_that_cannot_be_used(tmp_path, make, message):
    make(tmp_path / "s.tar")
    with pytest.raises(ManifestError, match=message):
        read_manifest(str(tmp_path / "s.tar"))


def test_a_shard_cut_off_is_a_bad_video(shards, tmp_path):
    shard = tmp_path / "s.tar"
    shard.write_bytes((shards / "s-009.tar").read_bytes())
    first, second = read_manifest(str(shard))
    shard.write_bytes(shard.read_bytes()[: second.offset + 100])
    assert len(read_frames(first, lambda count: [0])) == 1
    with pytest.raises(BadVideo, match=f"100 bytes, but the index says {second.size}"):
        read_frames(second, lambda count: [0])


# Over HTTP.


class Server(ThreadingHTTPServer):
    """Serves `folder`; `fail` has the failure of the nth request for a path, from 1."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fail: Callable[[str, int], str | None] = lambda path, number: None
        self.requests: Counter[str] = Counter()
        self.sent = 0
        self.stall = 3.0
        """Seconds to wait before an answer, or until `over`."""
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        place = f"{self.path}@{asked[1] if asked else 0}"
        self.server.requests[place] += 1
        failure = self.server.fail(self.path, self.server.requests[place])
        path = self.server.folder / os.fsdecode(urllib.parse.unquote_to_bytes(self.path.lstrip("/")))
        if failure == "stall":
            self.server.over.wait(self.server.stall)
            self.close_connection = True
            return None
        if failure == "500":
            return self.send_error(500)
        if failure == "drop":  # says nothing and hangs up
            self.close_connection = True
            return None
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        total = len(content)
        if asked and failure != "whole":  # as servers do that know no ranges
            end = int(asked[2]) + 1 if asked[2] else total
            content = content[int(asked[1]) : end]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(content) - 1}/{total}")
        else:
            self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            cut = len(content) // 2 if failure == "cut" else len(content)
            self.server.sent += cut
            self.wfile.write(content[:cut])
            self.close_connection = failure == "cut"
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(shards, tmp_path, monkeypatch) -> Iterator[Server]:
    """With an index of the shards, and short waits."""
    pytest.importorskip("aiohttp", reason="pip install 'fsspec[http]'")
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    rows = [
        {"path": v.member, "shard": Path(v.path).name, "offset": v.offset, "bytes": v.size, **describe(probe(v))}
        for v in read_manifest(f"{shards}/s-{{008..010}}.tar")
    ]
    (tmp_path / "index.jsonl").write_bytes(write_index(rows))
    (tmp_path / "list.csv").write_text("0.mp4,3\n1.mp4,4\n")
    for number in range(2):
        (tmp_path / f"{number}.mp4").symlink_to(shards / f"{number}.mp4")
    running = Server(tmp_path)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.over.set()
    running.shutdown()
    thread.join()
    running.server_close()


def _batches(videos: VideoList, workers: int = 0, batches: int = 4) -> list[Batch]:
    stream = ClipStream(videos, DataConfig(workers=workers), 4, 32, seed=0)
    with ClipLoader(stream, start=0, batches=batches, batch_size=3) as loader:
        return list(loader)


def _assert_same_clips(batches: list[Batch], other: list[Batch]) -> None:
    for one, two in zip(batches, other, strict=True):
        assert torch.equal(one.clip, two.clip)
        assert [Path(path).name for path in one.paths] == [Path(path).name for path in two.paths]


@pytest.fixture
def local(server) -> list[Batch]:
    return _batches(read_manifest(str(server.folder)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["", "/index.jsonl"])
def test_a_remote_index_gives_the_clips_of_the_local_one(server, local, source, workers):
    batches = _batches(read_manifest(server.url + source), workers)
    _assert_same_clips(batches, local)
    assert not any(batch.bad for batch in batches)


def test_remote_shards_without_an_index_are_listed_by_their_headers(server, local):
    videos = read_manifest(server.url + "/s-{008..010}.tar")
    _assert_same_clips(_batches(videos), local)
    assert videos[0].path == server.url + "/s-008.tar"


def test_error_names_a_server_without_ranges(server):
    server.fail = lambda path, _number: "whole" if path.endswith(".tar") else None
    with pytest.raises(NothingReadable, match=r"were requested; does the server answer range requests\?"):
        _batches(read_manifest(server.url))


def test_names_with_a_meaning_in_urls(server, local):
    names = ["a b.mp4", "50% %41.mp4", "no#1?.mp4", "a::b\n.mp4", "\udcff ü.mp4"]
    for name in names:
        (server.folder / name).symlink_to(server.folder / "0.mp4")
    (server.folder / "index.jsonl").write_bytes(write_index([{"path": name} for name in names]))
    batches = _batches(read_manifest(server.url))
    assert not any(batch.bad for batch in batches)


def test_a_list_of_urls(server):
    videos = read_manifest(server.url + "/list.csv", server.url)
    assert [(video.path, video.label) for video in videos] == [
        (server.url + "/0.mp4", 3),
        (server.url + "/1.mp4", 4),
    ]
    assert not any(batch.bad for batch in _batches(videos))


@pytest.mark.parametrize("workers", [0, 2])
def test_failures_that_pass_are_outlived(server, local, workers):
    kinds = ("500", "drop", "cut")
    server.fail = lambda path, number: kinds[(number + len(path)) % 3] if number < storage.ATTEMPTS - 1 else None
    batches = _batches(read_manifest(server.url), workers)
    _assert_same_clips(batches, local)
    assert not any(batch.bad for batch in batches)
    assert max(server.requests.values()) >= storage.ATTEMPTS - 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("failure", ["500", "drop", "cut"])
def test_failures_that_stay_are_bad_videos(server, failure, workers):
    videos = read_manifest(server.url)
    server.fail = lambda path, number: failure if "s-009" in path else None
    batches = _batches(videos, workers)
    bad = dict(bad for batch in batches for bad in batch.bad)
    assert set(bad) == {f"{server.url}/s-009.tar/{n}.mp4" for n in (1, 4)}
    assert all(f"given up after {storage.ATTEMPTS} attempts" in reason for reason in bad.values())
    assert all(len(batch.clip) == 3 for batch in batches)


def test_a_server_that_never_answers_is_given_up_when_the_time_is_over(server, monkeypatch, capsys):
    monkeypatch.setattr(storage, "_silent", set())
    videos = read_manifest(server.url, read_timeout=3)  # in which a busy machine answers
    server.fail = lambda path, number: "stall" if "s-009" in path else None
    begun = time.monotonic()
    message = r"s-009.tar: given up after [2-5] attempts in \d+\.\d s: no answer in time \(read timeout 2 s\)$"
    with pytest.raises(ManifestError, match=message):
        read_manifest(server.url + "/s-009.tar", read_timeout=2)
    assert time.monotonic() - begun < 20
    bad = {name for batch in _batches(videos, batches=3) for name, _ in batch.bad}  # an epoch and 2 visits
    assert bad == {f"{server.url}/s-009.tar/{n}.mp4" for n in (1, 4)}
    assert capsys.readouterr().err.count("trying again") == 1


def test_a_lost_answer_leaves_time_for_another(server, local, monkeypatch):
    server.fail = lambda path, number: "stall" if number == 1 and ("index" in path or "s-009" in path) else None
    batches = _batches(read_manifest(server.url, read_timeout=4))
    _assert_same_clips(batches, local)
    assert not any(batch.bad for batch in batches)


@pytest.mark.parametrize("url", ["https://host/a.mp4", "filecache::https://host/a.mp4", "zip://a.mp4::https://host/a"])
def test_the_server_of_a_url(url):
    assert storage._server_of(url) == "host"
    assert storage._server_of("memory:///a.mp4") == "memory:///a.mp4"


def test_a_file_system_that_only_blocks_is_given_up_too(monkeypatch):
    class Blocking(fsspec.AbstractFileSystem):
        protocol = "blocking"

        def cat_file(self, path, start=None, end=None, **_options):
            threading.Event().wait()

    fsspec.register_implementation("blocking", Blocking, clobber=True)
    with pytest.raises(OSError, match=r"given up after .* no answer in time"):
        storage.read("blocking://a.mp4", timeout=0.3)


def test_a_read_that_hangs_holds_no_process_up(server):
    """Ctrl-C during the main process's own reads, and its end during reads ahead."""
    server.fail = lambda path, number: "stall"
    server.stall = 60
    code = (
        # A background job of a shell ignores Ctrl-C, and so would its children.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys; from umt_fast.data import manifest, storage, video; "
        "storage.start_reading(video.Video(sys.argv[1] + '/0.mp4')); print('on', flush=True); "
        "manifest.read_manifest(sys.argv[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1)  # it now waits for the list
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=50)
    assert time.monotonic() - begun < 20  # the first attempt would end after 30
    assert errors.rstrip().endswith(b"KeyboardInterrupt")


def test_a_missing_file_is_not_tried_again(server):
    with pytest.raises(ManifestError, match=r"cannot read the list http.*: no such file"):
        read_manifest(server.url + "/other")
    assert set(server.requests.values()) == {1}


def test_an_unknown_kind_of_url():
    with pytest.raises(storage.CannotReach, match="nonsense"):
        read_manifest("nonsense://bucket/data")


# Ranks.


def test_no_video_is_lost_or_repeated_when_the_number_of_ranks_changes(shards, tmp_path):
    """An epoch of 60 videos, begun by two ranks, continued by three and then by one."""
    source = shards / "0.mp4"
    for number in range(60):
        (tmp_path / f"{number}.mp4").symlink_to(source)
    videos = read_manifest(str(tmp_path))
    seen: list[str] = []
    start = 0
    for world_size, batch_size, batches in ((2, 4, 2), (3, 4, 2), (1, 5, 4)):
        for rank in range(world_size):
            stream = ClipStream(videos, DataConfig(workers=rank), 2, 32, seed=0)
            with ClipLoader(
                stream, start=start, batches=batches, batch_size=batch_size, rank=rank, world_size=world_size
            ) as loader:
                seen += [path for batch in loader for path in batch.paths]
        start += world_size * batch_size * batches
    assert start == 60
    assert sorted(seen) == sorted(video.path for video in videos)

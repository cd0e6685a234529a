"""Hostile lists, indices, shards, replies and videos. Traffic goes only to the loopback."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import socket
import sqlite3
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from PIL import Image

from umt_fast.config import ConfigError, DataConfig
from umt_fast.data import storage
from umt_fast.data.captions import CaptionError, Source, read_annotations, read_answers, read_questions
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import probe, read_frames
from umt_fast.data.index import FORMAT, BadIndex, VideoList, describe, write_index
from umt_fast.data.labels import read_classes, read_labelled
from umt_fast.data.loader import ClipDataset
from umt_fast.data.manifest import ManifestError, read_manifest
from umt_fast.data.prepare import CannotPrepare, Recipe, Settings, prepare
from umt_fast.data.prepare.verify import verify
from umt_fast.data.shards import list_shard
from umt_fast.data.storage import CannotReach, TooLarge
from umt_fast.data.tokens import Tokenizer
from umt_fast.data.video import BadVideo, Limits, Video
from umt_fast.errors import RunError
from umt_fast.run.checkpoint import load_checkpoint
from umt_fast.weights import read_class_map, read_weights

FAST = Recipe("mjpeg", 16)


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has had enough
            self.server.reply(self)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler], None]], str]]:
    servers = []

    def begin(reply: Callable[[BaseHTTPRequestHandler], None]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        server.daemon_threads = True
        server.reply = reply
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def good_video(tmp_path_factory, write_video) -> Path:
    return write_video(tmp_path_factory.mktemp("good_video") / "a.mp4", frames=8, size=(32, 32))


# What a URL may name.


@pytest.mark.parametrize(
    "url",
    [
        "reference://a.mp4",
        "reference://a.mp4::file:///tmp/x.json",
        "simplecache::reference://a.mp4",
        "zip://a.mp4::https://host/x.zip",
        "tar://a.mp4::s3://b/x.tar",
        "filecache::zip://a::https://host/x.zip",
        "https://host/a::file:///etc/passwd",
        "local:///etc/passwd",
        "github://owner:repo@/a.mp4",
        "sftp://host/a.mp4",
        "ftp://host/a.mp4",
        "smb://host/a.mp4",
        "data://x",
        "dir://x::file:///tmp",
        "git://repo:a.mp4",
        "jupyter://x",
        "REFERENCE://a.mp4",
    ],
)
def test_a_url_of_another_kind_is_refused_before_anything_is_opened(url, monkeypatch):
    monkeypatch.setattr("fsspec.core.url_to_fs", None)
    with pytest.raises(CannotReach, match="allowed are"):
        storage.read(url)
    with pytest.raises(CannotReach, match="allowed are"):
        storage.url_size(url)
    with pytest.raises(BadVideo, match="allowed are"):
        read_frames(Video(url), lambda count: [0])


@pytest.mark.parametrize(
    "source",
    [
        "reference://list.csv",
        "reference://s.tar",
        "zip://a.tar::https://host/x.tar",
        "simplecache::reference://s-{0..1}.tar",
        "reference://a/folder",
        "reference://train.jsonl::file:///tmp/x.json",
    ],
)
def test_a_source_by_such_a_url_is_refused(source, monkeypatch):
    monkeypatch.setattr("fsspec.core.url_to_fs", None)
    for read in (read_manifest, read_labelled, lambda source: read_annotations(Source(source))):
        with pytest.raises((CannotReach, CaptionError)):
            read(source)


@pytest.mark.parametrize("cache", ["", "simplecache::", "filecache::"])
def test_files_by_url_and_through_caches_are_read(good_video, cache):
    assert storage.read(f"{cache}file://{good_video}") == good_video.read_bytes()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("cache", ["", "simplecache::", "filecache::", "blockcache::", "filecache::simplecache::"])
def test_a_url_of_a_pipe_or_device_is_refused_at_once(tmp_path, cache):
    os.mkfifo(tmp_path / "a.mp4")
    for path in (tmp_path / "a.mp4", "/dev/zero"):
        with pytest.raises(CannotReach, match="not a regular file"):
            storage.read(f"{cache}file://{path}")


CACHES = ["simplecache::", "filecache::", "blockcache::", "simplecache::filecache::"]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("cache", CACHES)
def test_a_reply_without_an_end_does_not_fill_the_disk_of_a_cache(serve, monkeypatch, tmp_path, cache):
    sent = []

    def reply(request):
        request.send_response(200)
        if request.command == "HEAD":
            request.send_header("Content-Length", "1000")
        request.end_headers()
        while request.command == "GET" and len(sent) < 200:
            request.wfile.write(bytes(1 << 20))
            sent.append(1)

    monkeypatch.setattr(storage, "_temporary_folder", lambda: str(tmp_path))
    with pytest.raises(TooLarge, match="more than the 1000 bytes"):
        storage.read(f"{cache}{serve(reply)}/a.mp4", timeout=5)
    assert len(sent) < 20
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cache", CACHES)
def test_a_partial_download_is_no_copy(serve, monkeypatch, tmp_path, cache):
    """The second attempt fetches the whole file, and a later read fetches nothing."""
    content, gets = os.urandom(100_000), []

    def reply(request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            gets.append(1)
            request.wfile.write(content[: 50_000 if len(gets) == 1 else None])
            request.close_connection = True

    monkeypatch.setattr(storage, "_temporary_folder", lambda: str(tmp_path))
    url = f"{cache}{serve(reply)}/a.mp4"
    assert storage.read(url) == content
    assert storage.read(url, 10, 20) == content[10:20]
    assert storage.url_size(url) == len(content)
    assert len(gets) == 2


def test_copies_lie_where_the_configuration_of_fsspec_says(serve, monkeypatch, tmp_path):
    monkeypatch.setitem(fsspec.config.conf, "filecache", {"cache_storage": str(tmp_path / "copies")})

    def reply(request):
        request.send_response(200)
        request.send_header("Content-Length", "4")
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(b"data")

    assert storage.read(f"filecache::{serve(reply)}/a.mp4") == b"data"
    (copy,) = (tmp_path / "copies").iterdir()
    assert copy.read_bytes() == b"data"


def test_a_reference_file_opens_nothing(tmp_path, good_video):
    """Such a file could send a local file to its author, or run its templates."""
    references = {"version": 1, "refs": {"a.mp4": [f"file://{good_video}"]}}
    (tmp_path / "ref.json").write_text(json.dumps(references))
    (tmp_path / "list.csv").write_text(f"reference://a.mp4::file://{tmp_path}/ref.json\n")
    (video,) = read_manifest(str(tmp_path / "list.csv"))
    with pytest.raises(BadVideo, match="allowed are"):
        read_frames(video, lambda count: [0])


@pytest.mark.parametrize("target", ["file://{good_video}", "ftp://127.0.0.1/a", "data:text/plain,x"])
def test_a_redirect_out_of_http_is_not_followed(serve, good_video, monkeypatch, target):
    monkeypatch.setattr(storage, "ATTEMPTS", 2)

    def reply(request):
        request.send_response(302)
        request.send_header("Location", target.format(good_video=good_video))
        request.end_headers()

    with pytest.raises(OSError, match="given up after 2 attempts"):
        storage.read(f"{serve(reply)}/a.mp4")


# What an index, a shard or OUT may make `prepare` write.

OUTSIDE = ["{other}/b.mp4", "../other/b.mp4", "a/../../other/b.mp4", "file://{other}/b.mp4", "./../other/b.mp4"]


@pytest.fixture
def source(tmp_path, good_video) -> Path:
    """A folder with a.mp4 and c.mp4, and beside it one with b.mp4."""
    for name in ("source/a.mp4", "source/c.mp4", "other/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(good_video, tmp_path / name)
    return tmp_path / "source"


def unchanged(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("in_shard", [False, True])
@pytest.mark.parametrize("path", OUTSIDE)
def test_a_row_outside_the_folder_of_its_index_is_a_bad_row(source, tmp_path, path, in_shard):
    path = path.format(other=tmp_path / "other")
    bad = {"path": "m.mp4", "shard": path, "offset": 0, "bytes": 9} if in_shard else {"path": path}
    (source / "index.jsonl").write_bytes(write_index([{"path": "a.mp4"}, bad]))
    good, refused = read_manifest(str(source))
    assert len(read_frames(good, lambda count: [0])) == 1
    with pytest.raises(BadVideo, match="outside the folder of its index"):
        read_frames(refused, lambda count: [0])
    before = unchanged(tmp_path)
    report = prepare(Settings(str(source), str(tmp_path / "out"), FAST, workers=1))
    assert list(report.failures.values()) == ["it lies outside the folder of its index"]
    after = unchanged(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {path.name for path in (tmp_path / "out").glob("*.mp4")} == {"a.mp4"}


@pytest.mark.parametrize("member", ["../../x.mp4", "/x.mp4", "a/../../../x.mp4"])
def test_a_member_that_climbs_out_of_its_shard_is_not_written_there(source, tmp_path, good_video, member):
    with tarfile.open(source / "s.tar", "w") as tar:
        tar.add(good_video, "ok.mp4")
        info = tarfile.TarInfo(member)
        info.size = good_video.stat().st_size
        tar.addfile(info, io.BytesIO(good_video.read_bytes()))
    before = unchanged(tmp_path)
    out = tmp_path / "deep" / "out"
    out.parent.mkdir()
    prepare(Settings(str(source / "s.tar"), str(out), FAST, workers=1))
    written = unchanged(tmp_path).keys() - before.keys()
    assert all(Path(name).is_relative_to(out) for name in written)
    assert unchanged(tmp_path)[str(source / "a.mp4")] == before[str(source / "a.mp4")]


def test_a_link_in_out_is_not_followed(source, tmp_path, good_video):
    (source / "sub").mkdir()
    shutil.copy(good_video, source / "sub" / "b.mp4")
    settings = Settings(str(source), str(tmp_path / "out"), FAST, workers=1)
    prepare(settings)
    shutil.rmtree(tmp_path / "out" / "sub")
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "other")
    before = (tmp_path / "other" / "b.mp4").read_bytes()
    report = prepare(settings)
    (reason,) = report.failures.values()
    assert "would lie outside" in reason
    assert (tmp_path / "other" / "b.mp4").read_bytes() == before


def test_nothing_but_bad_rows_is_an_error(source, tmp_path):
    (source / "index.jsonl").write_bytes(write_index([{"path": "../other/b.mp4"}]))
    with pytest.raises(CannotPrepare, match="outside the folder of its index"):
        prepare(Settings(str(source), str(tmp_path / "out"), FAST, workers=1))


# What FFmpeg opens.

PLAYLISTS = {
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "ffconcat": "ffconcat version 1.0\nfile '{good_video}'\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{good_video}\n#EXT-X-ENDLIST\n",
    "m3u8_url": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
    "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
    "<BaseURL>{good_video}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "imf": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"/>',
    "rtsp": "RTSPtextrtsp://127.0.0.1:{port}/x",
}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_file_that_names_others_to_open_is_a_bad_video(tmp_path, good_video, kind, in_memory):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.1)
        path = tmp_path / "x.mp4"
        path.write_text(PLAYLISTS[kind].format(good_video=good_video, port=server.getsockname()[1]))
        begun = time.monotonic()
        with pytest.raises(BadVideo):
            read_frames(Video(str(path)), lambda count: [0], path.read_bytes() if in_memory else None)
        assert time.monotonic() - begun < 10
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_playlists_of_these_tests_work(tmp_path, good_video):
    """Without our restrictions FFmpeg opens another file."""
    path = tmp_path / "x.mp4"
    path.write_text(PLAYLISTS["ffconcat"].format(good_video=good_video))
    with av.open(str(path), options={"safe": "0"}) as container:
        assert next(container.decode(video=0)).width == 32


def test_a_picture_that_is_postscript_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(BadVideo, match="not a picture"):
        read_frames(Video(str(tmp_path / "x.png")), lambda count: [0])


DEEP = b"[" * 200_000


# Captions beside videos, and files that are not files.


@pytest.mark.timeout(60)
def test_only_plain_small_captions_of_the_source_are_read(source, tmp_path, good_video):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (source / "sub").mkdir()
    for name in "bdefgh":
        shutil.copy(good_video, source / f"{name}.mp4")
    (source / "a.txt").write_text("a caption")
    os.mkfifo(source / "b.txt")
    (source / "c.txt").symlink_to("/dev/zero")
    (source / "d.txt").symlink_to(secret)
    (source / "e.txt").write_text("x" * 100_000)
    (source / "sub" / "real.txt").write_text("linked inside")
    (source / "f.txt").symlink_to(source / "sub" / "real.txt")
    (source / "g.txt").mkdir()
    (source / "h.txt").symlink_to(source / "h.txt")
    prepare(Settings(str(source), str(tmp_path / "out"), FAST, workers=1))
    captions = {Path(video.path).stem: video.caption for video in read_manifest(str(tmp_path / "out"))}
    assert captions == dict.fromkeys("abcdefgh") | {"a": "a caption", "f": "linked inside"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", [".mp4", ".png"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_a_video_that_is_not_a_regular_file(tmp_path, kind, suffix):
    path = tmp_path / f"x{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    with pytest.raises(BadVideo, match="not a regular file"):
        read_frames(Video("/dev/zero" if kind == "device" else str(path)), lambda count: [0])


READERS: dict[str, Callable[[str], object]] = {
    "list.csv": read_manifest,
    "list.json": read_manifest,
    "index.jsonl": lambda path: read_manifest(str(Path(path).parent)),
    "s.tar": read_manifest,
    "labels.csv": read_labelled,
    "classes.txt": read_classes,
    "captions.json": lambda path: read_annotations(Source(path)),
    "captions.csv": lambda path: read_annotations(Source(path)),
    "captions.db": lambda path: read_annotations(Source(path)),
    "questions.json": read_questions,
    "answers.json": read_answers,
    "list.videos": read_manifest,
    "vocab.txt": lambda path: Tokenizer.read(Path(path).parent),
    "map.json": lambda path: read_class_map(path, 2),
    "w.pth": read_weights,
    "w.safetensors": read_weights,
    "config.json": lambda path: read_weights(Path(path).parent),
    "clips_0000000001.pth": lambda path: load_checkpoint(Path(path)),
}


NAMES_OF_ODD_THINGS = {("list.csv", "deep"), ("classes.txt", "deep")}
"""A file or a class may have such a name."""


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "deep", "zeros"])
@pytest.mark.parametrize("name", READERS)
def test_what_a_data_set_holds_in_place_of_a_file_ends_in_one_error(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(DEEP if kind == "deep" else bytes(1 << 16))
    one_error = pytest.raises((RunError, OSError))
    with contextlib.nullcontext() if (name, kind) in NAMES_OF_ODD_THINGS else one_error:
        READERS[name](str(path))


@pytest.mark.parametrize("words", ["CREATE VIRTUAL TABLE", "CREATE/*(*/VIRTUAL TABLE", "CREATE -- (\nVirtual TABLE"])
def test_a_virtual_table_is_not_read(tmp_path, words):
    """A virtual table would run an SQLite extension on the file's content; anyone can edit the schema of a file."""
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        connection.execute("CREATE VIRTUAL TABLE annos USING fts4(id, path, caption)")
        connection.execute("PRAGMA writable_schema = ON")
        change = "UPDATE sqlite_master SET sql = replace(sql, 'CREATE VIRTUAL TABLE', ?) WHERE name = 'annos'"
        connection.execute(change, (words,))
        connection.commit()
    with pytest.raises(CaptionError, match="with a table `annos`"):
        read_annotations(Source(str(tmp_path / "a.db")))


# Sizes.


def endless(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(bytes(1 << 16))


def compressed(request: BaseHTTPRequestHandler) -> None:
    content = gzip.compress(bytes(64 << 20))
    request.send_response(200)
    request.send_header("Content-Encoding", "gzip")
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)


@pytest.mark.timeout(60)
def test_a_reply_without_an_end_is_cut_off(serve):
    url = serve(endless)
    begun = time.monotonic()
    with pytest.raises(TooLarge, match=r"larger than --data\.max-bytes 1000000"):
        storage.read(f"{url}/a.mp4", max_bytes=1_000_000)
    with pytest.raises(BadVideo, match="max-bytes 1000000"):
        read_frames(Video(f"{url}/a.mp4", limits=Limits(max_bytes=1_000_000)), lambda count: [0])
    with pytest.raises(ManifestError, match="max-bytes 1000000"):
        read_manifest(f"{url}/list.csv", limits=Limits(max_bytes=1_000_000))
    assert time.monotonic() - begun < 20


@pytest.mark.timeout(60)
def test_answers_that_are_read_at_once_are_bounded_together(serve, monkeypatch):
    monkeypatch.setattr(storage, "_MOST_AT_ONCE", 4 << 20)
    url = serve(endless)
    limits = Limits(max_bytes=3 << 20)
    reads = [storage.start_reading(Video(f"{url}/{number}.mp4", limits=limits)) for number in range(8)]
    most = 0
    while not all(read.done() for read in reads):
        most = max(most, sum(map(len, list(storage._unfinished))))
        time.sleep(0.001)
    assert all(isinstance(read.exception(), TooLarge) for read in reads)
    assert most < (4 << 20) + (3 << 20) + 8 * storage._BLOCK
    assert not storage._unfinished


def test_a_compressed_reply_is_not_unpacked(serve, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    with pytest.raises(OSError, match="compressed"):
        storage.read(f"{serve(compressed)}/a.mp4")


def test_an_index_that_claims_a_large_video_reserves_nothing(serve):
    video = Video("http://127.0.0.1:9/s.tar", "a.mp4", 0, 1 << 40)
    with pytest.raises(BadVideo, match="max-bytes"):
        read_frames(video, lambda count: [0])


@pytest.mark.parametrize("name", ["x.mp4", "x.png"])
def test_large_frames_are_refused_before_they_are_decoded(tmp_path, write_video, name):
    path = tmp_path / name
    if name == "x.png":
        Image.fromarray(np.zeros((1200, 1200, 3), np.uint8)).save(path)
    else:
        write_video(path, "mjpeg", frames=2, size=(1200, 1200), pixels="yuvj420p")
    assert read_frames(Video(str(path)), lambda count: [0])[0].shape == (1200, 1200, 3)
    with pytest.raises(BadVideo, match=r"than --data\.max-pixels"):
        read_frames(Video(str(path), limits=Limits(max_pixels=1_000_000)), lambda count: [0])


def test_the_limits_hold_for_a_folder_of_frames(tmp_path):
    (tmp_path / "frames").mkdir()
    Image.fromarray(np.zeros((120, 120, 3), np.uint8)).save(tmp_path / "frames" / "1.png")
    os.mkfifo(tmp_path / "frames" / "2.png")
    video = Video(str(tmp_path / "frames"))
    assert len(read_frames(video, lambda count: [0])) == 1
    with pytest.raises(BadVideo, match=r"2\.png.*not a regular file"):
        read_frames(video, lambda count: [1])
    with pytest.raises(BadVideo, match="max-pixels 10000"):
        read_frames(replace(video, limits=Limits(max_pixels=10_000)), lambda count: [0])


def test_frames_that_grow_behind_the_header_are_refused(tmp_path, write_video):
    """With the index of a copy, whose decoder is opened without its container."""
    path = write_video(tmp_path / "a.mp4", "mjpeg", frames=4, size=(1200, 1200), gop=1, pixels="yuvj420p")
    facts = probe(Video(str(path)))
    row = {"path": "a.mp4", "bytes": path.stat().st_size, **describe(replace(facts, width=16, height=16))}
    (tmp_path / "index.jsonl").write_bytes(write_index([row]))
    (video,) = read_manifest(str(tmp_path), limits=Limits(max_pixels=1_000_000))
    with pytest.raises(BadVideo):
        read_frames(video, lambda count: [0])


def test_a_video_that_decodes_for_too_long_is_replaced(tmp_path, good_video, write_video, monkeypatch):
    """In a run, by another one."""
    slow = write_video(tmp_path / "slow.mp4", frames=9, size=(32, 32))
    shutil.copy(good_video, tmp_path / "good.mp4")
    stream = ClipStream(read_manifest(str(tmp_path)), DataConfig(time_limit=1), 2, 16, seed=0)
    real = time.monotonic
    opened: list[str] = []
    original = av.open

    def slow_open(file, *rest, **options):
        opened.append(str(file))
        return original(file, *rest, **options)

    monkeypatch.setattr("av.open", slow_open)
    clock = lambda: real() + (100 * len(opened) if opened and str(slow) in opened[-1] else 0)  # noqa: E731
    monkeypatch.setattr("umt_fast.data.decode.time_limit.time.monotonic", clock)
    batch = ClipDataset(stream)[[0, 1]]
    assert [Path(path).name for path in batch.paths] == ["good.mp4", "good.mp4"]
    assert {(Path(name).name, reason) for name, reason in batch.bad} == {
        ("slow.mp4", "not decoded within 1 seconds (--data.time-limit)")
    }


def tar_of(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def sparse_tar(path: Path, header: tarfile.TarInfo, size: int, good_video: Path) -> None:
    """A member of `size` bytes without disk space, followed by a video."""
    header.size = size
    with open(path, "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.seek(size + -size % 512, os.SEEK_CUR)
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(good_video, "a.mp4")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_large_header_of_a_shard_is_refused(tmp_path, good_video, kind):
    header = tarfile.TarInfo("x")
    header.type = kind
    sparse_tar(tmp_path / "s.tar", header, 3 << 30, good_video)
    with pytest.raises(ManifestError, match="headers of more"):
        read_manifest(str(tmp_path / "s.tar"))


def pax(**records: str) -> bytes:
    """An extended header with these records."""
    info = tarfile.TarInfo("x")
    info.pax_headers = records
    return info.create_pax_header(info.get_info(), "utf-8")[:-512]


def long_pax() -> bytes:
    """Four consecutive extended headers, each below the limit."""
    return 4 * pax(comment="a" * 900_000)


def sparse_map() -> bytes:
    """A sparse member whose list of parts has more bytes than any header."""
    content = b"2000000\n" + b"999\n" * 1_000_000
    member = tarfile.TarInfo("b.mp4")
    member.size = len(content)
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9", "GNU.sparse.name": "b.mp4"}
    return pax(**sparse) + member.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % 512)


@pytest.mark.parametrize("begin", [long_pax, sparse_map])
def test_headers_in_many_pieces_are_refused(tmp_path, begin):
    (tmp_path / "s.tar").write_bytes(begin() + tar_of({"a.mp4": b"x"}))
    with pytest.raises(ManifestError, match="headers of more than"):
        read_manifest(str(tmp_path / "s.tar"))


def test_a_state_of_prepare_that_is_a_link_is_refused(tmp_path, good_video):
    """In a folder from someone else, continuing would empty its `aside`."""
    (tmp_path / "mine" / "aside").mkdir(parents=True)
    (tmp_path / "mine" / "aside" / "thesis.txt").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".prepare").symlink_to(tmp_path / "mine")
    with pytest.raises(CannotPrepare, match="is a link"):
        prepare(Settings(str(good_video.parent), str(tmp_path / "out"), FAST, workers=1))
    assert (tmp_path / "mine" / "aside" / "thesis.txt").exists()


def test_a_sparse_member_is_left_out(tmp_path, good_video):
    """Its bytes in the shard differ from the file's, so a range of the shard would be wrong."""
    content = b"1\n0\n4\n".ljust(512, b"\0") + b"data".ljust(512, b"\0")
    member = tarfile.TarInfo("b.mp4")
    member.size = len(content)
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9", "GNU.sparse.name": "b.mp4"}
    head = pax(**sparse) + member.tobuf(tarfile.GNU_FORMAT) + content
    (tmp_path / "s.tar").write_bytes(head + tar_of({"a.mp4": good_video.read_bytes()}))
    (video,) = read_manifest(str(tmp_path / "s.tar"))
    assert video.member == "a.mp4"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["cls", "txt", "json"])
def test_a_large_label_or_caption_of_a_shard_is_left_out(tmp_path, good_video, kind):
    sparse_tar(tmp_path / "s.tar", tarfile.TarInfo(f"a.{kind}"), 3 << 30, good_video)
    (video,) = read_manifest(str(tmp_path / "s.tar"))
    assert (video.label, video.caption) == (None, None)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("size", [-512, -1024, -(1 << 40)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_negative_size_in_a_shard_ends(tmp_path, good_video, size, kind):
    with open(tmp_path / "s.tar", "wb") as file:
        header = tarfile.TarInfo("x.mp4")
        header.type = kind
        block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
        block[124:136] = b"\xff" + (size + (1 << 88)).to_bytes(11, "big")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        file.write(block + bytes(1024))
    with pytest.raises(OSError, match="not a tar file"):
        list_shard(str(tmp_path / "s.tar"), {".mp4"})


@pytest.mark.parametrize("label", [b"9" * 5000, b"\xc2\xb2", b"3.5", b"9" * 19])
def test_a_label_of_a_shard_that_is_not_a_number_is_none(tmp_path, good_video, label):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(good_video, "a.mp4")
        info = tarfile.TarInfo("a.cls")
        info.size = len(label)
        tar.addfile(info, io.BytesIO(label))
    (video,) = read_manifest(str(tmp_path / "s.tar"))
    assert video.label is None


@pytest.mark.parametrize(
    "row",
    [
        b'{"path": "a.mp4", "times": ' + DEEP,
        DEEP,
        b'{"path": "a.mp4", "label": ' + b"9" * 5000 + b"}",
        b'{"path": "a.mp4", "label": {"x": 1}}',
        b'{"path": "a.mp4", "caption": 5}',
        b'{"path": "a.mp4", "label": "\\ud800"}',
        b'{"path": 5}',
        b'{"path": "a.mp4", "shard": []}',
        b"\xff\xfe",
        b"5",
    ],
)
def test_a_hostile_row_of_an_index_is_one_error(row):
    videos = VideoList([json.dumps({"path": "b"}).encode(), row], "/data", confined=True)
    with pytest.raises(BadIndex, match="row 2"):
        videos[1]


@pytest.mark.parametrize("head", [DEEP, b"\xff", b"null", json.dumps({**FORMAT, "version": 9}).encode()])
def test_a_hostile_head_of_an_index_is_one_error(tmp_path, head):
    (tmp_path / "index.jsonl").write_bytes(head + b'\n{"path": "a"}\n')
    with pytest.raises(BadIndex, match="does not begin with"):
        read_manifest(str(tmp_path))


def test_a_hostile_row_costs_a_run_one_video(tmp_path, good_video):
    shutil.copy(good_video, tmp_path / "a.mp4")
    rows = [b'{"path": "a.mp4"}', b'{"path": "b.mp4", "times": ' + DEEP, b'{"path": "a.mp4"}']
    (tmp_path / "index.jsonl").write_bytes(b"\n".join([json.dumps(FORMAT).encode(), *rows]) + b"\n")
    stream = ClipStream(read_manifest(str(tmp_path)), DataConfig(), 2, 16, seed=0)
    batch = ClipDataset(stream)[[0, 1, 2]]
    assert len(batch.clip) == 3
    assert "row 2" in dict(batch.bad)["row 2 of the list"]


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "time_limit"])
def test_limits_are_checked(name):
    with pytest.raises(ConfigError, match=name):
        DataConfig(**{name: 0})
    if name != "time_limit":
        with pytest.raises(ConfigError, match=name.replace("_", "-")):
            Settings("a", "b", **{name: 0})


def test_a_hostile_row_in_the_middle_is_one_error_for_those_who_read_them_all():
    rows = [b'{"path": "a"}', b'{"path": "b", "times": ' + DEEP, b'{"path": "c"}']
    with pytest.raises(BadIndex, match="row 2"):
        list(VideoList.of_bytes(rows, "/data").rows())


@pytest.mark.timeout(30)
def test_an_sqlite_view_is_not_run(tmp_path):
    """A view can compute forever."""
    connection = sqlite3.connect(tmp_path / "annos.db")
    connection.execute(
        "CREATE VIEW annos AS WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n) SELECT i, 'a', 'b' FROM n"
    )
    connection.commit()
    connection.close()
    with pytest.raises(CaptionError, match="with a table `annos`"):
        read_annotations(Source(str(tmp_path / "annos.db")))


@pytest.mark.parametrize("content", [b"{", b"[]", DEEP, b"\xff"])
def test_damaged_settings_of_copies_are_one_error(source, tmp_path, content):
    settings = Settings(str(source), str(tmp_path / "out"), FAST, workers=1)
    prepare(settings)
    (tmp_path / "out" / ".prepare" / "settings.json").write_bytes(content)
    with pytest.raises(CannotPrepare, match="is damaged"):
        prepare(settings)
    assert "not compared" in str(verify(str(tmp_path / "out"), 1))


def test_verify_reads_no_file_outside_the_folder(source, tmp_path):
    prepare(Settings(str(source), str(tmp_path / "out"), FAST, workers=1))
    index = tmp_path / "out" / "index.jsonl"
    index.write_bytes(index.read_bytes().replace(b'"a.mp4"', b'"../other/b.mp4"'))
    verdict = verify(str(tmp_path / "out"), 1)
    assert [reason for _, reason in verdict.problems] == ["it lies outside the folder of its index"]

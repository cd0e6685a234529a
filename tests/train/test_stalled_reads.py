"""Runs that read from a silent server stop as fast as others."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from umt_fast.run import checkpoint
from umt_fast.run.stop import EXIT_STOPPED

pytest.importorskip("aiohttp", reason="pip install 'fsspec[http]'")


class Server(ThreadingHTTPServer):
    """Serves a folder, until `silent` is set."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.silent = threading.Event()
        self.asked = threading.Event()
        """While silent."""


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.server.silent.is_set():
            self.server.asked.set()
            time.sleep(100)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(demo_videos, tmp_path) -> Iterator[Server]:
    """Server of the demo's videos; `list.txt` in `tmp_path` names them by their URLs."""
    running = Server(demo_videos.parent)
    names = [line.split(",")[0] for line in demo_videos.read_text().splitlines()]
    urls = [f"http://127.0.0.1:{running.server_port}/{Path(name).name}\n" for name in names]
    (tmp_path / "list.txt").write_text("".join(urls))
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGINT, ["--data.workers", "0", "--optim.accumulate", "2"]),
        (signal.SIGTERM, ["--data.workers", "2"]),
    ],
)
def test_a_signal_saves_though_no_data_comes(trainer, server, tmp_path, number, options):
    options = ["--run.name", "s", "--data.train", str(tmp_path / "list.txt"), "--optim.epochs", "500", *options]
    child = trainer.start(*options, "--run.save-every", "100000")
    trainer.wait_for_step(child, 4)
    server.silent.set()
    assert server.asked.wait(20)
    time.sleep(2)  # until the prefetched batches are used up
    begun = time.monotonic()
    child.send_signal(number)
    folder = trainer.folder / "s" / "checkpoints"
    while not checkpoint.list_checkpoints(folder) and time.monotonic() - begun < 20:  # the first attempt ends after 30
        time.sleep(0.05)
    (saved,) = checkpoint.list_checkpoints(folder)
    output, _ = child.communicate(timeout=60)  # it draws its pictures
    assert child.returncode == EXIT_STOPPED, output
    clips = 8 if "--optim.accumulate" in options else 4
    step = checkpoint.load_checkpoint(saved)["clips_seen"] // clips
    assert step >= 4
    assert f"stopped at step {step}: {saved}" in output
    server.silent.clear()
    status, output = trainer.run(*options, "--run.stop-at", str(step + 2))
    assert status == 0, output
    assert f"going on from {saved} at step {step}" in output


def test_ctrl_c_before_the_first_step(server, tmp_path):
    code = (
        # A background job of a shell ignores Ctrl-C, and so would its children.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys; from umt_fast.config import DataConfig; from umt_fast.data.loader import first_clips; "
        "from umt_fast.data.manifest import read_manifest; from umt_fast.data.clips import ClipStream; "
        "first_clips(ClipStream(read_manifest(sys.argv[1]), DataConfig(), 4, 32, seed=0))"
    )
    server.silent.set()
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "list.txt")], stderr=subprocess.PIPE)
    assert server.asked.wait(20)
    begun = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=90)
    assert time.monotonic() - begun < 20  # the first attempt would end after 30
    assert errors.rstrip().endswith(b"KeyboardInterrupt")

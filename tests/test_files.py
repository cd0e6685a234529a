"""Locked folders, and lists of files with strange names."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import signal
import time
from pathlib import Path

import pytest
import torch

from umt_fast.data.index import VideoList
from umt_fast.data.mapped_list import write_mapped
from umt_fast.errors import RunError
from umt_fast.files import (
    FolderInUse,
    escape,
    expand_home,
    lock_folder,
    read_reasons,
    unescape,
    write_reasons,
    write_whole,
)
from umt_fast.run import attention_choice
from umt_fast.run.log import RunLog
from umt_fast.run.world import World
from umt_fast.weights.files import save_safetensors

STRANGE = ["a\tb.mp4", "a\nb.mp4", "c\r\n.mp4", "\x1b[31m\x00\x7f\x85.mp4", "a\u2028b\u2029.mp4", "\udcff\udc80.mp4"]
BACKSLASHES = ["\\", "\\t.mp4", "x$\\foo$.mp4", "\\\\n", "\\x1b", "\\u2028", "a\\\tb"]
PLAIN = ["a b,c.mp4", "ü/日本.mp4", "s3://bucket/key", "12:30.mp4"]


@pytest.mark.parametrize("name", [*STRANGE, *BACKSLASHES])
def test_names_survive_writing_and_reading(name):
    assert escape(name) != name or name in STRANGE[-1:]
    assert unescape(escape(name)) == name
    assert escape(name).isprintable() or name in STRANGE[-1:]


def test_escapes_of_names_in_files():
    assert escape("a\tb\n\\\x1b\u2028") == r"a\tb\n\\\x1b\u2028"
    assert [escape(name) for name in PLAIN] == PLAIN


def test_half_a_character_of_an_index_can_be_written():
    name = "\ud83d.mp4"
    assert escape(name) == r"\ud83d.mp4"
    assert read_reasons(write_reasons([(name, "no such name")])) == {name: "no such name"}


def test_a_line_is_a_file():
    reasons = {name: f"no\nframe\tin {name}" for name in [*STRANGE, *BACKSLASHES, *PLAIN]}
    content = write_reasons(reasons.items())
    assert content.count(b"\n") == content.count(b"\t") == len(content.splitlines()) == len(reasons)
    assert b"\xff\x80.mp4\t" in content
    assert {name: " ".join(reason.split()) for name, reason in reasons.items()} == read_reasons(content)
    assert read_reasons(b"") == {}


def test_a_resumed_run_knows_its_bad_files(tmp_path, capsys):
    bad = [(name, "broken") for name in STRANGE]
    for step, count in ((0, len(bad)), (3, len(bad) + 1)):
        log = RunLog(tmp_path, World(0, 1, torch.device("cpu")), step, 10, 4)
        assert log._record_bad([*bad, ("other", "empty")][:count]) == count
        log.close()
    assert read_reasons((tmp_path / "bad_files.txt").read_bytes()) == {**dict(bad), "other": "empty"}
    assert "\x1b" not in capsys.readouterr().out


def _hold_in_a_process(folder, seconds: float) -> int:
    """A process that locks `folder` and has a child, like a run with workers."""
    process = os.fork()
    if process:
        return process
    with lock_folder(folder):
        if not os.fork():
            time.sleep(seconds)
            os._exit(0)
        (folder / "held").touch()
        time.sleep(seconds)
    os._exit(0)


@pytest.mark.parametrize("missing", [None, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_lock_ends_with_its_process_and_needs_no_flock(tmp_path, monkeypatch, capfd, missing):
    """Children of the killed process do not keep the lock."""

    def fail(*_arguments):
        raise OSError(missing, os.strerror(missing))

    if missing is not None:
        monkeypatch.setattr(fcntl, "flock", fail)
    folder = tmp_path / "run"
    with lock_folder(folder), pytest.raises(FolderInUse, match=f"another process is using {folder}"):
        lock_folder(folder).__enter__()
    process = _hold_in_a_process(folder, 20)
    while not (folder / "held").exists():
        time.sleep(0.01)
    with pytest.raises(FolderInUse):
        lock_folder(folder).__enter__()
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with lock_folder(folder):
        pass
    notes = capfd.readouterr().err
    assert (f"the file system of {folder} has no flock" in notes) == (missing is not None)


def test_a_disk_that_is_full_leaves_the_old_file_and_no_other(tmp_path, small_disk):
    path = tmp_path / "index.jsonl"
    path.write_bytes(b"old")
    with small_disk(100), pytest.raises(OSError, match="too large"):
        write_whole(path, bytes(1000))
    with small_disk(100), pytest.raises(OSError, match=r"a\.safetensors, is the disk full"):
        save_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1000)})
    with small_disk(5000), pytest.raises(OSError, match="too large"):
        write_mapped(VideoList.of_paths(f"{i}.mp4" for i in range(1000)), str(tmp_path / "a.videos"))
    assert [file.name for file in tmp_path.iterdir()] == ["index.jsonl"]
    assert path.read_bytes() == b"old"


def test_a_user_without_a_home(tmp_path, monkeypatch):
    """As in a container with an unknown user id: the cache is not written, and `~` is a one-line error."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("UMT_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert expand_home("~a.pth") == Path("~a.pth")
    with pytest.raises(RunError, match="no home folder is known"):
        expand_home("~/a.pth")
    monkeypatch.chdir(tmp_path)
    attention_choice._remember("key", {"sdpa": 1.0})
    assert attention_choice._read_cache() == {}
    assert not list(tmp_path.iterdir())

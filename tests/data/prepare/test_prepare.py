from __future__ import annotations

import dataclasses
import faulthandler
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import av
import numpy as np
import pytest

from umt_fast.config import ConfigError
from umt_fast.data import prepare as preparing
from umt_fast.data.decode import read_frames
from umt_fast.data.index import BadIndex
from umt_fast.data.manifest import read_manifest
from umt_fast.data.prepare import Settings, encode, journal, prepare, verify
from umt_fast.data.prepare import work as tasks
from umt_fast.data.prepare.__main__ import main
from umt_fast.data.prepare.encode import Recipe
from umt_fast.data.prepare.journal import Journal
from umt_fast.data.prepare.plan import CannotPrepare, _copy_paths
from umt_fast.data.prepare.work import Died, Workers
from umt_fast.data.video import BadVideo, Video
from umt_fast.files import FolderInUse, lock_folder, read_reasons

ROOT = Path(__file__).parents[3]
FAST = Recipe("h264", short_side=32)
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_video) -> Path:
    """A list of eleven videos with labels, in two folders; three are bad, one comes twice."""
    folder = tmp_path_factory.mktemp("source")
    lines = []
    for number in range(7):
        name = f"{'ab'[number % 2]}/{number}{('.mp4', '.mkv', '.avi')[number % 3]}"
        (folder / name).parent.mkdir(exist_ok=True)
        codec = "mpeg4" if number % 3 == 2 else "libx264"
        write_video(folder / name, codec, frames=24 + 5 * number, seed=number)
        lines.append(f"{name},{number}")
    (folder / "a" / "0.txt").write_text("a bar that runs\n")
    (folder / "a" / "empty.mp4").touch()
    (folder / "a" / "text.mp4").write_text("no video at all\n" * 100)
    cut = (folder / "a" / "0.mp4").read_bytes()
    (folder / "a" / "cut.mp4").write_bytes(cut[: len(cut) // 2])
    lines[2:2] = ["a/empty.mp4,7", "a/missing.mp4,7"]
    lines += ["a/text.mp4 7", "a/cut.mp4 7", "b/1.mkv,8"]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder / "train.csv"


def _settings(source: Path, out: Path, **changes) -> Settings:
    return Settings(str(source), str(out), **{"recipe": FAST, "prefix": str(source.parent), "workers": 2, **changes})


def _tree(folder: Path) -> dict[str, str]:
    """Every file with the digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    """The output of an uninterrupted run, as files and as shards of three, and its report."""
    made = {}
    for per_shard in (None, 3):
        out = tmp_path_factory.mktemp("unbroken") / "out"
        made[per_shard] = (out, prepare(_settings(source, out, per_shard=per_shard)))
    return made


# Output.


def test_files_and_index(source, unbroken):
    out, report = unbroken[None]
    rows = _rows(out)
    paths = ["a/0.mp4", "b/1.mp4", "a/2.mp4", "b/3.mp4", "a/4.mp4", "b/5.mp4", "a/6.mp4", "b/1.mp4"]
    assert [row["path"] for row in rows] == paths
    assert [row["label"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 8]
    assert rows[0]["caption"] == "a bar that runs"
    assert all("caption" not in row for row in rows[1:])
    for row in rows:
        content = (out / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert (row["codec"], row["width"], row["height"]) == ("h264", 42, 32)
    assert set(_tree(out)) == {*paths, "index.jsonl", "failed.txt", ".lock", *_state_files()}
    assert report.copies == report.fresh == 7
    assert len(report.failures) == 4


def _state_files() -> set[str]:
    return {f".prepare/{name}" for name in ("settings.json", "journal.jsonl")}


def test_the_trainer_reads_the_copies_through_the_index(source, unbroken):
    good = {video.name: video for video in read_manifest(str(source), str(source.parent))}
    for out, _report in unbroken.values():
        videos = read_manifest(str(out))
        assert len(videos) == 8
        for video, name in zip(videos, ("a/0.mp4", "b/1.mkv", "a/2.avi"), strict=False):
            original = good[str(source.parent / name)]
            before = read_frames(original, lambda count: [0, 3, count - 1])
            assert video.facts.packets is not None
            after = read_frames(video, lambda count: [0, 3, count - 1])
            small = [frame[::3, ::3][:15, :20].astype(float) for frame in (*before, *after)]
            assert np.corrcoef([small[0].ravel(), small[2].ravel()])[0, 1] < 0.9  # otherwise any frame would pass
            assert [frame.shape for frame in after] == [(32, 42, 3)] * 3


def test_failures_are_listed_with_reasons(source, unbroken):
    out, report = unbroken[None]
    lines = [line.split("\t") for line in (out / "failed.txt").read_text().splitlines()]
    names = ["a/empty.mp4", "a/missing.mp4", "a/text.mp4", "a/cut.mp4"]
    assert [line[0] for line in lines] == [str(source.parent / name) for name in names]
    assert lines[0][1] == "empty file"
    assert lines[1][1] == "No such file or directory"
    assert "Invalid data" in lines[2][1]
    assert report.failures == dict(lines)


def test_report(unbroken):
    out, report = unbroken[None]
    text = str(report)
    assert text.startswith("11 videos: 7 copied, 4 failed\n")
    assert re.search(r"\d+\.\d MB before, \d+\.\d MB after: \d\.\d\d times", text)
    assert re.search(r"1 +empty file", text)
    assert f"python -m train.pretrain --data.train {out}" in text
    seconds = sum((24 + 5 * number) / 15 for number in range(7))
    assert report.seconds == pytest.approx(seconds, abs=0.1)
    assert report.bytes_after == sum(path.stat().st_size for path in out.rglob("*.mp4"))


def test_shards(unbroken):
    out, _report = unbroken[3]
    rows = _rows(out)
    # Videos 0 to 2, 3 to 5 and so on of the list: the second of them is empty, the third missing.
    assert [(row["shard"], row["path"]) for row in rows[:4]] == [
        ("shard-000000.tar", "00000000.mp4"),
        ("shard-000000.tar", "00000001.mp4"),
        ("shard-000001.tar", "00000004.mp4"),
        ("shard-000001.tar", "00000005.mp4"),
    ]
    assert (rows[-1]["path"], rows[-1]["label"]) == ("00000001.mp4", 8)
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.uid, member.uname, member.mtime) == (0, "", 0)
                key, kind = member.name.split(".")
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(key, {})[kind] = file.read()
    for row in rows[:-1]:
        content = (out / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["bytes"]]
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        sample = samples.pop(row["path"].split(".")[0])
        assert sample["mp4"] == content
        assert int(sample["cls"]) == row["label"]
        assert json.loads(sample["json"])["frames"] == row["frames"]
        assert ("txt" in sample) == ("caption" in row)
    assert not samples
    assert set(_tree(out)) == {
        *(f"shard-{number:06d}.tar" for number in range(4)),
        "index.jsonl",
        "failed.txt",
        ".lock",
        *_state_files(),
    } - {"shard-000003.tar"}  # of its two, none could be read


def test_files_and_shards_hold_the_same_copies(unbroken):
    files, shards = (_rows(unbroken[per_shard][0]) for per_shard in (None, 3))
    assert [row["sha256"] for row in files] == [row["sha256"] for row in shards]
    assert [row["times"] for row in files] == [row["times"] for row in shards]


def test_the_same_bytes_with_another_number_of_processes(source, unbroken, tmp_path):
    prepare(_settings(source, tmp_path / "out", workers=3, per_shard=3))
    assert _tree(tmp_path / "out") == _tree(unbroken[3][0])


def test_shards_and_indices_can_be_sources(unbroken, tmp_path):
    for number, source in enumerate((unbroken[3][0], unbroken[None][0] / "index.jsonl")):
        report = prepare(Settings(str(source), str(tmp_path / str(number)), Recipe("mjpeg"), workers=2))
        assert (report.copies, report.failures) == (7, {})
        assert [row["label"] for row in _rows(tmp_path / str(number))] == [0, 1, 2, 3, 4, 5, 6, 8]


def test_names_that_would_collide():
    paths = ["x/a.avi", "x/a.mkv", "x/b.mp4", "x/b.mov", "y/a.avi", "c"]
    found = _copy_paths(paths)
    assert found == ["x/a.avi.mp4", "x/a.mkv.mp4", "x/b.mp4", "x/b.mov.mp4", "y/a.mp4", "c.mp4"]
    assert _copy_paths(["a.avi", "a.mp4", "a.avi.mp4"]) == ["a.avi.mp4.mp4", "a.mp4", "a.avi.mp4"]
    assert _copy_paths(["a.avi", "a.mp4", "a.avi.mkv"]) == ["a.avi.mp4.mp4", "a.mp4", "a.avi.mp4"]


def test_a_failed_name_of_several_lines(tmp_path):
    (tmp_path / "source").mkdir()
    name = tmp_path / "source" / "a\tb\nc.mp4"
    name.touch()
    with pytest.raises(CannotPrepare, match=r"none of the 1 videos"):
        prepare(Settings(str(name.parent), str(tmp_path / "out"), FAST, workers=1))
    content = (tmp_path / "out" / "failed.txt").read_bytes()
    assert content.endswith(b"/a\\tb\\nc.mp4\tempty file\n")
    assert read_reasons(content) == {str(name): "empty file"}


def test_a_file_name_that_is_not_text(write_video, tmp_path):
    (tmp_path / "source").mkdir()
    write_video(tmp_path / "source" / "a.mp4", frames=4)
    os.rename(tmp_path / "source" / "a.mp4", os.fsencode(tmp_path) + b"/source/caf\xe9 1, take 2.mp4")
    report = prepare(Settings(str(tmp_path / "source"), str(tmp_path / "out"), FAST, workers=1))
    assert report.copies == 1
    (video,) = read_manifest(str(tmp_path / "out"))
    assert len(read_frames(video, lambda count: [count - 1])) == 1


# Interruptions.


def _in_a_process(action) -> multiprocessing.process.BaseProcess:
    """Fork a process with its own group, as a shell does, which stops at once on a signal."""

    def run() -> None:
        os.setsid()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        action()

    process = fork.Process(target=run)
    process.start()
    return process


def _write_slowly(*arguments):
    """Slow enough for a kill in the middle on a fast machine; forked workers inherit this."""
    time.sleep(0.05)
    written = encode.write_copy(*arguments)
    time.sleep(0.05)
    return written


@pytest.mark.parametrize("per_shard", [None, 3])
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(source, unbroken, tmp_path, monkeypatch, per_shard):
    monkeypatch.setattr(tasks, "write_copy", _write_slowly)
    expected = _tree(unbroken[per_shard][0])
    settings = _settings(source, tmp_path / "out", per_shard=per_shard)
    rng = np.random.default_rng(per_shard or 0)
    midway = 0
    for _ in range(8):
        process = _in_a_process(lambda: prepare(settings))
        time.sleep(rng.uniform(0.05, 0.35))
        process.kill()
        process.join()
        finished = (tmp_path / "out" / "index.jsonl").exists()
        midway += not finished and any((tmp_path / "out").rglob("*.mp4"))
        if finished:
            break
    report = prepare(settings)
    assert report.copies == 7
    assert _tree(tmp_path / "out") == expected
    assert midway, "no kill came in the middle"


class _Killing:
    """Replaces a function: the process is killed before or after its call number `number`."""

    def __init__(self, function, number: int, after: bool) -> None:
        self.function, self.number, self.after, self.calls = function, number, after, 0

    def __call__(self, *args, **kwargs):
        if self.calls == self.number and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.function(*args, **kwargs)
        if self.calls == self.number and self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        return result


@pytest.mark.parametrize(
    ("module", "name", "numbers"),
    [
        (journal.os, "fsync", (0, 3, 9)),  # of the journal, so that a record is there, or its file alone
        (preparing, "write_whole", (0, 1, 2)),  # settings, failures, index
        (preparing.os, "unlink", (0, 1, 3)),  # copies that are in a shard by now
        (preparing.shutil, "rmtree", (0, 1)),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_killed_between_two_steps(source, unbroken, tmp_path, monkeypatch, module, name, numbers, after):
    expected = _tree(unbroken[3][0])
    for number in numbers:
        out = tmp_path / str(number)
        settings = _settings(source, out, per_shard=3)

        def run(settings=settings, number=number):
            main = os.getpid()
            function = getattr(module, name)
            killing = _Killing(function, number, after)
            patched = lambda *args, **kwargs: (killing if os.getpid() == main else function)(*args, **kwargs)  # noqa: E731
            monkeypatch.setattr(module, name, patched)
            prepare(settings)

        process = _in_a_process(run)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        prepare(settings)
        assert _tree(out) == expected


def test_a_half_written_journal_line_is_ignored(source, unbroken, tmp_path):
    settings = _settings(source, tmp_path / "out")
    prepare(settings)
    journal = tmp_path / "out" / ".prepare" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    report = prepare(settings)
    assert report.fresh == 4
    assert _tree(tmp_path / "out") == _tree(unbroken[None][0])


def test_leftovers_of_a_killed_run_go(source, unbroken, tmp_path):
    settings = _settings(source, tmp_path / "out")
    prepare(settings)
    aside = tmp_path / "out" / ".prepare" / "aside"
    aside.mkdir()
    (aside / "3.mp4").write_bytes(b"half a video")
    prepare(settings)
    assert _tree(tmp_path / "out") == _tree(unbroken[None][0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_soon_and_says_how_to_go_on(source, tmp_path, write_video, number):
    long = tmp_path / "long"
    long.mkdir()
    for name in range(4):
        write_video(long / f"{name}.mp4", frames=150, size=(320, 256))
    command = [sys.executable, "-m", "umt_fast.data.prepare", str(long), str(tmp_path / "out"), "--workers", "2"]
    command += ["--codec", "hevc", "--gop", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    until = time.monotonic() + 60
    while not list((tmp_path / "out" / ".prepare").glob("aside/*")) and time.monotonic() < until:
        time.sleep(0.02)
    started = time.monotonic()
    os.killpg(process.pid, number)  # as a terminal does
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 20
    assert process.returncode == 130
    assert re.search(r"stopped\. 0 of 4 videos are copied; the same command continues from there", errors)
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / ".prepare" / "aside").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left


def test_workers_end_when_their_parent_is_killed(source, tmp_path):
    out = tmp_path / "out"
    process = _in_a_process(lambda: prepare(_settings(source, out)))
    while not (out / ".prepare" / "aside").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.join()
    with lock_folder(out, patience=2.0):  # the workers, who inherited the lock, are gone
        pass


# Refusals.


def test_other_options_are_refused_by_name(source, unbroken):
    out, _report = unbroken[None]
    with pytest.raises(CannotPrepare, match=r"--gop was 4, now 2.*--quality was 22, now 30.*another OUT"):
        prepare(_settings(source, out, recipe=Recipe("h264", 32, 2, 30)))
    with pytest.raises(CannotPrepare, match="--per-shard was None, now 3"):
        prepare(_settings(source, out, per_shard=3))


def test_another_source_is_refused(source, unbroken, tmp_path):
    out, _report = unbroken[None]
    (tmp_path / "other.csv").write_text(source.read_text())
    with pytest.raises(CannotPrepare, match=r"SOURCE was .*train.csv, now .*other.csv"):
        prepare(_settings(tmp_path / "other.csv", out, prefix=str(source.parent)))


def test_only_one_process_at_a_time(source, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_LOCK_PATIENCE", 0.1)
    with lock_folder(tmp_path / "out"), pytest.raises(FolderInUse, match="another process is using"):
        prepare(_settings(source, tmp_path / "out"))


def test_a_folder_with_other_files_is_refused(source, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CannotPrepare, match="other files"):
        prepare(_settings(source, tmp_path))


@pytest.mark.parametrize("out", ["", "copies", "a/b"])
def test_out_within_source_is_refused(source, out):
    with pytest.raises(CannotPrepare, match="lies in SOURCE"):
        prepare(Settings(str(source.parent), str(source.parent / out)))


def test_out_that_is_a_file(source, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(CannotPrepare, match="is a file; give a folder"):
        prepare(_settings(source, tmp_path / "out"))


def test_nothing_readable(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.mp4").touch()
    with pytest.raises(CannotPrepare, match=r"none of the 1 videos.*failed.txt"):
        prepare(Settings(str(tmp_path / "source"), str(tmp_path / "out"), workers=1))
    assert "empty file" in (tmp_path / "out" / "failed.txt").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["source"],
        ["source", "out", "--verify", "out"],
        ["source", "out", "--workers", "0"],
        ["s", "o", "--time-limit", "0"],
        ["s", "o", "--time-limit", "long"],
        ["s", "o", "--read-timeout", "nan"],
        ["s", "o", "--gop", "9"],
    ],
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_errors_have_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="error: cannot read the list"):
        main([str(tmp_path / "none.csv"), str(tmp_path / "out")])


# What goes wrong on the way.


def _full(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("function", ["write_copy", "put_in_place", "write_shard"])
def test_a_full_disk_ends_it_with_what_is_done_kept(source, unbroken, tmp_path, monkeypatch, function):
    settings = _settings(source, tmp_path / "out", per_shard=3, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, function, _full)
        words = r"No space left on device\. \d+ of 11 videos are copied; the same command continues from there"
        with pytest.raises(CannotPrepare, match=words):
            prepare(settings)
    prepare(settings)
    assert _tree(tmp_path / "out") == _tree(unbroken[3][0])


def test_a_full_disk_that_ffmpeg_does_not_report(source, tmp_path, monkeypatch):
    def write(*_args):
        raise encode.BadCopy("the copy does not read: truncated")

    monkeypatch.setattr(tasks, "write_copy", write)
    monkeypatch.setattr(tasks, "_NEARLY_FULL", 1 << 60)
    with pytest.raises(CannotPrepare, match="no space left"):
        prepare(_settings(source, tmp_path / "out"))


def test_a_video_that_kills_its_worker_is_one_failure(source, unbroken, tmp_path, monkeypatch):
    write = tasks.write_copy

    def crash(video, *rest):
        if video.path.endswith("3.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(video, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write_copy", crash)
        report = prepare(_settings(source, tmp_path / "out"))
    (reason,) = [reason for name, reason in report.failures.items() if name.endswith("3.mp4")]
    assert "SIGKILL, 2 times; is there memory enough?" in reason
    assert report.copies == 6
    assert prepare(_settings(source, tmp_path / "out")).copies == 7  # tried again
    assert _tree(tmp_path / "out") == _tree(unbroken[None][0])


@pytest.mark.parametrize("per_shard", [None, 3])
def test_a_video_that_never_ends_is_one_failure(source, unbroken, tmp_path, monkeypatch, per_shard):
    write = tasks.write_copy

    def spin(video, *rest):
        while video.path.endswith("3.mp4"):
            pass
        return write(video, *rest)

    settings = _settings(source, tmp_path / "out", per_shard=per_shard)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write_copy", spin)
        report = prepare(dataclasses.replace(settings, time_limit=2.0))
    (reason,) = [reason for name, reason in report.failures.items() if name.endswith("3.mp4")]
    assert reason == "not done after 2 seconds; damaged, or in need of a longer --time-limit"
    assert report.copies == 6
    assert multiprocessing.active_children() == []
    assert prepare(settings).copies == 7  # tried again
    assert _tree(tmp_path / "out") == _tree(unbroken[per_shard][0])


@pytest.mark.parametrize("per_shard", [None, 3])
def test_a_repaired_input_is_copied(source, unbroken, tmp_path, monkeypatch, per_shard):
    def refuse(video, *rest):
        if video.path.endswith(("2.avi", "6.mp4")):
            raise BadVideo("not yet")
        return encode.write_copy(video, *rest)

    settings = _settings(source, tmp_path / "out", per_shard=per_shard)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write_copy", refuse)
        assert prepare(settings).copies == 5
    prepare(settings)
    assert _tree(tmp_path / "out") == _tree(unbroken[per_shard][0])


def test_a_list_may_grow(source, unbroken, tmp_path):
    listing = tmp_path / "train.csv"
    lines = source.read_text().splitlines(keepends=True)
    for part in (lines[:6], lines):
        listing.write_text("".join(part))
        report = prepare(_settings(listing, tmp_path / "out", prefix=str(source.parent), per_shard=3))
    assert report.copies == 7
    found, expected = (_tree(out) for out in (tmp_path / "out", unbroken[3][0]))
    del found[".prepare/settings.json"], expected[".prepare/settings.json"]
    assert found == expected


# The pool.


def _square_or_die(number: int) -> int:
    if number == 3:
        faulthandler.disable()  # this crash is expected
        os.kill(os.getpid(), signal.SIGSEGV)
    return number**2


def test_pool_survives_its_workers():
    with Workers(_square_or_die, 2) as pool:
        for number in range(6):
            pool.add(number)
        outcomes = {}
        for task, outcome in pool.results():
            outcomes[task] = outcome
            if task == 5:
                pool.add(7)
    died = outcomes.pop(3)
    assert isinstance(died, Died)
    assert "SIGSEGV" in str(died)
    assert outcomes == {0: 0, 1: 1, 2: 4, 4: 16, 5: 25, 7: 49}


def _sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_pool_kills_overdue_workers():
    begun = time.monotonic()
    with Workers(_sleep, 2) as pool:
        pool.add(60, time_limit=0.5)
        for seconds in (0.01, 0.02, 0.03):
            pool.add(seconds, time_limit=30)
        pool.add(0.6)  # has no limit
        outcomes = dict(pool.results())
    assert time.monotonic() - begun < 30
    overdue = outcomes.pop(60)
    assert isinstance(overdue, Died)
    assert str(overdue) == "not done after 0.5 seconds; damaged, or in need of a longer --time-limit"
    assert outcomes == {seconds: seconds for seconds in (0.01, 0.02, 0.03, 0.6)}


# Verification.


@pytest.fixture
def made(source, tmp_path):
    def make(per_shard: int | None = None) -> Path:
        prepare(_settings(source, tmp_path / "made", per_shard=per_shard))
        return tmp_path / "made"

    return make


@pytest.mark.parametrize("per_shard", [None, 3])
def test_verify_good_copies(unbroken, per_shard):
    out = unbroken[per_shard][0]
    before = _tree(out)
    verdict = verify.verify(str(out), 2)
    assert verdict.problems == []
    assert (verdict.checked, verdict.compared) == (7, 7)
    assert verdict.lowest is not None
    assert 20 < verdict.lowest[0] < 60
    assert str(verdict).endswith("all is right")
    assert _tree(out) == before


def _bad(out: Path) -> dict[str, str]:
    return {os.path.relpath(file, out): problem for file, problem in verify.verify(str(out), 2).problems}


@pytest.mark.parametrize("per_shard", [None, 3])
def test_verify_finds_a_flipped_bit(source, made, per_shard):
    out = made(per_shard)
    file = "b/5.mp4" if per_shard is None else "shard-000001.tar"
    data = bytearray((out / file).read_bytes())
    data[2000] ^= 16
    (out / file).write_bytes(data)
    problems = _bad(out)
    assert set(problems) == {file}
    assert "its bytes have changed" in problems[file]
    os.unlink(out / file)  # the repair that it names
    assert file in _bad(out)
    prepare(_settings(source, out, per_shard=per_shard))
    assert _bad(out) == {}


def test_verify_finds_missing_cut_and_swapped_files(made):
    out = made()
    os.unlink(out / "a/0.mp4")
    os.truncate(out / "a/2.mp4", 500)
    os.rename(out / "b/1.mp4", out / "b/x")
    os.rename(out / "b/3.mp4", out / "b/1.mp4")
    os.rename(out / "b/x", out / "b/3.mp4")
    problems = _bad(out)
    assert set(problems) == {"a/0.mp4", "a/2.mp4", "b/1.mp4", "b/3.mp4"}
    assert "No such file" in problems["a/0.mp4"]
    assert "500 bytes" in problems["a/2.mp4"]


def _unless_bad(video: Video, other: Video) -> Video:
    return other if Path(video.path).stem.isdigit() else video


def test_verify_finds_a_copy_of_another_video(source, made, monkeypatch):
    """Its bytes fit the index; only a comparison with the source finds it."""
    other = Video(str(source.parent / "b/1.mkv"))
    write = tasks.write_copy
    monkeypatch.setattr(tasks, "write_copy", lambda video, *rest: write(_unless_bad(video, other), *rest))
    problems = _bad(made())
    assert set(problems) == {"a/0.mp4", "a/2.mp4", "b/3.mp4", "a/4.mp4", "b/5.mp4", "a/6.mp4"}
    assert "frames, its source" in problems["a/0.mp4"]


def test_verify_compares_pictures(source, made, monkeypatch, write_video, tmp_path):
    upside = write_video(tmp_path / "other.mp4", frames=24, seed=99)
    write = tasks.write_copy
    replace = {"0.mp4": Video(str(upside))}
    monkeypatch.setattr(
        tasks, "write_copy", lambda video, *rest: write(replace.get(Path(video.path).name, video), *rest)
    )
    problems = _bad(made())
    assert set(problems) == {"a/0.mp4"}
    assert "is not like its source" in problems["a/0.mp4"]


def test_verify_accepts_strong_colours(tmp_path):
    """4:2:0 blurs colour: this picture has a PSNR of 19 dB in RGB and 34 dB in luma."""
    (tmp_path / "gifs").mkdir()
    blocks = np.random.default_rng(10).integers(0, 255, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(tmp_path / "gifs" / "a.gif"), "w") as container:
        stream = container.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "rgb8"
        for shift in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(blocks, shift, 1), format="rgb24")))
        container.mux(stream.encode())
    prepare(_settings(tmp_path / "gifs", tmp_path / "out"))
    assert _bad(tmp_path / "out") == {}


def test_verify_finds_an_index_of_other_times(made):
    out = made()
    index = out / "index.jsonl"
    rows = index.read_text().splitlines()
    row = json.loads(rows[1])
    row["keys"] = [[3, 7]]
    other = json.loads(rows[3])
    other["packets"]["first"] += 1
    index.write_text("\n".join([rows[0], json.dumps(row), rows[2], json.dumps(other), *rows[4:]]))
    problems = _bad(out)
    assert problems == {
        "a/0.mp4": "its keys are not those of the index",
        "a/2.mp4": "its packets are not at the offsets of the index",
    }


def test_error_names_a_damaged_row_of_an_index(made, tmp_path):
    out = made()
    index = out / "index.jsonl"
    rows = index.read_bytes().split(b"\n")
    for damage in (rows[3][:-20], b"[]", rows[3].replace(b'"keys": [[4, ', b'"keys": [[400, ')):
        index.write_bytes(b"\n".join([*rows[:3], damage, *rows[4:]]))
        with pytest.raises(BadIndex, match="row 3 is not a row"):
            verify.verify(str(out), 1)
        with pytest.raises(BadIndex, match="row 3 is not a row"):
            prepare(Settings(str(out), str(tmp_path / "again"), FAST, workers=1))


def test_verify_without_sources(source, made):
    out = made()
    settings = out / ".prepare" / "settings.json"
    settings.write_text(settings.read_text().replace("train.csv", "gone.csv"))
    verdict = verify.verify(str(out), 2)
    assert (verdict.checked, verdict.compared, verdict.problems) == (7, 0, [])
    assert "not compared with the sources" in str(verdict)
    assert "all is right" not in str(verdict)


def test_verify_elsewhere_does_not_say_that_all_is_right(source, made, monkeypatch, capsys, tmp_path):
    """With a relative SOURCE that does not exist in the other working directory."""
    out = made()
    settings = out / ".prepare" / "settings.json"
    given = json.loads(settings.read_text())
    settings.write_text(json.dumps({**given, "SOURCE": os.path.relpath(given["SOURCE"])}))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["--verify", str(out), "--workers", "1"])
    assert caught.value.code == 1
    assert "nothing was compared with a source" in capsys.readouterr().out


def test_verify_command(made, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    out = made()
    with pytest.raises(SystemExit) as caught:
        main(["--verify", str(out), "--workers", "1"])
    assert caught.value.code == 0
    os.unlink(out / "a/0.mp4")
    with pytest.raises(SystemExit) as caught:
        main(["--verify", str(out)])
    assert caught.value.code == 1
    assert f"1 file is not right: rm {out / 'a/0.mp4'}, and run prepare again" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"has no index\.jsonl"):
        main(["--verify", str(out / "b")])


def copy_record(name: str) -> dict:
    row = {"path": name, "bytes": 1, "sha256": "0", "codec": "mjpeg", "width": 1, "height": 1, "frames": 1, "fps": 1.0}
    return {"row": row, "source_bytes": 1, "seconds": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["row"].pop("path"),
        lambda content: content["row"].update(bytes="1"),
        lambda content: content.update(row=[]),
        lambda content: content.update(source_bytes=None),
        lambda content: content.pop("seconds"),
        lambda content: content.update(offsets=[]),
    ],
)
def test_a_journal_of_another_shape_ends_before_the_strange_line(tmp_path, change):
    """Found by fuzzing."""
    journal = Journal(tmp_path / "journal.jsonl")
    for name in ("a", "b", "c"):
        content = copy_record(name)
        if name == "b":
            change(content)
        journal.add("copy", name, content)
    journal.close()
    assert list(Journal(tmp_path / "journal.jsonl").copies) == ["a"]


def test_journal_order(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for name in ("c", "a", "b"):
        journal.add("copy", name, copy_record(name))
    journal.add("copy", "a", None)
    journal.close()
    journal.compact(["b", "c"])
    assert list(Journal(tmp_path / "journal.jsonl").copies) == ["b", "c"]


def test_recipe_is_checked_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError):
        Recipe(codec="none")

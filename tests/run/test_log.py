"""The log survives faults of its files and of its reader."""

from __future__ import annotations

import io
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from umt_fast.errors import RunError
from umt_fast.run.log import LossBuffer, RunLog, Throughput, read_metrics, say
from umt_fast.run.train_state import TrainState
from umt_fast.run.world import World

ALONE = World(0, 1, torch.device("cpu"))


def state_at(step: int) -> TrainState:
    model = torch.nn.Linear(2, 2)
    return TrainState(model, torch.optim.AdamW(model.parameters()), ALONE, None, step=step)


def batch(paths: list[str], bad: list[tuple[str, str]] | None = None) -> Any:
    return SimpleNamespace(paths=paths, bad=bad or [])


def losses_of(step: int, loss: float = 1.0) -> LossBuffer:
    buffer = LossBuffer()
    buffer.add(
        step, [{"loss": torch.tensor(loss)}, {"loss": torch.tensor(loss + 2)}], torch.tensor(0.5), [batch(["a.mp4"])]
    )
    return buffer


def test_a_line_holds_step_time_mfu_and_memory(tmp_path, capsys):
    with RunLog(tmp_path, ALONE, 0, 10, 4, Throughput(1e6, 1e12)) as log:
        log.report(state_at(1), losses_of(1), lr=0.1)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["step"], line["loss"], line["grad_norm"]) == (1, 2.0, 0.5)
    assert 0 < line["step_ms"] < 10_000
    assert line["clips_per_second"] == pytest.approx(4e3 / line["step_ms"], rel=0.01)
    assert line["mfu"] == pytest.approx(1e6 / (line["step_ms"] / 1e3) / 1e12, abs=1e-4)
    assert 0.05 < line["peak_gib"] < 100
    said = capsys.readouterr().out
    for part in ("step 1/10", "loss 2.0000", "ms ", "MFU ", "peak GiB "):
        assert part in said


def test_a_loss_that_is_not_finite_names_its_step_and_files(tmp_path):
    with RunLog(tmp_path, ALONE, 0, 10, 4) as log, pytest.raises(RunError, match=r"step 3 .* a\.mp4"):
        log.report(state_at(3), losses_of(3, float("nan")))


def test_bad_files_above_the_limit_end_the_run(tmp_path):
    buffer = losses_of(1)
    bad = [("b.mp4", "broken"), ("c.mp4", "broken"), ("b.mp4", "broken")]
    buffer.add_data([batch([], bad[:2]), batch([], bad[2:])], 0.0)
    with RunLog(tmp_path, ALONE, 0, 10, 4) as log, pytest.raises(RunError, match="2 videos"):
        log.report(state_at(1), buffer, max_bad=1)


def test_lines_that_are_not_records_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}]
    lines = [b'{"step": 2, "loss": 1.0}', b"null", b"[1, 2]", b'"text"', b"3", b"\xff\xfe", b"", b'{"loss": 1}']
    lines += [b"[" * 100_000, b'{"step": "2"}', b'{"step": 4, "loss": 0.5}', b'{"step": 6, "lo']
    path.write_bytes(b"\n".join(lines))
    assert read_metrics(path) == good
    RunLog(tmp_path, ALONE, 2, 10, 4).close()  # a run that resumes at step 2 drops later records
    assert path.read_text() == json.dumps(good[0]) + "\n"
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_with_links_and_pipes(tmp_path, capsys):
    """Nothing is written through a link in the folder, and no pipe is waited for."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    outside.write_text("mine")
    for name in ("bad_files.txt", "loss.png", "metrics.jsonl"):
        (folder / "links").mkdir(parents=True, exist_ok=True)
        (folder / "pipes").mkdir(exist_ok=True)
        (folder / "links" / name).symlink_to(outside)
        os.mkfifo(folder / "pipes" / name)
    for kind in ("links", "pipes"):
        with RunLog(folder / kind, ALONE, 1, 2, 4) as log:
            if kind == "links":
                (folder / kind / "bad_files.txt").symlink_to(outside)
            else:
                os.mkfifo(folder / kind / "bad_files.txt")
            losses = losses_of(2)
            losses.add_data([batch([], [("b.mp4", "broken")])], 0.0)
            log.report(state_at(2), losses, lr=1.0)
            log.finish(state_at(2), "loss")
        assert (folder / kind / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert outside.read_text() == "mine"
    assert capsys.readouterr().out.count("cannot write") == 2


def test_records_without_a_loss_are_not_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1, "loss": "x", "lr": null}\n')
    with RunLog(tmp_path, ALONE, 1, 2, 4) as log:
        log.report(state_at(2), losses_of(2), lr=1.0)
        log.finish(state_at(2), "loss")
    assert (tmp_path / "loss.png").exists()


def test_a_run_that_was_killed_before_its_picture_is_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0, "lr": 0.5}\n')
    with RunLog(tmp_path, ALONE, 2, 2, 4) as log:
        log.finish(state_at(2), "loss")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "loss.png").write_bytes(b"mine")
        log.finish(state_at(2), "loss")
    assert (tmp_path / "loss.png").read_bytes() == b"mine"


def test_a_picture_without_room_ends_no_run(tmp_path, small_disk, capsys):
    with RunLog(tmp_path, ALONE, 0, 2, 4) as log:
        log.report(state_at(1), losses_of(1), lr=1.0)
        with small_disk(1000):
            log.finish(state_at(1), "loss")
    assert "note: cannot write" in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if "png" in path.name]


def test_a_folder_that_is_removed_is_made_anew(tmp_path):
    folder = tmp_path / "run"
    with RunLog(folder, ALONE, 0, 10, 4) as log:
        log.report(state_at(1), losses_of(1))
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
        log.report(state_at(2), losses_of(2))
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [2]
    (events,) = (folder / "tensorboard").glob("events.*")
    accumulator = EventAccumulator(str(events)).Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [(2, 2.0)]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf8(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    say("skipped v/fehlt-ü-视频\udcff.mp4")
    assert rb"\u89c6" in written.getvalue()
    assert written.getvalue().endswith(b".mp4\n")


def test_a_reader_that_is_gone(monkeypatch):
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            raise OSError

    monkeypatch.setattr(sys, "stdout", Gone())
    say("nobody reads this")


def test_a_full_disk_ends_no_run_and_leaves_whole_lines(tmp_path, small_disk, capsys):
    with RunLog(tmp_path, ALONE, 0, 10, 4) as log:
        log.report(state_at(1), losses_of(1))
        size = (tmp_path / "metrics.jsonl").stat().st_size
        buffer = losses_of(2)
        buffer.add_data([batch([], [("b.mp4", "broken " * 100)])], 0.0)
        with small_disk(size + 20):
            log.report(state_at(2), buffer)
            log.report(state_at(3), losses_of(3))
        log.report(state_at(4), losses_of(4))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 4]
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert [event.step for event in EventAccumulator(str(events)).Reload().Scalars("loss")] == [1, 4]
    said = capsys.readouterr().out
    for name in ("metrics.jsonl", "bad_files.txt", "events.out"):
        assert len([line for line in said.splitlines() if "cannot write" in line and name in line]) == 1
    assert "step 4/10" in said

"""The trainer as a program: its files, how it stops, how it resumes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from umt_fast import VideoStudent
from umt_fast.config import PretrainConfig
from umt_fast.recipe import load_recipe
from umt_fast.run import checkpoint
from umt_fast.run.stop import EXIT_STOPPED
from umt_fast.weights import load_umt_student, read_weights


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(left: Path, right: Path) -> None:
    one, two = (checkpoint.load_checkpoint(path) for path in (left, right))
    for key, value in one["model"].items():
        assert torch.equal(value, two["model"][key]), key
    assert one["clips_seen"] == two["clips_seen"]


def test_a_run_leaves_metrics_pictures_and_a_loadable_checkpoint(trainer):
    status, output = trainer.run("--run.name", "a")
    assert status == 0, output
    folder = trainer.folder / "a"
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(2, 17, 2))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"loss", "grad_norm", "lr", "clips_per_second", "epoch", "data_wait_seconds"} <= lines[0].keys()
    for picture in ("loss.png", "visible.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.*"))
    assert "RANDOM weights" in output
    for named in ("decoder pyav", "attention", "kernels", "precision"):
        assert named in output
    assert [path.name for path in trainer.checkpoints("a")] == [f"clips_{n:010d}.pth" for n in (32, 48, 64)]
    student = VideoStudent(load_recipe(PretrainConfig, trainer.recipe).student)
    load_umt_student(student, read_weights(trainer.checkpoints("a")[-1]))


@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_exact(trainer, processes):
    options = ["--optim.batch-size", "2"] if processes == 2 else []
    status, output = trainer.run("--run.name", "whole", *options, processes=processes)
    assert status == 0, output
    status, output = trainer.run("--run.name", "parts", "--run.stop-at", "8", *options, processes=processes)
    assert status == 0, output
    assert trainer.checkpoints("parts")[-1].name == "clips_0000000032.pth"
    status, output = trainer.run("--run.name", "parts", *options, processes=processes)
    assert status == 0, output
    assert "going on from" in output
    assert_same_weights(trainer.checkpoints("whole")[-1], trainer.checkpoints("parts")[-1])
    whole, parts = (metrics(trainer.folder / name) for name in ("whole", "parts"))
    assert [(line["step"], line["loss"]) for line in whole] == [(line["step"], line["loss"]) for line in parts]


def test_a_run_goes_on_with_another_number_of_processes(trainer, demo_videos):
    """It resumes at the same clip and divides the rest of the epoch again; a longer list is reported."""
    status, output = trainer.run(
        "--run.name", "a", "--optim.batch-size", "1", "--run.stop-at", "3", "--data.crops-per-clip", "1", processes=2
    )
    assert status == 0, output
    longer = trainer.folder / "longer.csv"
    longer.write_text(demo_videos.read_text() * 2)
    other = trainer.folder / "other.csv"
    other.write_text("".join(sorted(longer.read_text().splitlines(keepends=True), reverse=True)))
    status, output = trainer.run("--run.name", "a", "--optim.batch-size", "3", "--data.train", str(longer))
    assert status == 0, output
    assert "at step 2\n" in output  # 6 clips, 3 a step
    assert "note: list was" in output
    assert "note: videos was 8 when it was saved, now 16" in output
    assert "note: total steps was 32 when it was saved, now 42" in output
    assert trainer.checkpoints("a")[-1].name == f"clips_{6 + 40 * 3:010d}.pth"
    status, output = trainer.run("--run.name", "a", "--optim.batch-size", "3", "--data.train", str(other))
    assert status == 0, output
    assert "note: list was" in output
    assert "note: videos was" not in output  # only their order differs


def test_several_crops_of_a_video(trainer):
    status, output = trainer.run("--run.name", "a", "--data.crops-per-clip", "2", "--run.stop-at", "2")
    assert status == 0, output
    assert "8 epochs = 32 steps" in output
    assert "waited for data" in output
    assert 0 <= metrics(trainer.folder / "a")[-1]["data_stall"] <= 1
    status, output = trainer.run("--run.name", "a", "--data.crops-per-clip", "4")
    assert status == 1
    assert "data.crops_per_clip = 2, this run has 4" in output
    status, output = trainer.run("--run.name", "b", "--data.crops-per-clip", "3")
    assert status == 2
    assert "batch_size = 4 is not a positive multiple of crops_per_clip = 3" in " ".join(
        output.replace("│", " ").split()
    )


def test_masking_rules_accumulation_and_clipping_run(trainer):
    for rule in ("random", "tube"):
        options = ("--mask.rule", rule, "--optim.accumulate", "2", "--optim.clip-grad", "0.5", "--optim.epochs", "4")
        status, output = trainer.run("--run.name", rule, *options, "--data.workers", "0")
        assert status == 0, output
        assert metrics(trainer.folder / rule)[-1]["step"] == 4


def test_several_masks_per_clip_with_a_chosen_attention_and_recomputation(trainer):
    options = ("--mask.masks-per-clip", "2", "--compute.attention", "math", "--compute.recompute", "selective")
    status, output = trainer.run("--run.name", "m", *options, "--optim.epochs", "4", "--data.workers", "0")
    assert status == 0, output
    assert "student math" in output
    assert "recompute: selective" in output
    assert metrics(trainer.folder / "m")[-1]["step"] == 8


def test_an_attention_backend_that_is_missing_is_named(trainer):
    status, output = trainer.run("--compute.attention", "flash_attn_4")
    assert status == 1
    assert "error: compute.attention = flash_attn_4" in output
    assert "pip install flash-attn-4" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_the_run_goes_on_from_there(trainer, number, processes):
    """All processes get the signal: from a terminal directly, under torchrun from torchrun."""
    options = ("--run.name", "s", "--optim.epochs", "500")
    torchrun = None if processes == 1 else ("--nproc-per-node", "2")
    child = trainer.start_program(*options, "--run.save-every", "100000", torchrun=torchrun)
    trainer.wait_for_step(child, 4)
    os.killpg(child.pid, number) if processes == 1 else os.kill(child.pid, number)
    output, _ = child.communicate(timeout=60)
    if processes == 1:  # torchrun reports its own signal
        assert child.returncode == EXIT_STOPPED, output
    assert "saving after this step" in output
    (saved,) = trainer.checkpoints("s")
    step = checkpoint.load_checkpoint(saved)["clips_seen"] // (4 * processes)
    status, output = trainer.run(*options, "--run.stop-at", str(step + 2), processes=processes)
    assert status == 0, output
    assert f"going on from {saved} at step {step}" in output


def test_a_second_signal_ends_the_run_at_once(trainer):
    large = ("--student.width", "256", "--student.depth", "12")  # saving it takes a moment
    child = trainer.start("--run.name", "s", "--optim.epochs", "500", "--optim.batch-size", "64", *large)
    trainer.wait_for_step(child, 2)
    while child.poll() is None:  # two that come before Python looks are one
        child.send_signal(signal.SIGINT)
        time.sleep(0.02)
    output, _ = child.communicate(timeout=20)
    assert child.returncode == 128 + signal.SIGINT, output
    assert "without saving" in output
    assert not checkpoint.list_checkpoints(trainer.folder / "s" / "checkpoints")


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(trainer):
    status, output = trainer.run("--run.name", "n", "--run.stop-at", "4")
    assert status == 0, output
    before = trainer.checkpoints("n")[-1].read_bytes()
    status, output = trainer.run("--run.name", "n", "--optim.lr", "1e38", "--optim.warmup-epochs", "0")
    assert status != 0
    assert "is not finite" in output
    assert "Last good checkpoint" in output
    assert "clips_0000000016.pth" in output
    assert ".mp4" in output
    assert "Traceback" not in output
    assert [path.name for path in trainer.checkpoints("n")] == ["clips_0000000016.pth"]
    assert trainer.checkpoints("n")[-1].read_bytes() == before


def test_bad_files_are_listed_and_skipped(trainer, demo_videos):
    (trainer.folder / "broken.mp4").write_bytes(b"not a video")
    listing = trainer.folder / "list.csv"
    listing.write_text(demo_videos.read_text() + f"{trainer.folder / 'broken.mp4'},0\n")
    status, output = trainer.run("--run.name", "b", "--data.train", str(listing), "--data.max-bad-fraction", "0.2")
    assert status == 0, output
    lines = (trainer.folder / "b" / "bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(trainer.folder / "broken.mp4")]
    assert "not readable as video" in lines[0]


def test_strange_file_names_do_no_harm(trainer, demo_videos):
    """Bytes that are not text, mathematical text, a colon, a line separator."""
    folder = trainer.folder / "strange"
    folder.mkdir()
    video = next(demo_videos.parent.glob("*.mp4")).read_bytes()
    for name in (b"x$\\foo$.mp4", b"lat\xff.mp4", b"12:30.mp4", "a\u2028b.mp4".encode()):
        (folder / os.fsdecode(name)).write_bytes(video)
    (folder / os.fsdecode(b"broken\xfe.mp4")).write_bytes(b"no video")
    options = ("--data.max-bad-fraction", "0.5", "--optim.batch-size", "1", "--optim.epochs", "2")
    status, output = trainer.run("--run.name", "folder", "--data.train", str(folder), *options)
    assert status == 0, output
    assert (trainer.folder / "folder" / "bad_files.txt").read_bytes().count(b"\n") == 1
    listing = trainer.folder / "names.txt"
    listing.write_bytes(b"".join(os.fsencode(path) + b"\n" for path in sorted(folder.iterdir())))
    status, output = trainer.run("--run.name", "list", "--data.train", str(listing), *options)
    assert status == 0, output


def test_two_runs_do_not_share_a_folder(trainer):
    child = trainer.start("--run.name", "two", "--optim.epochs", "500")
    trainer.wait_for_step(child, 2)
    status, output = trainer.run("--run.name", "two")
    assert status != 0
    assert "another run is using" in output


def test_too_many_bad_files_stop_the_run(trainer, demo_videos):
    listing = trainer.folder / "list.csv"
    listing.write_text(demo_videos.read_text() + "".join(f"/gone/{n}.mp4,0\n" for n in range(4)))
    status, output = trainer.run("--run.name", "b", "--data.train", str(listing))
    assert status != 0
    assert "max-bad-fraction" in output
    assert "Traceback" not in output
    assert "No such file" in (trainer.folder / "b" / "bad_files.txt").read_text()


def test_a_full_disk_leaves_the_last_checkpoint_whole(trainer):
    status, output = trainer.run("--run.name", "d", "--run.stop-at", "4")
    assert status == 0, output
    before = trainer.checkpoints("d")[-1].read_bytes()

    status, output = trainer.run("--run.name", "d", largest_file=len(before) // 2)
    assert status != 0
    assert "error: cannot write" in output
    assert "Traceback" not in output
    assert [path.read_bytes() for path in trainer.checkpoints("d")] == [before]


def test_mistakes_end_with_a_one_line_error(trainer, tmp_path):
    cases = {
        ("--data.train", "/nowhere.csv"): "cannot read the list /nowhere.csv",
        ("--optim.batch-size", "4096"): "lower --optim.batch-size",
        ("--run.name", "a/b"): "is not a plain folder name",
        ("--run.name", ".."): "is not a plain folder name",
        ("--run.name", "a\0b"): "is not a plain folder name",
        ("--run.dir", "a\0b"): "is not the name of a folder",
        ("--teacher-weights", "/nowhere.pt"): "no weights at /nowhere.pt",
        ("--run.resume", "/nowhere.pth"): "cannot read checkpoint /nowhere.pth",
        ("--teacher-weights", ""): "no teacher weights are named",
        ("--teacher.width", "512"): "with teachers up to 256 wide",
        ("--run.stop-at", "0"): "run.stop_at = 0: must be a finite number >= 1",
        ("--optim.lr", "nan"): "optim.lr = nan: must be a finite number >= 0",
        ("--data.read-timeout", "inf"): "data.read_timeout = inf: must be a finite number >= 1",
        ("--data.flip", "7"): "data.flip = 7.0: must be in [0, 1]",
    }
    for options, message in cases.items():
        status, output = trainer.run(*options)
        assert status != 0
        assert message in " ".join(output.replace("│", " ").split())
        assert "Traceback" not in output


def test_another_model_does_not_resume(trainer):
    status, output = trainer.run("--run.name", "m", "--run.stop-at", "4")
    assert status == 0, output
    status, output = trainer.run("--run.name", "m", "--student.heads", "4")
    assert status != 0
    assert "student.heads = 2, this run has 4" in output
    for options, message in (
        (("--run.seed", "9"), "run.seed = 0, this run has 9"),
        (("--teacher-weights", "/other.pth"), "teacher_weights = random, this run has /other.pth"),
    ):
        status, output = trainer.run("--run.name", "m", *options)
        assert status != 0
        assert message in output
    status, output = trainer.run("--run.name", "m", "--run.resume", "never")
    assert status != 0
    assert "already holds" in output
    status, output = trainer.run("--run.name", "m", "--run.stop-at", "8")
    assert status == 0, output
    early, late = str(trainer.checkpoints("m")[0]), str(trainer.checkpoints("m")[-1])
    status, output = trainer.run("--run.name", "m", "--run.resume", early)
    assert status != 0
    assert f"already holds {Path(late).name}" in output
    status, output = trainer.run("--run.name", "branch", "--run.resume", early, "--run.stop-at", "6")
    assert status == 0, output
    assert "at step 4" in output

"""Runs that are killed, stall, start wrongly or lose their reader continue, or end with one clear line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from train import pretrain
from umt_fast.config import PretrainConfig
from umt_fast.recipe import load_recipe
from umt_fast.run import checkpoint, pictures, world
from umt_fast.run.stop import EXIT_STOPPED
from umt_fast.run.world import World
from umt_fast.weights import read_weights

ALONE = World(0, 1, torch.device("cpu"))
ENDLESS = ("--optim.epochs", "500", "--run.save-every", "100000")


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_is_started_again_at_once(trainer):
    options = ("--run.name", "k", "--data.workers", "2", *ENDLESS)
    child = trainer.start(*options, "--run.save-every", "2")
    trainer.wait_for_step(child, 4)
    child.kill()  # its workers are not
    child.wait()
    status, output = trainer.run(*options, "--run.stop-at", "6")
    assert status == 0, output
    assert "going on from" in output


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_warnings_of_schedulers_save_the_run(trainer, number):
    child = trainer.start("--run.name", "s", *ENDLESS, "--data.workers", "0")
    trainer.wait_for_step(child, 2)
    child.send_signal(number)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == EXIT_STOPPED, output
    assert f"{number.name}: saving after this step" in output
    assert len(trainer.checkpoints("s")) == 1
    assert "Traceback" not in output


def test_a_second_signal_ends_a_rank_that_waits_for_another(trainer):
    options = ("--run.name", "g", *ENDLESS, "--data.workers", "0")
    main, other = trainer.start_ranks(options, options)
    trainer.wait_for_step(main, 2)
    other.send_signal(signal.SIGSTOP)
    time.sleep(1)  # the main rank is in a collective now
    main.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    main.send_signal(signal.SIGTERM)
    output, _ = main.communicate(timeout=10)
    assert main.returncode == 128 + signal.SIGTERM, output
    assert "ended without saving" in output


def call_the_roll_quickly(arguments: list[str]) -> None:
    world.ANSWER_SECONDS = 3.0
    pretrain.main(arguments)


def test_a_rank_that_stalls_is_named(trainer):
    options = ("--run.name", "t", *ENDLESS, "--data.workers", "0", "--run.step-timeout", "3")
    main, other = trainer.start_ranks(options, options, main=call_the_roll_quickly)
    trainer.wait_for_step(main, 2)
    other.send_signal(signal.SIGSTOP)
    output, _ = main.communicate(timeout=60)
    assert main.returncode == 1
    assert "rank 1 does not answer" in output
    assert "Traceback" not in output


def test_ranks_that_were_started_differently_refuse(trainer):
    options = ("--run.name", "d")
    for rank in trainer.start_ranks(options, (*options, "--optim.lr", "0.5")):
        output, _ = rank.communicate(timeout=60)
        assert rank.returncode == 1
        assert "rank 1 was started with optim.lr = 0.5, rank 0 with 0.00015" in output
        assert "Traceback" not in output


def test_an_environment_that_is_half_set_is_one_line(trainer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    status, output = trainer.run("--run.name", "w")
    assert status == 1
    assert "WORLD_SIZE = 2, but RANK is not set" in output


DIES = """
import os, signal, time

def die(*_, **__):
    time.sleep(0.5)  # until its messages arrive
    os.kill(os.getpid(), signal.SIGKILL)

rank, attempt = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
if rank == "{rank}" and attempt == "0":
    {code}
"""
"""Python imports this code at its start; it ends a rank at a chosen place."""


def dying_at(trainer, rank: int, code: str) -> dict[str, str]:
    """Environment variables with which a rank runs `code` at its start; `code` may call `die`."""
    root = Path(__file__).parents[2]
    (trainer.folder / "sitecustomize.py").write_text(DIES.format(rank=rank, code=code.replace("\n", "\n    ")))
    return {"PYTHONPATH": f"{trainer.folder}:{root}:{root / 'kernels'}"}


SIXTH_STEP = """import torch
real, calls = torch.Tensor.backward, iter(range(5))
torch.Tensor.backward = lambda *given, **options: die() if next(calls, None) is None else real(*given, **options)"""


def test_a_lost_rank_costs_no_whole_step(trainer):
    """The main rank saves the last step, although no save was due; after torchrun's restart the bits are the same."""
    settings = ("--optim.batch-size", "2", "--run.save-every", "100", "--data.workers", "0", "--optim.epochs", "4")
    status, output = trainer.run("--run.name", "whole", *settings, processes=2)
    assert status == 0, output
    child = trainer.start_program(
        *("--run.name", "parts", *settings),
        torchrun=("--nproc-per-node", "2", "--max-restarts", "2"),
        environment=dying_at(trainer, 1, SIXTH_STEP),
    )
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0, output
    assert "another rank is lost after step 5; saved " in output
    assert "clips_0000000020.pth at step 5" in output
    whole, parts = (read_weights(trainer.checkpoints(name)[-1]) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def die(*_, **__) -> None:
    time.sleep(0.5)  # until its messages arrive
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_drawing(arguments: list[str]) -> None:
    if os.environ["RANK"] == "0":
        pictures.draw_loss_curve = die
    pretrain.main(arguments)


def test_a_rank_that_is_done_waits_for_the_others(trainer):
    """Otherwise torchrun could not restart a lost rank, because the torchrun of the finished rank has ended."""
    options = ("--run.name", "e", "--run.stop-at", "2", "--data.workers", "0")
    ranks = trainer.start_ranks(options, options, main=die_while_drawing)
    for rank in ranks:
        output, _ = rank.communicate(timeout=60)
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL, 1]
    assert "another process of the run was lost or is late" in output


def test_the_run_goes_on_without_a_reader(trainer):
    child = trainer.start("--run.name", "h", "--run.log-every", "1", "--data.workers", "0")
    trainer.wait_for_step(child, 1)
    assert child.stdout is not None
    child.stdout.close()  # as `| head` does
    assert child.wait(timeout=60) == 0
    assert steps_of(trainer.folder / "h") == list(range(1, 17))


def test_a_terminal_without_utf8(trainer, demo_videos):
    listing = trainer.folder / "uni.csv"
    listing.write_text(f"{trainer.folder}/fehlt-ü-视频.mp4,0\n{demo_videos.read_text()}", encoding="utf-8")
    child = trainer.start_program(
        *("--run.name", "u", "--data.train", str(listing), "--data.max-bad-fraction", "1", "--data.workers", "0"),
        environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, output
    assert r"fehlt-\xfc-\u89c6\u9891.mp4" in output


def test_checkpoints_by_the_clock(trainer):
    options = ("--run.save-minutes", "0", "--run.save-every", "1000", "--run.stop-at", "5", "--run.log-every", "2")
    assert trainer.run("--run.name", "c", "--run.keep", "9", "--data.workers", "0", *options)[0] == 0
    assert [path.name for path in trainer.checkpoints("c")] == [f"clips_{n:010d}.pth" for n in (8, 16, 20)]


def test_a_folder_that_is_removed_meanwhile(trainer):
    child = trainer.start("--run.name", "r", *ENDLESS, "--data.workers", "0")
    trainer.wait_for_step(child, 2)
    subprocess.run(["rm", "-rf", str(trainer.folder / "r")], check=True)
    output = trainer.wait_for_step(child, 8)
    child.send_signal(signal.SIGTERM)
    output += child.communicate(timeout=60)[0]
    assert child.returncode == EXIT_STOPPED, output
    assert "is made again" in output
    assert len(trainer.checkpoints("r")) == 1


def test_a_file_system_without_flock(trainer, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    status, output = trainer.run("--run.name", "f", "--run.stop-at", "2", "--data.workers", "0")
    assert status == 0, output
    assert f"the file system of {trainer.folder / 'f'} has no flock" in output


def test_a_new_run_starts_from_weights(trainer):
    """With other frames and another size, as positions are computed and not in the file."""
    assert trainer.run("--run.name", "first", "--run.stop-at", "2", "--data.workers", "0")[0] == 0
    (first,) = trainer.checkpoints("first")
    config = load_recipe(PretrainConfig, trainer.recipe)
    path = str(first)
    options = ["--init", path, "--student.frames", "2", "--student.image-size", "48", "--teacher.image-size", "48"]
    config, _ = pretrain.launch.read_settings(
        pretrain.SETTINGS, pretrain.RECIPES, "", "", "", trainer.arguments("--run.name", "second", *options)
    )
    job = pretrain.prepare(config, ALONE)
    job.loader.close()
    assert job.state.step == 0
    saved = checkpoint.load_checkpoint(first)["model"]
    for key, value in job.state.model.state_dict().items():
        assert torch.equal(value, saved[key]), key
    assert "no weights at /nowhere.pth" in trainer.run("--run.name", "third", "--init", "/nowhere.pth")[1]


def test_a_home_folder_in_run_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = PretrainConfig()
    assert config.run.dir == "runs"
    tilde = type(config.run)(dir="~/runs", name="a")
    assert tilde.folder == tmp_path / "runs" / "a"

"""Training runs with DALI as the decoder, on the CPU."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed: make test-dali")

from umt_fast.run import checkpoint
from umt_fast.run.stop import EXIT_STOPPED

OPTIONS = ("--data.decoder", "dali", "--data.pipelines", "2")


@pytest.fixture
def vp9(demo_videos, tmp_path) -> tuple[str, str]:
    """The demo's VP9 videos, and a file that is not a video."""
    lines = [line for line in demo_videos.read_text().splitlines() if ".webm," in line]
    (tmp_path / "broken.webm").write_bytes(b"no video" * 100)
    listing = tmp_path / "vp9.csv"
    listing.write_text("\n".join([*lines, f"{tmp_path / 'broken.webm'},0"]))
    return "--data.train", str(listing)


def _losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_run_that_stops_goes_on_as_if_it_had_not(trainer, vp9):
    options = (*OPTIONS, *vp9, "--data.max-bad-fraction", "0.5", "--run.save-every", "6", "--run.log-every", "2")
    for name, stop in (("whole", "8"), ("parts", "6"), ("parts", "8")):
        status, output = trainer.run("--run.name", name, "--run.stop-at", stop, *options)
        assert status == 0, output
        assert "decoder dali on the CPU" in output
    assert _losses(trainer.folder / "whole") == _losses(trainer.folder / "parts")
    one, two = (checkpoint.load_checkpoint(trainer.checkpoints(name)[-1]) for name in ("whole", "parts"))
    assert one["clips_seen"] == two["clips_seen"] == 32
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    assert "broken.webm" in (trainer.folder / "whole" / "bad_files.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves(trainer, vp9, number):
    options = (*OPTIONS, *vp9, "--data.max-bad-fraction", "0.5", "--optim.epochs", "500")
    child = trainer.start("--run.name", "s", "--run.save-every", "100000", *options)
    trainer.wait_for_step(child, 4)
    os.killpg(child.pid, number)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == EXIT_STOPPED, output
    assert "saving after this step" in output
    assert len(trainer.checkpoints("s")) == 1

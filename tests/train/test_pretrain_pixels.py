"""Pixel objectives through the loop of `train.pretrain`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train import pretrain
from umt_fast.run import checkpoint

ROOT = Path(__file__).parents[2]
SMALL = """
objective = "{objective}"
[model]
image_size = 32
frames = 8
width = 32
depth = 2
heads = 2
decoder_width = 16
decoder_depth = 1
decoder_heads = 2
{model}
[mask]
{mask}
[optim]
epochs = 8
warmup_epochs = 2
batch_size = 4
lr = 3e-2
[data]
workers = 1
frame_step = 1
flip = 0.0
[run]
log_every = 2
save_every = 100
"""
CASES = {
    "videomae": ("videomae", "", "ratio = 0.5"),
    "videomaev2": ("videomae", "", "ratio = 0.5\ndecoder_ratio = 0.5"),
    "adamae": ("adamae", "", 'rule = "adamae"\nratio = 0.5'),
    "mae_st": ("mae_st", "target_frames = 4", 'rule = "mae_st"\nratio = 0.5'),
}


def run(folder: Path, case: str, videos: Path, name: str, *options: str) -> Path:
    objective, model, mask = CASES[case]
    recipe = folder / f"{case}.toml"
    recipe.write_text(SMALL.format(objective=objective, model=model, mask=mask))
    command = [sys.executable, "-m", "train.pretrain", "--recipe", str(recipe), "--data.train", str(videos)]
    command += ["--run.dir", str(folder), "--run.name", name, "--run.device", "cpu", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder / name


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_and_leaves_a_reconstruction(tmp_path, demo_videos, case):
    folder = run(tmp_path, case, demo_videos, "whole")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (folder / "visible.png").stat().st_size > 5000
    saved = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    state = torch.load(saved, weights_only=True)["model"]
    prefix = "blocks.0" if case == "mae_st" else "encoder.blocks.0"
    assert f"{prefix}.mlp.fc1.weight" in state


def test_resume_is_exact(tmp_path, demo_videos):
    whole = run(tmp_path, "videomaev2", demo_videos, "whole")
    run(tmp_path, "videomaev2", demo_videos, "parts", "--run.stop-at", "7")
    parts = run(tmp_path, "videomaev2", demo_videos, "parts")
    one, two = (
        torch.load(checkpoint.list_checkpoints(folder / "checkpoints")[-1], weights_only=True)["model"]
        for folder in (whole, parts)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", sorted(path.stem for path in pretrain.RECIPES.glob("*.toml")))
def test_every_recipe_is_planned(name, capsys):
    pretrain.main(["--recipe", name, "--dry-run"])
    assert "TFLOP" in capsys.readouterr().out


def test_counts_of_the_published_recipes(capsys):
    for name, words in {
        "videomae_b16_k400": "160 of 1568 tokens visible, 1408 decoded",
        "videomaev2_b16": "160 of 1568 tokens visible, 784 decoded",
        "videomaev2_g14": "208 of 2048 tokens visible, 1024 decoded",
        "mae_st_l16_k400": "156 of 1568 tokens visible, 1412 decoded",
    }.items():
        pretrain.main(["--recipe", name, "--dry-run"])
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "videomae_b16_k400", "--mask.decoder-ratio", "0.4"], "mask.decoder_ratio = 0.4"),
        (["--recipe", "videomae_b16_k400", "--data.frame-step", "0"], "data.frame_step = 0"),
        (["--recipe", "mae_st_l16_k400", "--mask.decoder-ratio", "0.5"], "not for objective = mae_st"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, words, capsys):
    with pytest.raises(SystemExit):
        pretrain.main([*options, "--dry-run"])
    assert words in " ".join(re.split(r"[\s│]+", capsys.readouterr().err))


def test_an_objective_that_does_not_exist_is_named(tmp_path):
    recipe = tmp_path / "odd.toml"
    recipe.write_text('objective = "colours"\n')
    with pytest.raises(SystemExit, match=r"odd\.toml: objective = 'colours'; there are alignment, videomae"):
        pretrain.main(["--recipe", str(recipe), "--dry-run"])

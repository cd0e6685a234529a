"""Pixel objectives through the loop of `train.pretrain`."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train import pretrain
from train.pretrain_pixels import PixelObjective
from umt_fast.config import (
    ConfigError,
    DataConfig,
    OptimConfig,
    PixelMaskConfig,
    VideoMaeConfig,
    VideoMaePretrainConfig,
)
from umt_fast.data.batch import Batch, VisitedVideo
from umt_fast.data.index import VideoList
from umt_fast.data.loader import ClipDataset
from umt_fast.run import checkpoint
from umt_fast.run.world import World

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
    arguments = ["--recipe", str(recipe), "--data.train", str(videos), "--run.dir", str(folder), "--run.name", name]
    pretrain.main([*arguments, "--run.device", "cpu", *options])
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


TINY = VideoMaeConfig(32, 16, 2, 8, 16, 1, 1, decoder_width=8, decoder_depth=1, decoder_heads=1)
RULES = {
    "everest": {"ratio": 0.75, "candidate_ratio": 0.5},
    "motion": {"ratio": 0.5},
    "region": {"ratio": 0.75, "order": (0, 255)},
    "flow": {"ratio": 0.75, "source": "given_here:flow"},
    "text": {"ratio": 0.75, "source": "given_here:likeness"},
}


@pytest.mark.parametrize("rule", RULES)
def test_every_guided_rule_goes_from_files_to_a_picture(tmp_path, demo_videos, rule, monkeypatch):
    given = types.ModuleType("given_here")
    given.flow = lambda clip: torch.zeros(len(clip), clip.shape[1] - 1, 2, *clip.shape[2:4])
    given.likeness = lambda clip, captions: torch.rand(len(captions), 4, 4)
    monkeypatch.setitem(sys.modules, "given_here", given)
    paths = [line.rpartition(",")[0] for line in demo_videos.read_text().splitlines()]
    masks = tmp_path / "masks"
    masks.mkdir()
    diagonal = np.repeat(np.eye(32, dtype=np.uint8)[..., None] * 255, 3, axis=2)
    for path in paths:
        Image.fromarray(diagonal).save(masks / f"{Path(path).stem}.png")
    config = VideoMaePretrainConfig(
        mask=PixelMaskConfig(rule, regions=str(masks) if rule == "region" else "", **RULES[rule]),
        data=DataConfig(frame_step=1, workers=0),
        optim=OptimConfig(batch_size=2),
        model=TINY,
    )
    rows = [{"path": path, "caption": "a square"} for path in paths]
    stream = PixelObjective.make_stream(config, VideoList.of_rows(rows))
    built = PixelObjective(config, World(0, 1, torch.device("cpu")))
    batch = ClipDataset(stream)[[0, 1]]
    clips = built.to_device(batch)
    assert clips.shape == (2, 8, 32, 32, 4 if rule in ("motion", "region") else 3)
    out = built.make_step(built.model, False)(clips)
    out.loss.backward()
    assert out.visible.shape == (2, built.visible)
    assert out.scored.shape == (2, built.decoded)
    built.save_picture(batch, out, tmp_path)
    assert (tmp_path / "visible.png").stat().st_size > 5000


def test_a_missing_folder_of_masks_is_named(tmp_path):
    mask = PixelMaskConfig("region", 0.75, regions=str(tmp_path / "none"), order=(0, 255))
    with pytest.raises(ConfigError, match=r"mask\.regions = .*none: no such folder"):
        PixelObjective.make_stream(VideoMaePretrainConfig(mask=mask, model=TINY), VideoList.of_paths(["a.mp4"]))


def test_missing_captions_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "given_here", types.SimpleNamespace(likeness=len))
    config = VideoMaePretrainConfig(
        mask=PixelMaskConfig("text", 0.75, source="given_here:likeness"), data=DataConfig(frame_step=1), model=TINY
    )
    built = PixelObjective(config, World(0, 1, torch.device("meta")))
    video = VisitedVideo(0, 4, "a.mp4", None, None)
    with pytest.raises(ConfigError, match="text needs captions: row 5 of the list has none"):
        built.to_device(Batch(torch.zeros(1, 1), [video], []))


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

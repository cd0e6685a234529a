"""Runs of train.stage2 on a small recipe and small lists, for tests of its loop and validation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from forked import run_ranks
from PIL import Image

from train import stage2

WORDS = ("a", "red", "blue", "circle", "square", "star", "that", "spins", "orbits", "bounces")

SMALL = """
bert = "random"
teacher_weights = "random"
[student]
image_size = 32
frames = 2
width = 16
depth = 2
heads = 2
drop_path = 0.2
align_layers = 2
target_width = 8
[teacher]
image_size = 32
width = 16
depth = 2
heads = 2
align_layers = 2
target_width = 8
[text]
width = 16
depth = 3
heads = 2
fusion_layer = 1
vocab_size = 80
max_positions = 40
mlp_width = 32
dropout = 0.1
[joint]
width = 8
[data]
workers = 0
max_words = 10
[optim]
epochs = 2
warmup_epochs = 1
batch_size = 2
lr = 1e-3
min_lr = 1e-5
betas = [0.9, 0.999]
[compute]
precision = "fp32"
attention = "sdpa"
[run]
device = "cpu"
log_every = 1
"""


class Runner:
    """Runs train.stage2 on the small recipe with lists of eight videos and six pictures."""

    def __init__(self, folder: Path, videos: Path) -> None:
        self.folder = folder
        (folder / "small.toml").write_text(SMALL)
        self.paths = [line.split(",")[0] for line in videos.read_text().splitlines()]
        self.videos = self.list_of("videos.json", "video", self.paths)
        pictures = []
        for number in range(6):
            pictures.append(str(folder / f"{number}.png"))
            pixels = np.random.default_rng(number).integers(0, 256, (24, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures[-1])
        self.images = self.list_of("images.json", "image", pictures)

    def list_of(self, name: str, kind: str, paths: list[str], **more: object) -> str:
        rng = np.random.default_rng(len(name))
        entries = [{kind: path, "caption": " ".join(rng.choice(WORDS, 4)), **more} for path in paths]
        (self.folder / name).write_text(json.dumps(entries))
        return str(self.folder / name)

    def arguments(self, name: str, *options: str, images: bool = True) -> list[str]:
        lists = ["--data.videos", self.videos, *(("--data.images", self.images) if images else ())]
        recipe = ["--recipe", str(self.folder / "small.toml"), "--run.dir", str(self.folder), "--run.name", name]
        return [*recipe, *lists, *options]

    def run(self, name: str, *options: str, images: bool = True) -> Path:
        stage2.main(self.arguments(name, *options, images=images))
        return self.folder / name

    def run_two(self, name: str, *options: str, images: bool = True) -> Path:
        run_ranks(stage2.main, [self.arguments(name, *options, images=images)])
        return self.folder / name


def last_checkpoint(folder: Path) -> dict:
    return torch.load(max((folder / "checkpoints").glob("*.pth")), weights_only=True)


def assert_equal(one, two, where=""):
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list):
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where

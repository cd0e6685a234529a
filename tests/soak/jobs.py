"""The jobs of train/ on tiny models and lists, for the soak to start and compare."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from stage2_runs import Runner

from train import finetune, pretrain, stage2
from umt_fast.data import synthetic
from umt_fast.run import checkpoint, world

ROOT = Path(__file__).parents[2]
MAINS = {"pretrain": pretrain.main, "finetune": finetune.main, "stage2": stage2.main}
STEPS = 60
"""Steps of a run; a checkpoint every 3."""
FINETUNE = """
[classifier]
image_size = 32
frames = 2
width = 32
depth = 2
heads = 2
num_classes = 2
drop_path = 0.2
[data]
crops_per_clip = 2
[augment]
mode = "fast"
[optim]
epochs = 60
lr = 6.4e-2
ema_decay = 0.9
[test]
segments = 2
crops = 2
clips_per_pass = 4
every_epochs = 3
[compute]
precision = "fp32"
"""


class Jobs:
    """Lists and recipes in `folder`, and the command line of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.videos = synthetic.write_videos(folder / "videos", count=8)
        paths = [line.rpartition(",")[0] for line in self.videos.read_text().splitlines()]
        self.labelled = folder / "labelled.csv"
        self.labelled.write_text("".join(f"{path},{number % 2}\n" for number, path in enumerate(paths)))
        (folder / "finetune.toml").write_text(FINETUNE)
        self._stage2 = Runner(folder, self.videos)

    def arguments(self, job: str, name: str, ranks: int) -> list[str]:
        options: dict[str, object] = {"--run.name": name, "--run.dir": self.folder, "--compute.attention": "math"}
        options |= {"--run.stop-at": STEPS, "--run.log-every": 1, "--run.save-every": 3, "--data.workers": 1}
        options |= {"--optim.batch-size": 4 // ranks, "--optim.epochs": 60}
        options |= {"--run.start-timeout": 30}  # only this finds a rank that dies before it joins
        if job == "pretrain":
            options |= {"--recipe": ROOT / "tests" / "support" / "small.toml", "--data.train": self.videos}
        elif job == "finetune":
            options |= {"--recipe": self.folder / "finetune.toml", "--data.train": self.labelled}
            options |= {"--data.validation": self.labelled, "--data.test": self.labelled, "--optim.epochs": 15}
        else:
            options |= {"--recipe": self.folder / "small.toml", "--data.images": self._stage2.images}
            options |= {"--data.videos": self._stage2.videos, "--data.validation": self._stage2.videos}
        return [str(part) for option in options.items() for part in option]


def run_job(job: str, arguments: list[str], log: str) -> None:
    """Run a job and append its output to a file."""
    with open(log, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    world.ANSWER_SECONDS = 2.0
    MAINS[job](arguments)


def differences(run: Path, whole: Path) -> list[str]:
    """Differences between an interrupted and the undisturbed run: results, records, leftover files."""
    found = []
    names = [sorted(str(path.relative_to(each)) for path in each.rglob("*") if path.is_file()) for each in (run, whole)]
    # An event file for each start; pictures of the last batch may be missing where a kill came before them.
    ours, theirs = ({name for name in each if not re.search("tfevents|visible", name)} for each in names)
    found += [f"{name} is left" for name in sorted(ours - theirs)] + [
        f"{name} is missing" for name in sorted(theirs - ours)
    ]
    left, right = (
        checkpoint.load_checkpoint(checkpoint.list_checkpoints(each / "checkpoints")[-1]) for each in (run, whole)
    )
    for part in ("clips_seen", "model", "optimizer", "rng", "schedule", "average"):
        if not same(left.get(part), right.get(part)):
            found.append(f"{part} of the last checkpoint")
    losses = [[(line["step"], line["loss"]) for line in read_lines(each)] for each in (run, whole)]
    if losses[0] != losses[1]:
        found.append("losses of metrics.jsonl")
    if (run / "best.pth").exists() and (whole / "best.pth").exists():
        best = [torch.load(each / "best.pth", weights_only=True) for each in (run, whole)]
        found += [f"{part} of best.pth" for part in ("model", "step") if not same(best[0][part], best[1][part])]
    return found


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    return one == two

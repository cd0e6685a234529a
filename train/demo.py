"""The second half of `make demo`: does a stage-1 encoder help to tell motions apart from few labels?

    python -m train.demo --init runs/demo/checkpoints/x.pth --out runs/demo-finetune

Writes synthetic videos, fine-tunes the `tiny` recipe on 64 of them from random weights and from the encoder, with the
same steps and seeds, and tests each on 128 others that no run has seen. Prints and keeps the top-1 of every run, and
leaves the confusion matrix of the best.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
from pathlib import Path

from train import finetune
from umt_fast.config import FinetuneConfig
from umt_fast.data import synthetic
from umt_fast.errors import RunError
from umt_fast.recipe import load_recipe
from umt_fast.run import world
from umt_fast.run.log import say
from umt_fast.weights import read_model

LABELLED, HELD_OUT = 64, 128
SEEDS = (0, 1, 2)
VIDEOS = 100
"""Seed of the generator of the labelled videos; the held-out ones have twice that."""


def write_lists(folder: Path, videos: int) -> tuple[Path, Path]:
    """Lists of videos labelled by their motion, to train on and to test on; both have every motion equally often."""
    lists = []
    for name, count, seed in (("train", LABELLED, videos), ("test", HELD_OUT, 2 * videos)):
        listing = synthetic.write_videos(folder / name, count, seed)
        rows = [line.rpartition(",") for line in listing.read_text().splitlines()]
        named = [f"{path},{synthetic.MOTIONS[int(label) // len(synthetic.SHAPES)]}\n" for path, _, label in rows]
        lists.append(folder / f"{name}.csv")
        lists[-1].write_text("".join(named))
    return lists[0], lists[1]


def settings(init: str, side: int, seed: int, lists: tuple[Path, Path], out: Path) -> FinetuneConfig:
    """The recipe `tiny` on clips `side` pixels wide, in a folder named by its start and seed."""
    recipe = load_recipe(FinetuneConfig, finetune.RECIPES / "tiny.toml")
    name = f"{'stage1' if init else 'random'}-{seed}"
    return dataclasses.replace(
        recipe,
        classifier=dataclasses.replace(recipe.classifier, image_size=side),
        init=dataclasses.replace(recipe.init, checkpoint=init),
        compute=dataclasses.replace(recipe.compute, precision="fp32"),  # bf16 is slower for models this small
        data=dataclasses.replace(recipe.data, train=str(lists[0]), test=str(lists[1])),
        run=dataclasses.replace(recipe.run, dir=str(out), name=name, seed=seed, log_every=40, save_every=10**6),
    )


def compare(init: str, videos: int, out: Path) -> dict[str, list[float]]:
    """Top-1 in percent on the held-out videos of each run, by its start."""
    side = int(read_model(init)[1]["student"]["image_size"])
    lists, processes = write_lists(out / "videos", videos), world.start("auto")
    found: dict[str, list[float]] = {}
    tests: list[tuple[float, Path]] = []
    for start, checkpoint in (("random weights", ""), ("stage-1 encoder", init)):
        for seed in SEEDS:
            config = settings(checkpoint, side, seed, lists, out)
            finetune.train(config, processes)
            test = config.run.folder / "test"
            tests.append((json.loads((test / "test.json").read_text())["top1"], test))
            found.setdefault(start, []).append(tests[-1][0])
    shutil.copy(max(tests)[1] / "confusion.png", out / "confusion.png")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="checkpoint of the stage-1 demo")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-finetune"))
    parser.add_argument("--videos", type=int, default=VIDEOS, help="seed of the labelled videos (default %(default)s)")
    given = parser.parse_args()
    try:
        found = compare(given.init, given.videos, given.out)
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")
    (given.out / "top1.json").write_text(json.dumps(found, indent=2) + "\n")
    motions = len(synthetic.MOTIONS)
    say(
        f"\ntop-1 on {HELD_OUT} held-out videos of {motions} motions, {LABELLED} labels, seeds {SEEDS}; chance is "
        f"{100 / motions:.0f}%:"
    )
    for name, values in found.items():
        shown = "  ".join(f"{value:5.1f}" for value in values)
        say(f"  {name:16}  {shown}   mean {statistics.mean(values):5.1f}")
    say(f"in {given.out}: top1.json, confusion.png (of the best run) and a folder for each run")


if __name__ == "__main__":
    main()

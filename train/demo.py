"""The second half of `make demo`: does a stage-1 encoder help to tell motions apart from few labels?

    python -m train.demo --init runs/demo/checkpoints/x.pth --out runs/demo-finetune

Writes synthetic videos, fine-tunes the `tiny` recipe on 32 of them from random weights and from the encoder, with the
same steps and seeds, and tests each on 64 others that no run has seen. Prints and keeps the top-1 of every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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

LABELLED, HELD_OUT = 32, 64
SEEDS = (0, 1, 2)


def write_lists(folder: Path) -> tuple[Path, Path]:
    """Lists of videos labelled by their motion, to train on and to test on; both have every motion equally often."""
    lists = []
    for name, count, seed in (("train", LABELLED, 100), ("test", HELD_OUT, 200)):
        listing = synthetic.write_videos(folder / name, count, seed)
        rows = [line.rpartition(",") for line in listing.read_text().splitlines()]
        named = [f"{path},{synthetic.MOTIONS[int(label) // len(synthetic.SHAPES)]}\n" for path, _, label in rows]
        lists.append(folder / f"{name}.csv")
        lists[-1].write_text("".join(named))
    return lists[0], lists[1]


def run(init: str, seed: int, lists: tuple[Path, Path], out: Path, processes: world.World) -> float:
    """Top-1 in percent of one run on the held-out videos."""
    recipe = load_recipe(FinetuneConfig, finetune.RECIPES / "tiny.toml")
    name = f"{'stage1' if init else 'random'}-{seed}"
    config = dataclasses.replace(
        recipe,
        init=dataclasses.replace(recipe.init, checkpoint=init),
        data=dataclasses.replace(recipe.data, train=str(lists[0]), test=str(lists[1])),
        run=dataclasses.replace(recipe.run, dir=str(out), name=name, seed=seed, log_every=30, save_every=10**6),
    )
    finetune.train(config, processes)
    return json.loads((out / name / "test" / "test.json").read_text())["top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="checkpoint of the stage-1 demo")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-finetune"))
    given = parser.parse_args()
    try:
        lists, processes = write_lists(given.out / "videos"), world.start("auto")
        found = {
            name: [run(init, seed, lists, given.out, processes) for seed in SEEDS]
            for name, init in (("random weights", ""), ("stage-1 encoder", given.init))
        }
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")
    (given.out / "top1.json").write_text(json.dumps(found, indent=2) + "\n")
    say(f"\ntop-1 on {HELD_OUT} held-out videos, {LABELLED} labels of {len(synthetic.MOTIONS)} motions, seeds {SEEDS}:")
    for name, values in found.items():
        shown = "  ".join(f"{value:5.1f}" for value in values)
        say(f"  {name:16}  {shown}   mean {statistics.mean(values):5.1f}")


if __name__ == "__main__":
    main()

"""The second half of `make demo`: does a stage-1 encoder help when labels are few?

    python -m train.demo --init runs/demo/checkpoints/x.pth --out runs/demo-finetune

Writes synthetic videos, and compares the encoder with random weights in two ways: frozen, by a linear probe of its
pooled features for the colour, shape and motion of the larger shape; and fine-tuned by the `tiny` recipe on the
motions, with the same steps and seeds. Both learn from the labels of 64 videos at most and are tested on 128 others.
Prints the top-1 of every probe and run, and writes them to --out with the confusion matrix of the best run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train import finetune
from umt_fast import StudentConfig, VideoStudent
from umt_fast.config import DataConfig, FinetuneConfig
from umt_fast.data import synthetic
from umt_fast.data.labels import read_labelled
from umt_fast.data.loader import ClipLoader
from umt_fast.evaluation import probe
from umt_fast.evaluation.classification import score
from umt_fast.evaluation.features import encoder_of
from umt_fast.evaluation.views import Views, view_stream
from umt_fast.recipe import load_recipe
from umt_fast.run import launch, world
from umt_fast.run.log import say
from umt_fast.weights import read_model

if TYPE_CHECKING:
    from jaxtyping import Float

    from umt_fast.models.encoder import VideoEncoder

LABELLED, HELD_OUT = 64, 128
SEEDS = (0, 1, 2)
STARTS = ("random weights", "stage-1 encoder")
TASKS = {"motion": synthetic.MOTIONS, "shape": synthetic.SHAPES, "colour": synthetic.HUES}
"""Classes of the larger shape, in the order of `synthetic.describe`."""
VIDEO_SEED = 100
"""Seed of the generator of the labelled videos; the held-out videos have twice this seed."""


def _parts(videos: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Number and seed of the labelled videos, and of the held-out videos."""
    return (LABELLED, videos), (HELD_OUT, 2 * videos)


def write_lists(folder: Path, videos: int) -> tuple[Path, Path]:
    """Write the training list and the test list, labelled by motion; each has every motion equally often."""
    lists = []
    for name, (count, seed) in zip(("train", "test"), _parts(videos), strict=True):
        listing = synthetic.write_videos(folder / name, count, seed)
        rows = [line.rpartition(",") for line in listing.read_text().splitlines()]
        named = [f"{path},{synthetic.MOTIONS[int(label) // len(synthetic.SHAPES)]}\n" for path, _, label in rows]
        lists.append(folder / f"{name}.csv")
        lists[-1].write_text("".join(named))
    return lists[0], lists[1]


def settings(init: str, side: int, seed: int, lists: tuple[Path, Path], out: Path) -> FinetuneConfig:
    """The recipe `tiny` on clips `side` pixels wide, in a folder named after starting weights and seed."""
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


@torch.no_grad()
def pooled_features(encoders: list[VideoEncoder], listing: Path) -> list[Float[Tensor, "n d"]]:
    """Pooled features of one middle view of each video, per encoder; a video is decoded once for all encoders."""
    sizes, videos, size = encoders[0].config, read_labelled(str(listing)).videos, 16
    stream = view_stream(videos, Views(sizes.frames, sizes.image_size), DataConfig(workers=0))
    features: list[list[Tensor]] = [[] for _ in encoders]
    with ClipLoader(stream, start=0, end=len(videos), batches=-(-len(videos) // size), batch_size=size) as loader:
        for batch in loader:
            for encoder, made in zip(encoders, features, strict=True):
                made.append(encoder.pooled(batch.clip))
    return [torch.cat(made) for made in features]


def probe_frozen(init: str, videos: int, lists: tuple[Path, Path]) -> dict[str, dict[str, list[float]]]:
    """Top-1, in percent on the held-out videos, of linear probes of frozen encoders, by task and starting weights.

    Each seed draws random weights, and the three quarters of the labelled videos that both of its probes train on.
    """
    state, settings = read_model(init)
    encoders = [encoder_of(state, settings, init).eval()]
    sizes = StudentConfig(**dataclasses.asdict(encoders[0].config), align_layers=1)
    for seed in SEEDS:
        torch.manual_seed(seed)
        encoders.append(encoder_of(VideoStudent(sizes).state_dict(), settings, "random weights").eval())
    train, test = (pooled_features(encoders, listing) for listing in lists)
    facts = [[synthetic.describe(i, seed) for i in range(count)] for count, seed in _parts(videos)]
    found: dict[str, dict[str, list[float]]] = {}
    for place, (task, classes) in enumerate(TASKS.items()):
        labels, wanted = (torch.tensor([classes.index(fact[place]) for fact in part]) for part in facts)
        found[task] = {start: [] for start in STARTS}
        for number, seed in enumerate(SEEDS, 1):
            seen = torch.randperm(LABELLED, generator=torch.Generator().manual_seed(seed))[: LABELLED * 3 // 4]
            for start, encoder in zip(STARTS, (number, 0), strict=True):
                linear = probe.choose_linear(train[encoder][seen], labels[seen], len(classes), seed)
                chances = linear(test[encoder]).double().softmax(-1)
                found[task][start].append(score(chances, wanted).top1)
    return found


def compare(init: str, lists: tuple[Path, Path], out: Path) -> dict[str, list[float]]:
    """Top-1, in percent on the held-out videos, of each fine-tuning run on the motions, by starting weights."""
    side = int(read_model(init)[1]["student"]["image_size"])
    processes = world.start("auto")
    found: dict[str, list[float]] = {}
    tests: list[tuple[float, Path]] = []
    for start, checkpoint in zip(STARTS, ("", init), strict=True):
        for seed in SEEDS:
            config = settings(checkpoint, side, seed, lists, out)
            finetune.train(config, processes)
            test = config.run.folder / "test"
            tests.append((json.loads((test / "test.json").read_text())["top1"], test))
            found.setdefault(start, []).append(tests[-1][0])
    shutil.copy(max(tests)[1] / "confusion.png", out / "confusion.png")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m train.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", required=True, help="checkpoint of the stage-1 demo")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-finetune"), help="default %(default)s")
    parser.add_argument(
        "--videos", type=int, default=VIDEO_SEED, help="seed of the labelled videos (default %(default)s)"
    )
    given = parser.parse_args()
    with launch.one_line_errors():
        read_model(given.init)  # before the videos are written
        lists = write_lists(given.out / "videos", given.videos)
        frozen = probe_frozen(given.init, given.videos, lists)
        found = compare(given.init, lists, given.out)
    (given.out / "frozen.json").write_text(json.dumps(frozen, indent=2) + "\n")
    (given.out / "top1.json").write_text(json.dumps(found, indent=2) + "\n")
    say(f"\ntop-1 on {HELD_OUT} held-out videos, seeds {SEEDS}")
    for task, values in frozen.items():
        show(f"frozen, linear probe: {task}, {LABELLED * 3 // 4} labels", values, len(TASKS[task]))
    show(f"fine-tuned: motion, {LABELLED} labels", found, len(synthetic.MOTIONS))
    say(f"in {given.out}: frozen.json, top1.json, confusion.png (of the best run) and a folder for each run")


def show(title: str, found: dict[str, list[float]], classes: int) -> None:
    """Print the top-1 of each seed and their mean, for both starting weights."""
    say(f"{title}; chance is {100 / classes:.0f}%")
    for name, values in found.items():
        shown = "  ".join(f"{value:5.1f}" for value in values)
        say(f"  {name:16}  {shown}   mean {statistics.mean(values):5.1f}")


if __name__ == "__main__":
    main()

"""Test a classifier's checkpoint on a labelled list, on one or several processes. `--job retrieval`,
`multiple_choice` and `qa` test a stage-2 model: `train.evaluate_video_text`.

    python -m train.evaluate --checkpoint runs/k400_b16/best.pth --data.test val.csv
    torchrun --nproc-per-node 8 -m train.evaluate --checkpoint published.pth --data.test val.csv

The checkpoint is one of ours or a published one. Its settings give the sampling of clips and the number of views;
the flags below override them. Writes test.json, predictions.npz and pictures into the run's folder.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from umt_fast.config import (
    ClassifierConfig,
    ComputeConfig,
    ConfigError,
    FrameRule,
    LabelledDataConfig,
    RunConfig,
    TestConfig,
)
from umt_fast.data.labels import LabelledVideos, read_classes, read_labelled
from umt_fast.data.manifest import check_files
from umt_fast.evaluation.classification import predict
from umt_fast.evaluation.features import infer_sizes
from umt_fast.evaluation.report import write_report
from umt_fast.evaluation.views import Views
from umt_fast.models.classifier import build_classifier
from umt_fast.run import launch
from umt_fast.run.attention_choice import Use
from umt_fast.run.compute import choose_attention
from umt_fast.run.hardware import describe, resolve_precision
from umt_fast.run.log import say
from umt_fast.run.progress import Progress, silent
from umt_fast.run.world import World
from umt_fast.weights import (
    TensorDict,
    WeightsError,
    load_classifier,
    read_model,
    section_of,
    strip_prefixes,
    using_settings_of,
)

DATA_SETS: dict[str, FrameRule] = {
    "SSV2": "segment",
    "Kinetics": "dense",
    "UCF101": "dense",
    "HMDB51": "dense",
    **{f"Kinetics-{classes}": "strided" for classes in (400, 600, 700, 710)},  # VideoMAE's names
}
"""Frame rules by the published name of the data set; all other data sets are `sparse`."""
JOBS = ("labels", "retrieval", "multiple_choice", "qa")
"""Names of the tests; all but the first are those of `train.evaluate_video_text`."""


@dataclass(frozen=True)
class EvaluateConfig:
    """A test of one checkpoint."""

    checkpoint: str = ""
    """A fine-tuned classifier: ours, a published .pth, .safetensors, a folder or a Hugging Face repo."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    test: TestConfig = field(default_factory=TestConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(name="evaluate"))


def read_settings(arguments: list[str] | None) -> tuple[EvaluateConfig, TensorDict, list[str] | None]:
    """Returns the config (flags override the checkpoint's settings), the checkpoint's tensors, and its class names."""
    import tyro

    checkpoint, _ = launch.read_flag(arguments, "--checkpoint", "")
    if not checkpoint:
        tyro.cli(EvaluateConfig, args=arguments, prog="python -m train.evaluate", description=__doc__)  # for --help
        raise ConfigError("give --checkpoint a fine-tuned classifier")
    state, settings = read_model(checkpoint)
    state = strip_prefixes(state)
    if "head.weight" not in state:
        raise WeightsError(f"{checkpoint} has no head: it is not fine-tuned; see train.finetune --init")
    with using_settings_of(checkpoint):
        sizes = infer_sizes(state, settings, checkpoint)
        data, test = section_of(settings, "data"), section_of(settings, "test")
        rule = data.get("rule") or DATA_SETS.get(str(settings.get("data_set", "")), "sparse")
        default = EvaluateConfig(
            classifier=sizes,
            data=LabelledDataConfig(
                rule=rule, rate=float(data.get("rate") or settings.get("sampling_rate") or 4), fps=data.get("fps")
            ),
            test=TestConfig(
                segments=test.get("segments") or settings.get("test_num_segment") or (2 if rule == "segment" else 4),
                crops=test.get("crops") or settings.get("test_num_crop") or 3,
                merge=test.get("merge", "probabilities"),
            ),
        )
    config = tyro.cli(
        EvaluateConfig, args=arguments, default=default, prog="python -m train.evaluate", description=__doc__
    )
    return config, state, settings.get("classes")


def evaluate(config: EvaluateConfig, state: TensorDict, classes: list[str] | None, world: World) -> None:
    """Test, print the scores and write the report."""
    data, sizes, test = config.data, config.classifier, config.test
    if not data.test:
        raise ConfigError("give --data.test a list of videos with labels")
    names: Any = read_classes(data.classes) if data.classes else classes or sizes.num_classes
    listed = read_labelled(data.test, data.prefix, names, data.read_timeout)
    check_files(listed.videos, data.test, data.prefix)
    model = build_classifier(sizes)
    report = load_classifier(model, state)
    wrong = [line for line in report.lines() if "pos_embed" not in line]
    if wrong:
        raise WeightsError(f"{config.checkpoint} does not fit:\n  " + "\n  ".join(wrong[:8]))
    model.to(world.device).requires_grad_(False)
    bf16 = resolve_precision(config.compute.precision, world.device)
    use = Use.within(sizes, test.clips_per_pass, sizes.tokens, gradients=False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    chosen, lines = choose_attention(config.compute, {"classifier": use}, world, dtype)
    model.set_attention(chosen["classifier"])
    if config.compute.compile:
        model.compile(fullgraph=True, dynamic=False)
    if world.main:
        say(describe(world.device, bf16, data.file_decoder))
        say(
            f"{len(listed.videos)} videos, {test.segments} x {test.crops} views of {sizes.frames} frames ({data.rule}) "
            f"at {sizes.image_size} px, {sizes.num_classes} classes"
        )
        say("\n".join([*explain_numbers(listed), *lines]))
    found = predict(
        model,
        listed.videos,
        Views.of(sizes, data, test),
        data,
        world,
        clips_per_pass=test.clips_per_pass,
        bf16=bf16,
        merge=test.merge,
        on_progress=Progress("test", say=say) if world.main else silent,
    )
    if not world.main:
        return
    about = {
        "checkpoint": config.checkpoint,
        "list": data.test,
        "views": [test.segments, test.crops],
        "settings": dataclasses.asdict(config),
    }
    scores = write_report(config.run.folder, found, listed, about)
    for row, name, reason in found.bad:
        say(f"could not be read, row {row + 1}: {name}: {reason}")
    say(
        f"top-1 {scores.top1:.2f}%  top-5 {scores.top5:.2f}%  mean per class {scores.mean_class:.2f}%  "
        f"loss {scores.loss:.4f}  ({scores.videos} videos, {len(found.bad)} could not be read); "
        f"report in {config.run.folder}"
    )


def explain_numbers(listed: LabelledVideos) -> list[str]:
    """A note on what the numbers of a list mean, if the classes have names: another list may number them otherwise."""
    numbered = isinstance(next(listed.videos.rows()).get("label"), int)
    if not numbered or all(name.isdigit() for name in listed.classes):
        return []
    named = ", ".join(f"{number} {name}" for number, name in enumerate(listed.classes[:3]))
    more = ", ..." if len(listed.classes) > 3 else ""
    return [f"note: the list has numbers, which are taken for the checkpoint's classes: {named}{more}"]


def main(arguments: list[str] | None = None) -> None:
    with launch.one_line_errors():
        given = sys.argv[1:] if arguments is None else arguments
        job, flags = launch.read_flag(given, "--job", "labels")
        if job not in JOBS:
            raise ConfigError(f"--job {job}: there are {', '.join(JOBS)}")
        if job != "labels":
            from train import evaluate_video_text

            evaluate_video_text.main(given)
            return
        config, state, classes = read_settings(flags)

        def run(_config: EvaluateConfig, world: World) -> bool:
            evaluate(config, state, classes, world)
            return True

        launch.run(config, run)


if __name__ == "__main__":
    launch.as_program(main)

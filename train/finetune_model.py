"""Model and objective of a fine-tuning run: starting weights, acceleration, loss."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from umt_fast.config import ClassifierConfig, FinetuneConfig
from umt_fast.data.fast_augment import augment_batch
from umt_fast.data.labels import LabelledVideos
from umt_fast.evaluation.features import infer_sizes
from umt_fast.models.classifier import Classifier
from umt_fast.objectives.classification import mix, soft_cross_entropy
from umt_fast.run.attention_choice import Use
from umt_fast.run.compute import accelerate_model
from umt_fast.run.world import World
from umt_fast.weights import (
    TensorDict,
    WeightsError,
    load_classifier,
    read_class_map,
    read_model,
    section_of,
    strip_prefixes,
)

if TYPE_CHECKING:
    from umt_fast.data.batch import Batch


def load_init(classifier: Classifier, config: FinetuneConfig) -> list[str]:
    """Load the starting weights. Returns log lines that list what was loaded and what was not.

    Raises WeightsError for a file that does not fit, unless init.strict is off.
    """
    init = config.init
    if not init.checkpoint:
        return ["init: random weights; give --init FILE to start from a pre-trained encoder"]
    state, settings = read_model(init.checkpoint)
    ours = section_of(settings, "classifier") or section_of(settings, "student")
    frames = ours.get("frames") or settings.get("num_frames")
    report = load_classifier(
        classifier,
        state,
        delete_head=init.delete_head,
        class_map=read_class_map(init.class_map, config.classifier.num_classes) if init.class_map else None,
        frames=frames // config.classifier.tubelet_size if isinstance(frames, int) else None,
    )
    if init.strict and (unforeseen := report.unforeseen()):
        shown = "\n  ".join(unforeseen[:8] + ([f"and {len(unforeseen) - 8} more"] if len(unforeseen) > 8 else []))
        sizes = _compare_sizes(config.classifier, state, settings)
        raise WeightsError(
            f"{init.checkpoint} does not fit{sizes} (--init.strict false loads the fitting keys):\n  {shown}"
        )
    return [f"init: {len(report.loaded)} tensors from {init.checkpoint}", *(f"  {line}" for line in report.lines())]


def _compare_sizes(config: ClassifierConfig, state: TensorDict, settings: dict[str, Any]) -> str:
    """How a file's encoder differs from the model's in depth and width; empty if it does not, or if it holds none."""
    with contextlib.suppress(WeightsError):
        found = infer_sizes(strip_prefixes(state), settings, "")
        if (found.depth, found.width) != (config.depth, config.width):
            return f": it has {found.depth} blocks of width {found.width}, the model {config.depth} of {config.width}"
    return ""


def accelerate(
    model: Classifier, config: FinetuneConfig, world: World, bf16: bool, stored: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Set attention, recomputation and compilation of the model. Returns the same as `run.compute.accelerate`."""
    use = Use.within(config.classifier, config.optim.batch_size, config.classifier.tokens)
    return accelerate_model(model, config.compute, {"classifier": use}, world, bf16, stored)


def make_objective(
    config: FinetuneConfig, model: nn.Module, listed: LabelledVideos, device: torch.device, bf16: bool
) -> Callable[[Batch], Tensor]:
    """Returns batch -> loss. Its random choices depend on seed and visits alone, so a resumed run repeats them."""
    labels, classes = torch.from_numpy(listed.labels), config.classifier.num_classes
    crops, seed = config.data.crops_per_clip, config.run.seed
    augment = config.augment
    if augment.mode == "none":
        augment = dataclasses.replace(augment, operations=0, erase=0)

    def objective(batch: Batch) -> Tensor:
        clips = batch.clip.to(device, non_blocking=True)
        truth = labels[batch.rows].repeat_interleave(crops).to(device, non_blocking=True)
        if augment.mode != "published":
            seeds = np.array([[(seed, visit, crop, 3) for crop in range(crops)] for visit in batch.visits])
            drawn = [int(np.random.SeedSequence(key).generate_state(1)[0]) for key in seeds.reshape(-1, 4)]
            clips = augment_batch(clips, drawn, augment, config.classifier.pixel_statistics)
        key = np.random.SeedSequence((seed, batch.visits[0], 4)).generate_state(1)
        clips, targets = mix(clips, truth, classes, config.mix, np.random.RandomState(key))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return soft_cross_entropy(model(clips), targets)

    return objective

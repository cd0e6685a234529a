"""Data of a fine-tuning run: its lists of labelled videos, and its clips."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from umt_fast.config import ConfigError, FinetuneConfig
from umt_fast.data.augment import PublishedAugment, TrainSampling
from umt_fast.data.clips import ClipStream
from umt_fast.data.fast_augment import CroppedStream
from umt_fast.data.labels import LabelledVideos, read_classes, read_labelled
from umt_fast.data.manifest import check_files


class Lists(NamedTuple):
    """The labelled videos of a run."""

    train: LabelledVideos
    validation: LabelledVideos | None
    test: LabelledVideos | None


def read_lists(config: FinetuneConfig) -> tuple[FinetuneConfig, Lists]:
    """Read the lists; the returned config has their number of classes.

    All labels are checked here, before any video is opened. Raises LabelError and ManifestError.
    """
    data = config.data
    names = read_classes(data.classes) if data.classes else None
    count = None if data.count_classes else config.classifier.num_classes

    def read(source: str, classes: tuple[str, ...] | list[str] | int | None) -> LabelledVideos:
        listed = read_labelled(source, data.prefix, classes, data.read_timeout)
        check_files(listed.videos, source, data.prefix)
        return listed

    train = read(data.train, names if names is not None else count)
    if data.count_classes:
        classifier = dataclasses.replace(config.classifier, num_classes=len(train.classes))
        config = dataclasses.replace(config, classifier=classifier)
    elif names is not None and len(names) != count:
        raise ConfigError(
            f"{data.classes} has {len(names)} classes, the model {count}; give --classifier.num-classes {len(names)} "
            "or --data.count-classes"
        )
    others = (read(source, train.classes) if source else None for source in (data.validation, data.test))
    return config, Lists(train, *others)


def make_stream(config: FinetuneConfig, listed: LabelledVideos) -> ClipStream:
    """The run's clips with the part of the augmentation that runs in the workers; the objective does the rest."""
    data, sizes = config.data, config.classifier
    sampling = TrainSampling(sizes.frames, data.rule, data.rate, data.fps)
    shape = (listed.videos, data, sizes.frames, sizes.image_size, config.run.seed, sampling)
    if config.augment.mode == "published":
        shape_of = (sizes.frames, sizes.image_size, data.crops_per_clip)
        transform = PublishedAugment(*shape_of, config.augment, sizes.pixel_statistics)
        return ClipStream(*shape, transform=transform)
    return CroppedStream(*shape, augment=config.augment)

"""Data loading of fine-tuning: training clips by each augmentation, and the 4 x 3 views of a test.

    python -m benchmarks.input_pipeline.labelled list.csv --out benchmarks/results/cpu/labelled.json

One process with one thread decodes and augments. Its processor time is measured, which depends little on other load;
passes of the contenders take turns. A test is compared with a plain loop that opens and decodes the video for every
view, as the published data set does.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from umt_fast.config import AugmentConfig, DataConfig
from umt_fast.data.augment import PublishedAugment, TrainSampling
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import read_frames
from umt_fast.data.fast_augment import CroppedStream, augment_batch
from umt_fast.data.index import VideoList
from umt_fast.data.labels import read_labelled
from umt_fast.data.loader import ClipLoader
from umt_fast.data.sampling import test_frames
from umt_fast.data.views import crop_boxes, resize_bilinear, resized_size
from umt_fast.evaluation.views import Views, view_stream

FRAMES, SIDE, CLIPS = 8, 224, 2
VIEWS = Views(FRAMES, SIDE, segments=4, crops=3)
CONFIG = DataConfig(workers=0, crops_per_clip=CLIPS)


def train_published(videos: VideoList) -> int:
    """Clips of one pass over the list: whole frames, RandAugment by Pillow."""
    augment = PublishedAugment(FRAMES, SIDE, CLIPS, AugmentConfig())
    return _drain(ClipStream(videos, CONFIG, FRAMES, SIDE, 0, TrainSampling(FRAMES), augment))


def train_fast(videos: VideoList) -> int:
    """The loader's part of the fast augmentation; the device does the other part."""
    return _drain(CroppedStream(videos, CONFIG, FRAMES, SIDE, 0, TrainSampling(FRAMES)))


def train_fast_whole(videos: VideoList) -> int:
    """The fast augmentation with the device's part, here on the CPU."""
    stream = CroppedStream(videos, CONFIG, FRAMES, SIDE, 0, TrainSampling(FRAMES))
    return _drain(stream, lambda clips: augment_batch(clips, range(len(clips)), AugmentConfig()))


def _drain(stream: ClipStream, then: Callable[[torch.Tensor], object] = lambda clips: None) -> int:
    count = 0
    with ClipLoader(stream, start=0, batches=len(stream.videos), batch_size=stream.clips_per_visit) as loader:
        for batch in loader:
            then(batch.clip)
            count += len(batch.clip)
    return count


def test_once(videos: VideoList) -> int:
    """Every video decoded once for all its views."""
    count = 0
    stream = view_stream(videos, VIEWS, CONFIG)
    with ClipLoader(stream, start=0, batches=len(videos), batch_size=VIEWS.clips, end=len(videos)) as loader:
        for batch in loader:
            count += len(batch.clip)
    return count


def _view_frames(time_view: int, total: int) -> list[int]:
    return test_frames(total, FRAMES, "sparse", VIEWS.segments, time_view)


def test_per_view(videos: VideoList) -> int:
    """Every view opens its video, decodes its frames and resizes them."""
    count = 0
    for time_view in range(VIEWS.segments):
        for crop in range(VIEWS.crops):
            for video in videos:
                choose = functools.partial(_view_frames, time_view)
                frames = read_frames(video, choose)
                size = resized_size(frames[0].shape[0], frames[0].shape[1], SIDE)
                box = crop_boxes(*size, SIDE, VIEWS.crops)[crop]
                np.stack([resize_bilinear(frame, *size, box) for frame in frames])
                count += 1
    return count


TRAIN: dict[str, Callable[[VideoList], int]] = {
    "published": train_published,
    "fast, loader": train_fast,
    "fast, loader and device": train_fast_whole,
}
TEST: dict[str, Callable[[VideoList], int]] = {"per view": test_per_view, "once per video": test_once}


def measure(contenders: Mapping[str, Callable[[VideoList], int]], videos: VideoList, passes: int) -> dict[str, float]:
    """Clips per second of processor time by contender: the median of `passes`, in turn with the others."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(passes):
        for name, run in contenders.items():
            begun = time.process_time()
            count = run(videos)
            rates[name].append(count / (time.process_time() - begun))
    return {name: round(statistics.median(values), 2) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.input_pipeline.labelled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("videos", help="a list or folder of labelled videos")
    parser.add_argument("--prefix", default="", help="folder that relative paths of the list start from")
    parser.add_argument("--passes", type=int, default=3, help="measurements, of which the median counts (default 3)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    videos = read_labelled(given.videos, given.prefix).videos
    found = {
        "videos": len(videos),
        "clip": f"{FRAMES} x {SIDE} px, {CLIPS} clips per video in training, 4 x 3 views in a test",
        "load_average": os.getloadavg()[0],
        "train_clips_per_second": measure(TRAIN, videos, given.passes),
        "test_views_per_second": measure(TEST, videos, given.passes),
    }
    text = json.dumps(found, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

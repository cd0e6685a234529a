"""Sections `data`, `augment` and `mix`: lists, clips, augmentation, captions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

from umt_fast.config.base import ConfigError, check_at_least, check_share

FileDecoder = Literal["pyav"]
"""Decoders of files: each is a module of this name in `umt_fast.data.decode`, and worker processes use it."""
LoaderDecoder = Literal["dali"]
"""Decoders with a loader of their own; `umt_fast.data.open_loader` opens them."""
Decoder = Literal["auto", FileDecoder, LoaderDecoder]
FrameRule = Literal["sparse", "dense", "strided", "segment"]


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation of labelled clips: RandAugment, random resized crop, flip, erasing. Defaults are UMT's."""

    mode: Literal["published", "fast", "none"] = "published"
    """published: the draws of the published code, by Pillow on whole frames. fast: crop first, then the rest on the
    device. none: crop and flip only."""
    operations: int = 4
    """RandAugment operations drawn for a clip (arXiv 1909.13719); 0: none."""
    magnitude: float = 7.0
    """Mean level of an operation, from 0 to 10."""
    magnitude_std: float = 0.5
    """Standard deviation of the level."""
    chance: float = 0.5
    """Chance that a drawn operation is applied."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the crop, as a share of the frame's area."""
    crop_aspect: tuple[float, float] = (0.75, 1.3333)
    """Smallest and largest aspect ratio of the crop, width / height."""
    flip: float = 0.5
    """Chance of a horizontal flip; 0 where left and right matter, as in Something-Something."""
    erase: float = 0.25
    """Chance that a rectangle of the clip is replaced by noise (arXiv 1708.04896)."""

    def __post_init__(self) -> None:
        check_at_least(self, "augment", operations=0)
        for name in ("magnitude", "magnitude_std"):
            if not 0 <= getattr(self, name) <= 10:
                raise ConfigError(f"augment.{name} = {getattr(self, name)}: must be in [0, 10]")
        for name in ("chance", "flip", "erase"):
            check_share(f"augment.{name}", getattr(self, name))
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ConfigError(f"augment.crop_area = {self.crop_area}: must ascend in (0, 1]")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1] < math.inf:
            raise ConfigError(f"augment.crop_aspect = {self.crop_aspect}: must ascend from above 0")


@dataclass(frozen=True)
class MixConfig:
    """Mixing of the clips of a batch, and smoothing of their targets; the defaults are UMT's."""

    mixup: float = 0.8
    """Alpha of the Beta distribution of mixup's share (arXiv 1710.09412); 0: no mixup."""
    cutmix: float = 1.0
    """The same for cutmix (arXiv 1905.04899)."""
    probability: float = 1.0
    """Chance that a batch (with mode `elem`: a clip) is mixed."""
    switch: float = 0.5
    """Chance of cutmix instead of mixup, if both are on."""
    mode: Literal["batch", "elem"] = "batch"
    """One share for the whole batch, or one for each clip."""
    smoothing: float = 0.1
    """Share of a target that is spread over all classes."""

    def __post_init__(self) -> None:
        for name in ("probability", "switch", "smoothing"):
            check_share(f"mix.{name}", getattr(self, name))
        check_at_least(self, "mix", mixup=0, cutmix=0)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class DataConfig:
    """Videos, and how clips are read from them."""

    train: str = ""
    """A list (`path,label`, `path label` or `path` a line) or a folder of videos."""
    prefix: str = ""
    """Folder that relative paths of the list start from; empty: the working directory."""
    decoder: Decoder = "auto"
    """auto: DALI where it is installed and the GPU has decoding engines (NVDEC), else PyAV."""
    workers: int = 4
    """Processes per rank that read and decode, and threads of DALI on the CPU; 0: decode in the training process."""
    prefetch: int = 2
    """Batches each worker keeps ready."""
    pipelines: int = 0
    """DALI pipelines per rank, each of which decodes a group of videos ahead of the step; 0: one per NVDEC."""
    pipeline_visits: int = 0
    """Videos that a pipeline decodes at once, at full size in GPU memory; 0: a whole batch, which is then passed on
    without a copy."""
    crops_per_clip: int = 1
    """Clips cut from one decoded video: the same frames, cropped and flipped again (UMT's num_sample). A batch still
    holds `optim.batch_size` clips."""
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Crop sides as shares of the short side."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    crop_area: tuple[float, float] | None = None
    """Smallest and largest area share of random resized crops, with aspect ratios 3/4 to 4/3; None: multi-scale
    crops."""
    frame_step: int | None = None
    """A clip is every frame_step-th frame from a random frame on; None: one frame from each equal part of the video."""
    frame_rate: float | None = None
    """Frames per second of a clip, from a random time on, for videos of any rate; None: see `frame_step`."""
    clip_seconds: float | None = None
    """Duration of a clip, whose frames are spread evenly from a random time on (MAE-ST); None: see `frame_step`."""
    square_pixels: bool = False
    """Widen frames with non-square pixels as players do; by default they are read as they are stored, as UMT does."""
    max_bad_fraction: float = 0.1
    """The run stops when a larger share of the list than this is unreadable."""
    read_timeout: float = 60.0
    """Seconds for fetching a video from a URL, all attempts together; a slower video counts as unreadable."""
    max_bytes: int = 256 << 20
    """Largest video or list that is read from a URL, bytes; each worker holds up to 8 at a time. A larger video counts
    as unreadable."""
    max_pixels: int = 1 << 25
    """Largest frame, width times height in pixels: 8K by default. A video with larger frames counts as unreadable."""
    time_limit: float = 120.0
    """Seconds for decoding one video while training; a slower video counts as unreadable."""
    stall_timeout: float = 300.0
    """Seconds that a worker may read one video before it is killed and the video is left out."""

    def __post_init__(self) -> None:
        check_at_least(self, "data", workers=0, prefetch=1, pipelines=0, pipeline_visits=0, crops_per_clip=1)
        check_at_least(self, "data", read_timeout=1, max_bytes=1, max_pixels=1, time_limit=1, stall_timeout=1)
        check_share("data.flip", self.flip)
        check_share("data.max_bad_fraction", self.max_bad_fraction)
        check_share("data.crop_scales", *self.crop_scales)
        check_at_least(self, "data", frame_step=1, frame_rate=0.001, clip_seconds=0.001)
        given = [
            f"data.{key}" for key in ("frame_step", "frame_rate", "clip_seconds") if getattr(self, key) is not None
        ]
        if len(given) > 1:
            raise ConfigError(f"{given[0]} and {given[1]} are both given; choose one")
        if self.crop_area is not None:
            check_share("data.crop_area", *self.crop_area)
            if not 0 < self.crop_area[0] <= self.crop_area[1]:
                raise ConfigError(f"data.crop_area = {self.crop_area}: give the least and the largest share, above 0")
        if not self.crop_scales:
            raise ConfigError("data.crop_scales is empty: give at least one share of the short side")
        if self.decoder not in get_args(Decoder):
            raise ConfigError(f"data.decoder = {self.decoder!r}: give {', '.join(get_args(Decoder))}")

    @property
    def file_decoder(self) -> FileDecoder:
        """The decoder of files: `decoder` where it is one, else PyAV, which decodes what DALI does not."""
        return cast(FileDecoder, self.decoder) if self.decoder in get_args(FileDecoder) else "pyav"


@dataclass(frozen=True)
class LabelledDataConfig(DataConfig):
    """Labelled videos for training, validation and test. `crop_scales` is stage 1's; see `augment.crop_area`."""

    validation: str = ""
    """List that is tested after every epoch to select the best checkpoint; empty: the last checkpoint is the best."""
    test: str = ""
    """List for the multi-view test at the end; empty: none."""
    classes: str = ""
    """File of class names, one a line; line i names class i. Empty: labels are numbers, or names in sorted order."""
    count_classes: bool = False
    """Take the number of classes from the training list (or the class file) instead of classifier.num_classes."""
    rule: FrameRule = "sparse"
    """Frames of a clip. sparse: over the whole video; dense: at a fixed rate; strided: dense, with VideoMAE's test
    views; segment: one frame from each part, as for Something-Something."""
    rate: float = 4.0
    """A dense or strided clip has every rate-th frame of the video."""
    fps: float | None = None
    """Frames per second of a dense or strided clip, instead of `rate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < math.inf or (self.fps is not None and not 0 < self.fps < math.inf):
            raise ConfigError(f"data.rate = {self.rate}, data.fps = {self.fps}: must be above 0")


@dataclass(frozen=True)
class CaptionDataConfig(DataConfig):
    """Lists with captions: LIST, LIST=ROOT or LIST=ROOT*WEIGHT (docs/stage2.md)."""

    images: tuple[str, ...] = ()
    """Lists of pictures."""
    videos: tuple[str, ...] = ()
    """Lists of videos; in fine-tuning pictures may be among them."""
    validation: str = ""
    """LIST or LIST=ROOT that is tested after every epoch; a fine-tuning keeps its best weights in best.pth."""
    validation_job: Literal["retrieval", "multiple_choice"] = "retrieval"
    """Content of the validation list; in question answering it always holds questions."""
    answers: str = ""
    """Question answering: a JSON list of the answers that validation chooses from."""
    identity: Literal["published", "distinct"] = "published"
    """published: rows with the same row number in different lists count as the same sample, and in retrieval files
    with the same name in different folders; distinct: they do not."""
    replaced_captions: Literal["published", "replacement"] = "published"
    """Caption of a video that replaces a broken one. published: the caption of the broken video; replacement: its
    own."""
    last_frames: bool = False
    """Draw from whole intervals; the published code never draws the last frame of an interval."""
    antialias: bool = False
    """Antialias when frames are made smaller; the published code does not."""
    closing_sep: bool = False
    """End texts with [SEP], as BERT was trained; the published tokenizer does not."""
    max_words: int = 32
    """Longest text or question, in tokens."""
    max_answer_words: int = 5
    """Longest answer, in tokens."""
    join_captions: bool = False
    """Retrieval: all captions of an entry are one text (DiDeMo, ActivityNet)."""
    same_caption: bool = False
    """Entries with equal captions match each other, as in retrieval on Something-Something V2."""
    max_seconds: float | None = None
    """Read only this many seconds from the beginning of a video (DiDeMo: 30)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "data", max_words=3, max_answer_words=3, max_seconds=0)
        if self.crops_per_clip != 1:
            raise ConfigError(f"data.crops_per_clip = {self.crops_per_clip}: stage 2 makes one clip of a video; use 1")

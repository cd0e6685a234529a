"""Every setting with its default, in sections that check themselves; a job composes the sections that it needs.

`umt_fast.recipe` makes these from a recipe and the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from umt_fast.errors import RunError

Masking = Literal["attention", "random", "tube", "mae_st", "frame"]
Precision = Literal["auto", "bf16", "fp32"]
Decoder = Literal["auto", "dali", "pyav"]
TorchAttention = Literal["sdpa", "cudnn", "flash", "efficient", "math", "matmul"]
Attention = Literal["auto", TorchAttention, "flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers"]
Recompute = Literal["none", "selective", "full"]
Parallel = Literal["ddp", "fsdp"]
FrameRule = Literal["sparse", "dense", "segment"]
TeacherPrecision = Literal["same", "int8", "fp8", "int8-triton", "fp8-triton"]
"""8-bit matmuls of the teacher: torchao's, or umt_kernels' with norms and activations in the same passes."""
StudentPrecision = Literal["same", "fp8"]
GatherGradient = Literal["published", "true"]
Stage2Job = Literal["pretrain", "retrieval", "qa"]
Activation = Literal["quick_gelu", "gelu"]


MLP_RATIO = 4
"""Width of a hidden layer over the width of its block, in every model here."""


class ConfigError(RunError, ValueError):
    """A setting with a value that cannot be used."""


def _divides(owner: str, name: str, value: int, by_name: str, by: int) -> None:
    if by < 1 or value < 1 or value % by:
        raise ConfigError(f"{owner}: {name} = {value} is not a positive multiple of {by_name} = {by}")


def _aligned(owner: str, depth: int, layers: int, interval: float) -> tuple[int, ...]:
    """Indices of the aligned blocks, ascending: depth - 1 - int(i * interval), as UMT counts. Raises ConfigError."""
    if not 1 <= layers <= depth:
        raise ConfigError(f"{owner}: align_layers = {layers} is not in 1..depth = {depth}")
    blocks = tuple(depth - 1 - int(i * interval) for i in range(layers))[::-1]
    if interval <= 0 or blocks[0] < 0 or len(set(blocks)) < layers:
        raise ConfigError(
            f"{owner}: align_interval = {interval} does not give {layers} different blocks of {depth}; use 1"
        )
    return blocks


def _check_at_least(section: Any, name: str, **lowest: float) -> None:
    """Raise ConfigError unless each named setting of a section is None or finite and at least the number given."""
    for key, low in lowest.items():
        value = getattr(section, key)
        if value is not None and not low <= value < math.inf:
            raise ConfigError(f"{name}.{key} = {value}: must be a finite number >= {low:g}")


def _check_share(key: str, *values: float, below_one: bool = False) -> None:
    for value in values:
        if not (0 <= value < 1 or (value == 1 and not below_one)):
            raise ConfigError(f"{key} = {value}: must be in [0, 1{')' if below_one else ']'}")


@dataclass(frozen=True)
class VitConfig:
    """Sizes of a video ViT. Defaults are UMT-B/16."""

    image_size: int = 224
    """Side of the clip, pixels."""
    patch_size: int = 16
    """Side of a patch, pixels."""
    tubelet_size: int = 1
    """Frames per token."""
    frames: int = 8
    """Frames per clip."""
    width: int = 768
    depth: int = 12
    heads: int = 12

    _section = "model"
    """Name of the section in error messages."""

    def __post_init__(self) -> None:
        _divides(self._section, "image_size", self.image_size, "patch_size", self.patch_size)
        _divides(self._section, "frames", self.frames, "tubelet_size", self.tubelet_size)
        _divides(self._section, "width", self.width, "heads", self.heads)

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a frame of tokens."""
        return self.grid**2

    @property
    def token_frames(self) -> int:
        """Frames of tokens of a clip."""
        return self.frames // self.tubelet_size

    @property
    def tokens(self) -> int:
        """Tokens of a clip, visible or not."""
        return self.token_frames * self.patches


@dataclass(frozen=True)
class StudentConfig(VitConfig):
    """The video ViT that is trained to give the teacher's features."""

    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    align_layers: int = 6
    """How many of the last blocks are aligned with the teacher."""
    target_width: int = 512
    """Width of the teacher's output."""
    align_interval: float = 1.0
    """Blocks from one aligned block to the next, counted back from the last (clip_student_return_interval)."""

    _section = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        _aligned("student", self.depth, self.align_layers, self.align_interval)
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"student: drop_path = {self.drop_path} is not in [0, 1)")

    @property
    def aligned_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that are aligned, ascending."""
        return _aligned("student", self.depth, self.align_layers, self.align_interval)


@dataclass(frozen=True)
class ClassifierConfig(VitConfig):
    """The video ViT that classifies pooled tokens, as UMT fine-tunes it."""

    num_classes: int = 400
    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    pool: Literal["mean", "first"] = "mean"
    """What the head sees: the mean of all tokens, or the clip's first token (the published `--use_cls`)."""
    learnable_positions: bool = False
    """Positions drawn anew in place of the sinusoid table. They get no gradient either, as published."""
    positions: Literal["resized", "direct"] = "resized"
    """resized: the sinusoid table of 8 x 14 x 14 tokens, resized to the model's (UMT); direct: the table of the model's
    own number of tokens (VideoMAE)."""

    _section = "classifier"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes < 1:
            raise ConfigError(f"classifier: num_classes = {self.num_classes}: must be at least 1")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"classifier: drop_path = {self.drop_path} is not in [0, 1)")
        if self.pool not in ("mean", "first"):
            raise ConfigError(f"classifier: pool = {self.pool!r}: give mean or first")


@dataclass(frozen=True)
class VideoMaeConfig(VitConfig):
    """VideoMAE (arXiv 2203.12602) and VideoMAE V2 (arXiv 2303.16727). Defaults are ViT-B."""

    tubelet_size: int = 2
    frames: int = 16
    decoder_width: int = 384
    decoder_depth: int = 4
    decoder_heads: int = 6
    mlp_width: int | None = None
    """Width inside the encoder's MLPs; None: 4 x width. The decoder's is in the same ratio, rounded down."""
    drop_path: float = 0.0
    """Stochastic depth of the encoder's last block; it grows linearly from 0 at the first."""
    normalise_targets: bool = True
    """Targets of each token have mean 0 and variance 1 per colour; else they are pixels in [0, 1]."""

    _section = "videomae"

    def __post_init__(self) -> None:
        super().__post_init__()
        _divides(self._section, "decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        if self.decoder_depth < 1:
            raise ConfigError(f"videomae: decoder_depth = {self.decoder_depth} is not 1 or more")
        if self.mlp_width is not None and self.mlp_width < 1:
            raise ConfigError(f"videomae: mlp_width = {self.mlp_width} is not 1 or more")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"videomae: drop_path = {self.drop_path} is not in [0, 1)")

    @property
    def decoder_mlp_width(self) -> int:
        if self.mlp_width is None:
            return MLP_RATIO * self.decoder_width
        return self.decoder_width * self.mlp_width // self.width


@dataclass(frozen=True)
class MaeStConfig(VitConfig):
    """MAE-ST (arXiv 2205.09113). Defaults are ViT-L with the published recipe's decoder."""

    tubelet_size: int = 2
    frames: int = 16
    width: int = 1024
    depth: int = 24
    heads: int = 16
    decoder_width: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 16
    target_frames: int = 8
    """Frames of the clip that are predicted, spread evenly with both ends included."""
    class_token: bool = True
    separable_positions: bool = True
    """Learned positions as a sum of one table over space and one over time; else one table of all tokens."""
    qkv_bias: bool = True
    normalise_targets: bool = True
    """Targets of each token have mean 0 and variance 1 over all values; else they are normalised pixels."""

    _section = "mae_st"

    def __post_init__(self) -> None:
        super().__post_init__()
        _divides(self._section, "decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        _divides(self._section, "target_frames", self.target_frames, "frames of tokens", self.token_frames)
        if self.target_frames > self.frames:
            raise ConfigError(f"mae_st: target_frames = {self.target_frames} is more than frames = {self.frames}")
        if self.decoder_depth < 1:
            raise ConfigError(f"mae_st: decoder_depth = {self.decoder_depth} is not 1 or more")

    @property
    def target_frame_ids(self) -> list[int]:
        """Frames of a clip that are predicted: evenly spread from the first to the last, rounded down."""
        if self.target_frames == 1:
            return [0]
        return [(self.frames - 1) * i // (self.target_frames - 1) for i in range(self.target_frames)]


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation of labelled clips: RandAugment, random resized crop, flip, erasing. Defaults are UMT's."""

    mode: Literal["published", "fast", "none"] = "published"
    """published: draw by draw as the published code, by Pillow on whole frames. fast: crop first, the rest on the
    device. none: crop and flip alone."""
    operations: int = 4
    """RandAugment operations drawn for a clip (arXiv 1909.13719); 0: none."""
    magnitude: float = 7.0
    """Mean level of an operation, of 10."""
    magnitude_std: float = 0.5
    chance: float = 0.5
    """Chance that a drawn operation is applied."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the frame's area that the crop has."""
    crop_aspect: tuple[float, float] = (0.75, 1.3333)
    """Smallest and largest width by height of the crop."""
    flip: float = 0.5
    """Chance of a horizontal flip; 0 where left and right matter, as in Something-Something."""
    erase: float = 0.25
    """Chance that a rectangle of the clip becomes noise (arXiv 1708.04896)."""

    def __post_init__(self) -> None:
        if self.operations < 0 or not 0 <= self.magnitude <= 10 or not 0 <= self.magnitude_std <= 10:
            raise ConfigError(
                f"augment: operations = {self.operations}, magnitude = {self.magnitude}, magnitude_std = "
                f"{self.magnitude_std}: must be at least 0, and the latter two at most 10"
            )
        for name, share in (("chance", self.chance), ("flip", self.flip), ("erase", self.erase)):
            if not 0 <= share <= 1:
                raise ConfigError(f"augment.{name} = {share}: must be in [0, 1]")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ConfigError(f"augment.crop_area = {self.crop_area}: must ascend in (0, 1]")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1] < math.inf:
            raise ConfigError(f"augment.crop_aspect = {self.crop_aspect}: must ascend from above 0")


@dataclass(frozen=True)
class MixConfig:
    """How the clips of a batch are mixed, and their targets smoothed; the defaults are UMT's."""

    mixup: float = 0.8
    """Alpha of the Beta distribution that mixup's share is drawn from (arXiv 1710.09412); 0: no mixup."""
    cutmix: float = 1.0
    """Likewise for cutmix (arXiv 1905.04899)."""
    probability: float = 1.0
    """Chance that a batch, or with `elem` a clip, is mixed at all."""
    switch: float = 0.5
    """Chance of cutmix where both are on."""
    mode: Literal["batch", "elem"] = "batch"
    """One share for the whole batch, or one for each clip."""
    smoothing: float = 0.1
    """Share of a target that is spread over all classes."""

    def __post_init__(self) -> None:
        for name in ("probability", "switch", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"mix.{name} = {getattr(self, name)}: must be in [0, 1]")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"mix.{name} = {getattr(self, name)}: must be at least 0")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen CLIP image ViT. Defaults are CLIP-B/16."""

    image_size: int = 224
    """Side of the frame the teacher works on, pixels."""
    patch_size: int = 16
    """Side of a patch of that frame, pixels."""
    tubelet_size: int = 1
    """Frames per token; above 1 the patch weights are inflated in time as UMT does."""
    input_size: int | None = None
    """Side of the clip, pixels; it is resized to image_size (bicubic). None: the same."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    target_width: int = 512
    """Width of the output."""
    align_layers: int = 6
    """How many of the last blocks give targets."""
    align_interval: float = 1.0
    """Blocks from one of these to the next, counted back from the last (stage 2's clip_return_interval)."""
    activation: Activation = "quick_gelu"
    """quick_gelu: OpenAI's CLIPs; gelu: most of open_clip's. The weights' own config is checked against it."""

    def __post_init__(self) -> None:
        _divides("teacher", "image_size", self.image_size, "patch_size", self.patch_size)
        _divides("teacher", "input_size", self.clip_size, "the patches along a side", self.grid)
        _divides("teacher", "width", self.width, "heads", self.heads)
        _aligned("teacher", self.depth, self.align_layers, self.align_interval)
        if self.tubelet_size < 1:
            raise ConfigError(f"teacher: tubelet_size = {self.tubelet_size} is not 1 or more")

    @property
    def aligned_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that give targets, ascending."""
        return _aligned("teacher", self.depth, self.align_layers, self.align_interval)

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def clip_size(self) -> int:
        """Side of the clip that comes in, pixels."""
        return self.image_size if self.input_size is None else self.input_size

    @property
    def clip_patch_size(self) -> int:
        """Side of a patch on the clip that comes in, pixels."""
        return self.clip_size // self.grid


def check_fit(student: StudentConfig, teacher: TeacherConfig) -> None:
    """Raise ConfigError unless the teacher gives targets for what the student predicts."""
    pairs = {
        "the clip's side": (student.image_size, teacher.clip_size),
        "patches along a side": (student.grid, teacher.grid),
        "tubelet_size": (student.tubelet_size, teacher.tubelet_size),
        "align_layers": (student.align_layers, teacher.align_layers),
        "target_width": (student.target_width, teacher.target_width),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ConfigError(f"student and teacher differ in {name}: {ours} against {theirs}")


@dataclass(frozen=True)
class TextConfig:
    """The text encoder of stage 2. Defaults are bert-base-uncased with three fusion layers."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    fusion_layer: int = 9
    """First layer that also looks at the video."""
    vocab_size: int = 30522
    max_positions: int = 512
    mlp_width: int = 3072
    dropout: float = 0.0
    """Of hidden states and attention, in training; BERT's own is 0.1."""
    pad_id: int = 0
    cls_id: int = 101
    sep_id: int = 102
    mask_id: int = 103

    def __post_init__(self) -> None:
        _divides("text", "width", self.width, "heads", self.heads)
        if not 0 <= self.fusion_layer < self.depth:
            raise ConfigError(f"text: fusion_layer = {self.fusion_layer} is not in 0..depth - 1 = {self.depth - 1}")
        for name in ("vocab_size", "max_positions", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"text: {name} = {getattr(self, name)} is not 1 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"text: dropout = {self.dropout} is not in [0, 1)")


@dataclass(frozen=True)
class VideoTextConfig:
    """The model of stage 2: a video encoder, its teacher, a text encoder and the space where both meet."""

    vision: StudentConfig = field(default_factory=StudentConfig)
    """`frames` is the number of a video; an image is a clip of one frame."""
    teacher: TeacherConfig | None = field(default_factory=TeacherConfig)
    """None: no alignment, so no mask either, as in fine-tuning."""
    text: TextConfig = field(default_factory=TextConfig)
    joint_width: int = 512
    temperature: float = 0.07
    """What similarities are divided by, at the start; it is learned."""
    language_head: bool | None = None
    """Whether the text encoder can fill in masked words. None: if there is a teacher, as in the published files."""
    align_eps: float = 1e-5
    """Epsilon of the alignment heads' LayerNorm: 1e-5 as published for stage 2, where stage 1 has 1e-6."""
    position_frames: int | None = None
    """Frames of the position table; another number of frames interpolates it in time. None: one table of any length."""

    def __post_init__(self) -> None:
        if self.teacher is not None:
            check_fit(self.vision, self.teacher)
        if self.vision.tubelet_size != 1:
            raise ConfigError(f"vision: tubelet_size = {self.vision.tubelet_size}, but an image has one frame; use 1")
        if self.joint_width < 1:
            raise ConfigError(f"joint_width = {self.joint_width} is not 1 or more")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature} is not above 0")
        if not 0 < self.align_eps < math.inf:
            raise ConfigError(f"align_eps = {self.align_eps} is not above 0")
        if self.position_frames is not None and self.position_frames < 1:
            raise ConfigError(f"position_frames = {self.position_frames} is not 1 or more")

    @property
    def has_language_head(self) -> bool:
        return self.teacher is not None if self.language_head is None else self.language_head


@dataclass(frozen=True)
class VideoTextObjective:
    """What a step of stage 2 minimises. Defaults are those of the published pre-training."""

    uta: float = 1.0
    """Weight of the alignment with the teacher; 0 leaves it, the teacher and the mask out."""
    vtc: float = 1.0
    """Weight of the contrast."""
    vtm: float = 1.0
    """Weight of the matching."""
    mlm: float = 1.0
    """Weight of the masked words."""
    video_mask_ratio: float = 0.8
    """Share of a video's patches that are hidden."""
    image_mask_ratio: float = 0.5
    mlm_probability: float = 0.5
    """Share of the words that are to be predicted."""
    gather_gradient: GatherGradient = "published"
    """published: VTC gives the encoders 1 / ranks of its gradient, as the published gather does; true: all of it."""

    def __post_init__(self) -> None:
        for name in ("uta", "vtc", "vtm", "mlm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"objective: {name} = {getattr(self, name)} is not a number of 0 or more")
        for name in ("video_mask_ratio", "image_mask_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"objective: {name} = {getattr(self, name)} is not in [0, 1)")
        if not 0 < self.mlm_probability <= 1:
            raise ConfigError(f"objective: mlm_probability = {self.mlm_probability} is not in (0, 1]")


TEXTS = {
    "bert_base": TextConfig(),
    "bert_large": TextConfig(width=1024, depth=24, heads=16, fusion_layer=19, mlp_width=4096),
}
STUDENTS = {
    "umt_b16": StudentConfig(drop_path=0.1),
    "umt_l16": StudentConfig(width=1024, depth=24, heads=16, drop_path=0.2, target_width=768),
}
_CLIP_L14 = TeacherConfig(
    image_size=196, patch_size=14, input_size=224, width=1024, depth=24, heads=16, target_width=768
)
CLASSIFIERS = {
    "vit_b16": ClassifierConfig(drop_path=0.1),
    "vit_l16": ClassifierConfig(width=1024, depth=24, heads=16, drop_path=0.2),
}
TEACHERS = {
    "clip_b16": TeacherConfig(),
    "clip_l14": _CLIP_L14,
    # LAION's and DFN's, 16 x 16 patches: the student has patches of 14 pixels, or clips of 256 with input_size = 256.
    "open_clip_h14": TeacherConfig(patch_size=14, width=1280, depth=32, heads=16, target_width=1024, activation="gelu"),
    "clip_l14_336": _CLIP_L14,  # another model's weights, its positions resampled to the same 14 x 14 grid
}


@dataclass(frozen=True)
class MaskConfig:
    """Which tokens the student sees."""

    rule: Masking = "attention"
    ratio: float = 0.8
    """Share of the patches that the student does not see."""
    masks_per_clip: int = 1
    """Visible sets per clip and teacher pass; the student's batch is that many times larger."""

    def __post_init__(self) -> None:
        _check_share("mask.ratio", self.ratio, below_one=True)
        _check_at_least(self, "mask", masks_per_clip=1)


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
    """Processes per rank that read and decode, and threads of DALI on the CPU; 0: the training process does it."""
    prefetch: int = 2
    """Batches each worker keeps ready."""
    pipelines: int = 0
    """DALI pipelines per rank, each with a group of videos at work ahead of the step; 0: one per NVDEC of the GPU."""
    pipeline_visits: int = 0
    """Videos that a pipeline decodes at once, at their full size in memory; 0: all of a batch, which is then handed
    over without a copy."""
    crops_per_clip: int = 1
    """Clips cut from one decoded video: the same frames, cropped and flipped anew (UMT's num_sample). A batch still
    holds `optim.batch_size` clips."""
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Crop sides as shares of the short side."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    crop_area: tuple[float, float] | None = None
    """Random resized crops of such a share of the frame, sides in a ratio of 3/4 to 4/3; None: multi-scale crops."""
    frame_step: int | None = None
    """Clips of consecutive frames, every so many of the video's; None: one frame from each equal part of the video."""
    frame_rate: float | None = None
    """Frames a second of a clip, from a random moment on, whatever the video's own rate; None: see `frame_step`."""
    square_pixels: bool = False
    """Widen frames with non-square pixels as players do; by default they are read as they are stored, as UMT does."""
    max_bad_fraction: float = 0.1
    """Share of the list that may turn out unreadable before the run stops."""
    read_timeout: float = 60.0
    """Seconds within which a video must have come from a URL, all attempts together; then it counts as unreadable."""
    max_bytes: int = 256 << 20
    """Largest video or list that is read from a URL, bytes; each worker holds up to 8 at a time. A larger one counts as
    unreadable."""
    max_pixels: int = 1 << 25
    """Largest frame, width times height in pixels: 8K by default. A video with a larger one counts as unreadable."""
    time_limit: float = 120.0
    """Seconds that the decoding of one video may take while training; then it counts as unreadable."""
    stall_timeout: float = 300.0
    """Seconds that a worker may read one video before it is killed and the video is left out."""

    def __post_init__(self) -> None:
        _check_at_least(self, "data", workers=0, prefetch=1, pipelines=0, pipeline_visits=0, crops_per_clip=1)
        _check_at_least(self, "data", read_timeout=1, max_bytes=1, max_pixels=1, time_limit=1, stall_timeout=1)
        _check_share("data.flip", self.flip)
        _check_share("data.max_bad_fraction", self.max_bad_fraction)
        _check_share("data.crop_scales", *self.crop_scales)
        _check_at_least(self, "data", frame_step=1, frame_rate=0.001)
        if self.frame_step is not None and self.frame_rate is not None:
            raise ConfigError("data.frame_step and data.frame_rate are both given; choose one")
        if self.crop_area is not None:
            _check_share("data.crop_area", *self.crop_area)
            if not 0 < self.crop_area[0] <= self.crop_area[1]:
                raise ConfigError(f"data.crop_area = {self.crop_area}: give the least and the largest share, above 0")
        if not self.crop_scales:
            raise ConfigError("data.crop_scales is empty: give at least one share of the short side")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and its batches."""

    epochs: int = 200
    warmup_epochs: float = 40
    batch_size: int = 64
    """Clips per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimiser step."""
    lr: float = 1.5e-4
    """Peak learning rate for 256 clips per step; scaled linearly with the global batch."""
    min_lr: float = 1e-5
    """Learning rate at the end, scaled likewise."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Not applied to biases and 1-D parameters."""
    clip_grad: float | None = None
    """Largest gradient norm; None does not clip."""

    def __post_init__(self) -> None:
        _check_at_least(self, "optim", epochs=1, batch_size=1, accumulate=1, warmup_epochs=0, lr=0, min_lr=0, eps=0)
        _check_at_least(self, "optim", weight_decay=0, clip_grad=0)
        _check_share("optim.betas", *self.betas, below_one=True)


@dataclass(frozen=True)
class ComputeConfig:
    """How the models are computed."""

    precision: Precision = "auto"
    """auto: bf16 autocast where the device computes in it, else float32."""
    attention: Attention = "auto"
    """auto measures the installed backends on the run's shapes, once, and remembers the fastest."""
    compile: bool = False
    """Run the models through torch.compile: minutes at the start for faster steps."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again: none; selective, all but the outputs of matmuls and
    attention; full, whole blocks. Less memory for more time."""
    cuda_graph: bool = False
    """Record the whole step as one CUDA graph and replay it, so that the host launches nothing."""
    parallel: Parallel = "ddp"
    """Several processes: ddp copies the model to each; fsdp (FSDP2) shards weights, gradients and optimiser."""

    def __post_init__(self) -> None:
        if self.cuda_graph and self.recompute != "none" and not self.compile:
            raise ConfigError(
                "compute.recompute reads the random state, which a CUDA graph forbids; add --compute.compile"
            )
        for name in ("compile", "cuda_graph"):
            if self.parallel == "fsdp" and getattr(self, name):
                raise ConfigError(f"compute.parallel = fsdp does not work with compute.{name}; leave out either")


@dataclass(frozen=True)
class LowPrecisionConfig(ComputeConfig):
    """ComputeConfig with the options of pre-training that change its numbers a little."""

    teacher_precision: TeacherPrecision = "same"
    """same as the run; int8 (Ampere and later) or fp8 (Ada, Hopper and later) through torchao; int8-triton or
    fp8-triton by umt_kernels. The error is measured on clips of the run and printed at the start."""
    least_teacher_cosine: float = 0.999
    """Mean cosine with the exact targets below which such a teacher is refused."""
    student_precision: StudentPrecision = "same"
    """same as the run; fp8 (Ada, Hopper and later) trains the blocks' matmuls in float8 through torchao: an experiment.
    The error is measured on clips of the run and printed at the start."""
    least_student_cosine: float = 0.99
    """Mean cosine with the exact predictions below which such a student is refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_precision", "student_precision"):
            if getattr(self, name) != "same" and self.precision == "fp32":
                raise ConfigError(f"compute.{name} is for runs in bf16; remove --compute.precision fp32")


@dataclass(frozen=True)
class RunConfig:
    """The run's folder, its log and its checkpoints."""

    name: str = "pretrain"
    """The run's folder under `dir`."""
    dir: str = "runs"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = 10
    """Steps between log lines. Nothing is read from the device in between."""
    save_every: int = 1000
    """Steps between checkpoints; one is always saved at the end and on a signal."""
    save_minutes: float | None = None
    """Minutes after which one is saved too, looked at when a line is logged; None: by steps alone."""
    keep: int = 3
    """Checkpoints kept."""
    resume: str = "auto"
    """auto: go on from this run's last checkpoint if it has one; never; or a checkpoint's path."""
    stop_at: int | None = None
    """Save and stop after this step; the schedule stays that of the whole run."""
    start_timeout: float = 1800.0
    """Seconds that the processes wait for each other until the first step."""
    step_timeout: float = 600.0
    """Seconds that they wait for each other from then on; then the run ends and names the one that was waited for."""

    def __post_init__(self) -> None:
        _check_at_least(
            self,
            "run",
            seed=0,
            log_every=1,
            save_every=1,
            keep=1,
            stop_at=1,
            save_minutes=0,
            start_timeout=1,
            step_timeout=1,
        )
        if not self.name or Path(self.name).name != self.name:
            raise ConfigError(f"run.name = {self.name!r} is not a plain folder name")

    @property
    def folder(self) -> Path:
        return Path(self.dir).expanduser() / self.name


@dataclass(frozen=True)
class PretrainConfig:
    """Stage 1: a student aligned with a frozen CLIP teacher."""

    objective: Literal["alignment"] = "alignment"
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teacher_weights: str = ""
    """OpenAI's .pt, UMT's .pth, a .safetensors file, a Hugging Face CLIP folder or repo id; or `random`."""
    init: str = ""
    """Weights that the student starts from, such as a checkpoint of another run; frames and image size may differ.
    Empty: drawn at random."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: LowPrecisionConfig = field(default_factory=LowPrecisionConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_fit(self.student, self.teacher)
        _divides("data and optim", "batch_size", self.optim.batch_size, "crops_per_clip", self.data.crops_per_clip)
        if self.compute.cuda_graph and self.optim.accumulate > 1:
            raise ConfigError("compute.cuda_graph records one forward pass per step, so optim.accumulate must be 1")
        if self.compute.cuda_graph and self.compute.recompute == "full" and self.student.drop_path > 0:
            # torch.compile then draws from generators of its own, which the graph does not know.
            raise ConfigError(
                "compute.recompute = full draws the dropped paths again, which a CUDA graph forbids; use "
                "--compute.recompute selective or --student.drop-path 0"
            )


@dataclass(frozen=True)
class LabelledDataConfig(DataConfig):
    """Labelled videos for training, validation and test. `crop_scales` is stage 1's; see `augment.crop_area`."""

    validation: str = ""
    """List that chooses the best checkpoint, after every epoch; empty: the last one is the best."""
    test: str = ""
    """List for the multi-view test at the end; empty: none."""
    classes: str = ""
    """File of class names, one a line, in order of their numbers; empty: numbers, or the list's names, sorted."""
    count_classes: bool = False
    """Take the number of classes from the training list (or the class file) in place of classifier.num_classes."""
    rule: FrameRule = "sparse"
    """Frames of a clip: sparse, over the whole video; dense, at a fixed rate; segment, as Something-Something."""
    rate: float = 4.0
    """Frames of the video per frame of a dense clip."""
    fps: float | None = None
    """Frames per second of a dense clip, in place of `rate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < math.inf or (self.fps is not None and not 0 < self.fps < math.inf):
            raise ConfigError(f"data.rate = {self.rate}, data.fps = {self.fps}: must be above 0")


@dataclass(frozen=True)
class FinetuneOptimConfig(OptimConfig):
    """AdamW with layer-wise learning rates, its schedule, its batches, and a moving average of the weights."""

    epochs: int = 5
    warmup_epochs: float = 1
    batch_size: int = 32
    """Clips per process and forward pass; data.crops_per_clip of them are of one video."""
    lr: float = 2e-5
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    """Learning rate of the first step, for 256 clips per step like the others."""
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.75
    """Factor of the learning rate from one block to the one before; 1: none."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which validation and test then use; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, "optim", warmup_lr=0)
        _check_share("optim.ema_decay", self.ema_decay, below_one=True)
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay = {self.layer_decay}: must be in (0, 1]")


@dataclass(frozen=True)
class InitConfig:
    """The weights that fine-tuning starts from."""

    checkpoint: str = ""
    """A pre-trained or fine-tuned file, ours or a published one, a folder or a Hugging Face repo; empty: random
    weights. Also `--init FILE`."""
    strict: bool = True
    """Refuse a file with other keys or shapes than fine-tuning expects; false: only report them."""
    delete_head: bool = False
    """Start with a new head where the file's would fit."""
    class_map: str = ""
    """JSON list with the file's row for each class, to cut a K710 head down to K600 or K700."""
    scale: float = 0.001
    """Factor of a new head's initial weights."""


@dataclass(frozen=True)
class TestConfig:
    """The multi-view test, and validation."""

    segments: int = 4
    """Views in time."""
    crops: int = 3
    """Views along the frame's longer side."""
    merge: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged over the views."""
    clips_per_pass: int = 16
    """Clips of a forward pass."""
    every_epochs: int = 1
    """Epochs between validations."""

    __test__ = False  # pytest would collect it where it is imported

    def __post_init__(self) -> None:
        _check_at_least(self, "test", segments=1, crops=1, clips_per_pass=1, every_epochs=1)


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning on labels."""

    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    test: TestConfig = field(default_factory=TestConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(name="finetune"))

    def __post_init__(self) -> None:
        _divides("data and optim", "batch_size", self.optim.batch_size, "crops_per_clip", self.data.crops_per_clip)
        if self.mix.mixes and self.optim.batch_size % 2:
            raise ConfigError(f"optim.batch_size = {self.optim.batch_size}: mixup and cutmix need an even number")
        if self.compute.parallel != "ddp":
            raise ConfigError(f"compute.parallel = {self.compute.parallel} is for pre-training; fine-tune with ddp")
        if self.compute.cuda_graph:
            raise ConfigError(
                "compute.cuda_graph is for pre-training; fine-tuning draws how to mix a batch on the host"
            )


@dataclass(frozen=True)
class JointConfig:
    """The space in which video and text meet, and how stage 2 differs from stage 1 in the video encoder."""

    width: int = 512
    temperature: float = 0.07
    """What similarities are divided by, at the start; it is learned."""
    align_eps: float = 1e-5
    """Epsilon of the alignment heads' LayerNorm: 1e-5 as published for stage 2, where stage 1 has 1e-6."""
    position_frames: int | None = None
    """Frames of the position table; another number of frames interpolates it in time. None: one table of any length."""


@dataclass(frozen=True)
class CaptionDataConfig(DataConfig):
    """Lists with captions: LIST, LIST=ROOT or LIST=ROOT*WEIGHT (docs/stage2.md)."""

    images: tuple[str, ...] = ()
    """Lists of pictures."""
    videos: tuple[str, ...] = ()
    """Lists of videos; in fine-tuning pictures may be among them."""
    identity: Literal["published", "distinct"] = "published"
    """published: rows of different lists with one place count as the same sample; distinct: they do not."""
    replaced_captions: Literal["published", "replacement"] = "published"
    """Caption of a video that takes a broken one's place: published, the broken one's; or its own."""
    last_frames: bool = False
    """Draw from whole intervals; the published code never draws the last frame of one."""
    antialias: bool = False
    """Antialias when frames are made smaller; the published code does not."""
    closing_sep: bool = False
    """End texts with [SEP], as BERT was trained; the published tokenizer does not."""
    max_words: int = 32
    """Longest text or question, in tokens."""
    max_answer_words: int = 5
    join_captions: bool = False
    """Retrieval: all captions of an entry are one text (DiDeMo, ActivityNet)."""
    same_caption: bool = False
    """Retrieval: entries with equal captions match each other (Something-Something V2)."""
    max_seconds: float | None = None
    """Only the beginning of a longer video is looked at (DiDeMo: 30)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, "data", max_words=3, max_answer_words=3, max_seconds=0)
        if self.crops_per_clip != 1:
            raise ConfigError(f"data.crops_per_clip = {self.crops_per_clip}: stage 2 makes one clip of a video; use 1")


@dataclass(frozen=True)
class Stage2Config:
    """Stage 2 and its fine-tunings: video and text."""

    job: Stage2Job = "pretrain"
    init: str = ""
    """Where to start: for pre-training a stage-1 checkpoint or a stage-2 one, else a stage-2 one."""
    bert: str = "bert-base-uncased"
    """Hugging Face folder or repo id of the text encoder and its vocabulary; or `random`."""
    vocabulary: str = ""
    """A vocab.txt; empty: that of the BERT or of the checkpoint's run."""
    teacher_weights: str = ""
    """As for stage 1; or `random`."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Only pre-training has one."""
    text: TextConfig = field(default_factory=TextConfig)
    """Sizes; the vocabulary's size comes from the vocabulary, and is the most that a new one may have."""
    joint: JointConfig = field(default_factory=JointConfig)
    objective: VideoTextObjective = field(default_factory=VideoTextObjective)
    data: CaptionDataConfig = field(default_factory=CaptionDataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    """`lr` and `min_lr` are not scaled by the batch; the rate never falls below `min_lr`."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _ = self.video_text  # checks the sizes
        if self.job != "qa" and self.optim.batch_size < 2 and self.objective.vtm > 0:
            raise ConfigError(f"optim.batch_size = {self.optim.batch_size}: matching needs negatives; use 2 or more")
        if self.compute.cuda_graph:
            raise ConfigError("compute.cuda_graph is for stage 1: here the length of the texts differs between batches")
        if self.compute.parallel != "ddp":
            raise ConfigError(f"compute.parallel = {self.compute.parallel}: stage 2 trains with ddp")

    @property
    def video_text(self) -> VideoTextConfig:
        joint = self.joint
        return VideoTextConfig(
            vision=self.student,
            teacher=self.teacher if self.job == "pretrain" else None,
            text=self.text,
            joint_width=joint.width,
            temperature=joint.temperature,
            align_eps=joint.align_eps,
            position_frames=joint.position_frames,
        )


@dataclass(frozen=True)
class PixelMaskConfig:
    """Which tokens the encoder sees, and which the decoder predicts."""

    rule: Literal["tube", "random", "frame", "mae_st"] = "tube"
    ratio: float = 0.9
    """Share of the patches that the encoder does not see."""
    decoder_ratio: float | None = None
    """Share of the patches that the decoder leaves out by a running cell (VideoMAE V2): 0.25, 0.5 or 0.75. None: it
    predicts all hidden patches."""

    def __post_init__(self) -> None:
        _check_share("mask.ratio", self.ratio, below_one=True)
        if self.decoder_ratio not in (None, 0.25, 0.5, 0.75):
            raise ConfigError(f"mask.decoder_ratio = {self.decoder_ratio}: give 0.25, 0.5 or 0.75")


@dataclass(frozen=True)
class _PixelsConfig:
    init: str = ""
    """Weights that the model starts from; empty: drawn at random."""
    mask: PixelMaskConfig = field(default_factory=PixelMaskConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(frame_step=4, flip=0.0))
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _divides("data and optim", "batch_size", self.optim.batch_size, "crops_per_clip", self.data.crops_per_clip)
        if self.compute.cuda_graph and self.optim.accumulate > 1:
            raise ConfigError("compute.cuda_graph records one forward pass per step, so optim.accumulate must be 1")


@dataclass(frozen=True)
class VideoMaePretrainConfig(_PixelsConfig):
    """VideoMAE and VideoMAE V2: pixels of hidden tokens; `adamae` draws the visible ones by a learned network."""

    objective: Literal["videomae", "adamae"] = "videomae"
    model: VideoMaeConfig = field(default_factory=VideoMaeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask.decoder_ratio is not None:
            if self.model.grid % 2:
                raise ConfigError(f"mask.decoder_ratio needs an even grid of patches; model has {self.model.grid}")
            if self.objective == "adamae":
                raise ConfigError("mask.decoder_ratio is not for objective = adamae, which predicts all hidden tokens")


@dataclass(frozen=True)
class MaeStPretrainConfig(_PixelsConfig):
    """MAE-ST: pixels of hidden tokens, learned positions."""

    objective: Literal["mae_st"] = "mae_st"
    model: MaeStConfig = field(default_factory=MaeStConfig)
    mask: PixelMaskConfig = field(default_factory=lambda: PixelMaskConfig("mae_st"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask.decoder_ratio is not None:
            raise ConfigError("mask.decoder_ratio is not for objective = mae_st, whose decoder sees all tokens")

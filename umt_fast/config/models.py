"""Sizes of the models: sections `student`, `teacher`, `classifier`, `text` and, for pixels, `model`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from umt_fast.config.base import ConfigError, check_at_least, check_divides, check_share

Activation = Literal["quick_gelu", "gelu"]
MLP_RATIO = 4
"""Width of a hidden layer over the width of its block, in every model here."""


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
    """Channels of a token."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Attention heads."""

    _section = "model"
    """Name of the section in error messages."""

    def __post_init__(self) -> None:
        check_divides(self._section, "image_size", self.image_size, "patch_size", self.patch_size)
        check_divides(self._section, "frames", self.frames, "tubelet_size", self.tubelet_size)
        check_divides(self._section, "width", self.width, "heads", self.heads)

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
        """Frames of tokens in a clip: frames / tubelet_size."""
        return self.frames // self.tubelet_size

    @property
    def tokens(self) -> int:
        """Tokens of a clip, visible or not."""
        return self.token_frames * self.patches


@dataclass(frozen=True)
class StudentConfig(VitConfig):
    """The video ViT that learns to predict the teacher's features."""

    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    align_layers: int = 6
    """Number of blocks that are aligned with the teacher, counted from the last."""
    target_width: int = 512
    """Width of the teacher's output."""
    align_interval: float = 1.0
    """Distance between aligned blocks, counted back from the last block (UMT's clip_student_return_interval)."""

    _section = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        _aligned("student", self.depth, self.align_layers, self.align_interval)
        check_share("student.drop_path", self.drop_path, below_one=True)

    @property
    def aligned_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that are aligned, ascending."""
        return _aligned("student", self.depth, self.align_layers, self.align_interval)


IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MAE_ST_STATISTICS = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))
"""Mean and standard deviation per colour for normalising pixels in [0, 1]."""


@dataclass(frozen=True)
class ClassifierConfig(VitConfig):
    """The video ViT that classifies pooled tokens, as UMT, VideoMAE and MAE-ST fine-tune it."""

    num_classes: int = 400
    """Outputs of the head."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    pool: Literal["mean", "first"] = "mean"
    """Input of the head: the mean of all tokens, or the clip's first token (the published `--use_cls`)."""
    learnable_positions: bool = False
    """Random positions instead of the sinusoid table. As published, they get no gradient either."""
    positions: Literal["resized", "direct"] = "resized"
    """resized: the sinusoid table of 8 x 14 x 14 tokens, resized to the model's (UMT); direct: a sinusoid table for the
    model's number of tokens (VideoMAE)."""
    architecture: Literal["umt", "mae_st"] = "umt"
    """umt: UMT's and VideoMAE's ViT; mae_st: MAE-ST's, with a class token, learned positions and the encoder's norm."""
    mlp_width: int | None = None
    """Width inside the MLPs; None: 4 x width."""
    head_dropout: float = 0.0
    """Dropout of the pooled vector in training."""

    _section = "classifier"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "classifier", num_classes=1, mlp_width=1)
        check_share("classifier.drop_path", self.drop_path, below_one=True)
        check_share("classifier.head_dropout", self.head_dropout, below_one=True)
        if self.pool not in ("mean", "first"):
            raise ConfigError(f"classifier: pool = {self.pool!r}: give mean or first")
        if self.architecture == "mae_st" and (
            self.pool != "mean" or self.learnable_positions or self.mlp_width is not None
        ):
            raise ConfigError(
                "classifier: architecture = mae_st pools the mean and has learned positions and MLPs of 4 x width; "
                "leave out pool, learnable_positions and mlp_width"
            )

    @property
    def pixel_statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation per colour that the model expects its pixels to be normalised with."""
        return MAE_ST_STATISTICS if self.architecture == "mae_st" else IMAGENET_STATISTICS


@dataclass(frozen=True)
class VideoMaeConfig(VitConfig):
    """VideoMAE (arXiv 2203.12602) and VideoMAE V2 (arXiv 2303.16727). Defaults are ViT-B."""

    tubelet_size: int = 2
    """Frames per token."""
    frames: int = 16
    """Frames per clip."""
    decoder_width: int = 384
    """Width of the model's decoder, the network that predicts pixels."""
    decoder_depth: int = 4
    """Number of the decoder's blocks."""
    decoder_heads: int = 6
    """Attention heads of the decoder."""
    mlp_width: int | None = None
    """Hidden width of the encoder's MLPs; None: 4 x width. The decoder has the same ratio, rounded down."""
    drop_path: float = 0.0
    """Stochastic depth of the encoder's last block; it grows linearly from 0 at the first."""
    normalise_targets: bool = True
    """Normalise the targets of each token to mean 0 and variance 1 per colour; otherwise they are pixels in [0, 1]."""

    _section = "videomae"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self._section, "decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        check_at_least(self, "videomae", decoder_depth=1, mlp_width=1)
        check_share("videomae.drop_path", self.drop_path, below_one=True)

    @property
    def decoder_mlp_width(self) -> int:
        if self.mlp_width is None:
            return MLP_RATIO * self.decoder_width
        return self.decoder_width * self.mlp_width // self.width


@dataclass(frozen=True)
class MaeStConfig(VitConfig):
    """MAE-ST (arXiv 2205.09113). Defaults are ViT-L with the published recipe's decoder."""

    tubelet_size: int = 2
    """Frames per token."""
    frames: int = 16
    """Frames per clip."""
    width: int = 1024
    """Channels of a token."""
    depth: int = 24
    """Number of blocks."""
    heads: int = 16
    """Attention heads."""
    decoder_width: int = 512
    """Width of the model's decoder, the network that predicts pixels."""
    decoder_depth: int = 4
    """Number of the decoder's blocks."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    target_frames: int = 8
    """Frames of the clip that are predicted, spread evenly from the first to the last."""
    class_token: bool = True
    """A class token before the others."""
    separable_positions: bool = True
    """Learned positions are the sum of a table over space and a table over time; otherwise one table of all tokens."""
    qkv_bias: bool = True
    """Biases of queries, keys and values."""
    normalise_targets: bool = True
    """Normalise the targets of each token to mean 0 and variance 1; otherwise they are normalised pixels."""

    _section = "mae_st"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self._section, "decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        check_divides(self._section, "target_frames", self.target_frames, "frames of tokens", self.token_frames)
        if self.target_frames > self.frames:
            raise ConfigError(f"mae_st: target_frames = {self.target_frames} is more than frames = {self.frames}")
        check_at_least(self, "mae_st", decoder_depth=1)

    @property
    def target_frame_ids(self) -> list[int]:
        """Indices of the frames that are predicted: evenly spread from the first to the last, rounded down."""
        if self.target_frames == 1:
            return [0]
        return [(self.frames - 1) * i // (self.target_frames - 1) for i in range(self.target_frames)]


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
    """Channels of a token."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Attention heads."""
    target_width: int = 512
    """Width of the output."""
    align_layers: int = 6
    """Number of blocks that give targets, counted from the last."""
    align_interval: float = 1.0
    """Distance between these blocks, counted back from the last block (stage 2's clip_return_interval)."""
    activation: Activation = "quick_gelu"
    """quick_gelu: OpenAI's CLIP; gelu: most open_clip models. It is checked against the config beside the weights."""

    def __post_init__(self) -> None:
        check_divides("teacher", "image_size", self.image_size, "patch_size", self.patch_size)
        check_divides("teacher", "input_size", self.clip_size, "the patches along a side", self.grid)
        check_divides("teacher", "width", self.width, "heads", self.heads)
        _aligned("teacher", self.depth, self.align_layers, self.align_interval)
        check_at_least(self, "teacher", tubelet_size=1)

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
        """Side of the input clip, pixels."""
        return self.image_size if self.input_size is None else self.input_size

    @property
    def clip_patch_size(self) -> int:
        """Side of a patch on the input clip, pixels."""
        return self.clip_size // self.grid


def check_fit(student: StudentConfig, teacher: TeacherConfig) -> None:
    """Raise ConfigError unless the teacher's targets fit the student's predictions."""
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
    """Channels of a token."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Attention heads."""
    fusion_layer: int = 9
    """First layer that cross-attends to the video."""
    vocab_size: int = 30522
    """Words of the vocabulary."""
    max_positions: int = 512
    """Longest text, in tokens."""
    mlp_width: int = 3072
    """Width inside the MLPs."""
    dropout: float = 0.0
    """Dropout of hidden states and attention in training; BERT's own is 0.1."""
    pad_id: int = 0
    """Number of [PAD] in the vocabulary."""
    cls_id: int = 101
    """Number of [CLS]."""
    sep_id: int = 102
    """Number of [SEP]."""
    mask_id: int = 103
    """Number of [MASK]."""

    def __post_init__(self) -> None:
        check_divides("text", "width", self.width, "heads", self.heads)
        if not 0 <= self.fusion_layer < self.depth:
            raise ConfigError(f"text: fusion_layer = {self.fusion_layer} is not in 0..depth - 1 = {self.depth - 1}")
        check_at_least(self, "text", vocab_size=1, max_positions=1, mlp_width=1)
        check_share("text.dropout", self.dropout, below_one=True)


@dataclass(frozen=True)
class VideoTextConfig:
    """The model of stage 2: video encoder, teacher, text encoder, and the joint space of video and text."""

    vision: StudentConfig = field(default_factory=StudentConfig)
    """`frames` is for videos; an image is a clip of one frame."""
    teacher: TeacherConfig | None = field(default_factory=TeacherConfig)
    """None: no alignment, so no mask either, as in fine-tuning."""
    text: TextConfig = field(default_factory=TextConfig)
    joint_width: int = 512
    """Channels of the joint space."""
    temperature: float = 0.07
    """Initial temperature, the learned divisor of similarities."""
    language_head: bool | None = None
    """Whether the text encoder has a head for masked words. None: with a teacher only, as in the published files."""
    align_eps: float = 1e-5
    """Epsilon of the alignment heads' LayerNorm: 1e-5 as published for stage 2, where stage 1 has 1e-6."""
    position_frames: int | None = None
    """Frames of the position table; another number of frames interpolates it in time. None: one table of any length."""

    def __post_init__(self) -> None:
        if self.teacher is not None:
            check_fit(self.vision, self.teacher)
        if self.vision.tubelet_size != 1:
            raise ConfigError(f"vision: tubelet_size = {self.vision.tubelet_size}, but an image has one frame; use 1")
        check_at_least(self, "joint", joint_width=1, position_frames=1)
        for name in ("temperature", "align_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"joint.{name} = {getattr(self, name)}: must be above 0")

    @property
    def has_language_head(self) -> bool:
        return self.teacher is not None if self.language_head is None else self.language_head


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
    # LAION's and DFN's, 16 x 16 patches: the student needs patches of 14 pixels, or clips of 256 and input_size = 256.
    "open_clip_h14": TeacherConfig(patch_size=14, width=1280, depth=32, heads=16, target_width=1024, activation="gelu"),
    "clip_l14_336": _CLIP_L14,  # another model's weights, its positions resampled to the same 14 x 14 grid
}

"""Settings of whole jobs: each composes the sections it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from umt_fast.config.base import ConfigError, check_divides
from umt_fast.config.compute import ComputeConfig, LowPrecisionConfig
from umt_fast.config.data import AugmentConfig, CaptionDataConfig, DataConfig, LabelledDataConfig, MixConfig
from umt_fast.config.finetune import InitConfig, TestConfig
from umt_fast.config.mask import MaskConfig, PixelMaskConfig
from umt_fast.config.models import (
    ClassifierConfig,
    MaeStConfig,
    StudentConfig,
    TeacherConfig,
    TextConfig,
    VideoMaeConfig,
    VideoTextConfig,
    check_fit,
)
from umt_fast.config.optim import FinetuneOptimConfig, OptimConfig
from umt_fast.config.run import RunConfig
from umt_fast.config.stage2 import JointConfig, Stage2Job, VideoTextObjective


def _check_steps(data: DataConfig, optim: OptimConfig, compute: ComputeConfig) -> None:
    """Raise ConfigError for settings of a pre-training step that contradict each other."""
    check_divides("data and optim", "batch_size", optim.batch_size, "crops_per_clip", data.crops_per_clip)
    if compute.cuda_graph and optim.accumulate > 1:
        raise ConfigError("compute.cuda_graph records one forward pass per step, so optim.accumulate must be 1")


@dataclass(frozen=True)
class PretrainConfig:
    """Stage 1: a student aligned with a frozen CLIP teacher."""

    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teacher_weights: str = ""
    """OpenAI's .pt, UMT's .pth, a .safetensors file, a Hugging Face CLIP folder or repo id; or `random`."""
    init: str = ""
    """The student's starting weights, such as a checkpoint of another run; frames and image size may differ. Empty:
    random weights."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: LowPrecisionConfig = field(default_factory=LowPrecisionConfig)
    run: RunConfig = field(default_factory=RunConfig)
    objective: Literal["alignment"] = "alignment"
    """Set by the recipe."""

    def __post_init__(self) -> None:
        check_fit(self.student, self.teacher)
        _check_steps(self.data, self.optim, self.compute)
        if self.compute.cuda_graph and self.compute.recompute == "full" and self.student.drop_path > 0:
            # torch.compile then uses its own random generators, which the graph does not register.
            raise ConfigError(
                "compute.recompute = full draws the dropped paths again, which a CUDA graph forbids; use "
                "--compute.recompute selective or --student.drop-path 0"
            )


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
        check_divides("data and optim", "batch_size", self.optim.batch_size, "crops_per_clip", self.data.crops_per_clip)
        if self.mix.mixes and self.optim.batch_size % 2:
            raise ConfigError(f"optim.batch_size = {self.optim.batch_size}: mixup and cutmix need an even number")
        if self.compute.cuda_graph:
            raise ConfigError(
                "compute.cuda_graph is for pre-training; fine-tuning draws how to mix a batch on the host"
            )


@dataclass(frozen=True)
class Stage2Config:
    """Stage 2 and its fine-tunings: video and text."""

    job: Stage2Job = "pretrain"
    """pretrain: all four losses; retrieval: contrast and matching; qa: answers to questions."""
    init: str = ""
    """Starting weights: a stage-2 checkpoint; for pre-training also a stage-1 checkpoint."""
    bert: str = "bert-base-uncased"
    """Hugging Face folder or repo id of the text encoder and its vocabulary; or `random`."""
    vocabulary: str = ""
    """A vocab.txt; empty: the vocabulary of the checkpoint's run, or of the BERT."""
    teacher_weights: str = ""
    """As for stage 1; or `random`."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Used in pre-training only."""
    text: TextConfig = field(default_factory=TextConfig)
    """Sizes. `vocab_size` is the limit for a new vocabulary; the actual size comes from the vocabulary."""
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
        for name in ("max_words", "max_answer_words"):
            if getattr(self.data, name) > self.text.max_positions:
                raise ConfigError(
                    f"data.{name} = {getattr(self.data, name)}, but the text encoder has {self.text.max_positions} "
                    "positions (text.max_positions)"
                )
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
class _PixelsConfig:
    init: str = ""
    """Starting weights of the model; empty: random weights."""
    mask: PixelMaskConfig = field(default_factory=PixelMaskConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(frame_step=4, flip=0.0))
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_steps(self.data, self.optim, self.compute)
        if self.compute.cuda_graph and self.mask.source:
            raise ConfigError(f"compute.cuda_graph cannot record the function of mask.source = {self.mask.source}")
        if self.mask.rule == "everest" and self.compute.parallel == "fsdp":
            raise ConfigError("mask.rule = everest looks at embedded patches before the model runs; use parallel = ddp")
        if self.mask.rule == "motion" and self.data.square_pixels:
            raise ConfigError("mask.rule = motion looks at pixels as they are stored; remove --data.square-pixels")


@dataclass(frozen=True)
class VideoMaePretrainConfig(_PixelsConfig):
    """VideoMAE, VideoMAE V2 and AdaMAE: pixels of hidden tokens; in AdaMAE a learned network draws the visible ones."""

    objective: Literal["videomae", "adamae"] = "videomae"
    """Set by the recipe."""
    model: VideoMaeConfig = field(default_factory=VideoMaeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.objective == "adamae") != (self.mask.rule == "adamae"):
            raise ConfigError(
                f"objective = {self.objective} with mask.rule = {self.mask.rule}: the objective adamae and the rule of "
                "this name belong together"
            )
        if self.mask.decoder_ratio is not None:
            if self.model.grid % 2:
                raise ConfigError(f"mask.decoder_ratio needs an even grid of patches; model has {self.model.grid}")
            if self.objective == "adamae":
                raise ConfigError("mask.decoder_ratio is not for objective = adamae, which predicts all hidden tokens")


@dataclass(frozen=True)
class MaeStPretrainConfig(_PixelsConfig):
    """MAE-ST: pixels of hidden tokens, learned positions."""

    objective: Literal["mae_st"] = "mae_st"
    """Set by the recipe."""
    model: MaeStConfig = field(default_factory=MaeStConfig)
    mask: PixelMaskConfig = field(default_factory=lambda: PixelMaskConfig("mae_st"))
    data: DataConfig = field(default_factory=lambda: DataConfig(crop_area=(0.5, 1.0)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask.rule in ("adamae", "everest"):
            raise ConfigError(
                f"mask.rule = {self.mask.rule} is not for objective = mae_st, whose decoder sees all tokens"
            )
        if self.mask.decoder_ratio is not None:
            raise ConfigError("mask.decoder_ratio is not for objective = mae_st, whose decoder sees all tokens")

"""Sections that jobs share: masks, optimiser, computation, run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from umt_fast.config.base import (
    Attention,
    ConfigError,
    GatherGradient,
    Masking,
    Parallel,
    PixelMasking,
    Precision,
    Recompute,
    StudentPrecision,
    TeacherPrecision,
    check_at_least,
    check_share,
)
from umt_fast.files import expand_home


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
    negatives: Literal["hard", "uniform"] = "hard"
    """Negatives of the matching. hard: those that the contrast takes for matches are drawn more often, as published;
    uniform: every sample of the batch that does not match is as likely."""
    gather_gradient: GatherGradient = "published"
    """published: VTC gives the encoders 1 / ranks of its gradient, as the published gather does; true: all of it."""

    def __post_init__(self) -> None:
        check_at_least(self, "objective", uta=0, vtc=0, vtm=0, mlm=0)
        check_share("objective.video_mask_ratio", self.video_mask_ratio, below_one=True)
        check_share("objective.image_mask_ratio", self.image_mask_ratio, below_one=True)
        if not 0 < self.mlm_probability <= 1:
            raise ConfigError(f"objective.mlm_probability = {self.mlm_probability}: must be in (0, 1]")


@dataclass(frozen=True)
class MaskConfig:
    """Which tokens the student sees."""

    rule: Masking = "attention"
    ratio: float = 0.8
    """Share of the patches that the student does not see."""
    masks_per_clip: int = 1
    """Visible sets per clip and teacher pass; the student's batch is that many times larger."""

    def __post_init__(self) -> None:
        check_share("mask.ratio", self.ratio, below_one=True)
        check_at_least(self, "mask", masks_per_clip=1)


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
    """Learning rate at the end, scaled in the same way."""
    repeat_peak: bool = True
    """Whether the warm-up's last step has the peak rate, like the first after it (UMT, VideoMAE), or not (MAE-ST)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Not applied to biases and 1-D parameters."""
    clip_grad: float | None = None
    """Largest gradient norm; None does not clip."""

    def __post_init__(self) -> None:
        check_at_least(self, "optim", epochs=1, batch_size=1, accumulate=1, warmup_epochs=0, lr=0, min_lr=0, eps=0)
        check_at_least(self, "optim", weight_decay=0, clip_grad=0)
        check_share("optim.betas", *self.betas, below_one=True)

    def step_clips(self, processes: int) -> int:
        """Clips of an optimiser step over all processes: the global batch."""
        return processes * self.batch_size * self.accumulate


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
        check_at_least(
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
        return expand_home(self.dir) / self.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def last_step(self, total: int) -> int:
        """The step to stop after, of a schedule of `total` steps."""
        return total if self.stop_at is None else min(self.stop_at, total)


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
        check_at_least(self, "optim", warmup_lr=0)
        check_share("optim.ema_decay", self.ema_decay, below_one=True)
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
        check_at_least(self, "test", segments=1, crops=1, clips_per_pass=1, every_epochs=1)


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
class PixelMaskConfig:
    """Which tokens the encoder sees, and which the decoder predicts."""

    rule: PixelMasking = "tube"
    """tube, random, frame and mae_st need nothing; everest and adamae look at the patches; motion needs videos with
    motion vectors, region `regions` and `order`, flow and text `source`."""
    ratio: float = 0.9
    """Share of the patches that the encoder does not see."""
    decoder_ratio: float | None = None
    """Share of the patches that the decoder leaves out by a running cell (VideoMAE V2): 0.25, 0.5 or 0.75. None: it
    predicts all hidden patches."""
    candidate_ratio: float = 0.7
    """everest: share of the patches that are too much like the frame before to be seen or decoded."""
    regions: str = ""
    """region: folder of mask videos, which have the names of the videos."""
    order: tuple[int, ...] = ()
    """region: grey values of the mask videos, from the first to be shown on."""
    shuffled: int = 0
    """region: how many of the last ones of `order` are shuffled for every clip (MARLIN: all parts of the face)."""
    least_share: float = 0.1
    """region: share of a frame up to which further regions are shown."""
    source: str = ""
    """flow and text: a function, as `module:name`, that finds optical flow, or similarity to the caption, in clips."""

    def __post_init__(self) -> None:
        check_share("mask.ratio", self.ratio, below_one=True)
        check_share("mask.candidate_ratio", self.candidate_ratio, below_one=True)
        check_share("mask.least_share", self.least_share)
        if self.rule == "region" and not (self.regions and self.order):
            raise ConfigError(
                "mask.rule = region needs mask videos and the order in which their grey values are shown: give "
                "--mask.regions FOLDER and --mask.order 0 1 ..."
            )
        if len(set(self.order)) < len(self.order) or not all(0 <= value <= 255 for value in self.order):
            raise ConfigError(f"mask.order = {self.order}: must be grey values from 0 to 255, each once")
        if not 0 <= self.shuffled <= len(self.order):
            raise ConfigError(f"mask.shuffled = {self.shuffled}: must be in 0..{len(self.order)}, as mask.order has")
        if self.rule in ("flow", "text") and not re.fullmatch(r"[\w.]+:\w+", self.source):
            what = "optical flow" if self.rule == "flow" else "similarity to the caption"
            raise ConfigError(
                f"mask.rule = {self.rule} needs {what}: give --mask.source MODULE:FUNCTION (it is {self.source!r}); "
                "docs/pixels.md says what the function returns"
            )
        if self.rule == "everest" and not self.candidate_ratio < self.ratio:
            raise ConfigError(
                f"mask.candidate_ratio = {self.candidate_ratio}: must be below mask.ratio = {self.ratio}, or nothing "
                "is left to decode"
            )
        if self.rule == "everest" and self.decoder_ratio is not None:
            raise ConfigError("mask.decoder_ratio is not for mask.rule = everest, which chooses what is decoded itself")
        if self.decoder_ratio not in (None, 0.25, 0.5, 0.75):
            raise ConfigError(f"mask.decoder_ratio = {self.decoder_ratio}: give 0.25, 0.5 or 0.75")

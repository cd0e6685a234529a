"""Stage 1 of Unmasked Teacher as an objective of `train.pretrain`: a student aligned with a frozen CLIP teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

import umt_fast
from umt_fast import masking, weights
from umt_fast.config import PretrainConfig, TeacherConfig
from umt_fast.data.clips import ClipStream
from umt_fast.data.index import VideoList
from umt_fast.run import costs
from umt_fast.run.compute import accelerate
from umt_fast.run.world import World
from umt_fast.weights import HOW_TO_GET_CLIP, WeightsError, read_weights

if TYPE_CHECKING:
    from umt_fast.data.batch import Batch

WIDEST_RANDOM_TEACHER = 256


class AlignmentObjective:
    """Student and teacher of a run, as a `pretrain_objectives.Objective`."""

    FIXED: ClassVar[tuple[str, ...]] = (
        *("student", "teacher", "mask.rule", "mask.ratio"),
        *("teacher_weights", "data.crops_per_clip", "run.seed"),
    )
    no_decay = ()
    loss_label = "loss: mean of 2 - 2 cos"

    @staticmethod
    def make_stream(config: PretrainConfig, videos: VideoList) -> ClipStream:
        return ClipStream(videos, config.data, config.student.frames, config.student.image_size, config.run.seed)

    @staticmethod
    def plan(config: PretrainConfig, gpu_memory: float | None) -> str:
        return costs.plan(config, config.compute.precision != "fp32", gpu_memory)

    def __init__(self, config: PretrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.model = umt_fast.VideoStudent(config.student).to(world.device)
        self.teacher = build_teacher(config.teacher, config.teacher_weights, config.run.seed).to(world.device)
        self.blocks: nn.ModuleList = self.model.encoder.blocks

    def load_initial(self) -> None:
        """Load the student's weights from `init`, if it is set. Raises WeightsError."""
        if self.config.init:
            weights.load_umt_student(self.model, read_weights(self.config.init))

    @property
    def flops(self) -> int:
        """FLOP of one forward and backward pass on one process."""
        student, mask = self.config.student, self.config.mask
        seen = masking.count_seen(mask.rule, student.token_frames, student.patches, mask.ratio)
        clips = self.config.optim.batch_size
        return costs.lean_flops(student, self.config.teacher, clips, seen, mask.masks_per_clip).total

    @property
    def description(self) -> str:
        student, teacher, named = self.config.student, self.config.teacher, self.config.teacher_weights
        if named == "random":
            named = f"RANDOM weights (seed {self.config.run.seed}), which teach nothing about videos"
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"student {student.width} x {student.depth}, {parameters / 1e6:.1f} M parameters; "
            f"teacher {teacher.width} x {teacher.depth}, {named}"
        )

    def accelerate(
        self, bf16: bool, sample: Callable[[], Tensor], stored: Mapping[str, str]
    ) -> tuple[dict[str, str], list[str]]:
        """Set attention, precision and compilation of the models. Returns the chosen backends and log lines."""
        return accelerate(self.config, self.world, self.model, self.teacher, bf16, sample, stored)

    def to_device(self, batch: Batch) -> Tensor:
        return batch.clip.to(self.world.device, non_blocking=True)

    def make_step(self, model: nn.Module, bf16: bool) -> Callable[[Tensor], umt_fast.Alignment]:
        """clip [B,T,H,W,3] -> the student's loss on the visible sets that the run's masking rule draws."""
        mask, student = self.config.mask, self.config.student
        frames, patches = student.token_frames, student.patches
        num_visible = masking.find_rule(mask.rule).num_visible(frames, patches, mask.ratio)

        def step(clip: Tensor) -> umt_fast.Alignment:
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=bf16):
                sets = len(clip) * mask.masks_per_clip
                # None if the rule needs the teacher: then alignment_step draws, from its scores
                visible = masking.draw_blind(mask.rule, sets, frames, patches, mask.ratio, clip.device)
                return umt_fast.alignment_step(
                    model, self.teacher, clip, num_visible, visible, masks_per_clip=mask.masks_per_clip, rule=mask.rule
                )

        return step

    def save_picture(self, batch: Batch, out: umt_fast.Alignment, folder: Path) -> None:
        """Write `visible.png`: a clip, the teacher's attention on it, and the patches that the student saw."""
        from umt_fast.run.pictures import draw_visible

        title = f"{Path(batch.paths[0]).name}: {out.visible[0].numel()} of {out.scores[0].numel()} tokens visible"
        if self.config.teacher_weights == "random":
            title += " (random teacher)"
        draw_visible(batch.clip[0], out.scores[0], out.visible[0], folder / "visible.png", title)


def build_teacher(sizes: TeacherConfig, source: str, seed: int) -> umt_fast.ClipTeacher:
    """The frozen teacher with its weights; a random one depends on the seed alone.

    Raises WeightsError, saying how to get weights, if there are none.
    """
    if source == "random" and sizes.width > WIDEST_RANDOM_TEACHER:
        raise WeightsError(
            f"a random teacher teaches nothing: `random` is for trying the code, with teachers up to "
            f"{WIDEST_RANDOM_TEACHER} wide; this one is {sizes.width} wide.\n{HOW_TO_GET_CLIP}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = umt_fast.ClipTeacher(sizes)
    if source != "random":
        weights.load_clip_teacher(teacher, read_weights(source))
    return teacher.eval()

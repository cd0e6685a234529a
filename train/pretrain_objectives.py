"""The objectives of `train.pretrain`: what the loop asks of one, and a table of them by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from train.pretrain_alignment import AlignmentObjective
from train.pretrain_pixels import PixelObjective
from umt_fast.config import MaeStPretrainConfig, PretrainConfig, VideoMaePretrainConfig
from umt_fast.data.clips import ClipStream
from umt_fast.data.index import VideoList
from umt_fast.run.world import World

if TYPE_CHECKING:
    from umt_fast.data.batch import Batch


class StepResult(Protocol):
    """The result of a forward pass. An objective adds what its picture needs."""

    @property
    def loss(self) -> Tensor:
        """The scalar that the step minimises."""


class Objective(Protocol):
    """The models of a run and their loss. `config` is an instance of the settings in its row of `OBJECTIVES`."""

    FIXED: ClassVar[tuple[str, ...]]
    """Settings that a resumed run must share with the run that it continues: sections, or `section.name`."""

    @staticmethod
    def make_stream(config: Any, videos: VideoList) -> ClipStream:
        """The clips of the run. Raises ConfigError."""

    @staticmethod
    def plan(config: Any, gpu_memory: float | None) -> str:
        """Text of --dry-run: the cost of a step, and the batches that fit `gpu_memory` GiB."""

    def __init__(self, config: Any, world: World) -> None:
        """Build the models on `world.device`, with random weights."""

    @property
    def model(self) -> nn.Module:
        """The model that is trained and saved."""

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Modules that FSDP shards separately."""

    @property
    def no_decay(self) -> Collection[str]:
        """Parameters without weight decay, besides biases and 1-D parameters."""

    @property
    def flops(self) -> int:
        """FLOP of one forward and backward pass on one process."""

    @property
    def description(self) -> str:
        """A line about the models, for the start of the log."""

    @property
    def loss_label(self) -> str:
        """Legend of the loss curve."""

    def load_initial(self) -> None:
        """Load the weights of `init`, if it is set. Called for new runs only. Raises WeightsError."""

    def accelerate(
        self, bf16: bool, sample: Callable[[], Tensor], stored: Mapping[str, str]
    ) -> tuple[dict[str, str], list[str]]:
        """Set attention, recomputation, precision and compilation of the models; `run.compute` has functions for it.

        `sample` gives clips [B,T,H,W,3] of the run, `stored` the attention backends of the checkpoint. Returns the
        backends by use, and log lines. Raises ConfigError.
        """

    def to_device(self, batch: Batch) -> Tensor:
        """The clips of a batch on the device, as the step gets them."""

    def make_step(self, model: nn.Module, bf16: bool) -> Callable[[Tensor], StepResult]:
        """Returns the forward pass, from clips to the loss. `model` is `self.model` as its processes train it."""

    def save_picture(self, batch: Batch, out: Any, folder: Path) -> None:
        """Write pictures of a batch and of the step's result to `folder`."""


class Entry(NamedTuple):
    """An objective and the class of its settings."""

    settings: type[Any]
    objective: type[Objective]


OBJECTIVES = {
    "alignment": Entry(PretrainConfig, AlignmentObjective),
    "videomae": Entry(VideoMaePretrainConfig, PixelObjective),
    "adamae": Entry(VideoMaePretrainConfig, PixelObjective),
    "mae_st": Entry(MaeStPretrainConfig, PixelObjective),
}
"""Objectives by the recipe's `objective`; the first is the default."""
SETTINGS = {name: entry.settings for name, entry in OBJECTIVES.items()}

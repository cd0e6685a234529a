"""Sections `optim`: the optimiser, its schedule and its batches."""

from __future__ import annotations

from dataclasses import dataclass

from umt_fast.config.base import ConfigError, check_at_least, check_share


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and its batches."""

    epochs: int = 200
    """Visits of every video."""
    warmup_epochs: float = 40
    """Epochs in which the learning rate rises to its peak."""
    batch_size: int = 64
    """Clips per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimiser step."""
    lr: float = 1.5e-4
    """Peak learning rate for 256 clips per step; scaled linearly with the global batch."""
    min_lr: float = 1e-5
    """Learning rate at the end, scaled in the same way."""
    repeat_peak: bool = True
    """Whether both the last step of the warm-up and the first step after it have the peak rate (UMT, VideoMAE); false:
    only the latter (MAE-ST)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moving averages."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.05
    """Not applied to biases and 1-D parameters."""
    clip_grad: float | None = None
    """Largest gradient norm; None: no clipping."""

    def __post_init__(self) -> None:
        check_at_least(self, "optim", epochs=1, batch_size=1, accumulate=1, warmup_epochs=0, lr=0, min_lr=0, eps=0)
        check_at_least(self, "optim", weight_decay=0, clip_grad=0)
        check_share("optim.betas", *self.betas, below_one=True)

    def step_clips(self, processes: int) -> int:
        """Clips of an optimiser step over all processes: the global batch."""
        return processes * self.batch_size * self.accumulate


@dataclass(frozen=True)
class FinetuneOptimConfig(OptimConfig):
    """AdamW with layer-wise learning rates, its schedule, its batches, and a moving average of the weights."""

    epochs: int = 5
    """Visits of every video."""
    warmup_epochs: float = 1
    """Epochs in which the learning rate rises to its peak."""
    batch_size: int = 32
    """Clips per process and forward pass; each video gives data.crops_per_clip of them."""
    lr: float = 2e-5
    """Peak learning rate for 256 clips per step; scaled linearly with the global batch."""
    min_lr: float = 1e-6
    """Learning rate at the end, scaled in the same way."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step, for 256 clips per step like `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two moving averages."""
    layer_decay: float = 0.75
    """Factor of the learning rate from each block to the previous one; 1: equal rates."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which validation and test then use; 0: no moving average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "optim", warmup_lr=0)
        check_share("optim.ema_decay", self.ema_decay, below_one=True)
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay = {self.layer_decay}: must be in (0, 1]")

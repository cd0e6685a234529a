"""AdamW and its schedule, as UMT sets them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from umt_fast.config import ConfigError, OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, capturable: bool = False) -> torch.optim.AdamW:
    """Fused AdamW; no weight decay on biases and 1-D parameters. `capturable` for a step that is a CUDA graph."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]  # every bias is 1-D
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True, capturable=capturable
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step. A captured step reads it from the device, where it is changed in place."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if not group["capturable"]:
            group["lr"] = rate
        elif isinstance(group["lr"], Tensor) and group["lr"].device == device:
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.full((), rate, device=device)


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """Norm of all gradients, which are scaled down to `limit` if one is given. Nothing is read on the host."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, final: float) -> float:
    """UMT's schedule: 0 to `peak` in equal parts over the warm-up, then half a cosine to `final`. Counts from 0."""
    if step < warmup_steps:
        return peak * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Schedule:
    """Learning rate of each step of a run of `epochs` passes over `clips` clips, `global_batch` a step."""

    def __init__(self, config: OptimConfig, clips: int, global_batch: int) -> None:
        self.total_steps = config.epochs * clips // global_batch
        if self.total_steps < 1:
            raise ConfigError(
                f"{config.epochs} epochs of {clips} videos are fewer clips than one step takes ({global_batch}); "
                f"lower --optim.batch-size or raise --optim.epochs"
            )
        self.warmup_steps = min(int(config.warmup_epochs * clips / global_batch), self.total_steps)
        self.peak = config.lr * global_batch / 256
        self.final = config.min_lr * global_batch / 256

    def __call__(self, step: int) -> float:
        return learning_rate(step, self.total_steps, self.warmup_steps, self.peak, self.final)

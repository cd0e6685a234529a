"""AdamW, its parameter groups, and learning rate schedules, as published."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from umt_fast.config import ConfigError, FinetuneOptimConfig, OptimConfig
from umt_fast.run.parallel import whole


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    capturable: bool = False,
    decay_scalars: bool = False,
    no_decay: Collection[str] = (),
) -> torch.optim.AdamW:
    """Fused AdamW, without weight decay on biases and 1-D parameters. `capturable`: for a step in a CUDA graph.

    `decay_scalars` also decays 0-D parameters, as the published stage 2 does with its temperature. `no_decay`: names of
    further parameters without weight decay.
    """
    exempt = (1,) if decay_scalars else (0, 1)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.dim() in exempt or name in no_decay]  # every bias is 1-D
    decayed = [p for name, p in trained if not (p.dim() in exempt or name in no_decay)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True, capturable=capturable
    )


def layer_decay_groups(model: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups of a model with `blocks`, each with `lr_scale`, in order of first appearance (UMT's fine-tuning).

    With L blocks, block i has the scale layer_decay^(L - i), patch embedding and positions layer_decay^(L + 1), and all
    layers after the blocks 1. 1-D parameters, biases, positions and the class token have no weight decay. `names` of a
    group lists its parameters.
    """
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    last = len(blocks) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer = last
        if name.startswith((*_POSITIONS, "mask_token", "patch_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decayed = parameter.dim() > 1 and not name.endswith(".bias") and not name.startswith(_POSITIONS)
        scale = layer_decay ** (last - layer)
        group = groups.setdefault(
            (layer, decayed),
            {"params": [], "names": [], "lr_scale": scale, "weight_decay": weight_decay if decayed else 0.0},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


_POSITIONS = ("pos_embed", "cls_token")  # and MAE-ST's pos_embed_spatial and others


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step. A captured step reads it from a device tensor, which is changed in place."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if not group["capturable"]:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        elif isinstance(group["lr"], Tensor) and group["lr"].device == device:
            group["lr"].fill_(rate * group.get("lr_scale", 1.0))
        else:
            group["lr"] = torch.full((), rate * group.get("lr_scale", 1.0), device=device)


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """Scale the gradients down to norm `limit` (None: do not). Returns their norm before, without a synchronisation."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return whole(norm)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, limit: float | None) -> Tensor:
    """One optimiser step with gradients clipped to norm `limit`. Clears the gradients; returns their norm before."""
    norm = clip_gradients(model, limit)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learning_rate(
    step: int,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    final: float,
    start: float = 0.0,
    repeat_peak: bool = True,
) -> float:
    """UMT's and VideoMAE's schedule: linear warm-up from `start` to `peak`, then half a cosine to `final`.

    Steps count from 0. Both the last step of the warm-up and the first step after it have `peak`; without `repeat_peak`
    only the latter has it, as in MAE-ST.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / max(warmup_steps - repeat_peak, 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def floored_cosine(step: int, total_steps: int, warmup_steps: float, peak: float, floor: float = 0.01) -> float:
    """Stage 2's schedule: linear warm-up from 0, then a cosine to 0, never below `floor` * `peak`. Step 0 is first."""
    if step < warmup_steps:
        return peak * max(floor, step / max(warmup_steps, 1))
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * max(floor, 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


class Schedule:
    """Learning rate of each step of a run over `clips` clips per epoch, `global_batch` per step."""

    def __init__(self, config: OptimConfig, clips: int, global_batch: int) -> None:
        self.total_steps = config.epochs * clips // global_batch
        if self.total_steps < 1:
            raise ConfigError(
                f"{config.epochs} epochs of {clips} videos are fewer clips than one step needs ({global_batch}); "
                f"lower --optim.batch-size or raise --optim.epochs"
            )
        self.warmup_steps = min(int(config.warmup_epochs * clips / global_batch), self.total_steps)
        self.peak = config.lr * global_batch / 256
        self.final = config.min_lr * global_batch / 256
        self.repeat_peak = config.repeat_peak

    def __call__(self, step: int) -> float:
        repeat = self.repeat_peak
        return learning_rate(step, self.total_steps, self.warmup_steps, self.peak, self.final, repeat_peak=repeat)


class EpochSchedule:
    """Learning rate of each step of fine-tuning. An epoch is a whole number of steps; leftover clips start the next.

    All rates are for 256 clips per step and scaled linearly with the batch.
    """

    def __init__(self, config: FinetuneOptimConfig, videos: int, clips_per_video: int, step_clips: int) -> None:
        self.epoch_steps = videos * clips_per_video // step_clips
        if self.epoch_steps < 1:
            raise ConfigError(
                f"{videos} videos with {clips_per_video} clips each are fewer clips than a step has ({step_clips}); "
                "lower --optim.batch-size"
            )
        self.total_steps = config.epochs * self.epoch_steps
        self.warmup_steps = min(int(config.warmup_epochs * self.epoch_steps), self.total_steps)
        scale = step_clips / 256
        self.start, self.peak, self.final = config.warmup_lr * scale, config.lr * scale, config.min_lr * scale
        self.repeat_peak = config.repeat_peak

    def __call__(self, step: int) -> float:
        rates = (self.peak, self.final, self.start)
        return learning_rate(step, self.total_steps, self.warmup_steps, *rates, self.repeat_peak)


class MovingAverage(nn.Module):
    """Moving average of the whole state: decay * average + (1 - decay) * weights per step (arXiv 1703.01780)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average by the model's weights. Shards are gathered, so every rank must call this."""
        own, new = self.module.state_dict(), model.state_dict()
        floats = [key for key, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[key] for key in floats], [whole(new[key].detach()) for key in floats], 1 - self.decay)

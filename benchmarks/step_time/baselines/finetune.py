"""One step of fine-tuning as published (UMT, arXiv 2303.16058, section 4.2), in plain PyTorch.

This is our own code for the same computation, with the costs of the public code: attention over all tokens by matmul,
softmax, matmul; a float32 position table on the host, added at every step; mixup and cutmix on the device, in place; on
a GPU half-precision weights with float32 copies in the optimiser, as in DeepSpeed; the host waits for the loss of every
step. Parameter names are those of the checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step_time.baselines.pretrain import StudentBlock
from benchmarks.step_time.phases import Mark, no_mark
from umt_fast.config import ClassifierConfig, MixConfig, OptimConfig
from umt_fast.models.positions import sinusoid_positions

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class BaselineClassifier(nn.Module):
    """The published classifier; `sdpa` replaces its attention by torch's, for the ladder's second rung."""

    def __init__(self, config: ClassifierConfig, sdpa: bool = False) -> None:
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, config.width, kernel, stride=kernel)})
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(StudentBlock(config.width, config.heads, rate, sdpa) for rate in rates)
        self.fc_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.num_classes)
        self.position = sinusoid_positions(config.tokens, config.width)[None]  # not a buffer: it stays on the host

    def forward(self, clip: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b k"]:
        x = self.patch_embed["proj"](clip).flatten(2).transpose(1, 2)
        x = x + self.position.expand(len(x), -1, -1).type_as(x).to(x.device).clone().detach()
        for block in self.blocks:
            x = block(x)
        return self.head(self.fc_norm(x.mean(1)))


def mix_in_place(
    clip: Float[Tensor, "b 3 t h w"], labels: Int[Tensor, " b"], classes: int, mixing: MixConfig, rng: Any
) -> Float[Tensor, "b k"]:
    """Mix each clip with its mirror image in the batch, by mixup or cutmix, and return the smoothed targets."""
    share = 1.0
    if rng.rand() < mixing.probability:
        cuts = rng.rand() < mixing.switch
        alpha = mixing.cutmix if cuts else mixing.mixup
        share = float(rng.beta(alpha, alpha))
        if cuts:
            height, width = clip.shape[-2:]
            down, across = int(height * math.sqrt(1 - share)), int(width * math.sqrt(1 - share))
            row, column = rng.randint(0, height), rng.randint(0, width)
            top, bottom = np.clip([row - down // 2, row + down // 2], 0, height)
            left, right = np.clip([column - across // 2, column + across // 2], 0, width)
            clip[..., top:bottom, left:right] = clip.flip(0)[..., top:bottom, left:right]
            share = 1 - float((bottom - top) * (right - left)) / (height * width)
        else:
            mirrored = clip.flip(0).mul_(1 - share)
            clip.mul_(share).add_(mirrored)
    off = mixing.smoothing / classes
    hot = torch.full((len(labels), classes), off, device=clip.device)
    hot.scatter_(1, labels[:, None], 1 - mixing.smoothing + off)
    return hot * share + hot.flip(0) * (1 - share)


class HalfPrecision:
    """Half-precision weights trained through float32 copies, with a constant loss scale."""

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig, scale: float = 128.0) -> None:
        self.scale = scale
        self.trained = [parameter for group in groups for parameter in group["params"]]
        copies = {id(p): p.detach().float().requires_grad_() for p in self.trained}
        self.copies = [copies[id(p)] for p in self.trained]
        groups = [{**group, "params": [copies[id(p)] for p in group["params"]]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def step(self) -> None:
        for copy, parameter in zip(self.copies, self.trained, strict=True):
            assert parameter.grad is not None
            copy.grad = parameter.grad.float().div_(self.scale)
            parameter.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for copy, parameter in zip(self.copies, self.trained, strict=True):
                parameter.copy_(copy)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], depth: int, optim: OptimConfig, decay: float) -> list:
    """AdamW's groups with layer-wise learning rates, at their peak."""
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        layer = depth + 1
        if name.startswith("patch_embed"):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decayed = parameter.dim() > 1
        rate = optim.lr * decay ** (depth + 1 - layer)
        weight_decay = optim.weight_decay if decayed else 0.0
        group = {"params": [], "lr": rate, "weight_decay": weight_decay}
        groups.setdefault((layer, decayed), group)["params"].append(parameter)
    return list(groups.values())


class FinetuneBaselineStep:
    """The published step. A call takes a normalised clip, labels and a random state, and returns the loss as a number.

    precision  fp16 (CUDA; weights in half precision), bf16 (autocast) or fp32.
    """

    def __init__(
        self, model: BaselineClassifier, mixing: MixConfig, optim: OptimConfig, layer_decay: float, precision: str
    ) -> None:
        self.model, self.mixing, self.precision = model, mixing, precision
        self.classes, depth = model.head.out_features, len(model.blocks)
        if precision == "fp16":
            model.half()
        groups = parameter_groups(model.named_parameters(), depth, optim, layer_decay)
        self.half = HalfPrecision(groups, optim) if precision == "fp16" else None
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def __call__(
        self, clip: Float[Tensor, "b 3 t h w"], labels: Int[Tensor, " b"], rng: Any, mark: Mark = no_mark
    ) -> float:
        """`clip` is mixed in place. `mark` is called at the end of every phase."""
        targets = mix_in_place(clip, labels, self.classes, self.mixing, rng)
        mark("mixing")
        if self.half is not None:
            logits = self.model(clip.half())
        else:
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                logits = self.model(clip)
        mark("forward")
        loss = -(targets * F.log_softmax(logits.float(), -1)).sum(-1).mean()
        value = loss.item()
        mark("loss")
        if self.half is not None:
            (loss * self.half.scale).backward()
            mark("backward")
            self.half.step()
        else:
            self.optimizer.zero_grad()
            loss.backward()
            mark("backward")
            self.optimizer.step()
        if clip.device.type == "cuda":
            torch.cuda.synchronize()
        mark("optimiser")
        return value

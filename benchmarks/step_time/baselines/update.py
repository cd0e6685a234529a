"""Backward pass and optimiser step of the published pre-training: autocast, loss scaling, AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.step_time.phases import Mark
from umt_fast.config import OptimConfig


class BaselineUpdate:
    """AdamW on the trained parameters of a model.

    precision  autocast's dtype: fp16 (CUDA; with loss scaling), bf16 or fp32.
    decayed    whether a parameter (name, tensor) has weight decay.
    log_norm   whether to compute the norm of all gradients at every step, as for a log.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        precision: str,
        decayed: Callable[[str, nn.Parameter], bool],
        log_norm: bool = True,
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if decayed(name, p) is decays], "weight_decay": weight_decay}
            for decays, weight_decay in ((True, optim.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.device = named[0][1].device
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}[precision]
        # Not the default of 65536: an overflowing first step would be skipped, but losses are compared step by step.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1024, enabled=precision == "fp16")
        self.log_norm = log_norm

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def __call__(self, loss: Tensor, mark: Mark) -> float:
        """Wait for the loss, as the published code does, train on it and return it."""
        value = loss.item()
        mark("loss")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        mark("backward")
        if self.log_norm:
            self.scaler.unscale_(self.optimizer)
            norms = [p.grad.norm() for group in self.optimizer.param_groups for p in group["params"]]
            torch.stack(norms).norm()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        mark("optimiser")
        return value

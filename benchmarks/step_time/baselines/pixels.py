"""One step of VideoMAE's pre-training as published (arXiv 2203.12602), in plain PyTorch.

This is our own code for the same computation, with the costs of the public code: every token is embedded before a
boolean mask drops most of them; attention by matmul, softmax, matmul; position tables on the host; the decoder's
positions are expanded and masked at every step; targets are made in float32 by un-normalising the clip, cutting it into
tokens, normalising all of them and masking; fp16 with loss scaling on a GPU; the host waits for the loss of every step.
Parameter names are those of the checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD

from benchmarks.step_time.baselines.pretrain import StudentBlock
from benchmarks.step_time.baselines.update import BaselineUpdate
from benchmarks.step_time.phases import Mark, no_mark
from umt_fast.config import OptimConfig, VideoMaeConfig
from umt_fast.models.positions import sinusoid_positions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class Encoder(nn.Module):
    def __init__(self, config: VideoMaeConfig, sdpa: bool) -> None:
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, config.width, kernel, stride=kernel)})
        self.blocks = nn.ModuleList(StudentBlock(config.width, config.heads, 0.0, sdpa) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)


class Decoder(nn.Module):
    def __init__(self, config: VideoMaeConfig, sdpa: bool) -> None:
        super().__init__()
        width, heads = config.decoder_width, config.decoder_heads
        self.blocks = nn.ModuleList(StudentBlock(width, heads, 0.0, sdpa) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 3 * config.tubelet_size * config.patch_size**2)


class BaselineVideoMae(nn.Module):
    """The published VideoMAE; `sdpa` replaces its attention by torch's, for the ladder's second rung."""

    def __init__(self, config: VideoMaeConfig, sdpa: bool = False) -> None:
        super().__init__()
        self.encoder = Encoder(config, sdpa)
        self.encoder_to_decoder = nn.Linear(config.width, config.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        self.decoder = Decoder(config, sdpa)
        # Not buffers, so that they stay on the host.
        self.position = sinusoid_positions(config.tokens, config.width)[None]
        self.decoder_position = sinusoid_positions(config.tokens, config.decoder_width)[None]

    def forward(self, clip: Float[Tensor, "b 3 t h w"], hidden: Bool[Tensor, "b n"]) -> Float[Tensor, "b m f"]:
        """Predicted pixels of the tokens where `hidden` is True."""
        x = self.encoder.patch_embed["proj"](clip).flatten(2).transpose(1, 2)
        x = x + self.position.type_as(x).to(x.device).clone().detach()
        batch, _, width = x.shape
        x = x[~hidden].reshape(batch, -1, width)
        for block in self.encoder.blocks:
            x = block(x)
        x = self.encoder_to_decoder(self.encoder.norm(x))
        position = self.decoder_position.expand(batch, -1, -1).type_as(x).to(x.device).clone().detach()
        shown = position[~hidden].reshape(batch, -1, x.shape[-1])
        wanted = position[hidden].reshape(batch, -1, x.shape[-1])
        x = torch.cat((x + shown, self.mask_token + wanted), dim=1)
        for block in self.decoder.blocks:
            x = block(x)
        return self.decoder.head(self.decoder.norm(x[:, -wanted.shape[1] :]))


def make_targets(
    clip: Float[Tensor, "b 3 t h w"], hidden: Bool[Tensor, "b n"], config: VideoMaeConfig
) -> Float[Tensor, "b m f"]:
    """Pixels of the hidden tokens, each normalised per colour."""
    mean = torch.tensor(IMAGENET_MEAN, device=clip.device)[None, :, None, None, None]
    std = torch.tensor(IMAGENET_STD, device=clip.device)[None, :, None, None, None]
    pixels = clip * std + mean
    patch = config.patch_size
    cut = "b c (t u) (h p) (w q) -> b (t h w) (u p q) c"
    tokens = rearrange(pixels, cut, u=config.tubelet_size, p=patch, q=patch)
    deviation = tokens.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6
    normed = rearrange((tokens - tokens.mean(dim=-2, keepdim=True)) / deviation, "b n p c -> b n (p c)")
    return normed[hidden].reshape(len(clip), -1, normed.shape[-1])


class PixelsBaselineStep:
    """The published step. A call takes a normalised clip and a mask (True: hidden), and returns the loss as a number.

    precision  autocast's dtype: fp16 (CUDA; with loss scaling), bf16 or fp32.
    """

    def __init__(self, model: nn.Module, config: VideoMaeConfig, optim: OptimConfig, precision: str) -> None:
        self.model, self.config = model, config
        self.update = BaselineUpdate(model, optim, precision, lambda name, p: p.dim() > 1 and name != "mask_token")

    def __call__(self, clip: Float[Tensor, "b 3 t h w"], hidden: Bool[Tensor, "b n"], mark: Mark = no_mark) -> float:
        with torch.no_grad():
            targets = make_targets(clip, hidden, self.config)
        mark("targets")
        with self.update.autocast():
            predictions = self.model(clip, hidden)
            mark("forward")
            loss = F.mse_loss(predictions, targets)
        return self.update(loss, mark)

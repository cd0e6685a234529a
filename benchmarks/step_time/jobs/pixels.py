"""VideoMAE's pre-training on pixels: an encoder of visible tokens, a decoder of all, a loss on the hidden tokens.

Masks are made outside the step for both steps, as in the published loader. Our step takes the decoder's uint8 clips,
the published step normalised float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step_time.baselines.pixels import BaselineVideoMae, PixelsBaselineStep
from benchmarks.step_time.jobs.own import block_flops, normalised, timed_step
from benchmarks.step_time.ladder import Rung, TimedStep
from benchmarks.step_time.phases import Mark
from umt_fast.config import OptimConfig, VideoMaeConfig
from umt_fast.models.attention import Backend
from umt_fast.models.pixels import VideoMae
from umt_fast.objectives.pixels import videomae_step
from umt_fast.run import attention_choice, costs
from umt_fast.run.attention_choice import Use
from umt_fast.run.optim import build_optimizer, clip_gradients

OPTIM = OptimConfig(lr=3e-5)
MASK_RATIO = 0.9
LOSS_TOLERANCE = 0.002
"""Largest difference of losses, which are near 1 and fall by 0.01 over the compared steps."""
MODELS = {
    "videomae_b16": VideoMaeConfig(),
    "videomae_l16": VideoMaeConfig(
        width=1024, depth=24, heads=16, decoder_width=512, decoder_heads=8, decoder_depth=12
    ),
    "tiny": VideoMaeConfig(64, 16, 2, 4, 64, 2, 2, decoder_width=32, decoder_depth=1, decoder_heads=2),
}


def draw_tubes(config: VideoMaeConfig, batch: int, generator: torch.Generator) -> Tensor:
    """Ids [B,n] of the visible tokens: the same places in all frames, ascending."""
    visible = config.patches - int(MASK_RATIO * config.patches)
    places = torch.rand(batch, config.patches, generator=generator).topk(visible).indices.sort().values
    frames = torch.arange(config.token_frames)[:, None] * config.patches
    return (places[:, None] + frames).flatten(1)


@dataclass(frozen=True)
class PixelsWork:
    """Clips and weights, on the device."""

    config: VideoMaeConfig
    clip: Tensor
    """uint8 [B,T,H,W,3]"""
    weights: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def build(self, rung: Rung) -> TimedStep:
        return _build_own(rung, self) if rung.lean else _build_baseline(rung, self)

    def flops(self, lean: bool) -> dict[str, int]:
        config, clips = self.config, len(self.clip)
        seen = self.draw(torch.Generator().manual_seed(0)).shape[1]
        if lean:
            flops = costs.pixel_flops(config, clips, seen, config.tokens, config.tokens - seen)
            return {"forward": flops.student_forward, "backward": flops.student_backward}
        features = 3 * config.tubelet_size * config.patch_size**2
        patch = 2 * clips * config.tokens * config.width * features
        rest = config.depth * block_flops(seen, config.width) + 2 * seen * config.width * config.decoder_width
        rest += config.decoder_depth * block_flops(config.tokens, config.decoder_width)
        rest += 2 * (config.tokens - seen) * config.decoder_width * features
        return {"forward": patch + clips * rest, "backward": patch + 2 * clips * rest}  # pixels get no gradient

    def draw(self, generator: torch.Generator) -> Tensor:
        return draw_tubes(self.config, len(self.clip), generator).to(self.device)


def prepare(model: str, batch: int, device: torch.device) -> PixelsWork:
    """Random weights from a fixed seed, and smooth random clips, because noise cannot be learned."""
    config = MODELS[model]
    torch.manual_seed(0)
    side = config.image_size // 16
    coarse = 255 * torch.rand(batch, 3, config.frames // config.tubelet_size, side, side)
    size = (config.frames, config.image_size, config.image_size)
    smooth = F.interpolate(coarse, size, mode="trilinear")
    clip = smooth.permute(0, 2, 3, 4, 1).to(torch.uint8).contiguous().to(device)
    return PixelsWork(config, clip, VideoMae(config).state_dict())


def _generators() -> tuple[torch.Generator, torch.Generator]:
    """One for the compared steps and one for the timed steps, the same on every rung."""
    return torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)


def _build_baseline(rung: Rung, work: PixelsWork) -> TimedStep:
    model = BaselineVideoMae(work.config, rung.sdpa)
    model.load_state_dict(work.weights)
    model.to(work.device)
    if rung.compiled:
        model.compile(backend=rung.backend)
    step = PixelsBaselineStep(model, work.config, OPTIM, rung.precision)
    clip = normalised(work.clip)
    compared, timed = _generators()

    def run(shared: bool, mark: Mark) -> float:
        visible = work.draw(compared if shared else timed)
        hidden = torch.ones(len(clip), work.config.tokens, dtype=torch.bool, device=work.device)
        hidden = hidden.scatter_(1, visible, False)
        mark("drawing")
        return step(clip, hidden, mark)

    return run


def _fastest(rung: Rung, work: PixelsWork, tokens: int, width: int, heads: int) -> Backend:
    use = Use(len(work.clip), tokens, tokens, heads, width // heads, True)
    return attention_choice.choose("auto", use, work.device, torch.bfloat16, rung.compiled).backend


def _build_own(rung: Rung, work: PixelsWork) -> TimedStep:
    config, device = work.config, work.device
    model = VideoMae(config)
    model.load_state_dict(work.weights)
    model.to(device)
    compared, timed = _generators()
    visible = work.draw(torch.Generator().manual_seed(0))
    model.set_attention(
        _fastest(rung, work, visible.shape[1], config.width, config.heads),
        _fastest(rung, work, config.tokens, config.decoder_width, config.decoder_heads),
    )
    if rung.compiled:
        model.compile(fullgraph=True, dynamic=False, backend=rung.backend, mode=rung.mode)
    optimizer = build_optimizer(model, OPTIM, capturable=rung.captured, no_decay=("mask_token",))

    def draw(shared: bool) -> Tensor:
        visible.copy_(work.draw(compared if shared else timed))
        return work.clip

    def step(clip: Tensor, mark: Mark) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = videomae_step(model, config, clip, visible).loss
        mark("forward")
        loss.backward()
        mark("backward")
        clip_gradients(model, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("optimiser")
        return loss.detach()

    return timed_step(rung, draw, step, "drawing")

"""A small image model for the demo's stage 1: CLIP's image ViT, trained for a minute on single frames of moving shapes.

    python -m train.demo_teacher --out runs/demo/teacher.safetensors

No CLIP weights come with this repository, and a random teacher teaches nothing. This teacher learns from single frames
to predict kind, position, size, rotation and colour of the shapes. It never sees two frames of a video or the name of a
motion. Its file has OpenAI's key names and is read like any CLIP: --teacher-weights FILE.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.pretrain import RECIPES
from umt_fast.config import IMAGENET_STATISTICS, PretrainConfig, TeacherConfig
from umt_fast.data import synthetic
from umt_fast.models.clip_vision import LAYER_NORM_EPS, QUICK
from umt_fast.recipe import load_recipe
from umt_fast.run.log import say
from umt_fast.run.optim import learning_rate, set_learning_rate
from umt_fast.weights import write_weights

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, UInt8

ACTORS = 2
"""Shapes in a frame."""
NUMBERS = 7
"""Numbers that describe a shape, beside its kind: x, y, radius, cosine and sine of the phase and of the hue."""
_SPREAD = (0.2, 0.2, 0.06, 0.7, 0.7, 0.7, 0.7)
"""Approximate standard deviations of these numbers; errors are divided by them."""


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(QUICK * hidden))


class FrameModel(nn.Module):
    """CLIP's image ViT (arXiv 2103.00020), trainable; `ClipTeacher` computes the same with frozen weights."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + config.grid**2, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_post = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.proj = nn.Parameter(torch.randn(width, config.target_width) * width**-0.5)

    def forward(self, frames: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b l c"]:
        """Projected outputs of the class token and of every patch."""
        x = self.conv1(frames).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1)
        x = self.ln_pre(x + self.positional_embedding)
        blocks = self.transformer["resblocks"]
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            x = block(x)
        return self.ln_post(x) @ self.proj


def render(seed: int, count: int, side: int) -> tuple[UInt8[np.ndarray, "n s s 3"], Float32[np.ndarray, "n a f"]]:
    """Frames, and for each of their shapes its kind and the `NUMBERS` that describe it."""
    frames, facts = np.empty((count, side, side, 3), np.uint8), np.empty((count, ACTORS, 1 + NUMBERS), np.float32)
    for number in range(count):
        frames[number], shapes = synthetic.render_frame(np.random.default_rng((seed, number)), side)
        for row, one in zip(facts[number], shapes, strict=True):
            hue = 2 * math.pi * one.hue
            place = (min(max(one.x, 0), 1), min(max(one.y, 0), 1), one.radius)
            row[:] = one.shape, *place, math.cos(one.phase), math.sin(one.phase), math.cos(hue), math.sin(hue)
    return frames, facts


def batches(
    frames: UInt8[Tensor, "n s s 3"], facts: Float[Tensor, "n a f"], size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of normalised frames and their facts, shuffled again for every pass."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in IMAGENET_STATISTICS)
    while True:
        for chosen in torch.randperm(len(frames), generator=generator)[: len(frames) // size * size].split(size):
            yield (frames[chosen].permute(0, 3, 1, 2) / 255 - mean) / std, facts[chosen]


class Answers(nn.Module):
    """Heads that predict the shapes: each patch token which shapes cover its patch, and their kind, offset from its
    centre, radius, rotation and hue; the class token the same for the whole frame."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        outputs = ACTORS * (1 + NUMBERS + len(synthetic.SHAPES))
        self.patches, self.frame = nn.Linear(config.target_width, outputs), nn.Linear(config.target_width, outputs)
        steps = (torch.arange(config.grid) + 0.5) / config.grid
        self.middles = torch.stack((steps.repeat(config.grid), steps.repeat_interleave(config.grid)), -1)

    def forward(self, tokens: Float[Tensor, "b l c"], facts: Float[Tensor, "b a f"]) -> dict[str, Tensor]:
        """Losses by name."""
        kinds, numbers = facts[..., 0].long(), facts[..., 1:]
        offset = numbers[:, None, :, :2] - self.middles[:, None]  # [b, p, a, 2]
        on = (offset.norm(dim=-1) < numbers[:, None, :, 2] + 0.5 * self.middles[0, 0]).float()
        wanted = torch.cat((offset, numbers[:, None, :, 2:].expand(*on.shape, -1)), -1)
        said = self.patches(tokens[:, 1:]).unflatten(-1, (ACTORS, -1))
        of_frame = self.frame(tokens[:, 0]).unflatten(-1, (ACTORS, -1))
        return {
            "shapes on patches": F.binary_cross_entropy_with_logits(said[..., 0], on),
            **_errors("patches", said[..., 1:], wanted, kinds[:, None].expand(on.shape), on),
            **_errors("frames", of_frame[..., 1:], numbers, kinds, torch.ones_like(numbers[..., 0])),
        }


def _errors(of: str, said: Tensor, numbers: Tensor, kinds: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Mean squared errors and cross-entropy where `counts` is 1."""
    squares = ((said[..., :NUMBERS] - numbers) / numbers.new_tensor(_SPREAD)).square()
    groups = {
        "place": squares[..., :2],
        "radius": squares[..., 2:3],
        "turn": squares[..., 3:5],
        "hue": squares[..., 5:],
    }
    errors = {name: square.mean(-1) for name, square in groups.items()}
    flat = F.cross_entropy(said[..., NUMBERS:].flatten(0, -2), kinds.flatten(), reduction="none")
    errors["kind"] = flat.view(kinds.shape)
    return {f"{name} of {of}": (error * counts).sum() / counts.sum() for name, error in errors.items()}


def train(
    config: TeacherConfig, frames: int, steps: int, batch: int = 64, lr: float = 2e-3, seed: int = 0
) -> FrameModel:
    """Render `frames` frames and train on them for `steps` steps with AdamW and a cosine schedule, in float32."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    pixels, facts = (torch.from_numpy(part) for part in render(seed, frames, config.image_size))
    model, answers = FrameModel(config), Answers(config)
    optimizer = torch.optim.AdamW([*model.parameters(), *answers.parameters()], lr, weight_decay=0.02, fused=True)
    every = max(steps // 5, 1)
    for step, (pictures, known) in zip(range(1, steps + 1), batches(pixels, facts, batch, seed), strict=False):
        set_learning_rate(optimizer, learning_rate(step - 1, steps, max(steps // 20, 1), lr, 0.0))
        losses = answers(model(pictures), known)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        if step % every == 0 or step == 1:
            shown = "  ".join(f"{name} {loss.item():.2f}" for name, loss in losses.items() if "frames" not in name)
            say(f"teacher step {step}/{steps}  {shown}")
    say(f"trained the teacher on {frames} frames in {time.perf_counter() - start:.0f} s")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m train.demo_teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="file for the weights, .safetensors or .pth")
    parser.add_argument("--frames", type=int, default=8000, help="frames to train on (default %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of 64 frames (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=64, help="side of a frame (default %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="width of the model (default %(default)s)")
    given = parser.parse_args()
    recipe = load_recipe(PretrainConfig, RECIPES / "tiny.toml").teacher
    config = dataclasses.replace(
        recipe, image_size=given.image_size, width=given.width, heads=max(given.width // 32, 1)
    )
    model = train(config, given.frames, given.steps)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_weights(given.out, dict(model.state_dict()))
    say(f"wrote {given.out}")


if __name__ == "__main__":
    main()

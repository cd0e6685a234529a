"""The fast training augmentation: crop and flip in the loader, everything else per batch on the device.

The operations and their probabilities are the published ones. Three things differ: the crop comes first, so operations
act on the clip and not on the whole frame; the crop is resized with antialiasing; and geometric operations use
PyTorch's bicubic kernel (a = -0.75, Pillow's is -0.5). Colour operations give the same bytes as Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast.config import IMAGENET_STATISTICS, AugmentConfig
from umt_fast.data.augment import (
    FILL,
    Operation,
    Statistics,
    draw_crop,
    draw_erased,
    draw_operations,
    erase,
    inverse_affine,
)
from umt_fast.data.clips import ClipStream
from umt_fast.data.crops import View
from umt_fast.data.sampling import Draws

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8


@dataclass
class CroppedStream(ClipStream):
    """A stream of random resized crops with random flips; `augment_batch` does the rest of the augmentation."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def draw_views(self, width: int, height: int, rng: np.random.Generator) -> list[View]:
        draws = Draws.seeded(int(rng.integers(2**32)))
        boxes = [draw_crop(height, width, self.augment, draws) for _ in range(self.config.crops_per_clip)]
        return [View(b.left, b.top, b.width, b.height, draws.numpy.uniform() < self.augment.flip) for b in boxes]


def augment_batch(
    clips: UInt8[Tensor, "b t h w 3"],
    seeds: Sequence[int],
    settings: AugmentConfig,
    statistics: Statistics = IMAGENET_STATISTICS,
) -> Float[Tensor, "b 3 t h w"]:
    """RandAugment, normalisation and erasing of cropped clips, on their device; returns float32.

    The draws for a clip depend on its seed alone. Raises ValueError for another number of seeds than clips.
    """
    if len(seeds) != len(clips):
        raise ValueError(f"{len(seeds)} seeds for {len(clips)} clips")
    mean, std = (torch.tensor(part, device=clips.device).view(3, 1, 1, 1) for part in statistics)
    out = torch.empty(len(clips), 3, *clips.shape[1:4], device=clips.device)
    for clip, seed, normalised in zip(clips, seeds, out, strict=True):
        draws = Draws.seeded(seed)
        frames = clip.permute(0, 3, 1, 2)
        for operation in draw_operations(settings, draws):
            frames = apply_to_frames(frames, operation)
        torch.sub(frames.transpose(0, 1) / 255, mean, out=normalised)
        normalised /= std
        erased = draw_erased(clip.shape[1], clip.shape[2], settings, draws)
        if erased is not None:
            if clips.device.type != "cpu":
                draws.torch = torch.Generator(clips.device).manual_seed(seed)
            erase(normalised, erased, draws)
    return out


def apply_to_frames(frames: UInt8[Tensor, "t 3 h w"], operation: Operation) -> UInt8[Tensor, "t 3 h w"]:
    """Apply one RandAugment operation to frames on any device."""
    name, value = operation
    if name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        return _affine(frames, operation)
    return _COLOUR[name](frames, value)


def _affine(frames: Tensor, operation: Operation) -> Tensor:
    height, width = frames.shape[-2:]
    a, b, c, d, e, f = inverse_affine(operation, width, height)
    y, x = torch.meshgrid(
        torch.arange(height, device=frames.device) + 0.5, torch.arange(width, device=frames.device) + 0.5, indexing="ij"
    )
    x, y = a * x + b * y + c, d * x + e * y + f
    grid = torch.stack((x / width, y / height), -1) * 2 - 1
    moved = F.grid_sample(
        frames.float(), grid.expand(len(frames), -1, -1, -1), "bicubic", padding_mode="border", align_corners=False
    )
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return torch.where(inside, moved.round().clamp(0, 255), FILL).to(torch.uint8)


def _auto_contrast(frames: Tensor, _: float) -> Tensor:
    low, high = frames.amin((2, 3), keepdim=True).double(), frames.amax((2, 3), keepdim=True).double()
    scale = 255 / (high - low)  # infinite for a constant channel, which is not changed
    stretched = (frames * scale - low * scale).clamp(0, 255).nan_to_num()
    return torch.where(high > low, stretched, frames.double()).to(torch.uint8)


def _equalize(frames: Tensor, _: float) -> Tensor:
    planes = frames.flatten(0, 1).flatten(1).long()  # [planes, pixels]
    offset = 256 * torch.arange(len(planes), device=frames.device)[:, None]
    counts = torch.zeros(len(planes) * 256, dtype=torch.int64, device=frames.device)
    counts = counts.scatter_add_(0, (planes + offset).flatten(), torch.ones_like(planes).flatten()).view(-1, 256)
    highest = counts.gather(1, planes.amax(1, keepdim=True))
    step = (planes.shape[1] - highest) // 255
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp_min(1)).clamp_max(255)
    table = torch.where(step > 0, table, torch.arange(256, device=frames.device))
    return table.gather(1, planes).to(torch.uint8).view(frames.shape)


def _blend(frames: Tensor, other: Tensor, share: float) -> Tensor:
    """Pillow's blend: other + share * (frames - other), truncated to integers."""
    other = other.float()
    return (other + share * (frames.float() - other)).clamp(0, 255).to(torch.uint8)


def _grey(frames: Tensor) -> Tensor:
    red, green, blue = frames.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]


def _contrast(frames: Tensor, value: float) -> Tensor:
    return _blend(frames, (_grey(frames).double().mean((2, 3), keepdim=True) + 0.5).floor(), value)


def _sharpness(frames: Tensor, value: float) -> Tensor:
    kernel = torch.full((3, 1, 3, 3), 1 / 13, device=frames.device)
    kernel[:, :, 1, 1] = 5 / 13
    smooth = frames.clone()  # Pillow leaves the border as it is
    if min(frames.shape[-2:]) > 2:
        smooth[..., 1:-1, 1:-1] = (F.conv2d(frames.float(), kernel, groups=3) + 0.5).clamp(0, 255).to(torch.uint8)
    return _blend(frames, smooth, value)


def _solarize(frames: Tensor, value: float) -> Tensor:
    return torch.where(frames < int(value), frames, 255 - frames) if value < 256 else frames


def _solarize_add(frames: Tensor, value: float) -> Tensor:
    return torch.where(frames < 128, (frames.int() + int(value)).clamp_max(255).to(torch.uint8), frames)


_COLOUR: dict[str, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": lambda frames, _: 255 - frames,
    "Posterize": lambda frames, bits: frames & (256 - 2 ** (8 - int(bits))),
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": lambda frames, value: _blend(frames, _grey(frames), value),
    "Contrast": _contrast,
    "Brightness": lambda frames, value: _blend(frames, torch.zeros_like(frames), value),
    "Sharpness": _sharpness,
}

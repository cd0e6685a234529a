"""Training augmentation of a labelled clip: RandAugment, random resized crop, flip, erasing (UMT's fine-tuning).

This is the published pipeline with the same random draws: RandAugment by Pillow on whole frames, then the crop.
`fast_augment` has a faster one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from umt_fast.config import IMAGENET_STATISTICS, AugmentConfig, FrameRule
from umt_fast.data.sampling import Draws, Timeline, train_frames
from umt_fast.data.video import BadVideo
from umt_fast.data.views import Box

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, UInt8

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation per channel, for pixels in [0, 1]."""
FILL = 128
"""Grey value of the area outside the frame after geometric operations."""
_HIGHEST = 10.0
"""Highest level of an operation; the lowest is 0."""

OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
)
_SIGNED = frozenset(OPERATIONS[7:]) | {"Rotate"}
_ENHANCERS = {name: getattr(ImageEnhance, name) for name in ("Color", "Contrast", "Brightness", "Sharpness")}


class Operation(NamedTuple):
    name: str
    value: float
    """Argument of the operation: degrees, bits, a threshold or a share; 0 if it has none."""


def draw_operations(settings: AugmentConfig, draws: Draws) -> list[Operation]:
    """Draw the operations of one clip. All draws of the published code are made, also the unused ones."""
    if settings.operations == 0:
        return []
    chosen = draws.numpy.choice(len(OPERATIONS), settings.operations)
    return [op for index in chosen if (op := draw_operation(OPERATIONS[index], settings, draws)) is not None]


def draw_operation(name: str, settings: AugmentConfig, draws: Draws) -> Operation | None:
    """Draw the argument of an operation; None if it is skipped."""
    if settings.chance < 1 and draws.python.random() > settings.chance:
        return None
    level = settings.magnitude
    if settings.magnitude_std > 0:
        level = draws.python.gauss(level, settings.magnitude_std)
    share = min(max(level, 0.0), _HIGHEST) / _HIGHEST
    sign = -1 if name in _SIGNED and draws.python.random() > 0.5 else 1
    if name == "Rotate":
        return Operation(name, sign * share * 30)
    if name == "Posterize":
        return Operation(name, max(4 - int(share * 4), 1))  # the published code keeps no bit at level 10
    if name == "Solarize":
        return Operation(name, 256 - int(share * 256))
    if name == "SolarizeAdd":
        return Operation(name, int(share * 110))
    if name in _ENHANCERS:
        return Operation(name, 1 + sign * share * 0.9)
    if name.startswith("Shear"):
        return Operation(name, sign * share * 0.3)
    if name.startswith("Translate"):
        return Operation(name, sign * share * 0.45)
    return Operation(name, 0)


def apply_to_image(image: Image.Image, operation: Operation) -> Image.Image:
    """Apply one RandAugment operation by Pillow; geometric operations are bicubic."""
    name, value = operation
    if name in _ENHANCERS:
        return _ENHANCERS[name](image).enhance(value)
    if name == "Rotate":
        return image.rotate(value, Image.Resampling.BICUBIC, fillcolor=(FILL,) * 3)
    if name.startswith(("Shear", "Translate")):
        matrix = inverse_affine(operation, image.width, image.height)
        affine, cubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
        return image.transform(image.size, affine, matrix, cubic, fillcolor=(FILL,) * 3)
    if name == "AutoContrast":
        return ImageOps.autocontrast(image)
    if name == "Equalize":
        return ImageOps.equalize(image)
    if name == "Invert":
        return ImageOps.invert(image)
    if name == "Posterize":
        return ImageOps.posterize(image, int(value))
    if name == "Solarize":
        return ImageOps.solarize(image, int(value))
    added = [min(255, level + int(value)) if level < 128 else level for level in range(256)]
    return image.point(added * 3)  # SolarizeAdd


def inverse_affine(operation: Operation, width: int, height: int) -> tuple[float, float, float, float, float, float]:
    """Affine matrix (two rows) from output to input coordinates, in pixels from the top left corner."""
    name, value = operation
    if name == "ShearX":
        return 1, value, 0, 0, 1, 0
    if name == "ShearY":
        return 1, 0, 0, value, 1, 0
    if name == "TranslateX":
        return 1, 0, value * width, 0, 1, 0
    if name == "TranslateY":
        return 1, 0, 0, 0, 1, value * height
    cosine, sine = math.cos(math.radians(value)), math.sin(math.radians(value))  # Rotate, about the centre
    x, y = width / 2, height / 2
    return cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y


def draw_crop(height: int, width: int, settings: AugmentConfig, draws: Draws) -> Box:
    """A crop of random area and aspect ratio (arXiv 1409.4842); after ten crops that do not fit, a central one."""
    low, high = settings.crop_aspect
    for _ in range(10):
        area = draws.python.uniform(*settings.crop_area) * height * width
        aspect = math.exp(draws.python.uniform(math.log(low), math.log(high)))
        draws.numpy.uniform()  # the published code draws this number and does not use it
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            top = draws.python.randint(0, height - down)
            return Box(top, draws.python.randint(0, width - across), down, across)
    across, down = width, height
    if width / height < low:
        down = round(width / low)
    elif width / height > high:
        across = round(height * high)
    return Box((height - down) // 2, (width - across) // 2, down, across)


def draw_erased(height: int, width: int, settings: AugmentConfig, draws: Draws) -> Box | None:
    """Draw the rectangle of a clip to replace by noise, or None."""
    if settings.erase == 0 or draws.python.random() > settings.erase:
        return None
    for _ in range(100):
        area = draws.python.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(draws.python.uniform(math.log(0.3), math.log(1 / 0.3)))
        down, across = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if across < width and down < height:
            top = draws.python.randint(0, height - down)
            return Box(top, draws.python.randint(0, width - across), down, across)
    return None


def normalise(
    frames: UInt8[np.ndarray, "t h w 3"] | UInt8[Tensor, "t h w 3"], statistics: Statistics = IMAGENET_STATISTICS
) -> Float[Tensor, "3 t h w"]:
    """Convert to float32 and normalise by a mean and standard deviation, by default ImageNet's."""
    mean, std = statistics
    pixels = torch.as_tensor(frames).float() / 255
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(3, 0, 1, 2)


def augment_published(
    frames: UInt8[np.ndarray, "t h w 3"],
    side: int,
    settings: AugmentConfig,
    draws: Draws,
    statistics: Statistics = IMAGENET_STATISTICS,
) -> Float[Tensor, "3 t side side"]:
    """One training clip from whole frames, with the published draws: RandAugment, crop, flip, erasing.

    Returns normalised float32. A second call with the same `draws` object gives another clip of the same frames.
    """
    operations = draw_operations(settings, draws)
    frames = augment_frames(frames, operations)
    box = draw_crop(frames.shape[1], frames.shape[2], settings, draws)
    clip = normalise(frames[:, box.top : box.top + box.height, box.left : box.left + box.width], statistics)
    clip = F.interpolate(clip, size=(side, side), mode="bilinear", align_corners=False)
    if settings.flip > 0 and draws.numpy.uniform() < settings.flip:
        clip = clip.flip(-1)
    erased = draw_erased(side, side, settings, draws)
    if erased is not None:
        erase(clip, erased, draws)
    return clip


def augment_frames(frames: UInt8[np.ndarray, "t h w 3"], operations: list[Operation]) -> UInt8[np.ndarray, "t h w 3"]:
    """Apply the same operations to each frame."""
    if not operations:
        return frames
    augmented = np.empty_like(frames)
    for frame, out in zip(frames, augmented, strict=True):
        image = Image.fromarray(frame)
        for operation in operations:
            image = apply_to_image(image, operation)
        out[:] = np.asarray(image)
    return augmented


def erase(clip: Float[Tensor, "3 t h w"], box: Box, draws: Draws) -> None:
    """Fill `box` with noise, in place; it is drawn frame after frame."""
    rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
    for time in range(clip.shape[1]):
        noise = torch.empty(3, box.height, box.width).normal_(generator=draws.torch)
        clip[:, time, rows, columns] = noise.to(clip.device)


@dataclass(frozen=True)
class TrainSampling:
    """Frame sampling of a `ClipStream` by one of the rules of fine-tuning."""

    frames: int
    rule: FrameRule = "sparse"
    rate: float = 1
    """A `dense` clip has every rate-th frame of the video."""
    fps: float | None = None
    """Frames per second of a `dense` clip, instead of `rate`."""

    def __call__(self, timeline: Timeline, rng: np.random.Generator) -> list[int]:
        rate = self.rate if self.fps is None else timeline.fps / self.fps
        return train_frames(timeline.num_frames, self.frames, self.rule, Draws.seeded(int(rng.integers(2**32))), rate)


@dataclass(frozen=True)
class PublishedAugment:
    """`augment_published`, `clips` times on the same frames; the transform of a `ClipStream`."""

    frames: int
    side: int
    clips: int
    settings: AugmentConfig
    statistics: Statistics = IMAGENET_STATISTICS

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one normalised clip."""
        return 3, self.frames, self.side, self.side

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def __call__(
        self,
        frames: list[UInt8[np.ndarray, "h w 3"]],
        out: Float32[np.ndarray, "r 3 t side side"],
        rng: np.random.Generator,
    ) -> None:
        """Raises BadVideo if the frames differ in size."""
        if len({frame.shape for frame in frames}) > 1:
            raise BadVideo("its frames change in size, which the published augmentation cannot crop alike")
        draws = Draws.seeded(int(rng.integers(2**32)))
        stacked = np.stack(frames)
        for clip in out:
            clip[:] = augment_published(stacked, self.side, self.settings, draws, self.statistics).numpy()

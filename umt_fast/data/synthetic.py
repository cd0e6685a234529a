"""Small video files of moving shapes, to try the trainer.

`python -m umt_fast.data.synthetic FOLDER` writes the files and FOLDER/train.csv, a list in UMT's format. With
--captions it writes videos of one shape, and FOLDER/train.json and test.json, whose captions name colour, shape and
motion.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import av
import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from jaxtyping import UInt8

SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("bounce", "orbit", "spin", "pulse")
COLOURS = {"red": 0.0, "yellow": 0.15, "green": 0.33, "blue": 0.6, "purple": 0.78, "white": None}
"""Hues of captioned shapes."""
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
"""Names of hues, in equal steps from 0."""
WIDTH, HEIGHT, FPS, FRAMES = 192, 144, 15, 48
_SMOOTH = 2  # factor of oversampling: shapes are drawn larger, then reduced

TURNS = {"circle": 0, "square": 4, "triangle": 3, "star": 5}
"""Order of a shape's rotational symmetry; 0: any angle looks the same."""

# Time in seconds -> (x, y, radius, angle) of a shape; x, y and radius as shares of the frame's height.
Path2D = Callable[[float], tuple[float, float, float, float]]
Actor = tuple[str, Path2D, tuple[int, ...]]
"""A shape's name, path and colour."""


class ShapeFacts(NamedTuple):
    """Facts about a shape in one frame."""

    shape: int
    """Index into SHAPES."""
    x: float
    """Centre as a share of the picture's side, from the left; outside of [0, 1] it is not in the picture."""
    y: float
    radius: float
    phase: float
    """Angle in radians times the order of symmetry (`TURNS`), so that equal phases look alike; 0 for circles."""
    hue: float
    """0 to 1, cyclic."""


def write_videos(folder: Path, count: int = 32, seed: int = 0) -> Path:
    """Write `count` videos, H.264 in .mp4 and VP9 in .webm alternately; all pairs of shape and motion take turns.

    The pictures are a function of the seed. Returns the list of lines `path,label`; the label is motion * 4 + shape of
    the larger of two shapes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        label, motion, shape = _kind(number)
        path = folder / f"{number:03d}_{motion}_{shape}{'.webm' if number % 2 else '.mp4'}"
        _encode(path, _draw_frames(*_scene(number, seed), FRAMES))
        lines.append(f"{path},{label}\n")
    listing = folder / "train.csv"
    listing.write_text("".join(lines))
    return listing


def write_captioned(folder: Path, train: int = 480, test: int = 96, seed: int = 0) -> tuple[Path, Path]:
    """Write short videos of one shape each, and lists with captions of its colour, shape and motion.

    Returns train.json and test.json, as stage 2 reads them. The first 96 videos of a list have different captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [(colour, shape, motion) for colour in COLOURS for shape in SHAPES for motion in MOTIONS]
    lists = []
    for part, count in (("train", train), ("test", test)):
        order = np.random.default_rng((seed, part == "test")).permutation(len(kinds))
        entries = []
        for number in range(count):
            rng = np.random.default_rng((seed, part == "test", number))
            colour, shape, motion = kinds[order[number % len(kinds)]]
            path = folder / f"{part}_{number:04d}.mp4"
            _encode(path, _render_one(colour, shape, motion, rng))
            phrase = "{} {} {}s" if number % 2 else "{} {} that {}s"
            entries.append({"video": str(path), "caption": "a " + phrase.format(colour, shape, motion)})
        lists.append(folder / f"{part}.json")
        lists[-1].write_text(json.dumps(entries, indent=0))
    return lists[0], lists[1]


def _render_one(colour: str, shape: str, motion: str, rng: np.random.Generator) -> list[np.ndarray]:
    """FRAMES // 2 frames of one shape over a patterned background."""
    hue = COLOURS[colour]
    filled = (240, 240, 240) if hue is None else tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, 1.0))
    return _draw_frames(_ground(rng), [(shape, _path(motion, 0.22, rng), filled)], FRAMES // 2)


def describe(number: int, seed: int) -> tuple[str, str, str]:
    """Motion, shape and nearest hue of the larger shape of a video of `write_videos`."""
    _, motion, shape = _kind(number)
    _, (large, _) = _scene(number, seed)
    hue = colorsys.rgb_to_hsv(*(level / 255 for level in large[2]))[0]
    return motion, shape, HUES[round(hue * len(HUES)) % len(HUES)]


def _kind(number: int) -> tuple[int, str, str]:
    """Label, motion and shape of a video by its number."""
    label = number % (len(SHAPES) * len(MOTIONS))
    return label, MOTIONS[label // len(SHAPES)], SHAPES[label % len(SHAPES)]


def _scene(number: int, seed: int) -> tuple[Image.Image, list[Actor]]:
    """A patterned background, and one large and one small shape."""
    rng = np.random.default_rng((seed, number))
    ground = _ground(rng)
    return ground, _two_actors(*_kind(number)[1:], rng)


def _two_actors(motion: str, shape: str, rng: np.random.Generator) -> list[Actor]:
    """A large shape, and a small one of another kind and motion."""
    others = rng.choice(len(SHAPES)), rng.choice(len(MOTIONS))
    return [
        (shape, _path(motion, 0.20, rng), _colour(rng)),
        (SHAPES[others[0]], _path(MOTIONS[others[1]], 0.10, rng), _colour(rng)),
    ]


def render_frame(rng: np.random.Generator, side: int) -> tuple[UInt8[np.ndarray, "s s 3"], list[ShapeFacts]]:
    """A square crop, `side` pixels wide, of one frame of a random video, and the facts of its large and small shape."""
    ground, shape, motion = _ground(rng), SHAPES[rng.choice(len(SHAPES))], MOTIONS[rng.choice(len(MOTIONS))]
    actors, time = _two_actors(motion, shape, rng), rng.uniform(0, FRAMES / FPS)
    size = HEIGHT * _SMOOTH * rng.uniform(0.66, 1.0)
    left, top = rng.uniform(0, WIDTH * _SMOOTH - size), rng.uniform(0, HEIGHT * _SMOOTH - size)
    image, facts = ground, []
    for name, path, colour in actors:
        *place, angle = path(time)
        x, y, radius = (value * HEIGHT * _SMOOTH for value in place)
        _draw(ImageDraw.Draw(image), name, x, y, radius, angle, colour)
        hue = colorsys.rgb_to_hsv(*(level / 255 for level in colour))[0]
        kind, phase = SHAPES.index(name), angle * TURNS[name]
        facts.append(ShapeFacts(kind, (x - left) / size, (y - top) / size, radius / size, phase, hue))
    box = (left, top, left + size, top + size)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, box)), facts


def _draw_frames(ground: Image.Image, actors: list[Actor], count: int) -> list[np.ndarray]:
    frames = []
    for index in range(count):
        image = ground.copy()
        draw = ImageDraw.Draw(image)
        for name, path, colour in actors:
            x, y, radius, angle = (value * HEIGHT * _SMOOTH for value in path(index / FPS))
            _draw(draw, name, x, y, radius, angle / (HEIGHT * _SMOOTH), colour)
        frames.append(np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BOX)))
    return frames


def _ground(rng: np.random.Generator) -> Image.Image:
    """Two dim colours blended by a soft random pattern."""
    pattern = Image.fromarray((rng.random((5, 6)) * 255).astype(np.uint8))
    pattern = pattern.resize((WIDTH * _SMOOTH, HEIGHT * _SMOOTH), Image.Resampling.BICUBIC)
    hue = rng.random()
    first, second = (
        tuple(int(255 * c) for c in colorsys.hsv_to_rgb((hue + shift) % 1, 0.4, value))
        for shift, value in ((0.0, 0.25), (0.15, 0.55))
    )
    size = pattern.size
    return Image.composite(Image.new("RGB", size, first), Image.new("RGB", size, second), pattern)


def _colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), 0.8, 1.0))


def _path(motion: str, radius: float, rng: np.random.Generator) -> Path2D:
    aspect = WIDTH / HEIGHT
    x, y = rng.uniform(radius, aspect - radius), rng.uniform(radius, 1 - radius)
    phase, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1.4)

    def mirror(value: float, low: float, high: float) -> float:
        """Reflect a value back into [low, high]."""
        span = high - low
        folded = (value - low) % (2 * span)
        return low + min(folded, 2 * span - folded)

    def path(t: float) -> tuple[float, float, float, float]:
        if motion == "bounce":
            dx, dy = 0.7 * speed * math.cos(phase), 0.7 * speed * math.sin(phase)
            return mirror(x + dx * t, radius, aspect - radius), mirror(y + dy * t, radius, 1 - radius), radius, phase
        if motion == "orbit":
            turn = phase + 2.5 * speed * t
            reach = 0.5 - radius
            return aspect / 2 + 1.2 * reach * math.cos(turn), 0.5 + reach * math.sin(turn), radius, phase
        if motion == "spin":
            return x, y, radius, phase + 4 * speed * t
        return x, y, radius * (1 + 0.6 * math.sin(phase + 4 * speed * t)), phase  # pulse

    return path


def _draw(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, angle: float, colour: tuple[int, ...]
) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    corners = {"square": 4, "triangle": 3, "star": 10}[shape]
    reach = [radius * (0.45 if shape == "star" and i % 2 else 1) for i in range(corners)]
    turns = [angle + 2 * math.pi * i / corners for i in range(corners)]
    points = [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(reach, turns, strict=True)]
    draw.polygon(points, fill=colour)


def _encode(path: Path, frames: list[np.ndarray]) -> None:
    vp9 = path.suffix == ".webm"
    # with mbtree, x264's output differs from run to run on some machines
    options = {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0"} if vp9 else {"crf": "20", "mbtree": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9" if vp9 else "libx264", rate=Fraction(FPS), options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = 12
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m umt_fast.data.synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for the videos and their list")
    parser.add_argument("--count", type=int, default=32, help="videos to write (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other videos for another seed (default 0)")
    parser.add_argument("--captions", action="store_true", help="train.json and test.json with captions instead")
    arguments = parser.parse_args()
    if arguments.captions:
        for path in write_captioned(arguments.folder, seed=arguments.seed):
            print(f"wrote {path}")
        return
    listing = write_videos(arguments.folder, arguments.count, arguments.seed)
    print(f"wrote {arguments.count} videos and their list {listing}")


if __name__ == "__main__":
    main()

"""Pictures of search results: for each query a few frames of the best videos, marked right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from umt_fast.data.decode import read_frames
from umt_fast.data.sampling import middle_frames
from umt_fast.data.video import BadVideo, Video

if TYPE_CHECKING:
    from jaxtyping import UInt8

HEIGHT, STRIP, EDGE, LINE = 72, 3, 3, 16
"""Height of a frame, pixels; frames per video; border and height of a text line, pixels."""
RIGHT, WRONG, UNKNOWN = (40, 150, 60), (190, 50, 40), (110, 110, 110)


@dataclass(frozen=True)
class Hit:
    """One video found for a query."""

    video: Video
    label: str
    right: bool | None = None
    """None if the right answer is unknown."""
    seconds: tuple[float, float] | None = None
    """The part of the video that was found; None: the whole video."""


def draw_found(queries: Sequence[tuple[str, Sequence[Hit]]], path: Path) -> None:
    """Write a picture with a row of hits for each query; a green border means right, red wrong."""
    columns = max((len(hits) for _, hits in queries), default=1)
    strip = _strip_width()
    cell = strip + 2 * EDGE + 6
    row = HEIGHT + 2 * EDGE + 2 * LINE + 8
    sheet = Image.new("RGB", (max(columns * cell, 320), max(len(queries) * row, row)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, (query, hits) in enumerate(queries):
        top = number * row
        draw.text((4, top + 1), _printable(query, 110), fill=(0, 0, 0), font=font)
        for place, hit in enumerate(hits):
            left = place * cell
            colour = UNKNOWN if hit.right is None else RIGHT if hit.right else WRONG
            box = (left + 1, top + LINE + 2, left + strip + 2 * EDGE, top + LINE + HEIGHT + 2 * EDGE + 1)
            draw.rectangle(box, fill=colour)
            sheet.paste(_picture(hit), (left + 1 + EDGE, top + LINE + 2 + EDGE))
            draw.text((left + 2, box[3] + 1), _printable(hit.label, 44), fill=colour, font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _strip_width() -> int:
    return STRIP * HEIGHT * 4 // 3


def _picture(hit: Hit) -> Image.Image:
    strip = Image.new("RGB", (_strip_width(), HEIGHT), (230, 230, 230))
    try:
        frames = read_part(hit.video, STRIP, hit.seconds)
    except (BadVideo, OSError):  # removed or changed since the search
        return strip
    width = _strip_width() // STRIP
    for place, frame in enumerate(frames):
        strip.paste(ImageOps.pad(Image.fromarray(frame), (width, HEIGHT)), (place * width, 0))
    return strip


def read_part(
    video: Video, frames: int, seconds: tuple[float, float] | None = None
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """`frames` evenly spread frames of a video, or of the part between two times. Raises BadVideo."""
    if seconds is None:
        return read_frames(video, lambda total: middle_frames(total, frames))
    from umt_fast.data.decode import open_video, read_places

    with open_video(video) as reader:
        times = reader.timeline.seconds
        last = max(int(np.searchsorted(times, seconds[1])), 1)
        first = min(int(np.searchsorted(times, seconds[0])), last - 1)
        indices = [first + index for index in middle_frames(last - first, frames)]
        found = {place: frame for places, frame in read_places(reader, indices) for place in places}
    return [found[place] for place in range(frames)]


def _printable(text: str, longest: int) -> str:
    text = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)
    return text if len(text) <= longest else text[: longest - 3] + "..."

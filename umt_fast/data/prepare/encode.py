"""Encode one video as a training copy, in which a random frame is cheap to decode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from umt_fast.config import ConfigError
from umt_fast.data.decode import probe
from umt_fast.data.decode.by_index import find_packets
from umt_fast.data.decode.container import each_frame, look_up
from umt_fast.data.decode.orientation import UPRIGHT, Orientation, orientation_of
from umt_fast.data.decode.rgb import ONE_THREAD
from umt_fast.data.video import BadVideo, Facts, Video


class BadCopy(Exception):
    """A copy is not as requested; the message says how it differs."""


@dataclass(frozen=True)
class Codec:
    encoder: str
    """FFmpeg's name of the encoder."""
    quality: tuple[int, int]
    """Default constant quality with predicted frames, and with key frames only: the same number gives different
    qualities."""
    options: dict[str, str] = field(default_factory=dict)
    scale: tuple[str, ...] = ("crf",)
    """Names of the options that set the quality."""
    full_range: bool = False


# One thread and no look-ahead give the same bytes on every run. No B-frames and no scene cuts keep the GOP constant.
CODECS = {
    "h264": Codec(
        "libx264",
        (22, 19),
        {
            "preset": "fast",
            # No CABAC and no deblocking: decoding is 1.9 times as fast, files are 1.1 times as large (docs/data.md).
            "tune": "fastdecode",
            "x264-params": "bframes=0:scenecut=0:open-gop=0:mbtree=0:rc-lookahead=0:sync-lookahead=0",
        },
    ),
    "hevc": Codec(
        "libx265",
        (24, 21),
        {
            "preset": "fast",
            "x265-params": "bframes=0:scenecut=0:open-gop=0:cutree=0:rc-lookahead=0"
            ":pools=none:frame-threads=1:wpp=0:info=0:log-level=none",
        },
    ),
    "vp9": Codec(
        "libvpx-vp9",
        (38, 46),
        {"b": "0", "deadline": "good", "cpu-used": "4", "lag-in-frames": "0", "auto-alt-ref": "0", "row-mt": "0"},
    ),
    "av1": Codec("libsvtav1", (35, 45), {"preset": "8", "svtav1-params": "pred-struct=1:lp=1:scd=0:fast-decode=2"}),
    "mjpeg": Codec("mjpeg", (5, 5), scale=("qmin", "qmax"), full_range=True),
}
SIDES = (16, 4320)
_RESIZE = 1 << 2 | 1 << 18 | 1 << 13 | 1 << 19
"""libswscale's BICUBIC, ACCURATE_RND, FULL_CHR_H_INT and BITEXACT, which PyAV before 18 does not name."""
_FINEST_CLOCK = 1_000_000
_COARSER_CLOCK = 90_000
_FASTEST = 240  # SVT-AV1's limit on frames per second; the rate only guides rate control


@dataclass(frozen=True)
class Recipe:
    """Encoding settings of copies. Raises ConfigError for invalid values and combinations."""

    codec: str = "h264"
    short_side: int = 256
    """Short side of the copy, pixels; smaller videos keep their size."""
    gop: int | None = None
    """Frames from one key frame to the next; None: 4, or 1 if the codec has only key frames."""
    quality: int | None = None
    """The encoder's constant quality, smaller is better; None: the codec's own default."""
    square_pixels: bool = False
    """Whether videos with non-square pixels are widened as players do; otherwise they are copied as stored."""

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ConfigError(f"--codec {self.codec}: there are {', '.join(CODECS)}")
        if self.short_side % 2 or not SIDES[0] <= self.short_side <= SIDES[1]:
            raise ConfigError(f"--short-side {self.short_side} is not an even number from {SIDES[0]} to {SIDES[1]}")
        if self.gop is not None and not 1 <= self.gop <= 8:
            raise ConfigError(f"--gop {self.gop} is not from 1 to 8")
        if self.codec == "mjpeg" and self.gop not in (None, 1):
            raise ConfigError(f"--gop {self.gop}: every frame of mjpeg is a key frame; leave it out, or choose --gop 1")
        if self.quality is not None and not 1 <= self.quality <= (31 if self.codec == "mjpeg" else 51):
            raise ConfigError(f"--quality {self.quality} is not from 1 to {31 if self.codec == 'mjpeg' else 51}")
        if CODECS[self.codec].encoder not in av.codecs_available:
            raise ConfigError(f"--codec {self.codec}: this FFmpeg has no {CODECS[self.codec].encoder}")

    def resolved(self) -> Recipe:
        """This recipe with the defaults filled in."""
        gop = self.gop or (1 if self.codec == "mjpeg" else 4)
        quality = self.quality or CODECS[self.codec].quality[gop == 1]
        return Recipe(self.codec, self.short_side, gop, quality, self.square_pixels)


def copy_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height of the copy: even, for 4:2:0, and not larger than the source unless a side is 1."""
    short = min(width, height)
    if short <= short_side:
        return max(width // 2 * 2, 2), max(height // 2 * 2, 2)
    width, height = (2 * round(side * short_side / short / 2) for side in (width, height))
    return width, height


def write_copy(video: Video, target: str, recipe: Recipe, content: bytes | None = None) -> tuple[Facts, float]:
    """Encode every frame of `video` into an MP4 file `target`. Returns the copy's facts and its seconds.

    Frame i of the copy is frame i of the source, upright, at the same time after frame 0. The copy is always 8-bit
    4:2:0, BT.601, limited range (MJPEG: full), since some decoders assume this of every video. `content`: the source's
    bytes, if known. One frame is in memory at a time.

    Raises BadVideo for a source that cannot be read to its end, BadCopy if the copy is not as requested, FFmpegError or
    OSError if encoding or writing fails.
    """
    recipe = recipe.resolved()
    facts = probe(video, content)
    frames = each_frame(video, content)
    first = next(frames)
    base, ticks = _clock(facts, first.time_base or Fraction(1))
    durations = np.diff(ticks)
    usual = int(np.median(durations)) if len(durations) else max(round(1 / (base * _rate(facts))), 1)
    durations = np.append(durations, usual)
    width, height = facts.width, facts.height
    if recipe.square_pixels:
        aspect = look_up(video, content).pixel_aspect
        stored = orientation_of(first).size(width, height)  # undoes the rotation
        width, height = orientation_of(first).size(max(round(stored[0] * aspect), 1), stored[1])
    size = copy_size(width, height, recipe.short_side)

    layout = {"movflags": "+faststart", "fflags": "+bitexact", "video_track_timescale": str(base.denominator)}
    with av.open("file:" + target, "w", format="mp4", options=layout) as container:
        stream = _add_stream(container, recipe, facts, size, base)
        packets = _encode(stream, _chain(first, frames), ticks, size, CODECS[recipe.codec].full_range)
        for packet, duration in zip(packets, durations, strict=False):  # _check reports a wrong number of packets
            packet.duration = int(duration)
            container.mux(packet)
    return _check(target, ticks, recipe, size), float((ticks[-1] + usual) * base)


def _rate(facts: Facts) -> Fraction:
    return Fraction(min(facts.fps or 25, _FASTEST)).limit_denominator(1001) or Fraction(1)


def _clock(facts: Facts, time_base: Fraction) -> tuple[Fraction, np.ndarray]:
    """A time base of 1/n seconds, and the presentation time of each frame in it, from 0 on."""
    if not len(facts.keys):  # a file without times: frames are evenly spaced
        rate = _rate(facts)
        return Fraction(1, rate.numerator), np.arange(facts.frames) * rate.denominator
    ticks = (facts.times - facts.times[0]) * time_base.numerator
    if time_base.denominator <= _FINEST_CLOCK:
        return Fraction(1, time_base.denominator), ticks
    return Fraction(1, _COARSER_CLOCK), np.rint(ticks * (_COARSER_CLOCK / time_base.denominator)).astype(np.int64)


def _add_stream(
    container: av.container.OutputContainer, recipe: Recipe, facts: Facts, size: tuple[int, int], base: Fraction
) -> av.VideoStream:
    codec = CODECS[recipe.codec]
    gop = recipe.gop or 1
    options = {**codec.options, **dict.fromkeys(codec.scale, str(recipe.quality)), "keyint_min": str(gop)}
    stream = container.add_stream(codec.encoder, rate=_rate(facts), options=options)
    assert isinstance(stream, av.VideoStream)
    stream.width, stream.height = size
    stream.pix_fmt = "yuvj420p" if codec.full_range else "yuv420p"
    context = stream.codec_context
    context.thread_count = 1
    context.gop_size = gop
    context.max_b_frames = 0
    context.time_base = base
    context.color_range = ColorRange.JPEG if codec.full_range else ColorRange.MPEG
    context.colorspace = 6  # SMPTE 170M, which is BT.601 (ISO/IEC 23091-2, table 4)
    return stream


def _chain(first: av.VideoFrame, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    yield first
    yield from frames


def _encode(
    stream: av.VideoStream, frames: Iterator[av.VideoFrame], ticks: np.ndarray, size: tuple[int, int], full_range: bool
) -> Iterator[av.Packet]:
    resize = VideoReformatter()
    orientation: Orientation | None = None
    for frame, tick in zip(frames, ticks, strict=True):
        orientation = orientation or orientation_of(frame)  # the first frame has the display matrix
        width, height = orientation.size(*size)
        fitted = resize.reformat(
            orientation.rotate(frame),
            width,
            height,
            "yuvj420p" if full_range else "yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
            interpolation=_RESIZE,
            threads=ONE_THREAD,
        )
        # A new frame, because the encoder would also get the old frame's type, captions and display matrix.
        planes = _turn(fitted.to_ndarray(), width, height, orientation)
        fresh = av.VideoFrame.from_ndarray(planes, format=fitted.format.name)
        fresh.pts, fresh.time_base = int(tick), stream.codec_context.time_base
        yield from stream.encode(fresh)
    yield from stream.encode()


def _turn(planes: np.ndarray, width: int, height: int, orientation: Orientation) -> np.ndarray:
    """Rotate the three planes of a 4:2:0 picture, stacked as in PyAV [height * 3/2, width]."""
    if orientation == UPRIGHT:
        return planes
    luma, *chroma = np.split(planes.ravel(), [width * height, width * height * 5 // 4])
    turned = [orientation.apply(luma.reshape(height, width))]
    turned += [orientation.apply(plane.reshape(height // 2, width // 2)) for plane in chroma]
    return np.concatenate([plane.ravel() for plane in turned]).reshape(-1, turned[0].shape[1])


def _check(target: str, ticks: np.ndarray, recipe: Recipe, size: tuple[int, int]) -> Facts:
    """The facts of a copy. Raises BadCopy unless they are as requested."""
    try:
        copy = probe(Video(target))
        packets = find_packets(Video(target), copy)
    except BadVideo as error:
        raise BadCopy(f"the copy does not read: {error}") from None
    if copy.frames != len(ticks):
        raise BadCopy(f"the copy has {copy.frames} frames of {len(ticks)}")
    if not np.array_equal(copy.times, ticks):
        index = int(np.flatnonzero(copy.times != ticks)[0])
        raise BadCopy(f"frame {index} of the copy is at tick {copy.times[index]} instead of {ticks[index]}")
    if not np.array_equal(copy.keys, ticks[:: recipe.gop]):
        raise BadCopy(f"the copy has {len(copy.keys)} key frames, not one every {recipe.gop} frames")
    if (copy.width, copy.height) != size or not copy.plain:
        raise BadCopy(f"the copy is {copy.width} x {copy.height}, plain: {copy.plain}, not {size[0]} x {size[1]}")
    return replace(copy, packets=packets)

"""The videos of the benchmark: originals like those of data sets, and training copies of these."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import av
import numpy as np

from umt_fast.data.decode import probe, read_frames
from umt_fast.data.index import VideoList
from umt_fast.data.manifest import read_manifest
from umt_fast.data.prepare import Settings, prepare
from umt_fast.data.prepare.encode import Recipe
from umt_fast.data.storage import file_size
from umt_fast.data.video import BadVideo, Video

SECONDS, FPS, SIZE, GOP = 10, 30, (340, 256), 250


@dataclass(frozen=True)
class Files:
    """The videos in one form: originals, or copies of one codec and GOP."""

    name: str
    codec: str
    gop: float
    """Frames from one key frame to the next, on average."""
    videos: VideoList
    known: list[Video]
    """The videos with their sizes, times and key frames, as in an index."""
    bytes_per_video: float


def make_originals(sources: VideoList, folder: Path) -> None:
    """Write each source as a 10 s video: played forwards and backwards until it is long enough."""
    for number, source in enumerate(sources):
        try:
            pictures = read_frames(source, lambda count: range(min(count, SECONDS * FPS)))
        except BadVideo as error:
            _refuse(source, error)
        looped = pictures + pictures[-2:0:-1]
        with av.open(str(folder / f"{number:03d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "g": str(GOP)})
            stream.width, stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            for place in range(SECONDS * FPS):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(looped[place % len(looped)]), "rgb24")
                container.mux(stream.encode(picture.reformat(*SIZE, format="yuv420p")))
            container.mux(stream.encode())


def make_copies(source: Path | str, folder: Path, codec: str, gop: int) -> None:
    """Copies as `umt_fast.data.prepare` makes them. Raises RunError."""
    prepare(Settings(str(source), str(folder), Recipe(codec, gop=gop)))


def read_files(name: str, source: Path | str) -> Files:
    """The videos of `source` with their sizes, times and key frames."""
    videos = read_manifest(str(source))
    for video in videos:
        if video.remote or video.offset is not None:
            sys.exit(
                f"error: {video.name} is not a local file of its own, as the bare loop needs; leave out --as-they-are"
            )
    known = [video if video.facts else _look_into(video) for video in videos]
    facts = [video.facts for video in known if video.facts]
    return Files(
        name,
        codec=" and ".join(sorted({one.codec for one in facts})),
        gop=sum(one.frames for one in facts) / sum(max(len(one.keys), 1) for one in facts),
        videos=videos,
        known=known,
        bytes_per_video=statistics.mean(file_size(video) for video in videos),
    )


def _look_into(video: Video) -> Video:
    """The video with its size, times and key frames. Exits if the bare loop could not read it."""
    try:
        facts = probe(video)
    except BadVideo as error:
        _refuse(video, error)
    if not len(facts.keys):
        _refuse(video, "no times to seek by")
    return replace(video, facts=facts)


def _refuse(video: Video, reason: object) -> NoReturn:
    sys.exit(f"error: {video.name}: {reason}; leave it out of VIDEOS")

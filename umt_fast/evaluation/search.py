"""Search videos by text with a stage-2 model.

    python -m umt_fast.evaluation.search --checkpoint stage2.pth --videos DIR "a red ball rolls" "a dog"

The videos of DIR (or of a list) are indexed once, in parts of --seconds; the index is kept in --index, by default
DIR/.umt-fast-search. Each query prints the best parts by their match score (a logit of the fusion layers) with cosine
similarity, times and paths; found.png shows them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import posixpath
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from umt_fast.data.decode import open_video, read_places
from umt_fast.data.index import VideoList
from umt_fast.data.manifest import check_files, read_manifest
from umt_fast.data.pairs import resize_bicubic
from umt_fast.data.sampling import middle_frames
from umt_fast.data.tokens import clean_text
from umt_fast.data.video import BadVideo, is_url
from umt_fast.errors import RunError
from umt_fast.evaluation.found import Hit, draw_found
from umt_fast.evaluation.video_text import Loaded, digest_files, load_model
from umt_fast.files import expand_home
from umt_fast.models.text import Context, Pairing
from umt_fast.models.video_text import VideoTextModel
from umt_fast.run.progress import OnProgress, Progress, silent
from umt_fast.weights.files import save_safetensors

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BATCH = 8
"""Parts per call of the video encoder."""
KEPT_PARTS = 256
"""Parts whose tokens stay in memory for the next queries; UMT-B/16 at 4 frames needs 2.4 MB per part."""


class SearchError(RunError, ValueError):
    """A search cannot be done."""


@dataclass
class SearchIndex:
    """Parts of videos in the joint space."""

    rows: Int[np.ndarray, " n"]
    """Row of each part's video in the list."""
    seconds: Float[np.ndarray, "n 2"]
    """Beginning and end of each part."""
    vectors: Float[torch.Tensor, "n e"]
    bad: list[tuple[str, str]]
    """Name and reason of each unreadable video."""
    tokens: dict[int, Float[torch.Tensor, "1 m d"]] = field(default_factory=dict)
    """Tokens of parts that earlier queries have decoded, by index."""


@dataclass(frozen=True)
class Match:
    """A part of a video that was found for a query."""

    row: int
    seconds: tuple[float, float]
    score: float
    """Match logit of the fusion layers."""
    similarity: float
    """Cosine similarity in the joint space, which selects the candidates."""


def build_index(loaded: Loaded, videos: VideoList, seconds: float, on_progress: OnProgress = silent) -> SearchIndex:
    """Embed every video in parts of about `seconds`; unreadable videos are listed in `bad`. Raises SearchError."""
    parts: list[tuple[int, tuple[float, float]]] = []
    vectors, bad = [], []
    waiting: list[np.ndarray] = []
    for row in range(len(videos)):
        on_progress(row, len(videos))
        try:
            found = list(_read_parts(loaded, videos, row, seconds))
        except (BadVideo, OSError, RunError) as error:
            bad.append((f"row {row + 1}", str(error)))
            with contextlib.suppress(RunError):
                bad[-1] = (videos[row].name, str(error))
            continue
        for times, clip in found:
            parts.append((row, times))
            waiting.append(clip)
            if len(waiting) == BATCH:
                vectors.append(_embed(loaded, waiting))
                waiting = []
    if waiting:
        vectors.append(_embed(loaded, waiting))
    if not parts:
        raise SearchError(f"none of the {len(videos)} videos could be read, the last one {bad[-1][0]}: {bad[-1][1]}")
    rows = np.array([row for row, _ in parts], np.int64)
    return SearchIndex(rows, np.array([times for _, times in parts]), torch.cat(vectors), bad)


@torch.no_grad()
def search(
    loaded: Loaded, videos: VideoList, index: SearchIndex, query: str, count: int = 5, candidates: int = 32
) -> list[Match]:
    """The best `count` parts for a query, best first: the fusion layers re-rank the `candidates` most similar parts."""
    model = loaded.model
    assert isinstance(model, VideoTextModel)
    cleaned = clean_text(query)
    if not cleaned:
        raise SearchError(f"the query {query!r} has no words")
    device = model.temp.device
    ids, mask = (x.to(device) for x in loaded.tokenizer([cleaned], min(64, model.config.text.max_positions)))
    hidden, text = model.embed_text(ids, mask)
    similarity = index.vectors @ text[0].cpu()
    places = similarity.topk(min(max(candidates, count), len(similarity))).indices.tolist()
    matches = []
    for place in places:
        row, times = int(index.rows[place]), index.seconds[place]
        part = (float(times[0]), float(times[1]))
        try:
            tokens = _tokens(loaded, videos, index, place)
        except (BadVideo, OSError):  # removed or changed since it was indexed
            continue
        score = float(model.match(hidden, mask, Context(tokens, Pairing()))[0, 1])
        matches.append(Match(row, part, score, float(similarity[place])))
    return sorted(matches, key=lambda match: -match.score)[:count]


def _tokens(loaded: Loaded, videos: VideoList, index: SearchIndex, place: int) -> Float[torch.Tensor, "1 m d"]:
    """Tokens of a part, decoded on first use. Raises BadVideo."""
    model = loaded.model
    assert isinstance(model, VideoTextModel)
    if place not in index.tokens:
        clip = _read_clip(loaded, videos, int(index.rows[place]), tuple(index.seconds[place]))
        if len(index.tokens) >= KEPT_PARTS:
            index.tokens.pop(next(iter(index.tokens)))
        index.tokens[place] = model.embed_video(torch.from_numpy(clip)[None].to(model.temp.device))[0]
    return index.tokens[place]


def save_index(path: Path, index: SearchIndex, key: str) -> None:
    """Write an index for `key` atomically. Raises OSError."""
    tensors = {"rows": torch.from_numpy(index.rows), "seconds": torch.from_numpy(index.seconds)}
    save_safetensors(path, tensors | {"vectors": index.vectors}, {"key": key, "bad": json.dumps(index.bad)})


def refuse_links(folder: Path) -> None:
    """Raise SearchError if `folder` is or has a link: it may have come with the videos and redirect what is written."""
    for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
        if path.is_symlink():
            raise SearchError(f"{path} is a link; remove it, or give --index a folder of your own")


def read_index(path: Path, key: str, videos: int, width: int) -> SearchIndex | None:
    """The stored index for `key` if it fits a list of `videos` videos and a joint space of `width`; else None."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            rows, seconds, vectors = (file.get_tensor(name) for name in ("rows", "seconds", "vectors"))
            bad = [(str(name), str(reason)) for name, reason in json.loads(metadata.get("bad", "[]"))]
        index = SearchIndex(rows.numpy(), seconds.numpy(), vectors, bad)
        shapes = [tuple(found.shape) for found in (index.rows, index.seconds, vectors)]
        fits = shapes == [(len(rows),), (len(rows), 2), (len(rows), width)]
        fits = fits and bool(vectors.isfinite().all()) and bool(np.isfinite(index.seconds).all())
        return index if fits and index.rows.min() >= 0 and index.rows.max() < videos else None
    except Exception:  # a damaged file may raise anything in its reader; it is rebuilt
        return None


def _read_parts(
    loaded: Loaded, videos: VideoList, row: int, seconds: float
) -> Iterator[tuple[tuple[float, float], np.ndarray]]:
    """Times and clip [T,S,S,3] of each part of a video, which is opened once."""
    vision = loaded.model.config.vision
    with open_video(videos[row]) as reader:
        times = reader.timeline.seconds
        end = float(times[-1]) + (1 / reader.timeline.fps if len(times) > 1 else 0)
        count = max(round(end / seconds), 1)
        edges = np.linspace(0, end, count + 1)
        starts = np.searchsorted(times, edges[:-1])
        stops = np.append(starts[1:], len(times))
        spans = [(int(a), int(b), part) for part, (a, b) in enumerate(zip(starts, stops, strict=True)) if b > a]
        wanted = [a + i for a, b, _ in spans for i in middle_frames(b - a, vision.frames)]
        clips = np.empty((len(spans), vision.frames, vision.image_size, vision.image_size, 3), np.uint8)
        flat = clips.reshape(-1, *clips.shape[2:])
        for places, frame in read_places(reader, wanted):
            flat[places] = resize_bicubic(frame, vision.image_size, False)
    for clip, (_, _, part) in zip(clips, spans, strict=True):
        yield (float(edges[part]), float(edges[part + 1])), clip


def _read_clip(loaded: Loaded, videos: VideoList, row: int, part: tuple[float, float]) -> np.ndarray:
    vision = loaded.model.config.vision
    with open_video(videos[row]) as reader:
        first, last = np.searchsorted(reader.timeline.seconds, part)
        first = min(int(first), reader.timeline.num_frames - 1)
        wanted = [first + i for i in middle_frames(max(int(last) - first, 1), vision.frames)]
        clip = np.empty((vision.frames, vision.image_size, vision.image_size, 3), np.uint8)
        for places, frame in read_places(reader, wanted):
            clip[places] = resize_bicubic(frame, vision.image_size, False)
    return clip


@torch.no_grad()
def _embed(loaded: Loaded, clips: Sequence[np.ndarray]) -> torch.Tensor:
    model = loaded.model
    assert isinstance(model, VideoTextModel)
    return model.embed_video(torch.from_numpy(np.stack(clips)).to(model.temp.device))[1].cpu()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m umt_fast.evaluation.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("query", nargs="+", help="texts to search for")
    parser.add_argument("--checkpoint", required=True, help="a stage-2 file, or one fine-tuned for retrieval")
    parser.add_argument("--videos", required=True, help="a folder of videos, or a list")
    parser.add_argument("--vocabulary", default="", help="vocab.txt or BERT folder; default: that of the run")
    parser.add_argument("--index", type=Path, help="folder of the index (default: DIR/.umt-fast-search)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a part (default %(default)s)")
    parser.add_argument("--frames", type=int, help="frames of a part (default: those of training)")
    parser.add_argument("--count", type=int, default=5, help="parts shown for a query (default %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s"
    )
    from umt_fast.run import launch  # library users of `search` must not need its imports

    with launch.one_line_errors():
        _run(parser.parse_args(arguments))


def _label(videos: VideoList, match: Match) -> str:
    begin, end = match.seconds
    return f"{match.score:.2f}  {begin:.1f}-{end:.1f} s  {posixpath.basename(videos[match.row].name)}"


def _run(options: argparse.Namespace) -> None:
    if options.seconds <= 0 or options.count < 1:
        raise SearchError(f"--seconds {options.seconds} --count {options.count}: give numbers above 0")
    loaded = load_model(options.checkpoint, options.vocabulary, options.frames, device=options.device)
    videos = read_manifest(options.videos)
    check_files(videos, options.videos)
    folder = options.index
    if folder is None:
        place = expand_home(options.videos)
        if is_url(options.videos) or not place.exists():
            raise SearchError(f"give --index a folder: {options.videos} is not a local folder or list")
        folder = (place if place.is_dir() else place.parent) / ".umt-fast-search"
        refuse_links(folder)
    key = json.dumps([loaded.digest, digest_files(videos), loaded.model.config.vision.frames, options.seconds])
    path = folder / "index.safetensors"
    index = read_index(path, key, len(videos), loaded.model.config.joint_width)
    if index is None:
        print(f"indexing {len(videos)} videos ...", file=sys.stderr)
        progress = Progress("index", say=lambda line: print(line, file=sys.stderr))
        index = build_index(loaded, videos, options.seconds, progress)
        save_index(path, index, key)
    for name, reason in index.bad:
        print(f"not searched: {name}: {reason}", file=sys.stderr)
    shown = []
    print(f"  {'match':>8}  {'cosine':>6}  {'part':>16}  video", file=sys.stderr)
    for query in options.query:
        print(query)
        matches = search(loaded, videos, index, query, options.count)
        for match in matches:
            times = "{:.1f}-{:.1f} s".format(*match.seconds)
            print(f"  {match.score:8.3f}  {match.similarity:6.3f}  {times:>16}  {videos[match.row].name}")
        hits = [Hit(videos[match.row], _label(videos, match), None, match.seconds) for match in matches]
        shown.append((query, hits))
    draw_found(shown, folder / "found.png")
    print(f"pictures: {folder / 'found.png'}", file=sys.stderr)


if __name__ == "__main__":
    main()

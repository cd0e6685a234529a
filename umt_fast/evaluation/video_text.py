"""Loading a trained stage-2 model, and embedding the videos of a list, with a cache of the embeddings."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from umt_fast.config import DataConfig, StudentConfig, TextConfig, VideoTextConfig
from umt_fast.data import open_loader
from umt_fast.data.captions import RetrievalSet
from umt_fast.data.clips import ClipStream
from umt_fast.data.index import VideoList
from umt_fast.data.pairs import IntervalSampling, PairTransform
from umt_fast.data.tokens import Tokenizer
from umt_fast.evaluation.retrieval import Embedded, embed_texts
from umt_fast.files import expand_home
from umt_fast.models.video_text import VideoQaModel, VideoTextModel
from umt_fast.run.progress import OnProgress, silent
from umt_fast.weights import TensorDict, WeightsError, load_video_text, read_model, section_of, using_settings_of
from umt_fast.weights.files import save_safetensors

if TYPE_CHECKING:
    from jaxtyping import Float

HEAD_WIDTH = 64
"""Width of an attention head in every published model."""
VOCABULARY = "vocab.txt"


@dataclass
class Loaded:
    """A model in evaluation mode, with the tokenizer of its text encoder."""

    model: VideoTextModel | VideoQaModel
    tokenizer: Tokenizer
    digest: str
    """Hash of the weights."""
    notes: list[str] = field(default_factory=list)
    """Notes on the file for the user."""


def load_model(
    path: str | Path,
    vocabulary: str | Path = "",
    frames: int | None = None,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    answers: bool = False,
) -> Loaded:
    """The model of a stage-2, fine-tuned or question-answering file, ours or a published one, without its teacher.

    Sizes come from the tensors and, in our files, from the settings; else 224 px and heads of 64 channels are assumed.
    vocabulary  a vocab.txt or a Hugging Face folder; empty: the vocab.txt of the run's folder.
    frames      per clip; None: as in training (published files: 12).
    answers     load the question-answering model. Without a decoder in the file, the fusion layers initialise it, as
                in training; `Loaded.notes` says so.

    Raises WeightsError, BadVocabulary.
    """
    path = expand_home(path)
    state, settings = read_model(path)
    with using_settings_of(path):
        config = infer_config(state, settings, str(path), frames, image_size)
    found = [Path(vocabulary)] if vocabulary else [folder / VOCABULARY for folder in (path.parent, path.parent.parent)]
    known = next((place for place in found if place.exists()), None)
    if known is None:
        raise WeightsError(
            f"no vocabulary for {path}: looked for {', '.join(map(str, found))}; give --vocabulary a vocab.txt or the "
            "folder of the BERT that it was trained from"
        )
    tokenizer = Tokenizer.read(known, closing_sep=bool(section_of(settings, "data").get("closing_sep", False)))
    if len(tokenizer.vocabulary) != config.text.vocab_size:
        raise WeightsError(
            f"{known} has {len(tokenizer.vocabulary)} words, but the model {path} has {config.text.vocab_size}"
        )
    decodes = any(key.startswith("text_decoder.") for key in state)
    if decodes and not answers:
        raise WeightsError(f"{path} is fine-tuned for questions: test it with train.evaluate --job qa")
    notes = []
    if answers and not decodes:
        notes.append(f"note: {path} was not fine-tuned for questions; its answers are of no use")
    model = (VideoQaModel if answers else VideoTextModel)(config)
    load_video_text(model, state)
    return Loaded(model.to(device).eval(), tokenizer, digest_of(state), notes)


def infer_config(
    state: TensorDict, settings: dict[str, Any], source: str, frames: int | None = None, image_size: int | None = None
) -> VideoTextConfig:
    """Sizes of the model in a file; see `load_model`. Raises WeightsError if it is not a stage-2 model."""
    try:
        kernel = state["vision_encoder.encoder.patch_embed.proj.weight"]
        prefix = (
            "text_encoder.bert." if "text_encoder.bert.embeddings.word_embeddings.weight" in state else "text_encoder."
        )
        words = state[f"{prefix}embeddings.word_embeddings.weight"]
        positions = state[f"{prefix}embeddings.position_embeddings.weight"]
        mlp = state[f"{prefix}encoder.layer.0.intermediate.dense.weight"]
    except KeyError as error:
        raise WeightsError(f"{source} is not a stage-2 model: it has no {error.args[0]}") from None
    width, _, _, patch, _ = kernel.shape
    text_width = words.shape[1]
    vision, text = section_of(settings, "student"), section_of(settings, "text")
    layers = _numbers(state, rf"{re.escape(prefix)}encoder\.layer\.(\d+)\.output")
    fusion = _numbers(state, rf"{re.escape(prefix)}encoder\.layer\.(\d+)\.crossattention")
    if not fusion:
        raise WeightsError(f"{source} is not a stage-2 model: no layer of its text encoder looks at the video")
    for name, size, known in (("vision", width, vision), ("text", text_width, text)):
        if "heads" not in known and size % HEAD_WIDTH:
            raise WeightsError(f"{source}: {name} is {size} wide, but its number of heads is unknown")
    special = {key: text[key] for key in ("pad_id", "cls_id", "sep_id", "mask_id") if key in text}
    try:
        return VideoTextConfig(
            vision=StudentConfig(
                image_size=image_size or vision.get("image_size", 14 * patch),
                patch_size=patch,
                frames=frames or vision.get("frames", 12),
                width=width,
                depth=1 + max(_numbers(state, r"vision_encoder\.encoder\.blocks\.(\d+)\.")),
                heads=vision.get("heads", width // HEAD_WIDTH),
                align_layers=1,
            ),
            teacher=None,
            text=TextConfig(
                width=text_width,
                depth=1 + max(layers),
                heads=text.get("heads", text_width // HEAD_WIDTH),
                fusion_layer=min(fusion),
                vocab_size=len(words),
                max_positions=len(positions),
                mlp_width=len(mlp),
                **special,
            ),
            joint_width=len(state["vision_proj.weight"]) if "vision_proj.weight" in state else 1,
            position_frames=section_of(settings, "joint").get("position_frames"),
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{source}: {error}") from None


def _numbers(state: TensorDict, pattern: str) -> set[int]:
    return {int(found[1]) for key in state if (found := re.match(pattern, key))}


def digest_of(state: TensorDict) -> str:
    """Hash of all keys and values."""
    found = hashlib.sha256()
    for key in sorted(state):
        found.update(key.encode())
        found.update(state[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def digest_files(videos: VideoList) -> str:
    """Hash of a list and of the sizes and times of its local files."""
    found = hashlib.sha256(videos.digest().encode())
    for path in dict.fromkeys(video.path for video in videos if not video.remote):
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # a missing file; the hash changes when it appears
            continue
        found.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class EmbedSettings:
    """Settings for embedding the videos of a list."""

    batch_size: int = 8
    max_words: int = 32
    """Longest text, in tokens."""
    max_seconds: float | None = None
    """Read only this many seconds from the beginning of a video; None: the whole video."""
    antialias: bool = False
    bf16: bool = False


def digest_test(loaded: Loaded, found: RetrievalSet, settings: EmbedSettings, data: DataConfig, *more: Any) -> str:
    """Hash of the weights, the list with its files, the settings, and the JSON values `more`."""
    vision = loaded.model.config.vision
    content = [
        loaded.digest,
        digest_files(found.videos),
        hashlib.sha256("\n".join(found.texts).encode("utf-8", "replace")).hexdigest(),
        [vision.frames, vision.image_size],
        [getattr(settings, one.name) for one in fields(settings) if one.name != "batch_size"],
        [data.decoder, data.square_pixels],
        more,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@torch.no_grad()
def embed_set(
    loaded: Loaded,
    found: RetrievalSet,
    settings: EmbedSettings,
    data: DataConfig,
    rank: int = 0,
    world_size: int = 1,
    cache: Path | None = None,
    on_progress: OnProgress = silent,
) -> tuple[Embedded, list[tuple[str, str]]]:
    """Embed this rank's part of the videos, and all texts, for `retrieval.score`; also returns the unreadable videos.

    An unreadable video is marked by a zero vector. `cache`: a folder for the embeddings; a later call with the same
    weights, list, files and settings reads them from there.
    """
    model = loaded.model
    assert isinstance(model, VideoTextModel)
    ids, mask = loaded.tokenizer(found.texts, settings.max_words)
    count = len(found.videos)
    rows = range(count * rank // world_size, count * (rank + 1) // world_size)
    key = digest_test(loaded, found, settings, data, rank, world_size)
    path = None if cache is None else cache / f"embeddings-{key}.safetensors"
    if path is not None and path.exists():
        return _read(path)
    device = model.temp.device
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
        tokens, video, bad = _embed_videos(model, found.videos, rows, settings, data, on_progress)
        hidden, attention_mask, text = embed_texts(model, ids, mask)
    embedded = Embedded(tokens, video, hidden, attention_mask, text)
    if path is not None:
        keep_tensors(path, {one.name: getattr(embedded, one.name) for one in fields(embedded)}, bad)
    return embedded, bad


def _embed_videos(
    model: VideoTextModel,
    videos: VideoList,
    rows: range,
    settings: EmbedSettings,
    data: DataConfig,
    on_progress: OnProgress,
) -> tuple[Float[Tensor, "v m d"], Float[Tensor, "v e"], list[tuple[str, str]]]:
    vision, device = model.config.vision, model.temp.device
    stream = ClipStream(
        videos,
        data,
        vision.frames,
        vision.image_size,
        seed=0,
        sampling=IntervalSampling(vision.frames, max_seconds=settings.max_seconds),
        transform=PairTransform(vision.frames, vision.image_size, antialias=settings.antialias),
        shuffle=False,
        replace=False,
    )
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    tokens = torch.zeros(len(rows), vision.tokens, vision.width, dtype=dtype)
    video = torch.zeros(len(rows), model.config.joint_width)
    bad: list[tuple[str, str]] = []
    batches = -(-len(rows) // settings.batch_size)
    options: dict[str, Any] = {"start": rows.start, "batches": batches, "batch_size": settings.batch_size}
    if not rows:
        return tokens, video, bad
    with open_loader(stream, device, end=rows.stop, **options) as loader:
        for done in range(1, batches + 1):
            batch = next(loader)
            bad += batch.bad
            if len(batch.clip):
                places = torch.tensor(batch.visits) - rows.start
                seen, pooled = model.embed_video(batch.clip.to(device, non_blocking=True))
                tokens[places], video[places] = seen.to("cpu", dtype), pooled.float().cpu()
            on_progress(len(videos) * done // batches, len(videos))
    return tokens, video, bad


def keep_tensors(path: Path, tensors: TensorDict, bad: Sequence[tuple[str, str]], **about: str) -> None:
    """Write tensors atomically, with the unreadable videos and `about` as metadata. Raises OSError."""
    save_safetensors(path, tensors, {**about, "bad": json.dumps(bad)})


def _read(path: Path) -> tuple[Embedded, list[tuple[str, str]]]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            bad = [(str(name), str(reason)) for name, reason in json.loads((file.metadata() or {}).get("bad", "[]"))]
        return Embedded(**tensors), bad
    except Exception as error:  # a damaged file can raise any error
        raise WeightsError(f"cannot read the saved embeddings {path}; remove the file: {error}") from error

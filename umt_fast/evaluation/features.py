"""Features of videos: loads a trained encoder from its file, and extracts the features of a list.

    python -m umt_fast.evaluation.features --checkpoint x.pth --data list.csv --out features/train

Writes one vector (or, with --kind tokens, every token) of each video to shards in a folder. The same command continues
an interrupted extraction; under torchrun the processes divide the shards among them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from umt_fast.config import MLP_RATIO, ClassifierConfig, DataConfig, VitConfig
from umt_fast.models.classifier import classifier_positions
from umt_fast.models.encoder import Pool, VideoEncoder
from umt_fast.models.positions import resize_positions, sinusoid_positions
from umt_fast.weights import (
    TensorDict,
    WeightsError,
    fit_positions,
    read_model,
    section_of,
    strip_prefixes,
    using_settings_of,
)

if TYPE_CHECKING:
    from umt_fast.run.world import World

_HEAD_WIDTH = 64
"""Width of an attention head in the published models, except those in `_HEADS`."""
_HEADS = {1280: 16, 1408: 16}
"""Heads by width: VideoMAE's ViT-H and ViT-g."""


_RULE = "frames of a clip: sparse, over the whole video; dense or strided, every --rate frames; segment, as SSv2"

_MOST_TOKENS = 1 << 18
"""Most tokens per clip that a file may imply: a table of more positions could exhaust the memory."""


def load_encoder(
    path: str | Path,
    *,
    frames: int | None = None,
    image_size: int | None = None,
    heads: int | None = None,
    device: str | torch.device = "cpu",
) -> VideoEncoder:
    """Load the encoder of a pre-trained or fine-tuned file, ours or a published one.

    `encoder(clip)` returns tokens [B,N,D] after the last norm, `encoder.pooled(clip)` one vector [B,D] per clip. Sizes
    come from the file's tensors and settings; if it has none, 8 token frames of 224 x 224 and heads of 64 channels are
    assumed. `frames`, `image_size` and `heads` override them; positions are then resampled. Raises WeightsError.
    """
    state, settings = read_model(path)
    return encoder_of(state, settings, str(path), frames, image_size, heads).to(device).eval()


def encoder_of(
    state: TensorDict,
    settings: dict[str, Any],
    source: str,
    frames: int | None = None,
    image_size: int | None = None,
    heads: int | None = None,
) -> VideoEncoder:
    """`load_encoder` for tensors and settings that are already read; errors name `source`."""
    state = strip_prefixes(state)
    with using_settings_of(source):
        trained = infer_sizes(state, settings, source, heads)
    config = VitConfig(
        image_size=image_size or trained.image_size,
        patch_size=trained.patch_size,
        tubelet_size=trained.tubelet_size,
        frames=frames or trained.frames,
        width=trained.width,
        depth=trained.depth,
        heads=trained.heads,
    )
    pool: Pool = "mean" if "fc_norm.weight" in state else "first" if "head.weight" in state else "tokens"
    norm = "fc_norm" if pool == "mean" else "norm"
    position = state.get("pos_embed")
    if position is not None:
        position = fit_positions(position, config, trained.token_frames).squeeze(0)
    elif pool == "tokens" or trained.positions == "direct":  # pre-training's table is made for the file's own size
        table = sinusoid_positions(trained.tokens, trained.width)
        position = resize_positions(table, trained.token_frames, config.token_frames, config.grid)
    else:
        position = classifier_positions(config)
    if position.shape != (config.tokens, config.width):
        raise WeightsError(f"{source}: pos_embed is {list(position.shape)}, this clip has {config.tokens} tokens")
    encoder = VideoEncoder(config, pool, position.contiguous(), trained.mlp_width)
    own = encoder.state_dict()
    state = {key.replace(f"{norm}.", "norm.", 1) if key.startswith(f"{norm}.") else key: v for key, v in state.items()}
    lacking = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    if lacking and "blocks.0.attn.q.weight" in state:
        raise WeightsError(f"{source} is a MAE-ST, whose encoder has a class token: use umt_fast.models.pixels for it")
    if lacking:
        raise WeightsError(f"{source} is not a video encoder: no {lacking[0]} {list(own[lacking[0]].shape)}")
    encoder.load_state_dict({key: state[key] for key in own})
    return encoder


def infer_sizes(state: TensorDict, settings: dict[str, Any], source: str, heads: int | None = None) -> ClassifierConfig:
    """The sizes of the model in a file: from its tensors' shapes, and otherwise from its settings.

    `state` has no prefixes. Settings are ours (a `classifier` or `student` section) or the published argument object.
    Raises WeightsError if neither tensors nor settings give a size.
    """
    if empty := next((key for key, value in state.items() if 0 in value.shape), None):  # without a value
        raise WeightsError(f"{source}: {empty} is {list(state[empty].shape)}, without a value")
    own = settings.get("model")  # our masked autoencoders have a section here, a published argument object a name
    own = own if isinstance(own, dict) else {}
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.dim() != 5:
        raise WeightsError(f"{source} is not a video encoder: it has no patch_embed.proj.weight [D,3,t,p,p]")
    width, _, tubelet, patch, _ = kernel.shape
    numbers = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    depth = len(numbers)
    if numbers != set(range(depth)):
        raise WeightsError(f"{source}: it has {depth} blocks, but none is number {min({*range(depth)} - numbers)}")
    ours = section_of(settings, "classifier") or section_of(settings, "student") or own
    heads = heads or ours.get("heads") or _HEADS.get(width)
    heads = heads or (width // _HEAD_WIDTH if width % _HEAD_WIDTH == 0 else None)
    if heads is None or depth == 0:
        raise WeightsError(
            f"{source}: {depth} blocks of width {width}, but the number of heads is unknown; give heads="
        )
    frames = ours.get("frames") or settings.get("num_frames")
    size = ours.get("image_size") or _named_size(settings.get("model")) or settings.get("input_size")
    positions = ours.get("positions", "resized")
    if positions not in ("resized", "direct"):
        raise WeightsError(f"{source}: positions = {str(positions)[:100]!r}: must be resized or direct")
    hidden = state.get("blocks.0.mlp.fc1.weight")
    mlp_width = len(hidden) if hidden is not None and len(hidden) != MLP_RATIO * width else None
    table = state.get("pos_embed")
    if table is not None and table.dim() == 3:
        frames, size = _from_table(table.shape[1], tubelet, patch, frames, size)
    size, frames = size or 14 * patch, frames or 8 * tubelet
    if frames // tubelet * (size // patch) ** 2 > _MOST_TOKENS:
        raise WeightsError(f"{source}: clips of {frames} frames of {size} x {size}, more than {_MOST_TOKENS} tokens")
    head = state.get("head.weight")
    classes = len(head) if head is not None and head.dim() == 2 else 1
    pool: Literal["mean", "first"] = "mean"
    mae_st = "blocks.0.attn.q.weight" in state
    if "head.weight" in state and "fc_norm.weight" not in state and not mae_st:
        pool = "first"
    return ClassifierConfig(
        size,
        patch,
        tubelet,
        frames,
        width,
        depth,
        heads,
        classes,
        pool=pool,
        positions=positions,
        architecture="mae_st" if mae_st else "umt",
        mlp_width=mlp_width,
    )


def _named_size(name: Any) -> int | None:
    """Image size in a published model name: 224 for `vit_base_patch16_224`."""
    last = str(name or "").rpartition("_")[2]
    return int(last) if last.isdigit() else None


def _from_table(rows: int, tubelet: int, patch: int, frames: Any, size: Any) -> tuple[int | None, int | None]:
    """Frames and image size that fit a table of `rows` positions; a known one determines the other."""
    if frames and rows % (frames // tubelet) == 0:
        grid = math.isqrt(rows // (frames // tubelet))
        if grid**2 * (frames // tubelet) == rows:
            return frames, grid * patch
    for grid in ([size // patch] if size else []) + [math.isqrt(rows * tubelet // 8), 14]:
        if grid and rows % grid**2 == 0:
            return rows // grid**2 * tubelet, grid * patch
    return frames, size


def main(arguments: list[str] | None = None) -> None:
    """Write features of a list's videos to a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m umt_fast.evaluation.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a pre-trained or fine-tuned file")
    parser.add_argument("--data", required=True, help="a list or folder of videos, with labels or without")
    parser.add_argument("--out", required=True, type=Path, help="folder for the features")
    parser.add_argument("--prefix", default="", help="folder that relative paths of the list start from")
    parser.add_argument("--classes", default="", help="class file that numbers the labels' names")
    parser.add_argument("--kind", choices=("pooled", "tokens"), default="pooled", help="default %(default)s")
    parser.add_argument("--layer", type=int, default=-1, help="block, negative from the end (default: the last)")
    parser.add_argument("--segments", type=int, default=1, help="views in time (default 1)")
    parser.add_argument("--crops", type=int, default=1, help="views in space (default 1)")
    parser.add_argument("--rule", choices=("sparse", "dense", "strided", "segment"), default="sparse", help=_RULE)
    parser.add_argument("--rate", type=float, default=4, help="frames of the video per frame of a dense clip")
    parser.add_argument("--frames", type=int, help="frames of a clip (default: the checkpoint's)")
    parser.add_argument("--image-size", type=int, help="side of a clip (default: the checkpoint's)")
    parser.add_argument("--heads", type=int, help="attention heads, where the file does not say")
    parser.add_argument("--shard", type=int, default=512, help="videos in a file (default 512)")
    parser.add_argument("--half", action="store_true", help="store float16")
    parser.add_argument("--format", choices=("safetensors", "npz"), default="safetensors", help="kind of file")
    parser.add_argument("--clips-per-pass", type=int, default=16, help="clips of a forward pass (default 16)")
    parser.add_argument("--workers", type=int, default=4, help="processes that decode (default 4)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default %(default)s")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is fast"
    )
    from umt_fast.run import launch, world  # load_encoder must not need these imports

    with launch.one_line_errors():
        given = parser.parse_args(arguments)
        processes = world.start(given.device)
        try:
            _extract(given, processes)
        finally:
            processes.close()


def _extract(given: argparse.Namespace, world: World) -> None:
    from umt_fast.data.labels import LabelError, LabelledVideos, read_classes, read_labelled
    from umt_fast.data.manifest import check_files, read_manifest
    from umt_fast.evaluation.extract import Extraction, FeaturesError, extract
    from umt_fast.evaluation.views import Views
    from umt_fast.run.hardware import describe, resolve_precision
    from umt_fast.run.log import say

    encoder = load_encoder(
        given.checkpoint, frames=given.frames, image_size=given.image_size, heads=given.heads, device=world.device
    )
    sizes = encoder.config
    depth = sizes.depth
    if not -depth <= given.layer < depth or min(given.segments, given.crops, given.shard, given.clips_per_pass) < 1:
        raise FeaturesError(f"--layer must be in {-depth}..{depth - 1}; segments, crops, shard and clips at least 1")
    listed: LabelledVideos | None = None
    try:
        names = read_classes(given.classes) if given.classes else None
        listed = read_labelled(given.data, given.prefix, names)
    except LabelError:
        if given.classes:
            raise
    videos = read_manifest(given.data, given.prefix) if listed is None else listed.videos
    check_files(videos, given.data, given.prefix)
    bf16 = resolve_precision(given.precision, world.device)
    if world.main:
        say(describe(world.device, bf16, "pyav"))
        say(
            f"encoder {sizes.width} x {depth}, {sizes.frames} frames of {sizes.image_size} px; {len(videos)} videos, "
            f"{given.segments} x {given.crops} views"
        )
    views = Views(sizes.frames, sizes.image_size, given.rule, given.rate, segments=given.segments, crops=given.crops)
    settings = Extraction(views, given.kind, given.layer, given.shard, given.half, given.clips_per_pass, given.format)
    about = {"checkpoint": str(given.checkpoint), "classes": None if listed is None else list(listed.classes)}
    bad = extract(
        encoder,
        videos,
        None if listed is None else listed.labels.tolist(),
        settings,
        DataConfig(workers=given.workers),
        world,
        given.out,
        about,
        bf16=bf16,
        say=say,
    )
    if world.main:
        for name, reason in bad:
            say(f"could not be read: {name}: {reason}")
        labels = "" if listed is not None else ", without labels"
        say(f"features of {len(videos) - len(bad)} of {len(videos)} videos{labels} in {given.out}")


if __name__ == "__main__":
    main()

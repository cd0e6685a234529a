"""Text-to-video and video-to-text retrieval: coarse scores, re-ranked scores, recalls (UMT, arXiv 2303.16058, 4.3).

The coarse score of a video and a text is their similarity in the joint space. The fusion layers re-rank the k best of
each row and column. A pair that is among the best of both is computed once, and keys and values of a video are
projected once for all of its texts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from umt_fast.models.text import Context, Pairing, cut_padding
from umt_fast.models.video_text import VideoTextModel, bare_video_text
from umt_fast.run.progress import OnProgress, silent

T = TypeVar("T")

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

NOT_RANKED = -100.0
"""Re-ranked score of a pair that is not among the k best, as published."""
RECALLS = (1, 5, 10)
PUBLISHED_K = 128
TEXTS_AT_ONCE = 256
"""Texts per call of the text layers, and per call of the fusion layers for one video."""


@dataclass
class Embedded:
    """This rank's videos and all texts before the fusion layers; tensors on the CPU."""

    tokens: Float[Tensor, "v m d"]
    video: Float[Tensor, "v e"]
    hidden: Float[Tensor, "n l h"]
    attention_mask: Int[Tensor, "n l"]
    text: Float[Tensor, "n e"]


@dataclass
class Retrieval:
    """Scores of all videos and texts, and the recalls in percent under their published names.

    `txt_r5`: share of videos with one of their texts among the first 5; `img_r5`: share of texts with their video among
    the first 5; `r_mean`: mean of the six recalls. The published tables show `recalls`.
    """

    coarse_v2t: Float[Tensor, "v n"]
    coarse_t2v: Float[Tensor, "n v"]
    rerank_v2t: Float[Tensor, "v n"]
    rerank_t2v: Float[Tensor, "n v"]
    recalls: dict[str, float]
    """Recalls of the re-ranked scores."""
    coarse_recalls: dict[str, float]


def evaluate(
    model: torch.nn.Module,
    clips: Shaped[Tensor, "v ..."] | Iterable[Shaped[Tensor, "b ..."]],
    input_ids: Int[Tensor, "n l"],
    attention_mask: Int[Tensor, "n l"],
    texts_of_videos: Sequence[Sequence[int]],
    k: int = PUBLISHED_K,
    group: Any = None,
) -> Retrieval:
    """Score `clips` against texts in both directions, without a mask and in evaluation mode.

    model            a VideoTextModel, bare or wrapped.
    clips            all clips, or batches of them in order: uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W].
    texts_of_videos  for each video the indices of its texts; several videos may share a text.
    k                number of candidates to re-rank.

    With several processes, each gets all texts and the clips of its part of the videos; the parts follow each other in
    the order of the ranks. The result is the same on all ranks, and the same as in one process. Raises ValueError.
    """
    own = _bare(model)
    with torch.no_grad(), evaluating(own):
        embedded = embed(own, clips, input_ids, attention_mask)
        return score(own, embedded, texts_of_videos, k, group)


def embed(
    model: VideoTextModel,
    clips: Shaped[Tensor, "v ..."] | Iterable[Shaped[Tensor, "b ..."]],
    input_ids: Int[Tensor, "n l"],
    attention_mask: Int[Tensor, "n l"],
    videos_at_once: int = 16,
) -> Embedded:
    """The input of `score`, computed batch by batch and kept on the CPU. Raises ValueError for no video or text."""
    device = model.temp.device
    batches = clips.split(videos_at_once) if isinstance(clips, Tensor) else clips
    seen = [[x.cpu() for x in model.embed_video(clip.to(device, non_blocking=True))] for clip in batches]
    if not seen:
        raise ValueError("no videos: give at least one")
    tokens, video = (torch.cat(parts) for parts in zip(*seen, strict=True))
    hidden, attention_mask, text = embed_texts(model, input_ids, attention_mask)
    return Embedded(tokens, video, hidden, attention_mask, text)


def embed_texts(
    model: VideoTextModel, input_ids: Int[Tensor, "n l"], attention_mask: Int[Tensor, "n l"]
) -> tuple[Float[Tensor, "n l h"], Int[Tensor, "n l"], Float[Tensor, "n e"]]:
    """Hidden states below the fusion layers, the mask cut to the longest text, normalised projections; on the CPU."""
    if not len(input_ids):
        raise ValueError("no texts: give at least one")
    device = model.temp.device
    input_ids, attention_mask = cut_padding(input_ids.cpu(), attention_mask.cpu())
    read = []
    for ids, mask in zip(input_ids.split(TEXTS_AT_ONCE), attention_mask.split(TEXTS_AT_ONCE), strict=True):
        read.append([x.cpu() for x in model.embed_text(ids.to(device), mask.to(device))])
    hidden, text = (torch.cat(parts) for parts in zip(*read, strict=True))
    return hidden, attention_mask, text


def score(
    model: VideoTextModel,
    embedded: Embedded,
    texts_of_videos: Sequence[Sequence[int]],
    k: int = PUBLISHED_K,
    group: Any = None,
    on_progress: OnProgress = silent,
) -> Retrieval:
    """Score matrices and recalls of embedded videos and texts.

    A zero vector marks an unreadable video: it has NOT_RANKED for every text, and counts as not found. Raises
    ValueError for invalid k or texts_of_videos.
    """
    parts = gather(embedded.video, group)
    video = torch.cat(parts)
    videos, texts = len(video), len(embedded.text)
    if k < 1:
        raise ValueError(f"k = {k}: give the number of candidates to score again, 1 or more")
    texts_of_videos = [[int(number) for number in numbers] for numbers in texts_of_videos]
    if len(texts_of_videos) != videos:
        raise ValueError(f"texts_of_videos has {len(texts_of_videos)} rows, but there are {videos} videos")
    check_answers(texts_of_videos, texts)
    with torch.autocast("cpu", enabled=False):
        coarse = video.float() @ embedded.text.float().T
    read = (video != 0).any(dim=1)
    coarse[~read] = NOT_RANKED
    best_v2t = _best(coarse, k) & read[:, None]
    best_t2v = _best(coarse.T, k) & read
    first = sum(len(part) for part in parts[: rank_and_size(group)[0]])
    own = slice(first, first + len(embedded.video))
    wanted = (best_v2t | best_t2v.T)[own]
    pairs = torch.cat(gather(match_pairs(model, embedded, wanted, on_progress=on_progress), group))
    v2t = torch.where(best_v2t, pairs, NOT_RANKED)
    t2v = torch.where(best_t2v, pairs.T, NOT_RANKED)
    return judge(coarse, v2t, t2v, texts_of_videos)


def judge(
    coarse: Float[Tensor, "v n"],
    v2t: Float[Tensor, "v n"],
    t2v: Float[Tensor, "n v"],
    texts_of_videos: Sequence[Sequence[int]],
) -> Retrieval:
    """Recalls of given score matrices; a row of `coarse` that is all NOT_RANKED is an unreadable video."""
    read = (coarse != NOT_RANKED).any(dim=1).tolist()
    texts_of_videos = [numbers if seen else [] for numbers, seen in zip(texts_of_videos, read, strict=True)]
    return Retrieval(
        coarse,
        coarse.T,
        v2t,
        t2v,
        recalls(v2t, t2v, texts_of_videos),
        recalls(coarse, coarse.T, texts_of_videos),
    )


def match_pairs(
    model: VideoTextModel,
    embedded: Embedded,
    wanted: Shaped[Tensor, "v n"],
    texts_at_once: int = TEXTS_AT_ONCE,
    on_progress: OnProgress = silent,
) -> Float[Tensor, "v n"]:
    """Logit of "match" for the wanted pairs of this rank's videos and all texts; 0 elsewhere."""
    device = model.temp.device
    hidden, mask = embedded.hidden.to(device), embedded.attention_mask
    logits = torch.zeros(wanted.shape)
    for number, row in enumerate(wanted):
        tokens = embedded.tokens[number][None].to(device, non_blocking=True)
        for texts in row.nonzero()[:, 0].split(texts_at_once):
            _, kept = cut_padding(mask[texts], mask[texts])
            states = hidden[texts.to(device), : kept.shape[1]]
            context = Context(tokens, Pairing(((None, len(texts)),)))
            logits[number, texts] = model.match(states, kept.to(device), context)[:, 1].cpu()
        on_progress(number + 1, len(wanted))
    return logits


def recalls(
    v2t: Float[Tensor, "v n"], t2v: Float[Tensor, "n v"], texts_of_videos: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Recalls at 1, 5 and 10 in percent, rounded to 2 decimals, in both directions."""
    relevant = torch.zeros(v2t.shape, dtype=torch.bool)
    for number, texts in enumerate(texts_of_videos):
        relevant[number, list(texts)] = True
    result: dict[str, float] = {}
    means = []
    for name, ranks in (("txt", best_ranks(v2t, relevant)), ("img", best_ranks(t2v, relevant.T))):
        shares = [100 * float((ranks < n).double().mean()) for n in RECALLS]
        result |= {f"{name}_r{n}": round(share, 2) for n, share in zip(RECALLS, shares, strict=True)}
        means.append(sum(shares) / len(shares))
        result[f"{name}_r_mean"] = round(means[-1], 2)
    return result | {"r_mean": round(sum(means) / 2, 2)}


def best_ranks(scores: Float[Tensor, "r c"], relevant: Shaped[Tensor, "r c"]) -> Int[Tensor, " r"]:
    """For each row the rank, from 0 on, of its best relevant column; ties are ordered by column.

    A row without a relevant column gets a rank that no recall counts.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = relevant.gather(1, order).int().argmax(dim=1)
    return torch.where(relevant.any(dim=1), places, scores.shape[1] + max(RECALLS))


def check_answers(texts_of_videos: Sequence[Sequence[int]], texts: int) -> None:
    """Raise ValueError unless every video has a text, every text a video, and all indices are valid."""
    found: set[int] = set()
    for video, numbers in enumerate(texts_of_videos):
        if not numbers:
            raise ValueError(f"texts_of_videos[{video}] is empty: video {video} has no text to find")
        wrong = [number for number in numbers if not 0 <= number < texts]
        if wrong:
            raise ValueError(f"texts_of_videos[{video}] has text {wrong[0]}, but there are {texts} texts")
        found.update(numbers)
    if len(found) < texts:
        lost = min(set(range(texts)) - found)
        raise ValueError(f"text {lost} belongs to no video of texts_of_videos")


@torch.no_grad()
def multiple_choice(
    model: torch.nn.Module,
    clip: Shaped[Tensor, "b ..."],
    input_ids: Int[Tensor, "r l"],
    attention_mask: Int[Tensor, "r l"],
    match_share: float = 0.7,
) -> Float[Tensor, "b o"]:
    """Score of each option of each video (MSRVTT-MC); r = b * o rows of text, with a video's options as neighbours.

    As published: 0.7 times the probability of a match plus 0.3 times the softmax, over the options, of similarity /
    learned temperature. Raises ValueError if b does not divide r.
    """
    if len(input_ids) % len(clip):
        raise ValueError(f"{len(input_ids)} options are not a multiple of {len(clip)} videos")
    options = len(input_ids) // len(clip)
    model = _bare(model)
    with evaluating(model):
        tokens, video = model.embed_video(clip)
        hidden, text = model.embed_text(input_ids, attention_mask)
        logits = model.match(hidden, attention_mask, Context(tokens, Pairing(((None, options),))))
    matches = logits.softmax(dim=1)[:, 1].view(len(clip), options)
    of_video = text.view(len(clip), options, -1)
    similar = (video[:, None] * of_video).sum(-1) / model.temp  # not a matmul, which autocast would round
    return match_share * matches + (1 - match_share) * similar.softmax(dim=1)


def _bare(model: torch.nn.Module) -> VideoTextModel:
    own = bare_video_text(model)
    if not isinstance(own, VideoTextModel):
        raise TypeError(f"{type(own).__name__} answers questions; it does not retrieve")
    return own


def _best(scores: Float[Tensor, "r c"], k: int) -> Shaped[Tensor, "r c"]:
    """True at the k highest of each row."""
    chosen = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, chosen, True)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and back to the previous mode at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def rank_and_size(group: Any = None) -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather(own: T, group: Any = None) -> list[T]:
    """`own` of every rank, on every rank."""
    _, world_size = rank_and_size(group)
    if world_size == 1:
        return [own]
    every: list[Any] = [None] * world_size
    dist.all_gather_object(every, own, group=group)
    return every

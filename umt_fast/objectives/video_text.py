"""Stage 2 of Unmasked Teacher as one call: alignment, contrast, matching and masked words (arXiv 2303.16058, 3.2).

UTA  the visible video tokens aligned with the teacher's, as in stage 1
VTC  contrast of the pooled video with the text over the batches of all ranks
VTM  classifies pairs of video and text as match or not: three pairs per sample, two of them with a drawn negative
MLM  predicts hidden words from the rest of the text and the video
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from umt_kernels import cosine_alignment_loss

from umt_fast import masking
from umt_fast.config import TextConfig, VideoTextObjective
from umt_fast.errors import RunError
from umt_fast.models.text import BertWithHead, Context, Pairing, padding_mask
from umt_fast.models.video_text import Seen, VideoTextModel, bare_video_text
from umt_fast.objectives.contrast import contrastive_loss, unit_mean

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

TEMPERATURES = (0.001, 0.5)
"""The temperature is clamped to this range at the start of every step, as published."""
IGNORED = -100
"""Label of a token that is not to be predicted."""
PUBLISHED = VideoTextObjective()
LOSSES = ("uta", "vtc", "vtm", "mlm")
"""Names of the losses in `VideoText`, and of their weights in `VideoTextObjective`."""


class NoNegatives(RunError, ValueError):
    """A batch in which every sample matches every other, so that VTM has no negatives."""


@dataclass
class Draws:
    """Random choices of a step. `video_text_step` draws the missing ones: first the words, then in this order."""

    visible: Int[Tensor, "b t n"] | None = None
    """Ascending ids of the visible patches of each frame. None in the result of a model without a teacher."""
    negative_videos: Int[Tensor, " b"] | None = None
    """For each text, the index in the batch of a video that does not match it."""
    negative_texts: Int[Tensor, " b"] | None = None
    """For each video, the index in the batch of a text that does not match it."""
    mlm_input_ids: Int[Tensor, "b l"] | None = None
    """The texts with words hidden."""
    mlm_labels: Int[Tensor, "b l"] | None = None
    """The hidden words; -100 at all other tokens."""


@dataclass
class VideoText:
    """The losses of a step; a loss with weight 0, or without its head in the model, is 0."""

    uta: Float[Tensor, ""]
    vtc: Float[Tensor, ""]
    vtm: Float[Tensor, ""]
    mlm: Float[Tensor, ""]
    total: Float[Tensor, ""]
    """Their weighted sum; its gradient is the step's."""
    draws: Draws

    @property
    def parts(self) -> dict[str, Tensor]:
        """The losses of `LOSSES`, by name."""
        return {name: getattr(self, name) for name in LOSSES}


def video_text_step(
    model: torch.nn.Module,
    clip: Shaped[Tensor, "b ..."],
    input_ids: Int[Tensor, "b l"],
    attention_mask: Int[Tensor, "b l"],
    idx: Int[Tensor, " b"],
    draws: Draws | None = None,
    objective: VideoTextObjective = PUBLISHED,
    generator: torch.Generator | None = None,
) -> VideoText:
    """Forward pass of stage 2 (UMT, arXiv 2303.16058, section 3.2); then call `out.total.backward()`.

    clip            uint8 [B,T,H,W,3], or float [B,3,T,H,W] already normalised; T = 1 is an image.
    input_ids       the texts, padded; attention_mask is 1 at their tokens, 0 at the padding. Tensors on the CPU are
                    first cut to the longest text of the batch, which changes no result.
    idx             samples with equal numbers match each other: not negatives in VTM, positives in VTC.
    generator       source of the visible set and the negatives, on the clip's device; words are drawn by the CPU's
                    default generator.

    `model` is a VideoTextModel, bare or wrapped (DDP). In fine-tuning it has no teacher and no language head: UTA and
    MLM are 0, and videos are pooled frame by frame. If a process group is initialised, VTC is over the batches of all
    ranks, which must have equal sizes. Raises ValueError for tensors that do not fit each other, and NoNegatives for a
    batch in which all samples match.
    """
    own = bare_video_text(model)
    if not isinstance(own, VideoTextModel):
        raise TypeError(f"{type(own).__name__} answers questions; its step is `answering_loss`")
    idx = torch.as_tensor(idx)
    _check(clip, input_ids, attention_mask, idx, own.config.text.vocab_size)
    draws = Draws() if draws is None else replace(draws)
    _check_draws(draws, input_ids)
    if objective.vtm > 0 and (draws.negative_videos is None or draws.negative_texts is None):
        check_negatives(idx)
    if own.config.has_language_head and objective.mlm > 0 and draws.mlm_labels is None:
        draws.mlm_input_ids, draws.mlm_labels = mask_words(input_ids, own.config.text, objective.mlm_probability)
    length = _used_length(input_ids, attention_mask, draws.mlm_labels, own.config.text.pad_id)
    input_ids, attention_mask = input_ids[:, :length], attention_mask[:, :length]
    return model(functools.partial(_step, clip, input_ids, attention_mask, idx, draws, objective, generator))


def _step(
    clip: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    idx: Tensor,
    draws: Draws,
    objective: VideoTextObjective,
    generator: torch.Generator | None,
    model: VideoTextModel,
) -> VideoText:
    with torch.no_grad():
        model.temp.clamp_(*TEMPERATURES)
    uta, seen = _align(model, clip, draws, objective, generator)

    # The texts, and the same texts with hidden words behind them, go through the lower layers in one pass.
    device, batch, length = clip.device, len(clip), input_ids.shape[1]
    words, labels = draws.mlm_input_ids, draws.mlm_labels
    fills = words is not None and labels is not None and model.config.has_language_head and objective.mlm > 0
    ids = [input_ids, words[:, :length]] if fills and words is not None else [input_ids]
    mask = padding_mask(attention_mask)
    mask = None if mask is None else mask.to(device)
    both = torch.cat(ids).to(device, non_blocking=True)
    hidden = model.bert.text(both, None if mask is None else mask.repeat(len(ids), 1, 1, 1))
    texts = hidden[:batch]

    video, text = unit_mean(model.vision_proj(seen.pooled)), unit_mean(model.text_proj(texts[:, :1]))
    idx = idx.to(device, non_blocking=True)
    vtc = vtm = mlm = uta.new_zeros(())
    if objective.vtc > 0:
        vtc = contrastive_loss(video, text, model.temp, idx, objective.gather_gradient)
    negatives = None
    if objective.vtm > 0:
        with torch.no_grad():
            similarity = video.float() @ text.float().T / model.temp
            if objective.negatives == "uniform":
                similarity = torch.zeros_like(similarity)
            if draws.negative_videos is None:
                draws.negative_videos = draw_negatives(similarity.T, idx, generator)
            if draws.negative_texts is None:
                draws.negative_texts = draw_negatives(similarity, idx, generator)
        negatives = (draws.negative_videos.to(device).long(), draws.negative_texts.to(device).long())
    first, filled = _fuse(model, seen.tokens, texts, mask, negatives, hidden[batch:] if fills else None)
    if first is not None:
        matches = torch.cat((torch.ones(batch), torch.zeros(2 * batch))).long().to(device, non_blocking=True)
        vtm = F.cross_entropy(model.itm_head(first).float(), matches)
    if filled is not None and labels is not None:
        mlm = _fill_in(model, filled, labels[:, :length])
    total = objective.uta * uta + objective.vtc * vtc + objective.vtm * vtm + objective.mlm * mlm
    return VideoText(uta, vtc, vtm, mlm, total, draws)


def _align(
    model: VideoTextModel,
    clip: Tensor,
    draws: Draws,
    objective: VideoTextObjective,
    generator: torch.Generator | None,
) -> tuple[Float[Tensor, ""], Seen]:
    """UTA and the video encoder's outputs at the visible tokens; without a teacher 0 and the outputs of all tokens."""
    if model.clip_teacher is None or objective.uta == 0:
        return torch.zeros((), device=clip.device), model.vision_encoder(clip)
    targets, draws.visible = _targets(model, clip, draws.visible, objective, generator)
    frames, patches = draws.visible.shape[1], model.config.vision.grid**2
    seen = model.vision_encoder(clip, masking.token_ids(draws.visible, frames * patches), aligned=True)
    found = seen.predictions
    assert found is not None
    eps = model.config.align_eps
    return cosine_alignment_loss(found.hidden, targets, weight=found.weight, bias=found.bias, eps=eps), seen


def _fuse(
    model: VideoTextModel,
    tokens: Float[Tensor, "b m d"],
    texts: Float[Tensor, "b l h"],
    mask: Bool[Tensor, "b 1 1 l"] | None,
    negatives: tuple[Int[Tensor, " b"], Int[Tensor, " b"]] | None,
    hidden: Float[Tensor, "b l h"] | None,
) -> tuple[Float[Tensor, "p h"] | None, Float[Tensor, "b l h"] | None]:
    """The fusion layers on the pairs of VTM and of MLM, in one call. Returns the first state of each of VTM's 3B pairs,
    and all states of MLM's `hidden` texts.

    (video, text), (video, negative text) and (video, text with words hidden) share the keys and values of the video;
    (negative video, text) picks its own.
    """
    batch = len(texts)
    rows = [] if negatives is None else [texts, texts[negatives[1]]]
    masks = [] if mask is None or negatives is None else [mask, mask[negatives[1]]]
    if hidden is not None:
        rows.append(hidden)
        masks += [] if mask is None else [mask]
    if not rows:
        return None, None
    own = len(rows)
    fused_in = torch.stack(rows, dim=1).flatten(0, 1)  # the texts of one video are neighbours
    fused_mask = torch.stack(masks, dim=1).flatten(0, 1) if masks else None
    segments: list[tuple[Tensor | None, int]] = [(None, own)]
    if negatives is not None:
        fused_in = torch.cat((fused_in, texts))
        fused_mask = None if fused_mask is None or mask is None else torch.cat((fused_mask, mask))
        segments.append((negatives[0], 1))
    fused = model.bert.fuse(fused_in, fused_mask, Context(tokens, Pairing(tuple(segments))))
    of_video = fused[: own * batch].unflatten(0, (batch, own))
    filled = None if hidden is None else of_video[:, -1]
    if negatives is None:
        return None, filled
    return torch.cat((of_video[:, 0, 0], fused[own * batch :, 0], of_video[:, 1, 0])), filled


@torch.no_grad()
def _targets(
    model: VideoTextModel,
    clip: Tensor,
    visible: Tensor | None,
    objective: VideoTextObjective,
    generator: torch.Generator | None,
) -> tuple[Float[Tensor, "k b m c"], Int[Tensor, "b t n"]]:
    """The teacher's outputs at the visible patches, and these patches, drawn from its attention unless given."""
    teacher = model.clip_teacher
    assert teacher is not None
    state = teacher.encode(clip)
    batch, frames, patches = state.scores.shape
    if visible is None:
        ratio = objective.image_mask_ratio if frames == 1 else objective.video_mask_ratio
        visible = masking.draw_by_score(state.scores, masking.count_visible(patches, ratio), generator)
    else:
        masking.check_visible(visible, batch, frames, patches)
        visible = visible.to(clip.device).long().sort(dim=-1).values
    return teacher.targets(state, visible), visible


def draw_negatives(
    similarity: Float[Tensor, "a b"], idx: Int[Tensor, " b"], generator: torch.Generator | None = None
) -> Int[Tensor, " a"]:
    """For each row one column that does not match it, in proportion to the softmax of the row (hard negatives).

    The published code sets matches to 0 after the softmax, and fails when a row's whole softmax is on its match. Here
    matches are left out before the softmax: the distribution is the same, and such a row still draws.
    """
    weights = negative_weights(similarity, idx)
    return torch.multinomial(weights.nan_to_num(1.0), 1, generator=generator)[:, 0]


def negative_weights(similarity: Float[Tensor, "a b"], idx: Int[Tensor, " b"]) -> Float[Tensor, "a b"]:
    """Probability of each column to be drawn as a negative of each row; 0 where their numbers are equal."""
    matches = idx[:, None] == idx[None, :]
    return similarity.float().masked_fill(matches, -torch.inf).softmax(dim=1)


def check_negatives(idx: Int[Tensor, " b"]) -> None:
    """Raise NoNegatives if all samples have the same number. Values are checked for tensors on the CPU only."""
    if len(idx) < 2:
        raise NoNegatives("a batch of one sample has no negatives: VTM needs at least 2 with different idx")
    if idx.device.type == "cpu" and bool((idx == idx[0]).all()):
        raise NoNegatives(
            f"all {len(idx)} samples of the batch have idx = {int(idx[0])}, so none has a negative for VTM; "
            f"shuffle the data, or use a larger batch"
        )


def mask_words(
    input_ids: Int[Tensor, "b l"], config: TextConfig, probability: float
) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
    """Texts with hidden words, and the labels: BERT's rule (arXiv 1810.04805, 3.1) at `probability`, as published.

    Every token but padding and [CLS] may be chosen. 80% of the chosen tokens become [MASK], 10% a random word, and 10%
    stay. All draws are made on the CPU.
    """
    limit = max(config.pad_id, config.cls_id, config.mask_id)
    if limit >= config.vocab_size:
        raise ValueError(
            f"a special token has id {limit}, but vocab_size = {config.vocab_size}; "
            "set pad_id, cls_id and mask_id of TextConfig to those of the vocabulary"
        )
    ids = input_ids.cpu()
    select, replaced, other = (torch.full(ids.shape, p).bernoulli().bool() for p in (probability, 0.8, 0.5))
    words = torch.randint(config.vocab_size, ids.shape)
    hidden, labels = apply_words(ids, select, replaced, other, words, config)
    return hidden.to(input_ids.device), labels.to(input_ids.device)


def apply_words(
    ids: Int[Tensor, "b l"], select: Tensor, replaced: Tensor, other: Tensor, words: Tensor, config: TextConfig
) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
    """The rule of `mask_words`, given its draws."""
    chosen = select & (ids != config.pad_id) & (ids != config.cls_id)
    hidden = torch.where(chosen & replaced, config.mask_id, ids)
    hidden = torch.where(chosen & ~replaced & other, words, hidden)
    return hidden, torch.where(chosen, ids, IGNORED)


def _fill_in(model: VideoTextModel, hidden: Float[Tensor, "b l h"], labels: Int[Tensor, "b l"]) -> Float[Tensor, ""]:
    """Cross-entropy of the hidden words; 0 if there are none. Only their tokens go through the head."""
    places = (labels.flatten() != IGNORED).nonzero()[:, 0]  # does not wait for the GPU if the labels are on the CPU
    wanted = labels.flatten()[places].long().to(hidden.device, non_blocking=True)
    assert isinstance(model.text_encoder, BertWithHead)
    logits = model.text_encoder.logits(hidden.flatten(0, 1)[places.to(hidden.device, non_blocking=True)])
    return F.cross_entropy(logits.float(), wanted, reduction="sum") / max(len(places), 1)


def _used_length(input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None, pad_id: int) -> int:
    """Length of the longest text. For tensors on a GPU the full width: reading them would make the host wait."""
    if input_ids.device.type != "cpu" or attention_mask.device.type != "cpu":
        return input_ids.shape[1]
    used = (attention_mask != 0) | (input_ids != pad_id)
    if labels is not None:
        used |= labels.cpu() != IGNORED
    columns = used.any(dim=0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 1


def _check(clip: Tensor, input_ids: Tensor, attention_mask: Tensor, idx: Tensor, words: int) -> None:
    batch = len(clip)
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape or len(input_ids) != batch:
        raise ValueError(
            f"input_ids {list(input_ids.shape)} and attention_mask {list(attention_mask.shape)}: "
            f"give both as [{batch}, L], a row for each of the {batch} clips"
        )
    if (
        input_ids.device.type == "cpu"
        and input_ids.numel()
        and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < words
    ):
        wrong = int(input_ids.max()) if int(input_ids.min()) >= 0 else int(input_ids.min())
        raise ValueError(f"input_ids has {wrong}, but the text encoder knows {words} words, from 0 on")
    if idx.shape != (batch,):
        raise ValueError(f"idx has shape {list(idx.shape)}; give [{batch}], a number for each clip")


def _check_draws(draws: Draws, input_ids: Tensor) -> None:
    """Raise ValueError for given draws that do not fit the batch. `visible` is checked where it is used."""
    batch = len(input_ids)
    for name in ("negative_videos", "negative_texts"):
        given = getattr(draws, name)
        if given is None:
            continue
        if given.shape != (batch,):
            raise ValueError(f"draws.{name} has shape {list(given.shape)}; give [{batch}], a place in the batch each")
        if given.device.type == "cpu" and not bool(((given >= 0) & (given < batch)).all()):
            wrong = given[(given < 0) | (given >= batch)]
            raise ValueError(f"draws.{name} has {int(wrong[0])}, but the batch has {batch} samples")
    words, labels = draws.mlm_input_ids, draws.mlm_labels
    if (words is None) != (labels is None):
        raise ValueError("draws has only one of mlm_input_ids and mlm_labels; give both or neither")
    for name, one in (("mlm_input_ids", words), ("mlm_labels", labels)):
        if one is not None and one.shape != input_ids.shape:
            raise ValueError(f"draws.{name} is {list(one.shape)}; give {list(input_ids.shape)}, as input_ids")

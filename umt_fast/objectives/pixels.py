"""Masked autoencoding of pixels: VideoMAE, VideoMAE V2 and MAE-ST, each as one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD, pixel_loss

from umt_fast.config import MaeStConfig, VideoMaeConfig
from umt_fast.models.pixels import MAE_ST_MEAN, MAE_ST_STD
from umt_fast.models.token_sampler import AdaMae

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

EPS = 1e-6


@dataclass
class Reconstruction:
    """What a step on pixels found."""

    loss: Float[Tensor, ""]
    predictions: Float[Tensor, "b s f"]
    """Pixels in target space, of the tokens `scored`, in the order (time, row, column, colour)."""
    scored: Int[Tensor, "b s"]
    """Ids of the tokens that were predicted."""


def hidden_ids(visible: Int[Tensor, "b n"], tokens: int) -> Int[Tensor, "b m"]:
    """The other ids of each row, ascending. Every row must hold its ids once."""
    shown = torch.zeros(len(visible), tokens, dtype=torch.bool, device=visible.device).scatter_(1, visible, True)
    # A stable sort puts the hidden ids first, in order, and waits for nothing on the host, which nonzero would.
    return shown.sort(dim=1, stable=True).indices[:, : tokens - visible.shape[1]]


def videomae_step(
    model: nn.Module,
    config: VideoMaeConfig,
    clip: Shaped[Tensor, "b ..."],
    visible: Int[Tensor, "b n"],
    decoded: Int[Tensor, "b m"] | None = None,
    overlap: int | None = None,
) -> Reconstruction:
    """Forward pass of VideoMAE (arXiv 2203.12602), or of VideoMAE V2 (arXiv 2303.16727) with `decoded` given.

    clip     uint8 [B,T,H,W,3], or float [B,3,T,H,W] normalised with ImageNet's mean and standard deviation.
    visible  ids of the tokens that the encoder sees; the loss is over hidden tokens only.
    decoded  ids of the tokens that the decoder predicts; None: all hidden ones.
    overlap  how many of `decoded` are visible, if that is the same for every clip: they are decoded but not scored, so
             the head leaves them out. None: they may differ, and get weight 0 in the mean over the batch.

    `model` is a VideoMae, bare or wrapped (DDP, torch.compile).
    """
    hidden_only = decoded is None
    if decoded is None:
        decoded = hidden_ids(visible, config.tokens)
    weights, places, scored = None, None, decoded
    if not hidden_only:
        shown = torch.zeros(len(visible), config.tokens, dtype=torch.bool, device=visible.device)
        seen = shown.scatter_(1, visible, True).gather(1, decoded)
        if overlap is None:
            weights = (~seen).float()
        else:
            places = seen.sort(dim=1, stable=True).indices[:, : decoded.shape[1] - overlap]
            scored = decoded.gather(1, places)
    predictions = model(clip, visible, decoded, places)
    uint8 = clip.dtype == torch.uint8
    loss = pixel_loss(
        predictions,
        clip,
        scored,
        config.patch_size,
        config.tubelet_size,
        normalise="channel" if config.normalise_targets else "none",
        eps=EPS,
        scale=None if uint8 else IMAGENET_STD,
        shift=(0.0, 0.0, 0.0) if uint8 else IMAGENET_MEAN,
        weights=weights,
    )
    return Reconstruction(loss, predictions, scored)


def target_frame_ids(frames: int, target_frames: int) -> list[int]:
    """Frames of a clip that MAE-ST predicts: evenly spread from the first to the last, rounded down."""
    return [int(place) for place in torch.linspace(0, frames - 1, target_frames).tolist()]


def mae_st_step(
    model: nn.Module, config: MaeStConfig, clip: Shaped[Tensor, "b ..."], visible: Int[Tensor, "b n"]
) -> Reconstruction:
    """Forward pass of MAE-ST (arXiv 2205.09113); the loss is over hidden tokens.

    clip is uint8 [B,T,H,W,3], or float [B,3,T,H,W] normalised with mean 0.45 and standard deviation 0.225. `model` is a
    MaeSt, bare or wrapped (DDP, torch.compile).
    """
    scored = hidden_ids(visible, config.tokens)
    predictions = model(clip, visible, scored)
    uint8 = clip.dtype == torch.uint8
    scale = (1 / (255 * MAE_ST_STD[0]),) * 3 if uint8 else None
    shift = (-MAE_ST_MEAN[0] / MAE_ST_STD[0],) * 3 if uint8 else (0.0, 0.0, 0.0)
    ids = torch.tensor(target_frame_ids(config.frames, config.target_frames), device=clip.device)
    loss = pixel_loss(
        predictions,
        clip.index_select(1 if uint8 else 2, ids),
        scored,
        config.patch_size,
        config.target_frames // config.token_frames,
        normalise="token" if config.normalise_targets else "none",
        eps=EPS,
        eps_in_root=True,
        scale=scale,
        shift=shift,
    )
    return Reconstruction(loss, predictions, scored)


SAMPLING_WEIGHT = 1e-4
"""Weight of AdaMAE's sampling loss."""


@dataclass
class AdaptiveReconstruction(Reconstruction):
    """What a step of AdaMAE found. `loss` is the sum of both losses."""

    reconstruction: Float[Tensor, ""]
    sampling: Float[Tensor, ""]
    probabilities: Float[Tensor, "b n"]
    visible: Int[Tensor, "b v"]


def adamae_step(
    model: AdaMae,
    clip: Shaped[Tensor, "b ..."],
    num_visible: int,
    visible: Int[Tensor, "b v"] | None = None,
    generator: torch.Generator | None = None,
) -> AdaptiveReconstruction:
    """Forward pass of AdaMAE (arXiv 2211.09120): tokens drawn from a learned distribution, which learns from the error.

    The sampler's loss is minus the mean of log p * error over hidden tokens, errors held fixed, so that a token that
    was hidden and hard to predict becomes likelier to be seen. A given `visible` is used in place of a draw.
    """
    config = model.config
    embedded = model.embed(clip)
    p = model.encoder.probabilities(embedded)
    if visible is None:
        visible = torch.multinomial(p.detach(), num_visible, generator=generator)
    visible = visible.sort(dim=1).values
    hidden = hidden_ids(visible, config.tokens)
    predictions = model.predict(embedded, visible, hidden)
    uint8 = clip.dtype == torch.uint8
    errors = pixel_loss(
        predictions,
        clip,
        hidden,
        config.patch_size,
        config.tubelet_size,
        normalise="channel" if config.normalise_targets else "none",
        eps=EPS,
        scale=None if uint8 else IMAGENET_STD,
        shift=(0.0, 0.0, 0.0) if uint8 else IMAGENET_MEAN,
        reduction="none",
    )
    eps = torch.finfo(p.dtype).eps
    log_p = (p / p.sum(-1, keepdim=True)).clamp(eps, 1 - eps).log().gather(1, hidden)
    reconstruction = errors.mean()
    sampling = -SAMPLING_WEIGHT * (log_p * errors.detach()).mean()
    return AdaptiveReconstruction(reconstruction + sampling, predictions, hidden, reconstruction, sampling, p, visible)

"""Masked autoencoding of pixels: VideoMAE, VideoMAE V2 and MAE-ST, each as one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD, pixel_loss

from umt_fast.config import MaeStConfig, VideoMaeConfig
from umt_fast.masking import hidden_ids
from umt_fast.masking.guided import numbers_on
from umt_fast.models.pixels import MAE_ST_MEAN, MAE_ST_STD

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped, UInt8

EPS = 1e-6


@dataclass
class Reconstruction:
    """Results of a step on pixels."""

    loss: Float[Tensor, ""]
    predictions: Float[Tensor, "b s f"]
    """Pixels in target space, of the tokens `scored`, in the order (time, row, column, colour)."""
    scored: Int[Tensor, "b s"]
    """Ids of the tokens that were predicted."""
    visible: Int[Tensor, "b v"]
    """Ids of the tokens that the encoder saw, ascending."""


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
    decoded  ids of the tokens that the decoder predicts; None: all hidden tokens. Visible ones among them do not count
             in the loss.
    overlap  number of visible tokens in each row of `decoded`: the head then leaves them out. None: unknown, or not the
             same for every clip; visible tokens then get weight 0 in the mean over the batch.

    `model` is a VideoMae, bare or wrapped (DDP, torch.compile).
    """
    weights, places = None, None
    if decoded is None:
        decoded = scored = hidden_ids(visible, config.tokens)
    else:
        scored = decoded
        shown = torch.zeros(len(visible), config.tokens, dtype=torch.bool, device=visible.device)
        seen = shown.scatter_(1, visible, True).gather(1, decoded)
        if overlap is None:
            weights = (~seen).float()
        else:
            places = seen.sort(dim=1, stable=True).indices[:, : decoded.shape[1] - overlap]
            scored = decoded.gather(1, places)
    predictions = model(clip, visible, decoded, places)
    loss = _videomae_loss(config, predictions, clip, scored, weights=weights)
    return Reconstruction(loss, predictions, scored, visible)


def _videomae_loss(
    config: VideoMaeConfig,
    predictions: Float[Tensor, "b s f"],
    clip: Shaped[Tensor, "b ..."],
    scored: Int[Tensor, "b s"],
    weights: Float[Tensor, "b s"] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Error against VideoMAE's targets: pixels in [0, 1], normalised per token and colour."""
    uint8 = clip.dtype == torch.uint8
    return pixel_loss(
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
        reduction=reduction,
    )


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
    ids = numbers_on(clip.device, *config.target_frame_ids)
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
    return Reconstruction(loss, predictions, scored, visible)


SAMPLING_WEIGHT = 1e-4
"""Weight of AdaMAE's sampling loss."""


@dataclass
class AdaptiveReconstruction(Reconstruction):
    """Results of a step of AdaMAE. `loss` is the sum of both losses."""

    reconstruction: Float[Tensor, ""]
    sampling: Float[Tensor, ""]
    probabilities: Float[Tensor, "b n"]


def adamae_step(
    model: nn.Module,
    config: VideoMaeConfig,
    clip: Shaped[Tensor, "b ..."],
    num_visible: int,
    visible: Int[Tensor, "b v"] | None = None,
    generator: torch.Generator | None = None,
) -> AdaptiveReconstruction:
    """Forward pass of AdaMAE (arXiv 2211.09120): visible tokens are drawn from a learned distribution.

    The sampler's loss is minus the mean of log p * error over hidden tokens, with the errors held constant. It raises
    the probability of tokens that are hard to predict. A given `visible` replaces the draw. `model` is an AdaMae, bare
    or wrapped (DDP).
    """
    predictions, p, visible, hidden = model(clip, num_visible, visible, generator)
    errors = _videomae_loss(config, predictions, clip, hidden, reduction="none")
    eps = torch.finfo(p.dtype).eps
    log_p = (p / p.sum(-1, keepdim=True)).clamp(eps, 1 - eps).log().gather(1, hidden)
    reconstruction = errors.mean()
    sampling = -SAMPLING_WEIGHT * (log_p * errors.detach()).mean()
    return AdaptiveReconstruction(reconstruction + sampling, predictions, hidden, visible, reconstruction, sampling, p)


@torch.no_grad()
def restore(
    config: VideoMaeConfig | MaeStConfig,
    clip: UInt8[Tensor, "b t h w 3"],
    out: Reconstruction,
) -> UInt8[Tensor, "b t h w 3"]:
    """The clip with scored tokens replaced by their predictions, and tokens that are neither visible nor scored by grey
    (VideoMAE V2 and EVEREST leave some). For MAE-ST only the target frames.

    Normalised predictions get back the mean and variance of their patch, as in the published pictures.
    """
    tubelet = config.tubelet_size
    over: int | tuple[int, int] = 2
    if isinstance(config, MaeStConfig):
        clip = clip[:, torch.tensor(config.target_frame_ids, device=clip.device)]
        tubelet, over = config.target_frames // config.token_frames, (2, 3)
    grid, side = config.grid, config.patch_size
    cubes = clip.unflatten(1, (-1, tubelet)).unflatten(3, (grid, side)).unflatten(5, (grid, side))
    tokens = cubes.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(clip), config.tokens, -1, 3).float() / 255
    predictions = out.predictions.float().unflatten(-1, (-1, 3))
    if config.normalise_targets:
        pixels = tokens.gather(1, out.scored[..., None, None].expand(-1, -1, *tokens.shape[2:]))
        predictions = predictions * pixels.std(over, keepdim=True) + pixels.mean(over, keepdim=True)
    elif isinstance(config, MaeStConfig):
        predictions = predictions * MAE_ST_STD[0] + MAE_ST_MEAN[0]
    known = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    known = known.scatter(1, out.visible, True).scatter(1, out.scored, True)
    tokens = torch.where(known[..., None, None], tokens, 0.5)
    tokens = tokens.scatter(1, out.scored[..., None, None].expand_as(predictions), predictions)
    shape = (len(clip), config.token_frames, grid, grid, tubelet, side, side, 3)
    frames = tokens.view(shape).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(clip.shape)
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)

"""The ops in eager PyTorch as in UMT's published code: all tokens first, then a boolean mask.

This is our own code for the same computation, not a copy. Each function gets the tensors of one case by name.
`hidden` is the published mask: True at every token that the student does not see.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD

Inputs = dict[str, Tensor]

LAYER_NORM_EPS = 1e-6


def normalised(clip: Tensor) -> Tensor:
    """uint8 [B,T,H,W,3] -> float32 [B,3,T,H,W], the published loader's output."""
    mean = torch.tensor(IMAGENET_MEAN, device=clip.device)
    std = torch.tensor(IMAGENET_STD, device=clip.device)
    return ((clip.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)


def seen(rows: Tensor, hidden: Tensor) -> Tensor:
    """The visible rows [B, n, D] of [B, N, D]; the host waits for the mask, as with any boolean index."""
    return rows[~hidden].reshape(rows.shape[0], -1, rows.shape[-1])


def gather_patches(x: Inputs, patch: int, halo: int, dtype: torch.dtype) -> Tensor:
    """Every window of the normalised clip, in the order (row, column, channel), then the mask if there is one."""
    frames = normalised(x["clip"]).transpose(1, 2).flatten(0, 1)  # [B*T, 3, H, W]
    if halo:
        frames = F.pad(frames, (halo, halo, halo, halo), mode="replicate")
    window = patch + 2 * halo
    windows = frames.unfold(2, window, patch).unfold(3, window, patch)  # [B*T, 3, h, w, window, window]
    rows = windows.permute(0, 2, 3, 4, 5, 1).reshape(len(x["clip"]), -1, 3 * window**2).to(dtype)
    return seen(rows, x["hidden"]) if "hidden" in x else rows


def student_patch_embed(x: Inputs, patch: int) -> Tensor:
    """Conv3d of every token, positions of every token, then the mask."""
    clip = normalised(x["clip"]).to(x["weight"].dtype)
    embedded = F.conv3d(clip, x["weight"], x["bias"], stride=(1, patch, patch)).flatten(2).transpose(1, 2)
    return seen(embedded + x["position"], x["hidden"])


def teacher_patch_embed(x: Inputs, side: int) -> Tensor:
    """Resize frames to the teacher's `side` if it differs, then apply CLIP's own convolution."""
    weight = x["conv1"]
    clip = normalised(x["clip"])
    if clip.shape[-1] != side:
        frames = clip.transpose(1, 2).flatten(0, 1)
        frames = F.interpolate(frames, size=(side, side), mode="bicubic", align_corners=False)
        clip = frames.unflatten(0, (clip.shape[0], clip.shape[2])).transpose(1, 2)
    patch = weight.shape[-1]
    return F.conv3d(clip.to(weight.dtype), weight, stride=(1, patch, patch)).flatten(2).transpose(1, 2)


def sample_visible(x: Inputs, num_visible: int) -> Tensor:
    """Order all ids by torch.multinomial; the first `num_visible` of each row are False in a mask made on the CPU."""
    scores = x["scores"]
    order = torch.multinomial(scores, scores.shape[1])
    hidden = torch.ones(scores.shape)
    row = torch.arange(len(scores)).view(-1, 1).repeat(1, num_visible)
    hidden[row, order[:, :num_visible].cpu()] = 0
    return hidden.to(torch.bool).to(scores.device, non_blocking=True)


def cls_scores(x: Inputs) -> Tensor:
    """MultiheadAttention with need_weights: all [P+1, P+1] weights, their mean over heads, then the class row."""
    q, k = x["queries"].transpose(1, 2), x["k"]
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    return weights.mean(dim=1)[:, 0, 1:]


def gather_layer_norm_rows(x: Inputs) -> Tensor:
    """LayerNorm of every row, then the mask."""
    return seen(F.layer_norm(x["x"], x["weight"].shape, x["weight"], x["bias"], LAYER_NORM_EPS), x["hidden"])


def gather_layer_norm_position(x: Inputs) -> Tensor:
    """LayerNorm, and the table of positions expanded over the batch and masked."""
    normed = F.layer_norm(x["x"], x["weight"].shape, x["weight"], x["bias"], LAYER_NORM_EPS)
    return normed + seen(x["position"].expand(len(normed), -1, -1), x["hidden"])


def cosine_alignment_loss(x: Inputs) -> Tensor:
    """A LayerNorm per layer, stacked; each row divided by its norm; 2 - 2 cos."""
    layers = zip(x["predictions"], x["weight"], x["bias"], strict=True)
    y = torch.stack([F.layer_norm(p, w.shape, w, b, LAYER_NORM_EPS) for p, w, b in layers])
    return cosine_distance(y, x["targets"])


def cosine_distance(y: Tensor, t: Tensor) -> Tensor:
    """Mean of 2 - 2 cos over rows."""
    y = y / y.norm(dim=-1, keepdim=True)
    t = t / t.norm(dim=-1, keepdim=True)
    return (2 - 2 * (y * t).sum(dim=-1)).mean()

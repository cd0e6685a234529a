"""The fine-tuning model in float64 NumPy, written only from its description."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from umt_fast import ClassifierConfig


def positions(config: ClassifierConfig) -> np.ndarray:
    """The sinusoid table of 8 x 14 x 14 tokens (patches of 14 pixels: 8 x 16 x 16), resized: bicubic, then linear."""
    side = 16 if config.patch_size == 14 else 14
    column = np.arange(config.width)
    angle = np.arange(8 * side**2)[:, None] / 10000 ** (2 * (column // 2) / config.width)
    table = np.where(column % 2 == 0, np.sin(angle), np.cos(angle)).reshape(8, side, side, config.width)
    space, time = _cubic(side, config.grid), _linear(8, config.token_frames)
    return np.einsum("ut,yi,xj,tijd->uyxd", time, space, space, table).reshape(-1, config.width)


def _cubic(old: int, new: int) -> np.ndarray:
    """Bicubic weights [new, old], a = -0.75, half-pixel centres, borders repeated, no antialiasing."""
    matrix = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            x = abs(place - j)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(j, 0), old - 1)] += near if x <= 1 else far if x < 2 else 0
    return matrix


def _linear(old: int, new: int) -> np.ndarray:
    matrix = np.zeros((new, old))
    for i in range(new):
        place = max((i + 0.5) * old / new - 0.5, 0)
        first = int(place)
        matrix[i, min(first, old - 1)] += 1 - (place - first)
        matrix[i, min(first + 1, old - 1)] += place - first
    return matrix


def logits(config: ClassifierConfig, state: dict[str, Tensor], clip: Tensor, table: np.ndarray) -> np.ndarray:
    """[B,K] of a normalised clip [B,3,T,H,W], from weights under their published names and positions [N,D]."""
    w = {key: value.double().numpy() for key, value in state.items()}
    t, g, p = config.token_frames, config.grid, config.patch_size
    pixels = clip.double().numpy().reshape(len(clip), 3, t, -1, g, p, g, p)
    tubes = pixels.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(clip), t * g * g, -1)
    x = tubes @ w["patch_embed.proj.weight"].reshape(config.width, -1).T + w["patch_embed.proj.bias"] + table
    for i in range(config.depth):
        own = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items() if key.startswith(f"blocks.{i}.")}
        bias = np.concatenate((own["attn.q_bias"], np.zeros(config.width), own["attn.v_bias"]))
        qkv = _norm(x, own, "norm1") @ own["attn.qkv.weight"].T + bias
        q, k, v = qkv.reshape(len(x), -1, 3, config.heads, config.width // config.heads).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5)
        attended = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + attended @ own["attn.proj.weight"].T + own["attn.proj.bias"]
        hidden = _norm(x, own, "norm2") @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(torch.from_numpy(hidden / math.sqrt(2))).numpy())
        x = x + hidden @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"]
    features = _norm(x.mean(1), w, "fc_norm") if config.pool == "mean" else _norm(x, w, "norm")[:, 0]
    return features @ w["head.weight"].T + w["head.bias"]


def _norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]

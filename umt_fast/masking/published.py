"""Masks drawn from a NumPy generator exactly as the published codes draw them. True means hidden or not decoded.

`numpy.random.RandomState(seed)` repeats the numbers of `numpy.random.seed(seed)`, which those codes use. Training draws
on the device instead, from the same distributions (`umt_fast.masking`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

PHASES = 4
"""Number of shifts of the running cell."""


def tube_mask(frames: int, patches: int, ratio: float, rng: np.random.RandomState) -> Bool[np.ndarray, " n"]:
    """VideoMAE's tube (arXiv 2203.12602): one shuffle of a frame, int(ratio * patches) hidden, for all frames."""
    return np.tile(random_mask(patches, ratio, rng), frames)


def random_mask(tokens: int, ratio: float, rng: np.random.RandomState) -> Bool[np.ndarray, " n"]:
    """One shuffle of int(ratio * tokens) hidden tokens of a clip."""
    hidden = int(ratio * tokens)
    mask = np.hstack([np.zeros(tokens - hidden), np.ones(hidden)])
    rng.shuffle(mask)
    return mask.astype(bool)


def running_cell_table(frames: int, height: int, width: int, ratio: float) -> Bool[Tensor, "4 n"]:
    """Decoder masks of VideoMAE V2 (arXiv 2303.16727), one per phase: a 2 x 2 cell that shifts from frame to frame.

    Raises ValueError unless `ratio` hides 1, 2 or 3 of a cell's 4 places and the sides are even.
    """
    hidden = int(4 * ratio)
    if not 1 <= hidden <= 3:
        raise ValueError(f"ratio = {ratio} hides {hidden} of a cell's 4 places; give 0.25, 0.5 or 0.75")
    if height % 2 or width % 2:
        raise ValueError(f"a grid of {height} x {width} patches has an odd side; cells of 2 x 2 need even ones")
    pattern = torch.arange(PHASES) < hidden
    phase, frame, place = torch.arange(PHASES), torch.arange(frames), torch.arange(4)
    shifted = (phase[:, None, None] + frame[None, :, None] + place + 1) % PHASES  # as published, already shifted by one
    cells = pattern[shifted].view(PHASES, frames, 2, 2)
    return cells.repeat(1, 1, height // 2, width // 2).flatten(1)


def running_cell_mask(
    frames: int, height: int, width: int, ratio: float, rng: np.random.RandomState
) -> Bool[np.ndarray, " n"]:
    """The decoder mask of one clip: a phase drawn with `rng`."""
    return running_cell_table(frames, height, width, ratio)[rng.randint(PHASES)].numpy()


@functools.lru_cache(maxsize=8)
def _decoded_by_phase(frames: int, height: int, width: int, ratio: float, device: torch.device) -> Int[Tensor, "4 m"]:
    """Ids that each phase decodes, cached: a step that is recorded as a CUDA graph must not copy from the host."""
    table = running_cell_table(frames, height, width, ratio)
    return (~table).nonzero()[:, 1].view(PHASES, -1).to(device)


def draw_running_cells(
    batch: int,
    frames: int,
    height: int,
    width: int,
    ratio: float,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b m"]:
    """Ascending ids of the tokens to decode. The phase of each clip is drawn on `device`; all decode equally many."""
    ids = _decoded_by_phase(frames, height, width, ratio, device)
    return ids[torch.randint(PHASES, (batch,), device=device, generator=generator)]

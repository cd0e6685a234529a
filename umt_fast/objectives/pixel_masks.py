"""The masking rule of a run on pixels: it draws the visible tokens and the tokens to decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from umt_fast import masking
from umt_fast.config import ConfigError, MaeStConfig, PixelMaskConfig, VideoMaeConfig
from umt_fast.masking import guided
from umt_fast.masking.published import draw_running_cells
from umt_fast.masking.source import Source

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8


class Sets(NamedTuple):
    """Token ids of a batch, each row ascending."""

    visible: Int[Tensor, "b n"]
    decoded: Int[Tensor, "b m"] | None
    """None: all hidden tokens."""
    overlap: int | None
    """Number of `decoded` tokens that are visible too, if it is the same for every clip; else None."""


class PixelMasks:
    """Draws the sets of `mask.rule` for clips of a model of `sizes`.

    Raises ConfigError if no token or every token would be visible, or if `mask.source` cannot be imported.
    """

    def __init__(self, sizes: VideoMaeConfig | MaeStConfig, mask: PixelMaskConfig) -> None:
        self.sizes, self.mask = sizes, mask
        self.num_visible = masking.count_seen(mask.rule, sizes.token_frames, sizes.patches, mask.ratio)
        if not 0 < self.num_visible < sizes.tokens:
            raise ConfigError(
                f"mask.ratio = {mask.ratio} leaves {self.num_visible} of {sizes.tokens} tokens visible with mask.rule "
                f"= {mask.rule}; some must be visible and some hidden"
            )
        if mask.rule == "everest" and (sizes.token_frames < 2 or self.num_decoded < 1):
            raise ConfigError(
                f"mask.rule = everest decodes {self.num_decoded} tokens of {sizes.token_frames} frames, which it "
                "compares: give at least 2 frames of tokens, and a mask.ratio further above mask.candidate_ratio"
            )
        self.source = Source(mask.source) if mask.source else None
        self.captions: Sequence[str] = ()
        """Captions of the clips that `draw` gets next, for a rule that needs them."""

    @property
    def num_decoded(self) -> int:
        """Tokens that the decoder predicts."""
        mask, tokens = self.mask, self.sizes.tokens
        if mask.rule == "everest":
            return int((1 - mask.candidate_ratio) * tokens) - self.num_visible
        if mask.decoder_ratio is None:
            return tokens - self.num_visible
        return tokens - int(tokens * mask.decoder_ratio)

    @property
    def overlap(self) -> int | None:
        """Number of visible tokens that are decoded too; None if it differs from clip to clip."""
        mask, frames = self.mask, self.sizes.token_frames
        if mask.decoder_ratio is None:
            return 0
        if mask.rule != "tube" or frames % 4:
            return None
        return self.num_visible // frames * int(frames * (1 - mask.decoder_ratio))

    def draw(
        self,
        clip: UInt8[Tensor, "b t h w c"],
        guide: UInt8[Tensor, "b t h w"] | None,
        embed: Callable[[Tensor], Float[Tensor, "b n d"]],
    ) -> Sets:
        """Sets for clips whose guide channel is `guide`; `embed` gives the embedded patches of clips."""
        mask, sizes = self.mask, self.sizes
        if mask.rule == "everest":
            candidates = self.num_visible + self.num_decoded
            noise = torch.rand(len(clip), candidates, device=clip.device)
            shares = (mask.candidate_ratio, mask.ratio)
            seen, decoded = guided.redundancy_removing(embed(clip), sizes.token_frames, noise, *shares)
            return Sets(seen[:, 0], decoded, 0)
        scores = self._scores(clip, guide)
        visible = masking.token_ids(masking.draw_scored(mask.rule, scores, mask.ratio), sizes.tokens)
        if mask.decoder_ratio is None:
            return Sets(visible, None, 0)
        grid = (sizes.token_frames, sizes.grid, sizes.grid)
        return Sets(visible, draw_running_cells(len(clip), *grid, mask.decoder_ratio, clip.device), self.overlap)

    def _scores(self, clip: Tensor, guide: Tensor | None) -> Float[Tensor, "b t p"]:
        clips = masking.Clips(clip, guide, self.captions, self.source, self.sizes, self.mask)
        return masking.find_rule(self.mask.rule).scores(clips)

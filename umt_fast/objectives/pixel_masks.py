"""The masking rule of a run on pixels: it draws the visible tokens and the tokens to decode."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from umt_fast import masking
from umt_fast.config import ConfigError, MaeStConfig, PixelMaskConfig, VideoMaeConfig
from umt_fast.data.guides import MOTION_SCALE
from umt_fast.masking import guided
from umt_fast.masking.published import draw_running_cells
from umt_fast.objectives.pixels import numbers_on

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
        self.source = load_function(mask.source) if mask.source else None
        self.captions: Sequence[str] = ()
        """Captions of the clips that `draw` gets next, for the rule `text`."""

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
        mask, sizes = self.mask, self.sizes
        shape = (len(clip), sizes.token_frames, sizes.patches)
        needs = masking.find_rule(mask.rule).needs
        if needs == "motion":
            assert guide is not None
            side = sizes.patch_size
            by_frame = guide[:, :, ::side, ::side].flatten(2).float() / MOTION_SCALE  # a value per patch
            return by_frame.unflatten(1, (sizes.token_frames, -1)).mean(2)
        if needs == "regions":
            assert guide is not None
            order = numbers_on(clip.device, *mask.order)
            first = guide[:, :: sizes.tubelet_size].int()
            nearest = (first[..., None] - order).abs().argmin(-1)  # compression changes the values of a mask video
            fixed = len(order) - mask.shuffled
            chance = torch.rand(len(clip), mask.shuffled, device=clip.device).argsort(1)
            places = torch.arange(fixed, device=clip.device).expand(len(clip), -1)
            ranks = torch.cat((places, fixed + chance), 1).gather(1, nearest.flatten(1)).view_as(nearest)
            shown = guided.regions_shown(ranks, range(len(order)), sizes.patch_size, mask.least_share)
            return shown.float()
        if needs == "flow":
            return self._flow_scores(clip)
        if needs == "text":
            assert self.source is not None
            return self._checked(self.source(clip, list(self.captions)), shape)
        return torch.ones(shape, device=clip.device)

    def _flow_scores(self, clip: Tensor) -> Float[Tensor, "b t p"]:
        """MGMAE: bumps at random patches of the middle frame, carried to the others by the flow."""
        sizes, batch, frames = self.sizes, len(clip), self.sizes.frames
        assert self.source is not None
        shape = (batch, frames - 1, 2, sizes.image_size, sizes.image_size)
        flow = self._checked(self.source(clip), shape)
        between = {pair: flow[:, min(pair)] for f in range(1, frames) for pair in ((f, f - 1),)}
        count = sizes.patches - int(self.mask.ratio * sizes.patches)
        centres = torch.rand(batch, sizes.patches, device=clip.device).topk(count).indices
        start = guided.gaussian_map(centres, sizes.grid, sizes.grid, sizes.patch_size)
        return guided.flow_scores(start, between, frames, sizes.patch_size, sizes.tubelet_size)

    def _checked(self, found: Any, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(found, Tensor) or tuple(found.shape) != shape or not found.is_floating_point():
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"mask.source = {self.mask.source} returned {got}; return a float tensor {list(shape)}")
        if found.device.type == "cpu" and not bool(found.isfinite().all()):  # on a GPU this would stall the step
            raise ConfigError(f"mask.source = {self.mask.source} returned values that are not finite")
        return found.detach()


def load_function(name: str) -> Callable[..., Any]:
    """Import the function `module:name`. Raises ConfigError."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"mask.source = {name}: {error}") from None
    if not callable(found):
        raise ConfigError(f"mask.source = {name} is not a function")
    return found

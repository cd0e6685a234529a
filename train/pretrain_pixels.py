"""Masked autoencoding of pixels as an objective of `train.pretrain`: VideoMAE, VideoMAE V2, AdaMAE and MAE-ST."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from umt_kernels import patch_embed

from umt_fast import masking
from umt_fast.config import ConfigError, MaeStConfig, MaeStPretrainConfig, VideoMaeConfig, VideoMaePretrainConfig
from umt_fast.data.clips import ClipStream
from umt_fast.data.guides import GUIDES, GuidedStream
from umt_fast.data.index import VideoList
from umt_fast.models.pixels import MaeSt, MaskedAutoencoder, VideoMae
from umt_fast.models.token_sampler import AdaMae
from umt_fast.objectives.pixel_masks import PixelMasks
from umt_fast.objectives.pixels import Reconstruction, adamae_step, mae_st_step, restore, videomae_step
from umt_fast.run import costs
from umt_fast.run.attention_choice import Use
from umt_fast.run.compute import accelerate_model
from umt_fast.run.world import World
from umt_fast.weights import load_autoencoder, read_model

if TYPE_CHECKING:
    from umt_fast.data.batch import Batch

PixelsConfig = VideoMaePretrainConfig | MaeStPretrainConfig


class PixelObjective:
    """The autoencoder of a run, as a `pretrain_objectives.Objective`."""

    FIXED: ClassVar[tuple[str, ...]] = (
        *("objective", "model", "mask", "run.seed"),
        *("data.crops_per_clip", "data.frame_step", "data.frame_rate", "data.clip_seconds"),
    )
    loss_label = "loss: mean squared error of pixels"

    @staticmethod
    def make_stream(config: PixelsConfig, videos: VideoList) -> ClipStream:
        """The run's clips, with a fourth channel if the masking rule needs one. Raises ConfigError."""
        sizes, mask = config.model, config.mask
        shape = (videos, config.data, sizes.frames, sizes.image_size, config.run.seed)
        needs = masking.find_rule(mask.rule).needs
        for guide in GUIDES:
            if needs == guide:
                return GuidedStream(*shape, guide=guide, grid=sizes.grid, folder=mask.regions)
        return ClipStream(*shape)

    @staticmethod
    def plan(config: PixelsConfig, gpu_memory: float | None) -> str:
        """Text of --dry-run: the cost of a step. The memory of activations is not estimated."""
        with torch.device("meta"):
            built = PixelObjective(config, World(0, 1, torch.device("meta")))
        parameters = sum(parameter.numel() for parameter in built.model.parameters())
        return (
            f"one forward and backward pass of {config.optim.batch_size} clips per process, {built.visible} of "
            f"{config.model.tokens} tokens visible, {built.decoded} decoded\n"
            f"  {built.flops / 1e12:.2f} TFLOP\n"
            f"  {16 * parameters / costs.GIB:.1f} GiB of weights, gradients and optimiser"
        )

    def __init__(self, config: PixelsConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.sizes = config.model
        self.masks = PixelMasks(config.model, config.mask)
        self.visible, self.decoded = self.masks.num_visible, self.masks.num_decoded
        self.model = build_model(config).to(world.device)
        # VideoMAE's mask token does not decay; MAE-ST's learned tables and tokens do.
        self.no_decay = () if config.objective == "mae_st" else ("mask_token",)

    def load_initial(self) -> None:
        """Load the autoencoder's weights from `init`, if it is set. Raises WeightsError."""
        if self.config.init:
            load_autoencoder(self.model, read_model(self.config.init)[0])

    @property
    def blocks(self) -> list[nn.Module]:
        named = ("blocks", "decoder_blocks") if isinstance(self.model, MaeSt) else ("encoder.blocks", "decoder.blocks")
        return [block for name in named for block in self.model.get_submodule(name).children()]

    @property
    def flops(self) -> int:
        """FLOP of one forward and backward pass on one process."""
        every = isinstance(self.sizes, MaeStConfig)
        length = self.sizes.tokens if every else self.visible + self.decoded
        scored = self.decoded - (self.masks.overlap or 0)
        return costs.pixel_flops(self.sizes, self.config.optim.batch_size, self.visible, length, scored).total

    @property
    def description(self) -> str:
        sizes = self.sizes
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        tokens = f"{self.visible} of {sizes.tokens} tokens visible"
        return (
            f"{self.config.objective}: encoder {sizes.width} x {sizes.depth}, decoder {sizes.decoder_width} x "
            f"{sizes.decoder_depth}, {parameters / 1e6:.1f} M parameters; {tokens}"
        )

    def accelerate(
        self, bf16: bool, sample: Callable[[], Tensor], stored: Mapping[str, str]
    ) -> tuple[dict[str, str], list[str]]:
        """Set attention, recomputation and compilation of the model. Returns the chosen backends and log lines."""
        sizes, clips, length = self.sizes, self.config.optim.batch_size, self.visible + self.decoded
        extra = int(isinstance(sizes, MaeStConfig) and sizes.class_token)
        if isinstance(sizes, MaeStConfig):
            length = sizes.tokens
        seen, whole = self.visible + extra, length + extra
        decoder_head = sizes.decoder_width // sizes.decoder_heads
        uses = {
            "encoder": Use.within(sizes, clips, seen),
            "decoder": Use(clips, whole, whole, sizes.decoder_heads, decoder_head, True),
        }
        return accelerate_model(self.model, self.config.compute, uses, self.world, bf16, stored)

    def to_device(self, batch: Batch) -> Tensor:
        """The batch's clips, uint8 [B,T,H,W,3], or with a fourth channel, the guide of the masking rule."""
        if masking.find_rule(self.config.mask.rule).needs == "captions":
            self.masks.captions = batch.captions
            if "" in self.masks.captions:
                row = batch.rows[self.masks.captions.index("") // self.config.data.crops_per_clip]
                raise ConfigError(
                    f"mask.rule = {self.config.mask.rule} needs captions: row {row + 1} of the list has none"
                )
        return batch.clip.to(self.world.device, non_blocking=True)

    def make_step(self, model: nn.Module, bf16: bool) -> Callable[[Tensor], Reconstruction]:
        """clip -> the error of the hidden tokens that the run's masking rule draws."""

        def step(clip: Tensor) -> Reconstruction:
            guide = clip[..., 3] if clip.shape[-1] == 4 else None
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=bf16):
                return self._forward(model, clip[..., :3], guide)

        return step

    def _forward(self, model: nn.Module, clip: Tensor, guide: Tensor | None) -> Reconstruction:
        sizes = self.sizes
        if self.config.objective == "adamae":
            assert isinstance(sizes, VideoMaeConfig)
            return adamae_step(model, sizes, clip, self.visible)
        visible, decoded, overlap = self.masks.draw(clip, guide, self._embed)
        if isinstance(sizes, MaeStConfig):
            return mae_st_step(model, sizes, clip, visible)
        return videomae_step(model, sizes, clip, visible, decoded, overlap)

    @torch.no_grad()
    def _embed(self, clip: Tensor) -> Tensor:
        """Embedded patches without positions, which EVEREST compares from frame to frame."""
        assert isinstance(self.model, VideoMae)
        conv = self.model.encoder.patch_embed.proj
        return patch_embed(clip, conv.weight, conv.bias, self.sizes.patch_size)

    def save_picture(self, batch: Batch, out: Reconstruction, folder: Path) -> None:
        """Write `visible.png`: a clip, its visible patches, and the decoder's reconstruction."""
        from umt_fast.run.pictures import draw_reconstruction

        clip, tokens = batch.clip[:1, ..., :3].cpu(), self.sizes.tokens
        first = Reconstruction(out.loss, out.predictions[:1].cpu(), out.scored[:1].cpu(), out.visible[:1].cpu())
        restored = restore(self.sizes, clip, first)[0]
        shown = clip[0]
        if isinstance(self.sizes, MaeStConfig):
            shown = shown[self.sizes.target_frame_ids]
        title = f"{Path(batch.paths[0]).name}: {self.visible} of {tokens} tokens visible"
        draw_reconstruction(
            shown, first.visible[0], restored, tokens, self.sizes.patch_size, folder / "visible.png", title
        )


def build_model(config: PixelsConfig) -> MaskedAutoencoder:
    """The autoencoder with its initial weights."""
    if isinstance(config.model, MaeStConfig):
        return MaeSt(config.model)
    return AdaMae(config.model) if config.objective == "adamae" else VideoMae(config.model)

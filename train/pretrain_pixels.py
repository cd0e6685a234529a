"""Masked autoencoding of pixels as an objective of `train.pretrain`: VideoMAE, VideoMAE V2, AdaMAE and MAE-ST."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from umt_fast import masking
from umt_fast.config import MaeStConfig, MaeStPretrainConfig, VideoMaeConfig, VideoMaePretrainConfig
from umt_fast.masking.published import draw_running_cells
from umt_fast.models.pixels import MaeSt, MaskedAutoencoder, VideoMae
from umt_fast.models.token_sampler import AdaMae
from umt_fast.objectives.pixels import Reconstruction, adamae_step, mae_st_step, restore, videomae_step
from umt_fast.run import costs
from umt_fast.run.attention_choice import Use
from umt_fast.run.compute import choose_attention
from umt_fast.run.world import World
from umt_fast.weights import load_exactly, read_weights, strip_wrappers

if TYPE_CHECKING:
    from umt_fast.data.loader import Batch

PixelsConfig = VideoMaePretrainConfig | MaeStPretrainConfig
FIXED = ("objective", "model", "mask", "data.crops_per_clip", "data.frame_step", "run.seed")
"""Settings that a resumed run must share with the run that it continues."""


def clip_sizes(config: PixelsConfig) -> VideoMaeConfig | MaeStConfig:
    return config.model


class Objective:
    """The autoencoder of a run, and what the loop asks of it."""

    def __init__(self, config: PixelsConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.sizes = config.model
        self.visible = masking.count_seen(
            config.mask.rule, self.sizes.token_frames, self.sizes.patches, config.mask.ratio
        )
        self.model = build_model(config).to(world.device)
        # VideoMAE's mask token does not decay; MAE-ST's learned tables and tokens do.
        self.no_decay = () if config.objective == "mae_st" else ("mask_token",)

    def load_initial(self) -> None:
        """The autoencoder's weights of `init`, if it is given. Raises WeightsError."""
        if self.config.init:
            load_exactly(self.model, strip_wrappers(read_weights(self.config.init)), "model")

    @property
    def blocks(self) -> list[nn.Module]:
        named = ("blocks", "decoder_blocks") if isinstance(self.model, MaeSt) else ("encoder.blocks", "decoder.blocks")
        return [block for name in named for block in self.model.get_submodule(name).children()]

    @property
    def decoded(self) -> int:
        """Tokens that the decoder predicts."""
        kept = self.config.mask.decoder_ratio
        tokens = self.sizes.tokens
        return tokens - self.visible if kept is None else tokens - int(tokens * kept)

    @property
    def overlap(self) -> int | None:
        """How many visible tokens are decoded too: the same number in every clip, or None where it differs."""
        mask, frames = self.config.mask, self.sizes.token_frames
        if mask.decoder_ratio is None:
            return 0
        if mask.rule != "tube" or frames % 4:
            return None
        return self.visible // frames * int(frames * (1 - mask.decoder_ratio))

    @property
    def flops(self) -> int:
        """Operations of one forward and backward pass on one process."""
        every = isinstance(self.sizes, MaeStConfig)
        length = self.sizes.tokens if every else self.visible + self.decoded
        scored = self.decoded - (self.overlap or 0)
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
        self, bf16: bool, _sample: Callable[[], Tensor], stored: Mapping[str, str]
    ) -> tuple[dict[str, str], list[str]]:
        """Give the model the run's attention, recomputation and compilation: the choices, and lines that say them."""
        compute, sizes = self.config.compute, self.sizes
        clips, length = self.config.optim.batch_size, self.visible + self.decoded
        extra = int(isinstance(sizes, MaeStConfig) and sizes.class_token)
        if isinstance(sizes, MaeStConfig):
            length = sizes.tokens
        seen, whole = self.visible + extra, length + extra
        head, decoder_head = sizes.width // sizes.heads, sizes.decoder_width // sizes.decoder_heads
        uses = {
            "encoder": Use(clips, seen, seen, sizes.heads, head, True),
            "decoder": Use(clips, whole, whole, sizes.decoder_heads, decoder_head, True),
        }
        dtype = torch.bfloat16 if bf16 else torch.float32
        chosen, said = choose_attention(compute, uses, self.world, dtype, stored)
        self.model.set_attention(chosen["encoder"], chosen["decoder"])
        if compute.recompute != "none":
            self.model.set_recompute(compute.recompute)
            said.append(f"recompute: {compute.recompute}")
        if compute.compile:
            self.model.compile(fullgraph=True, dynamic=False)
            said.append("torch.compile: the model; the first step takes minutes")
        return {name: backend.name for name, backend in chosen.items()}, said

    def objective(self, model: nn.Module, bf16: bool) -> Callable[[Tensor], Reconstruction]:
        """clip [B,T,H,W,3] -> the error of the hidden tokens that the run's masking rule draws."""

        def step(clip: Tensor) -> Reconstruction:
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=bf16):
                return self._step(model, clip)

        return step

    def _step(self, model: nn.Module, clip: Tensor) -> Reconstruction:
        config, mask, sizes = self.config, self.config.mask, self.sizes
        if config.objective == "adamae":
            assert isinstance(sizes, VideoMaeConfig)
            return adamae_step(model, sizes, clip, self.visible)
        sets = masking.draw_blind(mask.rule, len(clip), sizes.token_frames, sizes.patches, mask.ratio, clip.device)
        assert sets is not None  # no rule here waits for a teacher
        visible = masking.token_ids(sets, sizes.tokens)
        if isinstance(sizes, MaeStConfig):
            return mae_st_step(model, sizes, clip, visible)
        if mask.decoder_ratio is None:
            return videomae_step(model, sizes, clip, visible)
        decoded = draw_running_cells(
            len(clip), sizes.token_frames, sizes.grid, sizes.grid, mask.decoder_ratio, clip.device
        )
        return videomae_step(model, sizes, clip, visible, decoded, self.overlap)

    def draw(self, batch: Batch, out: Reconstruction, folder: Path) -> None:
        """A clip, what the encoder saw of it, and what the decoder made of it: `visible.png`."""
        from umt_fast.run.pictures import draw_reconstruction

        clip, tokens = batch.clip[:1].cpu(), self.sizes.tokens
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


def plan(config: PixelsConfig, _gpu_memory: float | None) -> str:
    """What a step costs, in words. The memory of activations is not estimated."""
    with torch.device("meta"):
        built = Objective(config, World(0, 1, torch.device("meta")))
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    return (
        f"one forward and backward pass of {config.optim.batch_size} clips per process, {built.visible} of "
        f"{config.model.tokens} tokens visible, {built.decoded} decoded\n"
        f"  {built.flops / 1e12:.2f} TFLOP\n"
        f"  {16 * parameters / costs.GIB:.1f} GiB of weights, gradients and optimiser"
    )

"""Modules of the ops with parameters: FSDP2 and other wrappers gather parameters in hooks on a module's call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from umt_kernels.add_layer_norm import add_layer_norm
from umt_kernels.gather_layer_norm import gather_layer_norm, gather_rms_norm
from umt_kernels.patch_embed import patch_embed

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


class GatherLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, called like `gather_layer_norm`: `norm(x, row_ids=..., position=...)`."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "*k b l d"], **settings: Any
    ) -> Float[Tensor, "*k r m d"]:
        return gather_layer_norm(x, self.weight, self.bias, self.eps, **settings)


class GatherRMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last dimension, called like `gather_rms_norm`."""

    def forward(self, x: Float[Tensor, "*k b l d"], **settings: Any) -> Float[Tensor, "*k r m d"]:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return gather_rms_norm(x, self.weight, eps, **settings)


class AddLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, called like `add_layer_norm`: `norm(residual, branch, scale=...)`."""

    def forward(  # type: ignore[override]
        self, residual: Float[Tensor, "b l d"], branch: Float[Tensor, "b m d"], **settings: Any
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m d"]]:
        return add_layer_norm(residual, branch, self.weight, self.bias, self.eps, **settings)


class PatchEmbed(nn.Module):
    """`patch_embed` with its weight in `proj`, a Conv3d or Conv2d whose stride is the patch size."""

    def __init__(self, proj: nn.Conv3d | nn.Conv2d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, clip: Shaped[Tensor, "b ..."], **settings: Any) -> Float[Tensor, "r m d"]:
        *_, height, width = self.proj.stride
        return patch_embed(clip, self.proj.weight, self.proj.bias, (height, width), **settings)

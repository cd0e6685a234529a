"""Ops of Unmasked Teacher pre-training (arXiv 2303.16058), usable on their own.

On CUDA tensors every op runs Triton kernels. On other devices, and for dtypes without a kernel, it runs its definition
in plain PyTorch, `umt_kernels.reference`. Tests compare the kernels with this definition.
"""

from umt_kernels.add_layer_norm import add_layer_norm
from umt_kernels.cls_scores import cls_scores
from umt_kernels.cosine_alignment_loss import alignment_loss, cosine_alignment_loss
from umt_kernels.eight_bit import EightBit, add_layer_norm_8bit, linear_8bit, quantize_rows
from umt_kernels.gather_layer_norm import gather_layer_norm, gather_rms_norm
from umt_kernels.gather_patches import IMAGENET_MEAN, IMAGENET_STD, gather_patches, weight_matrix
from umt_kernels.linear import linear
from umt_kernels.masks import ids_to_mask, mask_to_ids
from umt_kernels.mlp import mlp
from umt_kernels.modules import AddLayerNorm, GatherLayerNorm, GatherRMSNorm, PatchEmbed
from umt_kernels.patch_embed import patch_embed
from umt_kernels.pixel_loss import pixel_loss
from umt_kernels.sample_visible import sample_visible

__version__ = "0.1.0"

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AddLayerNorm",
    "EightBit",
    "GatherLayerNorm",
    "GatherRMSNorm",
    "PatchEmbed",
    "add_layer_norm",
    "add_layer_norm_8bit",
    "alignment_loss",
    "cls_scores",
    "cosine_alignment_loss",
    "gather_layer_norm",
    "gather_patches",
    "gather_rms_norm",
    "ids_to_mask",
    "linear",
    "linear_8bit",
    "mask_to_ids",
    "mlp",
    "patch_embed",
    "pixel_loss",
    "quantize_rows",
    "sample_visible",
    "weight_matrix",
]

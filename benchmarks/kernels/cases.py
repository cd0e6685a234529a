"""The cases: each op as the models use it, with formulas for the bytes that must move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import umt_kernels
from torch import Tensor
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD, reference, weight_matrix

from benchmarks.kernels import fused_cases, libraries, mlp_cases, published
from benchmarks.kernels.case import OpCase, Run
from benchmarks.kernels.inputs import IDS, make_clip, make_visible, with_grad
from benchmarks.kernels.published import LAYER_NORM_EPS, Inputs
from benchmarks.kernels.shapes import MASK_RATIO, Shapes
from umt_fast.masking import count_visible
from umt_fast.models.positions import bicubic_window, sinusoid_positions


def _patches(x: Inputs, s: Shapes, halo: int, dtype: torch.dtype) -> Tensor:
    ids = x.get("token_ids")
    return reference.gather_patches(x["clip"], s.patch, 1, ids, halo, IMAGENET_MEAN, IMAGENET_STD, dtype)


def gather_patches(s: Shapes) -> Iterator[OpCase]:
    """All tokens (the teacher's input without a resize), visible tokens (the student's), all with a halo."""
    yield _gather_patches(s, "all tokens")
    yield _gather_patches(s, "visible tokens", visible=True)
    if s.halo:  # otherwise this teacher does not resize
        yield _gather_patches(s, "all tokens, halo", halo=s.halo)


def _gather_patches(s: Shapes, form: str, visible: bool = False, halo: int = 0) -> OpCase:
    count = s.batch * (s.kept if visible else s.tokens)

    def make(device: torch.device) -> Inputs:
        return {"clip": make_clip(s, device), **(make_visible(s, device) if visible else {})}

    return OpCase(
        "gather_patches",
        form,
        s,
        make,
        lambda x: umt_kernels.gather_patches(
            x["clip"], s.patch, token_ids=x.get("token_ids"), halo=halo, dtype=s.dtype
        ),
        partial(published.gather_patches, patch=s.patch, halo=halo, dtype=s.dtype),
        lambda x, dtype: _patches(x, s, halo, dtype),
        read=count * (3 * s.patch**2 + visible * IDS),
        written=count * 3 * (s.patch + 2 * halo) ** 2 * s.dtype.itemsize,
    )


def patch_embed(s: Shapes) -> Iterator[OpCase]:
    """The student's embedding (visible tokens, bias, positions; trained) and the teacher's (all tokens; frozen)."""
    item, features = s.dtype.itemsize, 3 * s.patch**2
    leaves = ("weight", "bias")
    table = sinusoid_positions(s.tokens, s.width)

    def student(device: torch.device, backward: bool) -> Inputs:
        options: Any = {"device": device, "dtype": s.dtype}
        x = {"clip": make_clip(s, device), **make_visible(s, device), "position": table.to(**options)}
        x["weight"] = torch.randn(s.width, 3, 1, s.patch, s.patch, **options) * features**-0.5
        x["bias"] = torch.randn(s.width, **options)
        return with_grad(x, leaves, backward, (s.batch, s.kept, s.width))

    def embed(x: Inputs, dtype: torch.dtype) -> Tensor:
        rows = F.linear(_patches(x, s, 0, dtype), weight_matrix(x["weight"], x["clip"]), x["bias"])
        return rows + x["position"][x["token_ids"]]

    rows, pixels = s.batch * s.kept, s.batch * s.kept * features
    matrix = (features + 1) * s.width * item
    read = pixels + matrix + rows * IDS + min(s.tokens, rows) * s.width * item
    flops = 2 * pixels * s.width
    for backward in (False, True):
        yield OpCase(
            "patch_embed",
            "visible tokens",
            s,
            partial(student, backward=backward),
            lambda x: umt_kernels.patch_embed(
                x["clip"], x["weight"], x["bias"], s.patch, token_ids=x["token_ids"], position=x["position"]
            ),
            partial(published.student_patch_embed, patch=s.patch),
            embed,
            # Backward: the pixels and the output's gradient give the weight's.
            read=read + backward * (pixels + rows * IDS + rows * s.width * item),
            written=rows * s.width * item + backward * matrix,
            backward=backward,
            flops=flops * (1 + backward),
            leaves=leaves,
            libraries={} if backward else {"implicit": partial(libraries.implicit_patch_embed, s.patch, s.dtype)},
        )

    def teacher(device: torch.device) -> Inputs:
        conv1 = torch.randn(s.width, 3, 1, s.teacher_patch, s.teacher_patch, device=device)
        weight = (conv1 * (3 * s.teacher_patch**2) ** -0.5).to(s.dtype)
        folded = weight
        if s.halo:
            resize = bicubic_window(s.patch, s.teacher_patch)[0].to(device)
            folded = torch.einsum("dctij,ip,jq->dctpq", weight.double(), resize, resize).to(s.dtype)
        return {"clip": make_clip(s, device), "conv1": weight, "weight": folded}

    halo = s.halo  # read here, otherwise torch.compile would trace its computation too
    rows, window = s.batch * s.tokens, 3 * (s.patch + 2 * halo) ** 2
    yield OpCase(
        "patch_embed",
        "all tokens",
        s,
        teacher,
        lambda x: umt_kernels.patch_embed(x["clip"], x["weight"], None, s.patch),
        partial(published.teacher_patch_embed, side=s.teacher_side),
        lambda x, dtype: F.linear(_patches(x, s, halo, dtype), weight_matrix(x["weight"], x["clip"])),
        read=rows * features + window * s.width * item,
        written=rows * s.width * item,
        flops=2 * rows * window * s.width,
    )


def sample_visible(s: Shapes) -> Iterator[OpCase]:
    """Per frame by the teacher's scores, and over the whole clip with equal ones."""
    yield _sample_visible(s, "per frame", s.images, s.patches, s.num_visible, spread=1.0)
    yield _sample_visible(s, "whole clip", s.batch, s.tokens, count_visible(s.tokens, MASK_RATIO), spread=0.0)


def _sample_visible(s: Shapes, form: str, rows: int, ids: int, count: int, spread: float) -> OpCase:
    return OpCase(
        "sample_visible",
        form,
        s,
        lambda device: {"scores": (spread * torch.randn(rows, ids, device=device)).softmax(dim=1)},
        lambda x: umt_kernels.sample_visible(x["scores"], count),
        partial(published.sample_visible, num_visible=count),
        lambda x, dtype: reference.sample_visible(x["scores"], count, None),
        read=rows * ids * 4,
        written=rows * count * 4,
    )


def cls_scores(s: Shapes) -> Iterator[OpCase]:
    """The teacher's last block, with the keys of a joint projection of keys and values."""
    length, depth = s.patches + 1, s.width // s.heads
    leaves = ("q", "k")

    def make(device: torch.device, backward: bool) -> Inputs:
        options: Any = {"device": device, "dtype": s.dtype}
        queries = torch.randn(s.images, length, s.heads, depth, **options)
        k = torch.randn(s.images, length, 2, s.heads, depth, **options)[:, :, 0].transpose(1, 2)
        x = {"q": queries[:, 0].clone(), "k": k, "queries": queries}
        x = with_grad(x, (*leaves, "queries"), backward, (s.images, s.patches))
        if backward:
            x["grad"] = x["grad"].float()  # the scores are float32
        return x

    def eager(x: Inputs) -> Tensor:
        return published.cls_scores(x).float()

    rows = s.images * s.heads
    inputs = rows * (length + 1) * depth * s.dtype.itemsize
    scores = s.images * s.patches * 4
    for backward in (False, True):
        yield OpCase(
            "cls_scores",
            "last block",
            s,
            partial(make, backward=backward),
            lambda x: umt_kernels.cls_scores(x["q"], x["k"]),
            eager,
            lambda x, dtype: reference.cls_scores(x["q"], x["k"]),
            read=inputs + backward * (inputs + scores),
            written=scores + backward * inputs,
            backward=backward,
            leaves=leaves,
            eager_leaves={"q": "queries"},
        )


def gather_layer_norm(s: Shapes) -> Iterator[OpCase]:
    """The teacher's ln_post at the visible rows of each frame, and the student's norm with each token's position."""
    for backward in (False, True):
        yield _gather_layer_norm(s, "rows", backward, s.images, s.patches + 1, s.num_visible)
    for backward in (False, True):
        yield _gather_layer_norm(s, "position", backward, s.batch, s.kept, s.kept)


def _gather_layer_norm(s: Shapes, form: str, backward: bool, batch: int, length: int, kept: int) -> OpCase:
    gather = form == "rows"
    leaves = ("x", "weight", "bias")

    def make(device: torch.device) -> Inputs:
        options: Any = {"device": device, "dtype": s.dtype}
        visible = make_visible(s, device)
        x = {name: torch.randn(s.width, **options) for name in ("weight", "bias")}
        x["x"] = torch.randn(batch, length, s.width, **options)
        if gather:
            x["row_ids"] = visible["patch_ids"] + 1  # row 0 is the class token
            x["hidden"] = F.pad(visible["hidden"].view(batch, -1), (1, 0), value=True)
        else:
            x["position_ids"], x["hidden"] = visible["token_ids"], visible["hidden"]
            x["position"] = sinusoid_positions(s.tokens, s.width).to(**options)
        return with_grad(x, leaves, backward, (batch, kept, s.width))

    rows, row = batch * kept, s.width * s.dtype.itemsize
    positions = 0 if gather else min(s.tokens, rows) * row
    affine = 2 * row
    return OpCase(
        "gather_layer_norm",
        form,
        s,
        make,
        lambda x: umt_kernels.gather_layer_norm(
            x["x"],
            x["weight"],
            x["bias"],
            LAYER_NORM_EPS,
            row_ids=x.get("row_ids"),
            position=x.get("position"),
            position_ids=x.get("position_ids"),
        ),
        published.gather_layer_norm_rows if gather else published.gather_layer_norm_position,
        lambda x, dtype: reference.gather_layer_norm(
            x["x"], x["weight"], x["bias"], LAYER_NORM_EPS, x.get("row_ids"), x.get("position"), x.get("position_ids")
        ),
        # Backward: the rows, their gradients and the weight.
        read=rows * (row + IDS) + affine + positions + backward * (rows * (2 * row + gather * IDS) + row),
        # Backward: rows that were not kept get a gradient too, of zeros.
        written=rows * row + backward * (batch * length * row + affine),
        backward=backward,
        leaves=leaves,
        libraries=_with_library(
            libraries.gather_layer_norm_rows if gather else libraries.gather_layer_norm_position, backward
        ),
    )


def cosine_alignment_loss(s: Shapes) -> Iterator[OpCase]:
    """All aligned layers, with each one's LayerNorm."""
    shape = (s.layers, s.batch, s.kept, s.target_width)
    leaves = ("predictions", "weight", "bias")

    def make(device: torch.device, backward: bool) -> Inputs:
        options: Any = {"device": device, "dtype": s.dtype}
        x = {name: torch.randn(s.layers, s.target_width, **options) for name in ("weight", "bias")}
        x["predictions"], x["targets"] = torch.randn(shape, **options), torch.randn(shape, **options)
        return with_grad(x, leaves, backward, None)

    size, affine = math.prod(shape) * s.dtype.itemsize, 2 * s.layers * s.target_width * s.dtype.itemsize
    for backward in (False, True):
        yield OpCase(
            "cosine_alignment_loss",
            "with LayerNorm",
            s,
            partial(make, backward=backward),
            lambda x: umt_kernels.cosine_alignment_loss(
                x["predictions"], x["targets"], weight=x["weight"], bias=x["bias"], eps=LAYER_NORM_EPS
            ),
            published.cosine_alignment_loss,
            lambda x, dtype: reference.cosine_alignment_loss(
                x["predictions"], x["targets"], None, x["weight"], x["bias"], LAYER_NORM_EPS
            ),
            # Loss and gradient of a row need only this row, so one pass computes both.
            read=2 * size + affine,
            written=4 + backward * (size + affine),
            backward=backward,
            leaves=leaves,
            libraries=_with_library(libraries.cosine_alignment_loss, backward),
        )


def _with_library(run: Callable[..., Tensor], backward: bool) -> dict[str, Run]:
    def contender(load: Callable[[], libraries.LayerNorm]) -> Run:
        loaded: list[libraries.LayerNorm] = []  # filled at the first call: listing the cases imports no library

        def call(x: Inputs) -> Tensor:
            if not loaded:
                loaded.append(load())
            return run(x, loaded[0])

        return call

    return {name: contender(load) for name, load in (libraries.BACKWARD if backward else libraries.FORWARD).items()}


OPS = (
    *(gather_patches, patch_embed, sample_visible, cls_scores, gather_layer_norm, cosine_alignment_loss),
    *(fused_cases.add_layer_norm, fused_cases.linear, fused_cases.pixel_loss),
    *mlp_cases.OPS,
)


def cases(shapes: Shapes) -> list[OpCase]:
    """Every op and direction at these shapes."""
    return [case for op in OPS for case in op(shapes)]

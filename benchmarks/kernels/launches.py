"""Every form in which the models launch a kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from umt_kernels import (
    add_layer_norm,
    add_layer_norm_8bit,
    cls_scores,
    cosine_alignment_loss,
    gather_layer_norm,
    gather_patches,
    pixel_loss,
    quantize_rows,
    sample_visible,
)
from umt_kernels.matmul import GROUP, matmul

from benchmarks.kernels.implicit_patch_embed import implicit_patch_embed
from benchmarks.kernels.shapes import MASK_RATIO, UMT_B, UMT_L, VIT_H, Shapes
from umt_fast.masking import count_visible

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
IDS = {"i32": torch.int32, "i64": torch.int64}

MODELS = (UMT_B, UMT_L, VIT_H)


@dataclass(frozen=True)
class LaunchCase:
    """A call of an op on uninitialised tensors of a model's sizes."""

    op: str
    name: str
    run: Callable[[], object]
    arch: int = 80
    """The first architecture that supports the call."""


def cases() -> list[LaunchCase]:
    """Every op in every form of pre-training one of the models, or of a user's code with the same sizes."""
    found = []
    for model in MODELS:
        for op, listed in _FORMS.items():
            for name, run in listed(model):
                found.append(LaunchCase(op, f"{model.title} {name}", run, 90 if name.startswith("fp8") else 80))
    return found


_Forms = Iterator[tuple[str, Callable[[], object]]]


def _patches(m: Shapes) -> _Forms:
    def run(clip_dtype: torch.dtype, dtype: torch.dtype, halo: int, ids: torch.dtype | None) -> None:
        uint8 = clip_dtype == torch.uint8
        frames = (m.batch, m.frames, m.side, m.side, 3) if uint8 else (m.batch, 3, m.frames, m.side, m.side)
        token_ids = None if ids is None else torch.zeros(m.batch, m.kept, dtype=ids)
        gather_patches(torch.empty(frames, dtype=clip_dtype), m.patch, token_ids=token_ids, halo=halo, dtype=dtype)

    clips = {"u8": torch.uint8, **DTYPES}
    for (clip, clip_dtype), (name, dtype) in itertools.product(clips.items(), DTYPES.items()):
        teacher = f"teacher, all, halo {m.halo}" if m.halo else "teacher, all"
        yield f"{teacher}, {clip}->{name}", partial(run, clip_dtype, dtype, m.halo, None)
        for ids in IDS:
            yield f"student, {ids} ids, {clip}->{name}", partial(run, clip_dtype, dtype, 0, IDS[ids])


def _implicit(m: Shapes) -> _Forms:
    def run(dtype: torch.dtype, ids: torch.dtype) -> None:
        clip = torch.empty(m.batch, m.frames, m.side, m.side, 3, dtype=torch.uint8)
        weight, bias = torch.empty(m.width, 3, 1, m.patch, m.patch), torch.empty(m.width)
        token_ids = torch.zeros(m.batch, m.kept, dtype=ids)
        table = torch.empty(m.tokens, m.width)
        implicit_patch_embed(clip, weight, bias, m.patch, token_ids, table, dtype)

    for (name, dtype), (ids, id_dtype) in itertools.product(DTYPES.items(), IDS.items()):
        yield f"student, implicit, {ids} ids, u8->{name}", partial(run, dtype, id_dtype)


def _layer_norm(m: Shapes) -> _Forms:
    def run(rows: tuple[int, int], dtype: torch.dtype, kept: int, ids: torch.dtype, position: bool, grad: bool) -> None:
        x = torch.empty(*rows, m.width, dtype=dtype, requires_grad=grad)
        weight, bias = (torch.empty(m.width, requires_grad=grad) for _ in range(2))
        row_ids = torch.arange(kept, dtype=ids).repeat(rows[0], 1) if kept else None
        table = torch.empty(m.tokens, m.width) if position else None
        position_ids = torch.zeros(rows[0], kept or rows[1], dtype=ids) if position else None
        y = gather_layer_norm(x, weight, bias, 1e-6, row_ids=row_ids, position=table, position_ids=position_ids)
        if grad:
            y.backward(torch.empty_like(y))

    images, visible, tokens = m.images, m.kept, m.tokens
    for name, dtype in DTYPES.items():
        yield f"teacher, no ids, {name}", partial(run, (images, m.num_visible), dtype, 0, torch.int64, False, False)
        for ids, id_dtype in IDS.items():
            yield (
                f"teacher, {ids} ids, {name}",
                partial(run, (images, 1 + m.patches), dtype, m.num_visible, id_dtype, False, False),
            )
            yield f"student, position, {ids}, {name}", partial(run, (m.batch, visible), dtype, 0, id_dtype, True, True)
            yield f"gather, {ids} ids, {name}", partial(run, (m.batch, tokens), dtype, visible, id_dtype, False, True)


def _add_norm(m: Shapes) -> _Forms:
    """Teacher: every row of a bf16 residual, and the last block's visible rows. Student with drop path. Text layers."""

    def run(
        rows: tuple[int, int],
        residual: torch.dtype,
        branch: torch.dtype,
        grad: bool,
        kept: int = 0,
        drop: bool = False,
        post_norm: bool = False,
    ) -> None:
        x = torch.empty(*rows, m.width, dtype=residual, requires_grad=grad)
        added = torch.empty(rows[0], kept or rows[1], m.width, dtype=branch, requires_grad=grad)
        weight, bias = (torch.empty(m.width, requires_grad=grad) for _ in range(2))
        scale = torch.empty(rows[0]) if drop else None
        ids = torch.arange(kept).repeat(rows[0], 1) if kept else None
        outputs = add_layer_norm(
            x, added, weight, bias, 1e-6, scale=scale, row_ids=ids, out_dtype=branch, post_norm=post_norm
        )
        if grad:
            sum(outputs).backward(torch.empty_like(x))  # type: ignore[union-attr]

    def biased(rows: tuple[int, int]) -> None:
        x, added = (torch.empty(*rows, m.width, requires_grad=True) for _ in range(2))
        weight, bias, shift = (torch.empty(m.width, requires_grad=True) for _ in range(3))
        table, ids = torch.empty(m.tokens, m.width), torch.zeros(rows, dtype=torch.int64)
        y = add_layer_norm(
            x, added, weight, bias, 1e-6, branch_bias=shift, scale=torch.empty(rows[0]), position=table,
            position_ids=ids,
        )[1]  # fmt: skip
        y.backward(torch.empty_like(y))

    teacher, student, text, half = (m.images, 1 + m.patches), (m.batch, m.kept), (m.batch, 32), torch.bfloat16
    yield "teacher, bf16", partial(run, teacher, half, half, False)
    yield "teacher, last block, bf16", partial(run, teacher, half, half, False, kept=m.num_visible)
    for name, dtype in DTYPES.items():
        yield f"student, drop path, fp32+{name}", partial(run, student, torch.float32, dtype, True, drop=True)
    yield "student, bias, position, fp32", partial(biased, student)
    yield "text, post-norm, bf16", partial(run, text, half, half, True, post_norm=True)


def _cls_scores(m: Shapes) -> _Forms:
    def run(dtype: torch.dtype) -> None:
        images, depth = m.images, m.width // m.heads
        both = torch.empty(images, 1 + m.patches, 2, m.heads, depth, dtype=dtype)  # keys and values of one GEMM
        k = both[:, :, 0].transpose(1, 2).requires_grad_()
        scores = cls_scores(torch.empty(images, m.heads, depth, dtype=dtype, requires_grad=True), k)
        scores.backward(torch.empty_like(scores))

    for name, dtype in DTYPES.items():
        yield name, partial(run, dtype)


def _visible(m: Shapes) -> _Forms:
    def run(rows: int, patches: int, kept: int, dtype: torch.dtype) -> None:
        sample_visible(torch.empty(rows, patches, dtype=dtype), kept)

    tokens = m.tokens
    for name, dtype in DTYPES.items():
        yield f"per frame, {name}", partial(run, m.images, m.patches, m.num_visible, dtype)
        yield f"over the clip, {name}", partial(run, m.batch, tokens, count_visible(tokens, MASK_RATIO), dtype)


def _loss(m: Shapes) -> _Forms:
    def run(dtype: torch.dtype, norm: bool, grad: bool, ids: torch.dtype | None) -> None:
        visible = m.kept
        rows = visible if ids is None else m.tokens
        predictions = torch.empty(m.layers, m.batch, visible, m.target_width, dtype=dtype, requires_grad=grad)
        loss = cosine_alignment_loss(
            predictions,
            torch.empty(m.layers, m.batch, rows, m.target_width, dtype=dtype),
            target_ids=None if ids is None else torch.zeros(m.batch, visible, dtype=ids),
            weight=torch.empty(m.layers, m.target_width, requires_grad=grad) if norm else None,
            bias=torch.empty(m.layers, m.target_width, requires_grad=grad) if norm else None,
        )
        if grad:
            loss.backward()

    flags = itertools.product((False, True), (False, True), ("", *IDS), DTYPES)
    for norm, grad, ids, name in flags:
        parts = ["norm"] * norm + ["grad"] * grad + [f"{ids} ids"] * bool(ids) + [name]
        yield ", ".join(parts), partial(run, DTYPES[name], norm, grad, IDS.get(ids))


def _matmul(m: Shapes) -> _Forms:
    """Every product with an epilogue of a block: teacher, student both ways, and the 8-bit teacher."""
    if m is VIT_H:  # it runs the same compiled code, with other sizes
        return
    half, width, hidden = torch.bfloat16, m.width, 4 * m.width
    every, visible = m.images * (1 + m.patches), m.batch * m.kept

    def run(rows: int, k: int, n: int, dtype: torch.dtype, out: torch.dtype = half, **settings: Any) -> None:
        a, b = torch.empty(rows, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
        for name in ("residual", "derivative_at"):
            if name in settings:
                settings[name] = torch.empty(rows, n, dtype=settings[name])
        if settings.get("transposed"):
            b = b.view(k, n)
        if dtype.itemsize == 1:
            groups = settings.pop("groups", None)
            settings |= {"a_scale": torch.empty(rows if groups is None else (groups, rows)), "b_scale": torch.empty(n)}
        matmul(a, b, out, bias=None if "column_sums" in settings else torch.empty(n), **settings)

    yield "teacher, qkv", partial(run, every, width, 3 * width, half)
    yield "teacher, fc1", partial(run, every, width, hidden, half, activation="quick_gelu")
    yield "teacher, fc2", partial(run, every, hidden, width, half, residual=half)
    yield "student, fc1", partial(run, visible, width, hidden, half, activation="gelu", keep_before=True)
    yield (
        "student, fc2, fp32 residual",
        partial(run, visible, hidden, width, half, torch.float32, residual=torch.float32),
    )
    yield (
        "student, fc2 backward",
        partial(run, visible, width, hidden, half, transposed=True, activation="gelu", derivative_at=half,
                column_sums=True),
    )  # fmt: skip
    for name, dtype in {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.items():
        yield f"{name} teacher, qkv", partial(run, every, width, 3 * width, dtype)
        yield f"{name} teacher, fc1", partial(run, every, width, hidden, dtype, dtype, activation="quick_gelu")
        yield f"{name} teacher, fc2", partial(run, every, hidden, width, dtype, groups=hidden // GROUP)


def _pixels(m: Shapes) -> _Forms:
    """Tubes of two frames with 90% of the tokens hidden, as in VideoMAE."""

    def run(clip_dtype: torch.dtype, dtype: torch.dtype, normalise: Literal["channel", "token"]) -> None:
        frames, hidden = 2 * m.frames, m.frames * int(0.9 * m.patches)
        uint8 = clip_dtype == torch.uint8
        shape = (m.batch, frames, m.side, m.side, 3) if uint8 else (m.batch, 3, frames, m.side, m.side)
        predictions = torch.empty(m.batch, hidden, 6 * m.patch**2, dtype=dtype, requires_grad=True)
        ids = torch.zeros(m.batch, hidden, dtype=torch.int64)
        clip = torch.empty(shape, dtype=clip_dtype)
        pixel_loss(predictions, clip, ids, m.patch, normalise=normalise, eps_in_root=normalise == "token").backward()

    kinds: tuple[Literal["channel", "token"], ...] = ("channel", "token")
    for clip_dtype, normalise in itertools.product((torch.uint8, torch.float32), kinds):
        for name, dtype in DTYPES.items():
            pixels = "uint8" if clip_dtype == torch.uint8 else "fp32"
            yield f"{pixels} clip, per {normalise}, {name}", partial(run, clip_dtype, dtype, normalise)


def _eight_bit(m: Shapes) -> _Forms:
    """The 8-bit teacher's ops between products: sum, norm and quantisation; quantisation of the attention's output."""
    half, rows = torch.bfloat16, (m.images, 1 + m.patches, m.width)

    def norm(dtype: torch.dtype) -> None:
        weight = torch.empty(m.width)
        add_layer_norm_8bit(torch.empty(rows, dtype=half), torch.empty(rows, dtype=half), weight, weight, 1e-5, dtype)

    def only(dtype: torch.dtype) -> None:
        quantize_rows(torch.empty(rows, dtype=half), dtype)

    for name, dtype in {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.items():
        yield f"{name} teacher, sum and norm", partial(norm, dtype)
        yield f"{name} teacher, rows", partial(only, dtype)


_FORMS: dict[str, Callable[[Shapes], _Forms]] = {
    "gather_patches": _patches,
    "implicit_patch_embed": _implicit,
    "gather_layer_norm": _layer_norm,
    "add_layer_norm": _add_norm,
    "matmul": _matmul,
    "eight_bit": _eight_bit,
    "cls_scores": _cls_scores,
    "sample_visible": _visible,
    "cosine_alignment_loss": _loss,
    "pixel_loss": _pixels,
}

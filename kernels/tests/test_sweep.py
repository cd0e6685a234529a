"""Random calls of every op against its definition in float64: shapes, dtypes, strides and extreme values.

The tests run a few. `python kernels/tests/test_sweep.py 500 [OP...]` runs 500 seeds of each op, with its kernels under
TRITON_INTERPRET=1, and prints the faults.

Tolerances follow from the dtypes. The error of an element may be a few roundings of its own dtype, plus the change of
the definition when every input has a relative error of one unit of the op's computing dtype: if the definition
subtracts large numbers, no arithmetic in this dtype is better. Where the definition gives NaN or infinity, the op must
too. Where only the op does, a square or sum has left the range of the dtype: then the definition in this dtype must
overflow too.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from umt_kernels import (
    add_layer_norm,
    alignment_loss,
    backend,
    cls_scores,
    gather_layer_norm,
    gather_patches,
    linear,
    linear_8bit,
    mlp,
    patch_embed,
    pixel_loss,
    quantize_rows,
    sample_visible,
)
from umt_kernels.backend import runs_triton

UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TINIEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAWS = 4
"""Number of perturbed copies of the inputs, to estimate the effect of rounding."""
ALLOWED = 32
"""Factor of this effect: sums of a few hundred terms in another order round several times."""


@dataclass
class Call:
    """A function of tensors, its tensors, and the names of those with a gradient."""

    name: str
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: dict[str, Tensor]
    differentiated: tuple[str, ...]
    note: str = ""
    computes: torch.dtype = torch.float32
    """Dtype of the op's intermediate results."""
    floor: float = 0.0
    """Absolute error of the outputs, in units of that dtype."""


class Draw:
    """Random choices of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        """low .. high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[self.number(0, len(choices) - 1)]

    def flag(self) -> bool:
        return self.one_of((False, True))

    def values(self, kind: str, *shape: int, dtype: torch.dtype, huge: float = 5e29) -> Tensor:
        x = torch.randn(shape, generator=self.generator)
        half = dtype == torch.float16
        if kind == "huge":
            x = x.sign() * (1 + x.abs() % 1) * (3e4 if half else huge)
        elif kind == "tiny":
            x = x * (1e-6 if half else 1e-30)
        elif kind == "zeros":
            x = torch.zeros(shape)
        elif kind == "offset":
            x = x + 300
        elif kind in ("nan", "inf") and x.numel():
            x.view(-1)[self.number(0, x.numel() - 1)] = float(kind)
        return self.laid(x.to(dtype))

    def laid(self, x: Tensor) -> Tensor:
        """`x` as a slice, as a transposed tensor, or contiguous."""
        layout = self.number(0, 3)
        if layout == 1 and x.dim():
            outer = [n + 3 if axis == x.dim() - 1 else 2 * n for axis, n in enumerate(x.shape)]
            whole = torch.full(outer, 77, dtype=x.dtype)
            part = whole[tuple(slice(0, 2 * n, 2) for n in x.shape[:-1])][..., 1 : 1 + x.shape[-1]]
            return part.copy_(x)
        return x.mT.contiguous().mT if layout == 2 and x.dim() > 1 else x.contiguous()

    def ids(self, rows: int, kept: int, limit: int, padded: bool) -> Tensor:
        ids = torch.stack([torch.randperm(limit, generator=self.generator)[:kept] for _ in range(rows)])
        if padded:
            ids = ids.masked_fill(torch.rand(ids.shape, generator=self.generator) < 0.3, -1)
        return self.laid(ids.to(self.one_of((torch.int32, torch.int64))))


WIDTHS = (3, 24, 65, 200)
"""Widths of normalised rows. Not 1: a single column becomes 0, and its gradient is rounding times 1 / sqrt(eps)."""
ROOT = 5e17
"""Largest values of rows to normalise: float32 holds the sum of their squares. Beyond 1e19 the kernels
give 0, as F.rms_norm does (F.layer_norm on a CPU: NaN)."""
KINDS = ("normal", "normal", "offset", "huge", "tiny", "zeros", "nan", "inf")


def _norm(draw: Draw, kind: str, dtype: torch.dtype) -> Call:
    batch, length, width = draw.number(1, 3), draw.number(1, 6), draw.one_of(WIDTHS)
    gathers, rms, padded, tables = draw.flag(), draw.flag(), draw.flag(), draw.flag()
    kept = draw.number(1, length) if gathers else length
    sets = batch * draw.number(1, 2) if gathers else batch
    lead = (2,) if draw.flag() else ()
    tensors = {"x": draw.values(kind, *lead, batch, length, width, dtype=dtype, huge=ROOT)}
    parameters = draw.one_of((dtype, torch.float32))
    if draw.flag():
        tensors["weight"] = draw.values("normal", width, dtype=parameters)
    if draw.flag() and not rms:
        tensors["bias"] = draw.values("normal", width, dtype=parameters)
    ids: dict[str, Tensor] = {"row_ids": draw.ids(sets, kept, length, padded)} if gathers else {}
    if tables:
        tensors["position"] = draw.values("normal", 9, width, dtype=torch.float32)
        ids["position_ids"] = draw.ids(sets, kept, 9, padded)
    eps = draw.one_of((1e-6, 1e-3))
    # Rows of several sets get the sum of their gradients, which PyTorch's gather adds in the dtype of x.
    computes = dtype if sets > batch and not runs_triton(tensors["x"]) else torch.float32

    def run(**t: Tensor) -> Tensor:
        return gather_layer_norm(
            t.pop("x"), t.pop("weight", None), t.pop("bias", None), eps, rms=rms, padded=padded, **ids, **t
        )

    return Call(
        "gather_layer_norm", run, tensors, tuple(tensors), f"rms={rms} padded={padded} ids={list(ids)}", computes
    )


def _add(draw: Draw, kind: str, dtype: torch.dtype) -> Call:
    batch, length, width = draw.number(1, 3), draw.number(1, 6), draw.one_of(WIDTHS)
    gathers, rms, post = draw.flag(), draw.flag(), draw.flag()
    kept = draw.number(1, length) if gathers else length
    tensors = {
        "residual": draw.values(kind, batch, length, width, dtype=draw.one_of((dtype, torch.float32)), huge=ROOT),
        "branch": draw.values(draw.one_of((kind, "normal")), batch, kept, width, dtype=dtype, huge=ROOT),
    }
    for name in ("weight", "bias", "branch_bias"):
        if draw.flag():
            tensors[name] = draw.values("normal", width, dtype=torch.float32)
    fixed: dict[str, Any] = {"row_ids": draw.ids(batch, kept, length, False)} if gathers else {}
    scale = draw.one_of((None, 0.5, draw.values("normal", batch, dtype=torch.float32)))
    eps = draw.one_of((1e-6, 1e-3))
    computes = torch.float32 if post else tensors["residual"].dtype  # the norm reads the stored, rounded sum

    def run(**t: Tensor) -> tuple[Tensor, ...]:
        first = t.pop("residual"), t.pop("branch"), t.pop("weight", None), t.pop("bias", None)
        both = add_layer_norm(*first, eps, rms=rms, post_norm=post, scale=scale, **fixed, **t)
        return both[:1] if post else both  # with `post` both are the same tensor

    return Call(
        "add_layer_norm", run, tensors, tuple(tensors), f"rms={rms} post={post} scale={type(scale).__name__}", computes
    )


def _scores(draw: Draw, kind: str, dtype: torch.dtype) -> Call:
    rows, heads, length, depth = draw.number(1, 3), draw.number(1, 3), draw.number(2, 20), draw.one_of((1, 5, 16, 40))
    tensors = {
        "q": draw.values("normal", rows, heads, depth, dtype=dtype),
        "k": draw.values(kind, rows, heads, length, depth, dtype=dtype),
    }
    prefix = draw.number(0, length - 1)
    return Call("cls_scores", lambda q, k: cls_scores(q, k, num_prefix_tokens=prefix), tensors, ("q", "k"))


def _loss(draw: Draw, kind: str, dtype: torch.dtype) -> Call:
    layers, batch, rows, width = draw.number(1, 3), draw.number(1, 3), draw.number(1, 6), draw.one_of(WIDTHS)
    distance = draw.one_of(("cosine", "cosine", "l1", "smooth_l1", "mse"))
    reduction = draw.one_of(("mean", "sum", "none"))
    gathers, normed, padded = draw.flag(), draw.flag(), draw.flag()
    tensors = {
        "predictions": draw.values(kind, layers, batch, rows, width, dtype=dtype, huge=ROOT if normed else 5e29),
        "targets": draw.values(
            draw.one_of((kind, "normal")), layers, batch, 7 if gathers else rows, width, dtype=dtype
        ),
    }
    wanted = ["predictions"]
    if normed:
        for name in ("weight", "bias"):
            tensors[name] = draw.values("normal", layers, width, dtype=torch.float32)
            wanted.append(name)
    if draw.flag():
        tensors["row_weights"] = draw.values("normal", batch, rows, dtype=torch.float32).abs() + 0.1
    ids = {"target_ids": draw.ids(batch, rows, 7, False)} if gathers else {}
    eps = draw.one_of((1e-6, 1e-3))

    def run(**t: Tensor) -> Tensor:
        first = t.pop("predictions"), t.pop("targets"), distance
        return alignment_loss(*first, reduction=reduction, padded=padded, beta=0.7, eps=eps, **ids, **t)

    note = f"{distance} {reduction} ids={gathers} norm={normed}"
    # 2 - 2 cos cancels where a prediction points to its target: the error of 2 cos remains.
    count = 1 if reduction != "sum" else tensors["predictions"][..., 0].numel()
    floor = 8.0 * count * float(tensors["row_weights"].max() if "row_weights" in tensors else 1)
    return Call("alignment_loss", run, tensors, tuple(wanted), note, floor=floor if distance == "cosine" else 0.0)


def _pixels(draw: Draw, kind: str, dtype: torch.dtype) -> Call:
    batch, patch, tubelet = draw.number(1, 2), (draw.number(2, 4), draw.number(2, 4)), draw.number(1, 2)
    frames, height, width = tubelet * draw.number(1, 2), patch[0] * draw.number(1, 3), patch[1] * draw.number(1, 3)
    channels, layout = draw.number(1, 6), draw.one_of(("BTHWC", "BTCHW", "BCTHW"))
    tokens = frames // tubelet * (height // patch[0]) * (width // patch[1])
    ids = draw.ids(batch, draw.number(1, tokens), tokens, False)
    normalise, root = draw.one_of(("none", "channel", "token")), draw.flag()
    shape = (*ids.shape, channels * tubelet * patch[0] * patch[1])
    tensors = {"predictions": draw.values(kind, *shape, dtype=dtype)}
    sizes = dict(zip("BTHWC", (batch, frames, height, width, channels), strict=True))
    if draw.flag():
        clip = torch.randint(0, 256, [sizes[a] for a in layout], generator=draw.generator, dtype=torch.uint8)
        scale = None
    else:
        clip = draw.values("normal", *(sizes[a] for a in layout), dtype=torch.float32)
        scale = [0.5 + i / 2 for i in range(channels)]
    if draw.flag():
        tensors["weights"] = draw.values("normal", *ids.shape, dtype=torch.float32).abs() + 0.1
    reduction = "mean" if "weights" in tensors else draw.one_of(("mean", "none"))
    settings = {"normalise": normalise, "eps": 1e-3, "eps_in_root": root, "scale": scale, "reduction": reduction}
    settings["layout"] = layout

    def run(**t: Tensor) -> Tensor:
        return pixel_loss(t.pop("predictions"), clip, ids, patch, tubelet, **settings, **t)

    return Call(
        "pixel_loss", run, tensors, ("predictions",), f"{normalise} {reduction} {layout} {channels} {clip.dtype}"
    )


def _product(draw: Draw, kind: str, dtype: torch.dtype) -> Call:
    lead = draw.one_of(((), (3,), (2, 5), (2, 40)))
    k, n = draw.one_of((1, 8, 24, 70)), draw.one_of((1, 8, 40, 130))
    tensors = {"x": draw.values(kind, *lead, k, dtype=dtype), "weight": draw.values("normal", n, k, dtype=dtype)}
    if draw.flag():
        tensors["bias"] = draw.values("normal", n, dtype=draw.one_of((dtype, torch.float32)))
    if draw.flag():
        tensors["residual"] = draw.values(
            draw.one_of((kind, "normal")), *lead, n, dtype=draw.one_of((dtype, torch.float32))
        )
    activation = draw.one_of((None, "gelu", "quick_gelu"))

    def run(**t: Tensor) -> Tensor:
        where = "triton" if runs_triton(*t.values()) else "torch"
        return linear(t.pop("x"), t.pop("weight"), activation=activation, backend=where, **t)

    return Call("linear", run, tensors, tuple(tensors), f"{activation}", computes=dtype)


def _mlp(draw: Draw, kind: str, dtype: torch.dtype) -> Call:
    lead, d, h = draw.one_of(((3,), (2, 5))), draw.one_of((8, 24)), draw.one_of((8, 40))
    tensors = {
        "x": draw.values(kind, *lead, d, dtype=dtype),
        "fc1_weight": draw.values("normal", h, d, dtype=dtype),
        "fc1_bias": draw.values("normal", h, dtype=dtype),
        "fc2_weight": draw.values("normal", d, h, dtype=dtype),
        "fc2_bias": draw.values("normal", d, dtype=torch.float32),
    }
    activation, residual = draw.one_of(("gelu", "quick_gelu")), draw.flag()

    def run(**t: Tensor) -> Tensor:
        where = "triton" if runs_triton(*t.values()) else "torch"
        return mlp(**t, activation=activation, residual=t["x"] if residual else None, backend=where)

    return Call("mlp", run, tensors, tuple(tensors), f"{activation} residual={residual}", computes=dtype)


def _patches(draw: Draw, kind: str, dtype: torch.dtype) -> Call:
    batch, patch, halo = draw.number(1, 2), draw.one_of((2, 3, 4)), draw.number(0, 1)
    clip = draw.values(kind, batch, 3, 2, patch * 2, patch * 3, dtype=dtype)
    padded = draw.flag()
    ids = draw.ids(batch * draw.number(1, 2), draw.number(1, 6), 12, padded) if draw.flag() else None
    statistics: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)} if draw.flag() else {}

    def run(clip: Tensor) -> Tensor:
        return gather_patches(clip, patch, token_ids=ids, halo=halo, dtype=clip.dtype, padded=padded, **statistics)

    return Call("gather_patches", run, {"clip": clip}, (), f"halo={halo} padded={padded}")


def _embed(draw: Draw, kind: str, dtype: torch.dtype) -> Call:
    batch, patch = draw.number(1, 2), draw.one_of((2, 3))
    clip = torch.randint(0, 256, (batch, 2, patch * 2, patch * 3, 3), generator=draw.generator, dtype=torch.uint8)
    tensors = {"weight": draw.values(kind, 5, 3, 1, patch, patch, dtype=torch.float32)}
    tensors["bias"] = draw.values("normal", 5, dtype=torch.float32)
    tensors["position"] = draw.values("normal", 12, 5, dtype=torch.float32)
    ids = draw.ids(batch, draw.number(1, 6), 12, False)

    def run(weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
        return patch_embed(clip, weight, bias, patch, token_ids=ids, position=position)

    return Call("patch_embed", run, tensors, tuple(tensors))


OPS: dict[str, Callable[[Draw, str, torch.dtype], Call]] = {
    "gather_layer_norm": _norm, "add_layer_norm": _add, "cls_scores": _scores, "alignment_loss": _loss,
    "pixel_loss": _pixels, "linear": _product, "mlp": _mlp, "gather_patches": _patches, "patch_embed": _embed,
}  # fmt: skip


def outcome(call: Call, tensors: dict[str, Tensor], upstream: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, and the upstream gradients used for them."""
    leaves = {n: x.detach().requires_grad_(n in call.differentiated) for n, x in tensors.items()}
    outputs = call.run(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not call.differentiated:
        return [x.detach() for x in outputs], []
    if upstream is None:
        generator = torch.Generator().manual_seed(len(outputs))
        upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    wanted = [leaves[name] for name in call.differentiated]
    grads = torch.autograd.grad(outputs, wanted, [u.to(x.dtype) for u, x in zip(upstream, outputs, strict=True)])
    return [x.detach() for x in (*outputs, *grads)], upstream


def faults(op: str, seed: int) -> list[str]:
    """Faults of the call for a seed."""
    draw = Draw(seed)
    kind, dtype = draw.one_of(KINDS), draw.one_of(DTYPES)
    call = OPS[op](draw, kind, dtype)
    actual, upstream = outcome(call, call.tensors, None)
    with mock.patch.object(backend, "REFERENCE_ONLY", True):
        defined, _ = outcome(call, call.tensors, upstream)
    wide = {name: x.double() for name, x in call.tensors.items()}
    expected, _ = outcome(call, wide, upstream)
    unit = UNIT[call.computes]
    spread = [torch.zeros_like(x) for x in expected]
    for _ in range(DRAWS):
        moved = {n: x * (1 + unit * (2 * torch.rand(x.shape, generator=draw.generator) - 1)) for n, x in wide.items()}
        again, _ = outcome(call, moved, upstream)
        for most, ours, theirs in zip(spread, again, expected, strict=True):
            torch.maximum(most, (ours - theirs).abs().nan_to_num(0, 0, 0), out=most)
    names = (
        [f"output {i}" for i in range(len(actual) - len(call.differentiated))] if call.differentiated else ["output 0"]
    )
    names += [f"gradient of {name}" for name in call.differentiated]
    found = []
    for name, ours, theirs, most, same in zip(names, actual, expected, spread, defined, strict=True):
        rounded = theirs.to(ours.dtype).double()
        row = most.amax(-1, keepdim=True) if most.dim() else most
        largest = theirs.abs().nan_to_num(0, 0, 0).max() if theirs.numel() else 0
        allowed = (
            2 * max(unit, UNIT[ours.dtype]) * theirs.abs()
            + ALLOWED * row
            + 4 * unit * largest
            + 2 * TINIEST[ours.dtype]
        )
        if name.startswith("output"):
            allowed = allowed + call.floor * unit
        off = (ours.double() - theirs).abs() > allowed
        if kind == "huge":  # lengths of rows leave the range of float32
            off &= ~((ours.double() - same.double()).abs() <= ALLOWED * UNIT[ours.dtype] * same.double().abs())
        off = torch.where(
            rounded.isfinite() & ours.isfinite(), off, ~same_kind(ours, rounded) & ~overflowed(ours, same)
        )
        if off.any():
            place = tuple(off.nonzero()[0].tolist())
            where = f"{op} seed {seed} {kind} {str(dtype)[6:]} {call.note}: {name} {list(ours.shape)} at {place}"
            numbers = f"{ours[place].item():.8g}, not {theirs[place].item():.8g} +- {allowed[place].item():.2g}"
            found.append(f"{where}: {numbers} ({int(off.sum())} of {off.numel()})")
    return found


def same_kind(ours: Tensor, theirs: Tensor) -> Tensor:
    """Both NaN, or the same infinity."""
    return (ours.isnan() & theirs.isnan()) | (ours.double() == theirs)


def overflowed(ours: Tensor, defined: Tensor) -> Tensor:
    """Both NaN or infinite: what an infinity becomes depends on the order of sums."""
    return ~ours.isfinite() & ~defined.isfinite()


def faults_in_eight_bits(seed: int) -> list[str]:
    """Errors: of 8-bit rows half a step of their scale, of their products a rounding to bfloat16."""
    draw = Draw(seed)
    kind, dtype = draw.one_of(KINDS), draw.one_of(DTYPES)
    eight, (m, k, n) = draw.one_of((torch.int8, torch.float8_e4m3fn)), (draw.number(1, 5), 48, draw.one_of((8, 40)))
    x, weight = draw.values(kind, m, k, dtype=dtype), draw.values("normal", n, k, dtype=dtype)
    rows, matrix = quantize_rows(x, eight), quantize_rows(weight, eight)
    wide, scale = x.double(), rows.scale.double()[:, None]
    back = rows.values.double() * scale
    if eight == torch.int8:
        allowed = (0.5 + 1e-4) * scale
    else:  # three bits after the leading one, and steps of 2^-9 below 2^-6
        allowed = torch.maximum((1 + 1e-4) * wide.abs() / 16, scale / 1023)
    found = []
    finite = wide.isfinite().all(1)
    trusted = eight == torch.int8 or not backend.INTERPRETED  # Triton 3.9's interpreter rounds 127.1 to 64 in float8
    if trusted and not ((back - wide).abs() <= allowed)[finite].all():
        found.append(f"rows seed {seed} {kind} {eight}: off by {((back - wide).abs() / scale)[finite].max():.3g} steps")
    if back[~wide.isfinite()].isfinite().any():
        found.append(f"rows seed {seed} {kind} {eight}: a NaN or an infinity became a number")
    product = linear_8bit(rows, matrix)
    exact = back @ (matrix.values.double() * matrix.scale.double()[:, None]).T
    wrong = (product.double() - exact).abs() > UNIT[torch.bfloat16] * exact.abs() + 1e-5 * exact.abs().amax(
        1, keepdim=True
    )
    if wrong[finite].any():
        found.append(f"linear_8bit seed {seed} {kind} {eight}: {int(wrong[finite].sum())} of {wrong.numel()} are off")
    return found


def faults_in_draws(seed: int) -> list[str]:
    """For any scores: ids in range, ascending, each once, and positive scores first."""
    draw = Draw(seed)
    kind, dtype = draw.one_of(KINDS), draw.one_of(DTYPES)
    scores = draw.values(kind, draw.number(1, 4), draw.number(1, 40), dtype=dtype)
    wanted = draw.number(1, scores.shape[1])
    ids = sample_visible(scores, wanted, torch.Generator().manual_seed(seed)).long()
    positive = (scores > 0).sum(1).clamp_max(wanted)
    right = (ids >= 0).all() and (ids < scores.shape[1]).all() and (ids[:, 1:] > ids[:, :-1]).all()
    if right and torch.equal((scores.gather(1, ids) > 0).sum(1), positive):
        return []
    return [f"sample_visible seed {seed} {kind} {dtype} {list(scores.shape)}: {ids.tolist()}"]


SEEDS = {"alignment_loss": (*range(6), 17, 84), "linear": (*range(6), 23)}
"""Seeds 17 and 23 once found faults: a NaN that smooth_l1 hid, and a derivative of QuickGELU beyond float16's range."""


@pytest.mark.parametrize("op", OPS)
def test_random_calls_match_float64(op):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's, of overflows that are meant
        assert [fault for seed in SEEDS.get(op, range(8)) for fault in faults(op, seed)] == []


@pytest.mark.parametrize("find", [faults_in_eight_bits, faults_in_draws])
def test_random_calls_of_ops_without_a_gradient(find):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert [fault for seed in range(12) for fault in find(seed)] == []


def main(seeds: str = "20", *ops: str) -> int:
    count = 0
    others = {"eight_bit": faults_in_eight_bits, "sample_visible": faults_in_draws}
    for op in ops or (*OPS, *others):
        for seed in range(int(seeds)):
            for fault in others[op](seed) if op in others else faults(op, seed):
                count += 1
                print(fault, flush=True)
    print(f"{count} differences")
    return min(count, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))

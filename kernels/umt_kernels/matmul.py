"""The matrix product of `linear`, `mlp` and `eight_bit`: choice of kernel or PyTorch, tile sizes, and launch.

On Hopper and datacentre Blackwell GPUs, tensor descriptors (TMA) load and store the tiles, and one program per
multiprocessor computes many tiles. On others each program computes one tile, with loads pipelined by cp.async.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from umt_kernels.backend import INTERPRETED, runs_triton, triton
from umt_kernels.dispatch import KernelOp, is_transformed
from umt_kernels.launch import Plan, as_rows, row_stride
from umt_kernels.sharding import is_distributed

if triton is not None:
    from triton.runtime import driver
    from triton.tools.tensor_descriptor import TensorDescriptor

    from umt_kernels.matmul_kernel import kernel

Activation = Literal["gelu", "quick_gelu"]
"""Exact GELU (arXiv 1606.08415), and CLIP's x sigmoid(1.702 x)."""
_ACTIVATIONS = (None, *get_args(Activation))
Backend = Literal["auto", "torch", "triton"]
GROUP = 128
"""Columns with a common scale when the epilogue quantises a row."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TENSOR_DESCRIPTORS = (90, 100, 103)
"""Compute capabilities, times ten, that load and store tiles by TMA."""
FORCED = os.environ.get("UMT_KERNELS_LINEAR", "auto")
"""`triton` or `torch` for `linear` and `mlp` with backend="auto", instead of the choice by measurement."""
FASTER: frozenset[tuple[str, int]] = frozenset()
"""Ops and compute capabilities, times ten, where a measurement (`benchmarks/results`) shows this kernel faster than
PyTorch's matmul with its own epilogue, eager and compiled. Nothing is measured yet, so all ops run PyTorch's matmul."""
ABSENT_GPU = (80, 108)
"""Capability, times ten, and multiprocessors that the interpreter assumes: an A100's."""


def _shapes(
    a: Tensor, n: int, out_dtype: torch.dtype, keep_before: bool, column_sums: bool
) -> tuple[tuple[int, ...] | None, ...]:
    """Shapes of the result, the activation's input, column sums and scales; None for what is not requested."""
    m = a.shape[:-1].numel()
    return (
        (*a.shape[:-1], n),
        (m, n) if keep_before else None,
        (-(-m // _tile_rows(a.element_size())), n) if column_sums else None,
        (-(-n // GROUP), m) if out_dtype in LARGEST else None,
    )


def prepare(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    derivative_at: Tensor | None,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    out_dtype: torch.dtype,
    transposed: bool,
    activation: str | None,
    keep_before: bool,
    column_sums: bool,
) -> Plan:
    """Plan for `multiply`. All dimensions of `a` and `residual` except the last are read as one."""
    m, k, n = a.shape[:-1].numel(), a.shape[-1], b.shape[1] if transposed else b.shape[0]
    a_row, b_row, residual_row = (None if x is None else row_stride(x) for x in (a, b, residual))
    capability, multiprocessors = target(a.device)
    grouped = a_scale is not None and a_scale.dim() == 2
    tile = config(m, n, a.element_size(), capability, grouped, out_dtype in LARGEST, keep_before)
    tiles = triton.cdiv(m, tile["ROWS"]) * triton.cdiv(n, tile["COLUMNS"])
    numbers = (m, n, k, a_row, b_row, residual_row or 0)
    settings = {
        "TRANSPOSED": transposed,
        "ACTIVATION": activation,
        "DERIVATIVE": derivative_at is not None,
        "GROUPED": grouped,
        "LARGEST": LARGEST.get(out_dtype, 0.0),
        "EVEN": k % tile["DEPTH"] == 0,
        "WIDEN": INTERPRETED and a.is_floating_point(),
        **tile,
    }
    dtypes = (out_dtype, out_dtype, torch.float32, torch.float32)
    pairs = zip(_shapes(a, n, out_dtype, keep_before, column_sums), dtypes, strict=True)
    outputs = tuple(None if shape is None else (shape, dtype) for shape, dtype in pairs)

    def plan(descriptors: bool, programs: int, unaligned: Plan | None = None) -> Plan:
        form = {"DESCRIPTORS": descriptors, "FLATTEN": descriptors, **settings}
        return Plan(kernel, (programs,), numbers, form, outputs, unaligned=unaligned)

    by_pointers = plan(False, tiles)
    rows = [(a_row, a.dtype), (b_row, b.dtype), (n, out_dtype)]
    rows += [(residual_row, residual.dtype)] if residual is not None else []
    rows += [(n, derivative_at.dtype)] if derivative_at is not None else []
    if capability not in TENSOR_DESCRIPTORS or m * n == 0 or not all(_describable(*row) for row in rows):
        return by_pointers
    return plan(True, min(tiles, multiprocessors), by_pointers)


def _describable(row: int | None, dtype: torch.dtype) -> bool:
    """Whether TMA can load rows that are `row` elements apart: each must begin at its own 16-byte boundary.

    Triton 3.5's interpreter counts elements.
    """
    return row is not None and row > 0 and row * (1 if INTERPRETED else dtype.itemsize) % 16 == 0


def _launch(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    derivative_at: Tensor | None,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    out_dtype: torch.dtype,
    transposed: bool,
    activation: str | None,
    keep_before: bool,
    column_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # as the custom op has it, which makes empty tensors of None
    """activation(a @ b.T * scales + bias) + residual in `out_dtype`, from a [m,k] and b [n,k] ([k,n] if `transposed`).

    derivative_at   [m,n]; multiply by the activation's derivative there instead of applying the activation.
    a_scale         [m], or [k / GROUP, m] for groups of GROUP columns; b_scale [n]. For int8 and float8 operands.
    out_dtype       also int8 or float8, with a scale for every GROUP columns of a row (the fourth output).

    Returns the result [m,n]; with `keep_before` the activation's input, in the dtype of the result; with `column_sums`
    the sums over rows of every tile [tiles,n], float32; scales [n / GROUP, m]. Other outputs are None, or empty under
    torch.compile.
    """
    return multiply(plan, a, b, bias, residual, derivative_at, a_scale, b_scale)


def multiply(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    derivative_at: Tensor | None = None,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> tuple[Tensor, Any, Any, Any]:
    """Launch a plan of `prepare` on tensors whose strides fit the kernel. Returns the outputs of `_launch`."""
    out, before, sums, out_scale = plan.allocate(a.device)
    moved = (a, b, out, residual, derivative_at if before is None else before)
    rest = (bias, sums, a_scale, b_scale, out_scale)
    if plan.unaligned is None:
        plan.launch((*moved, *rest))
    elif any(x is not None and x.data_ptr() % 16 for x in moved):
        plan.unaligned.launch((*moved, *rest))
    else:
        plan.launch((*_described(moved, plan), *rest), pointers=(*moved, *rest))
    return out, before, sums, out_scale


def _described(moved: tuple[Tensor | None, ...], plan: Plan) -> list[TensorDescriptor | None]:
    (m, n, k, a_row, b_row, residual_row), tile = plan.numbers, plan.settings
    rows, columns, depth = tile["ROWS"], tile["COLUMNS"], tile["DEPTH"]
    part = [rows, columns // tile["PARTS"]]
    transposed = tile["TRANSPOSED"]
    forms = (
        ([m, k], a_row, [rows, depth]),
        ([k, n] if transposed else [n, k], b_row, [depth, columns] if transposed else [columns, depth]),
        ([m, n], n, part),
        ([m, n], residual_row, part),
        ([m, n], n, part),
    )
    return [
        None if x is None else TensorDescriptor(x, shape, [row, 1], block)
        for x, (shape, row, block) in zip(moved, forms, strict=True)
    ]


def _fake(
    a, b, bias, residual, derivative_at, a_scale, b_scale, out_dtype, transposed, activation, keep_before, column_sums
):
    n = b.shape[1] if transposed else b.shape[0]
    shapes = _shapes(a, n, out_dtype, keep_before, column_sums)
    dtypes = (out_dtype, out_dtype if keep_before else torch.float32, torch.float32, torch.float32)
    return tuple(a.new_empty(shape or 0, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


_matmul = KernelOp(
    "matmul",
    prepare,
    _launch,
    _fake,
    strided=dict.fromkeys(("a", "b", "residual"), as_rows),
)


def matmul(
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    derivative_at: Tensor | None = None,
    keep_before: bool = False,
    column_sums: bool = False,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel, with the arguments and outputs of `_launch`."""
    return _matmul(
        a, b, bias, residual, derivative_at, a_scale, b_scale, out_dtype, transposed, activation, keep_before,
        column_sums,
    )  # fmt: skip


def check_activation(activation: str | None) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f'activation = {activation!r}; give "gelu", "quick_gelu" or None')


def runs_here(op: str, backend: Backend, *tensors: Tensor | None) -> bool:
    """Whether `op` runs the kernel of this file on these tensors, not PyTorch's matmul. Only this function decides it.

    Raises ValueError for an unknown backend, RuntimeError for "triton" where it cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend = {backend!r}; give one of {', '.join(map(repr, get_args(Backend)))}")
    possible = runs_triton(*tensors) and not is_transformed(*tensors) and not is_distributed(*tensors)
    if backend == "auto":
        first = next(x for x in tensors if x is not None)
        wanted = FORCED == "triton" or (FORCED == "auto" and possible and (op, target(first.device)[0]) in FASTER)
        return wanted and possible
    if backend == "triton" and not possible:
        dtypes = ", ".join(str(x.dtype) for x in tensors if x is not None)
        needed = "it needs a GPU and triton, and runs neither under torch.func nor in forward mode"
        raise RuntimeError(f'backend = "triton" cannot run on these tensors ({dtypes}): {needed}')
    return backend == "triton"


def target(device: torch.device) -> tuple[int, int]:
    """Compute capability, times ten, and multiprocessors of the GPU that kernels on `device` are compiled for."""
    if device.type == "cuda":
        return _cuda_target(device.index)
    try:
        return driver.active.get_current_target().arch, ABSENT_GPU[1]  # a compiler without a GPU
    except (NameError, RuntimeError):
        return ABSENT_GPU


@functools.cache
def _cuda_target(index: int | None) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return 10 * found.major + found.minor, found.multi_processor_count


def config(
    m: int, n: int, itemsize: int, capability: int, grouped: bool = False, quantised: bool = False, two: bool = False
) -> dict[str, int]:
    """Tile sizes for an [m,n] result of operands of `itemsize` bytes; `two`: the activation's input is stored as well.

    A row of a tile has 128 bytes, the widest swizzle of shared memory. Tiles of 128 x 256 read the fewest bytes per
    product. 128 x 128 is used where these would leave half of the GPU idle, or the epilogue would spill registers:
    `grouped` scales need two accumulators, `quantised` rows are finished GROUP columns at a time, all others 64. The
    choices follow the compiled registers and shared memory (`benchmarks.kernels.compile_report`), not a measurement.
    """
    rows, depth = _tile_rows(itemsize), 128 // itemsize
    if itemsize == 4:  # only in tests: tensor cores do not multiply float32
        columns, parts, warps, stages = 64, 1, 4, 2
    else:
        full = -(-m // 128) * -(-n // 256) >= 100
        roomy = {80: not (quantised or two), 87: not (quantised or two), 90: True, 100: not quantised}
        columns = 256 if full and n > 128 and not grouped and roomy.get(capability, False) else 128
        parts = columns // (GROUP if quantised else 64)
        warps = 8
        if capability in TENSOR_DESCRIPTORS:
            stages = 3 if columns == 256 else 4
        else:  # the compiler allocates one buffer fewer than stages
            stages = 4 if capability in (80, 87) else 3
    tile = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "PARTS": parts, "SWATH": 8}
    return {**tile, "num_warps": warps, "num_stages": stages}


def _tile_rows(itemsize: int) -> int:
    return 64 if itemsize == 4 else 128

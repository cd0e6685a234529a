"""Bytes that each launch moves, and the widest loads for its layout."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from benchmarks.kernels.gpu_code import Launch, nbytes

SECTOR = 32
"""Bytes of the smallest memory transaction."""

BULK = {
    "gather_patches": ("clip",),
    "gather_layer_norm_forward": ("x",),
    "gather_layer_norm_backward": ("g", "x"),
    "add_layer_norm_forward": ("residual", "branch"),
    "add_layer_norm_backward": ("gy", "x"),
    "matmul": ("a", "b"),
    "eight_bit": ("x",),
    "cosine_alignment_loss": ("x", "t"),
    "cosine_alignment_loss_scale": ("grad",),
    "pixel_loss": ("x",),
}
"""Memory-bound kernels, and the arguments with nearly all of the bytes that each kernel reads."""

MATRIX_UNITS = frozenset({"matmul"})
"""Kernels that multiply matrices: their code must use the matrix units."""


def layout_bytes(launch: Launch, name: str) -> int:
    """Widest load, at most 16 bytes, for which every row (or window) of argument `name` is aligned."""
    a = launch.arguments
    tensor: Tensor = a[f"{name}_ptr"]
    size = tensor.element_size()
    if launch.kernel == "gather_patches":
        if a["HALO_WIDTH"]:
            return size  # a window starts a halo before its patch, and the border is replicated pixel by pixel
        lines = tensor.stride()[: 3 if a["INTERLEAVED"] else 4]
        step = a["PATCH_WIDTH"] * (a["CHANNELS"] if a["INTERLEAVED"] else 1)
    else:
        lines = tensor.stride()[:-1]
        step = tensor.shape[-1]
    return math.gcd(16, tensor.data_ptr(), step * size, *(stride * size for stride in lines))


def traffic(launch: Launch) -> tuple[int, int]:
    """Bytes requested from memory before any cache, and their minimum.

    The minimum reads each needed byte once and writes each output once. Requests also contain weights that every
    program reads again, partial sums, zeros written before a scatter, tables read per row, and half-used sectors.
    """
    return TRAFFIC[launch.kernel](launch)


def _patches_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    clip, rows = a["clip_ptr"], a["rows_ptr"]
    pixel = clip.element_size() * (a["CHANNELS"] if a["INTERLEAVED"] else 1)
    sectors = 0
    for column in range(a["grid_width"]):
        first = max(0, column * a["PATCH_WIDTH"] - a["HALO_WIDTH"]) * pixel
        last = min(a["width"], (column + 1) * a["PATCH_WIDTH"] + a["HALO_WIDTH"]) * pixel - 1
        sectors += last // SECTOR - first // SECTOR + 1
    wanted = rows.numel() * clip.element_size()
    written = nbytes(rows) + nbytes(a["ids_ptr"])
    return a["lines"] * sectors * SECTOR // a["grid_width"] + written, min(wanted, nbytes(clip)) + written


def _implicit_traffic(launch: Launch) -> tuple[int, int]:
    """Every tile of output channels reads its tokens' pixels, and every tile of tokens reads the matrix."""
    a = launch.arguments
    out, matrix = a["out_ptr"], nbytes(a["matrix_ptr"])
    pixels = a["rows"] * a["features"] * a["clip_ptr"].element_size()
    rest = 2 * nbytes(out) + nbytes(a["ids_ptr"]) + nbytes(a["bias_ptr"])
    channel_tiles, token_tiles = -(-a["channels"] // a["CHANNELS"]), -(-a["rows"] // a["TOKENS"])
    least = min(pixels, nbytes(a["clip_ptr"])) + matrix + rest - nbytes(out) + nbytes(a["position_ptr"])
    return pixels * channel_tiles + matrix * token_tiles + rest, least


def _norm_forward_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    least = 2 * nbytes(a["y_ptr"]) + nbytes(a["row_ids_ptr"]) + nbytes(a["position_ids_ptr"])
    parameters = nbytes(a["w_ptr"]) + nbytes(a["b_ptr"])
    moved = least + nbytes(a["statistics_ptr"]) + launch.programs * parameters
    table = a["position_ptr"]
    per_row = 0 if table is None else a["rows"] * a["width"] * table.element_size()
    return moved + per_row, least + parameters + min(per_row, nbytes(table))


def _norm_backward_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    w, dx, partial_sums = a["w_ptr"], nbytes(a["dx_ptr"]), nbytes(a["partial_ptr"])
    read = 2 * nbytes(a["g_ptr"]) + nbytes(a["inverse_ptr"]) + nbytes(a["statistics_ptr"])
    return read + dx + launch.programs * nbytes(w) + partial_sums, read + dx + 3 * nbytes(w)


def _norm_invert_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    moved = nbytes(a["row_ids_ptr"]) + nbytes(a["inverse_ptr"])
    return moved + 4 * a["row_ids_ptr"].numel(), moved


def _add_norm_forward_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    rows = a["rows"] * a["width"]
    read = rows * (a["residual_ptr"].element_size() + a["branch_ptr"].element_size())
    read += sum(nbytes(a[f"{name}_ptr"]) for name in ("row_ids", "position_ids", "scale"))
    written = nbytes(a["x_ptr"]) + nbytes(a["y_ptr"])
    parameters = sum(nbytes(a[f"{name}_ptr"]) for name in ("w", "b", "branch_bias"))
    table = a["position_ptr"]
    per_row = 0 if table is None else rows * table.element_size()
    moved = read + written + nbytes(a["statistics_ptr"]) + launch.programs * parameters + per_row
    return moved, read + written + parameters + min(per_row, nbytes(table))


def _add_norm_backward_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    rows = a["rows"] * a["width"]
    inputs = [a[f"{name}_ptr"] for name in ("gy", "gx", "x", "branch")]
    read = rows * sum(x.element_size() for x in inputs if x is not None)
    read += nbytes(a["row_ids_ptr"]) + nbytes(a["scale_ptr"])
    written = nbytes(a["dresidual_ptr"]) + nbytes(a["dbranch_ptr"])
    zeroes = nbytes(a["dresidual_ptr"]) if a["row_ids_ptr"] is not None else 0
    parameters = nbytes(a["w_ptr"]) + nbytes(a["branch_bias_ptr"])
    moved = read + written + zeroes + nbytes(a["statistics_ptr"]) + launch.programs * parameters
    return moved + nbytes(a["partial_ptr"]), read + written + parameters + 2 * nbytes(a["w_ptr"])


def _matmul_traffic(launch: Launch) -> tuple[int, int]:
    """Every column of tiles reads all of a, every row of tiles all of b; most of these reads hit the L2."""
    a = launch.arguments
    row_tiles, column_tiles = -(-a["m"] // a["ROWS"]), -(-a["n"] // a["COLUMNS"])
    rest = sum(nbytes(a[f"{name}_ptr"]) for name in ("out", "residual", "before", "bias", "b_scale", "out_scale"))
    scales, sums = nbytes(a["a_scale_ptr"]), nbytes(a["sums_ptr"])
    moved = (nbytes(a["a_ptr"]) + scales) * column_tiles + nbytes(a["b_ptr"]) * row_tiles + rest + 2 * sums
    return moved, nbytes(a["a_ptr"]) + nbytes(a["b_ptr"]) + rest + scales + (4 * a["n"] if sums else 0)


def _eight_bit_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    rows = sum(nbytes(a[f"{name}_ptr"]) for name in ("x", "branch", "total", "values", "scale"))
    parameters = nbytes(a["w_ptr"]) + nbytes(a["b_ptr"])
    return rows + launch.programs * parameters, rows + parameters


def _scores_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    least = nbytes(a["q_ptr"]) + nbytes(a["k_ptr"]) + nbytes(a["scores_ptr"])
    return least, least


def _scores_backward_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    both = 2 * nbytes(a["q_ptr"]) + 2 * nbytes(a["k_ptr"])
    return both + a["heads"] * nbytes(a["grad_ptr"]), both + nbytes(a["grad_ptr"])


def _visible_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    both = nbytes(a["scores_ptr"]) + nbytes(a["drawn_ptr"])
    return both + 8 * launch.programs, both + 8


def _loss_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    x, partial = nbytes(a["x_ptr"]), nbytes(a["partial_ptr"])
    least = 2 * x + nbytes(a["ids_ptr"]) + nbytes(a["dx_ptr"])
    parameters = nbytes(a["w_ptr"]) + nbytes(a["b_ptr"])
    per_layer = launch.programs // len(a["x_ptr"])
    moved = least + per_layer * parameters + partial
    return moved, least + parameters * (2 if a["WITH_GRAD"] else 1) + 4


def _finish_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    moved = nbytes(a["partial_ptr"]) + nbytes(a["loss_ptr"]) + nbytes(a["affine_ptr"])
    return moved, moved


def _sums_traffic(launch: Launch) -> tuple[int, int]:
    """Planes whose sum is not requested are not read."""
    a = launch.arguments
    wanted = [a[f"{name}_ptr"] for name in ("first", "second", "third") if a[f"{name}_ptr"] is not None]
    moved = len(wanted) * a["programs"] * a["width"] * 4 + sum(nbytes(x) for x in wanted)
    return moved, moved


def _scale_traffic(launch: Launch) -> tuple[int, int]:
    moved = 2 * nbytes(launch.arguments["grad_ptr"])
    return moved, moved


def _pixels_traffic(launch: Launch) -> tuple[int, int]:
    a = launch.arguments
    predictions, clip, grad = a["x_ptr"], a["clip_ptr"], a["dx_ptr"]
    pixels = predictions.numel() * clip.element_size()
    rest = nbytes(predictions) + nbytes(a["ids_ptr"]) + nbytes(a["row_ptr"]) + nbytes(grad)
    return pixels + rest, min(pixels, nbytes(clip)) + rest


TRAFFIC: dict[str, Callable[[Launch], tuple[int, int]]] = {
    "gather_patches": _patches_traffic,
    "implicit_patch_embed": _implicit_traffic,
    "cosine_alignment_loss_scale": _scale_traffic,
    "gather_layer_norm_forward": _norm_forward_traffic,
    "gather_layer_norm_backward": _norm_backward_traffic,
    "gather_layer_norm_backward_invert": _norm_invert_traffic,
    "add_layer_norm_forward": _add_norm_forward_traffic,
    "add_layer_norm_backward": _add_norm_backward_traffic,
    "matmul": _matmul_traffic,
    "eight_bit": _eight_bit_traffic,
    "cls_scores_forward": _scores_traffic,
    "cls_scores_backward": _scores_backward_traffic,
    "sample_visible": _visible_traffic,
    "cosine_alignment_loss": _loss_traffic,
    "cosine_alignment_loss_finish": _finish_traffic,
    "reductions": _sums_traffic,
    "pixel_loss": _pixels_traffic,
}

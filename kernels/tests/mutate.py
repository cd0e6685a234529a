"""`make mutate`: breaks the ops on purpose, one fault at a time, and checks that a test fails for each.

Each fault replaces a piece of source, which must occur exactly as often as the fault says (by default once). The tests
of the op run on the broken copy in Triton's interpreter, in a separate process that already has torch imported. First
every test must pass on the unchanged source. A fault without a failing test is printed, and the exit status is 1.
`python kernels/tests/mutate.py WORD...` runs only the faults whose file or source contains a WORD.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "umt_kernels"
SECONDS = 300
"""Seconds; a fault that makes its tests run longer counts as found."""


@dataclass(frozen=True)
class Fault:
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Files of tests, or files and names; the test that fails first comes first."""
    which: int | None = None
    """Index of the occurrence of `old` to change, from 0; None: there is only one."""


NORM, NORM_BACK = "gather_layer_norm.py", "gather_layer_norm_backward.py"
ADD, ADD_BACK = "add_layer_norm.py", "add_layer_norm_backward.py"
LOSS, LOSS_OP, LOSS_KERNEL = (f"cosine_alignment_loss{part}.py" for part in ("", "_op", "_kernel"))
PATCHES, PIXELS = "gather_patches.py", "pixel_loss.py"
MATMUL, PRODUCT, LINEAR, MLP, EIGHT = "matmul.py", "matmul_kernel.py", "linear.py", "mlp.py", "eight_bit.py"
SCORES, DRAW, CHECKS = "cls_scores.py", "sample_visible.py", "checks.py"

FORMS = "test_forms_for_other_models"
T_NORM = (f"test_gather_layer_norm.py::{FORMS}", "test_gather_layer_norm.py")
T_LOSS = (f"test_cosine_alignment_loss.py::{FORMS}", "test_cosine_alignment_loss.py")
T_SHORT = ("test_cosine_alignment_loss.py::test_a_prediction_without_a_direction_gets_no_gradient",)
T_EQUAL = ("test_cosine_alignment_loss.py::test_a_prediction_equal_to_its_target_gets_no_gradient",)
T_TWICE = ("test_cosine_alignment_loss.py::test_the_last_backward_scales_in_place_and_earlier_ones_do_not",)
T_NOTHING = ("test_cosine_alignment_loss.py::test_what_lies_in_a_row_of_nothing_does_not_count",)
T_NAN_LOSS = ("test_cosine_alignment_loss.py::test_a_nan_reaches_the_gradient",)
T_PATCHES = ("test_gather_patches.py", "test_patch_embed.py")
T_EMBED_AGAIN = ("test_patch_embed.py::test_a_second_call_of_the_same_shapes",)
T_EMBED_REFUSED = ("test_patch_embed.py::test_a_call_is_refused_every_time",)
T_EMBED = (f"test_patch_embed.py::{FORMS}", "test_patch_embed.py")
T_SCORES = ("test_cls_scores.py",)
T_DRAW = ("test_sample_visible.py",)
T_TIES, T_RACE, T_COUNTS, T_SEEDS, T_ZERO, T_LARGE = (
    (f"test_sample_visible.py::test_{name}",)
    for name in (
        "ties_take_exactly_as_many_as_fit",
        "a_draw_is_the_race_of_its_philox_numbers",
        "each_row_may_draw_its_own_count",
        "seeds_have_62_bits",
        "a_random_number_of_0_still_comes_before_a_score_of_0",
        "scores_near_the_largest_number_have_the_same_distribution",
    )
)
T_NAN = ("test_sample_visible.py::test_nan_and_0_are_alike",)
T_ODD = ("test_sample_visible.py::test_infinite_and_subnormal_scores",)
T_LAW = ("test_sample_visible.py::test_the_distribution_holds_at_any_size_of_the_scores",)
T_TRANSFORMS = ("test_derivatives.py",)
FAR = "test_addresses.py::test_"
NORM_FAR = (f"{FAR}gather_layer_norm", f"{FAR}gather_layer_norm_of_layers")
LOSS_FAR = (f"{FAR}cosine_alignment_loss",)
PATCHES_FAR = (
    f"{FAR}gather_patches_of_bytes",
    f"{FAR}gather_patches_of_floats",
    f"{FAR}gather_patches_of_planar_bytes",
)
SCORES_FAR = (f"{FAR}cls_scores",)
ADDS = "test_add_layer_norm.py::test_"
T_ADD = (f"{ADDS}one_output_used_and_rms",)  # with every optional input
T_ADD_FORMS, T_ADD_TYPES = (f"{ADDS}outputs_and_gradients_match_float64",), (f"{ADDS}every_dtype_is_its_own",)
T_ADD_SETS = (f"{ADDS}several_sets_of_a_sample_and_ids_of_nothing",)
ADD_FAR = (f"{FAR}add_layer_norm",)
T_LINEAR, T_MLP = ("test_linear.py::test_linear_matches_float64",), ("test_linear.py::test_mlp_matches_float64",)
T_WIDE, T_SWATH = ("test_linear.py::test_wide_tiles",), ("test_linear.py::test_more_tiles_than_a_swath",)
T_HALF = ("test_linear.py::test_gradients_of_float32_biases_are_sums_in_float32",)
T_LARGE_HALF = ("test_linear.py::test_the_derivative_of_quick_gelu_at_large_float16_numbers",)
T_ONCE = ("test_linear.py::test_the_result_is_rounded_once",)
EIGHTS = "test_eight_bit.py::test_"
T_ROWS = (f"{EIGHTS}rows_and_norms_are_rounded_to_the_nearest",)
T_GROUPS, T_CHAIN = (
    (f"{EIGHTS}an_epilogue_that_counts_the_wrong_groups_is_detected",),
    (f"{EIGHTS}an_mlp_of_8_bit_products",),
)
T_EIGHT_ODD = (f"{EIGHTS}a_row_with_a_nan_or_infinity_is_no_row_of_numbers",)
T_EIGHT_RANGE = (f"{EIGHTS}the_largest_number_is_the_end_of_the_range",)
T_EIGHT_ERRORS = (f"{EIGHTS}errors_name_the_value_and_the_place",)
PIX = "test_pixel_loss.py::test_"
T_PIXELS, T_COLOURS = (f"{PIX}values_and_gradients",), (f"{PIX}each_colour_has_its_own_scale_and_shift",)
T_PIXEL_VIEWS, T_PIXEL_MEAN = (f"{PIX}views_are_read_without_a_copy",), (f"{PIX}weighted_mean_is_over_the_whole_batch",)
T_PIXEL_NOTHING = (f"{PIX}an_id_of_nothing_has_no_error_even_with_eps_0",)
T_PIXEL_FORMS = (f"test_pixel_loss.py::{FORMS}",)
T_PIXEL_SETS = (f"{PIX}several_masks_of_a_clip_and_ids_of_nothing",)
PIXELS_FAR = (f"{FAR}pixel_loss",)
T_SHARDS, T_SUMS = ("test_sharding.py",), ("test_reductions.py",)
T_FAKES = ("test_library.py::test_opcheck[gather_layer_norm]",)
T_KEYS, T_COPIES, T_ROW_STRIDES = (
    (f"test_{name}",)
    for name in (
        "dispatch.py::test_different_calls_have_different_keys",
        "dispatch.py::test_a_kept_plan_copies_what_its_kernel_cannot_read",
        "launch.py::test_rows_at_equal_distances",
    )
)
T_STRIDES = ("test_linear.py::test_strides_that_tensor_descriptors_cannot_have",)

FAULTS = [
    # sample_visible: seeds, ties, uniforms, counts
    Fault(DRAW, "torch.randint(2**62,", "torch.randint(256,", T_SEEDS),
    Fault(DRAW, "torch.randint(2**62,", "torch.randint(2**32,", T_SEEDS),
    Fault(DRAW, "device=scores.device, generator=generator)", "device=scores.device)", T_DRAW),
    Fault(DRAW, "(uniform + 0.5)", "uniform", T_ZERO),
    Fault(DRAW, ">> 9).to(tl.float32)", ">> 8).to(tl.float32)", T_RACE),
    Fault(DRAW, "tl.randint(seed + row[:, None], counter)", "tl.randint(seed, counter)", T_RACE),
    Fault(DRAW, "tl.cumsum(equal.to(tl.int32), axis=1) <= left[:, None]", "left[:, None] > 0", T_TIES),
    Fault(DRAW, "<= left[:, None]", "< left[:, None]", T_TIES),
    Fault(DRAW, "above = (order > threshold[:, None])", "above = (order >= threshold[:, None])", T_TIES),
    Fault(DRAW, "range(32)", "range(31)", T_TIES),
    Fault(DRAW, "speed - tl.log(wait)", "score / wait", T_LARGE),
    Fault(DRAW, "-1099511627776.0 * wait", "-wait", T_RACE),
    Fault(DRAW, "(bits > 0) & (bits <= 0x7F800000)", "bits > 0", T_NAN),
    Fault(DRAW, "tl.minimum(score, 3.4028234663852886e38)", "score", T_ODD),
    Fault(DRAW, "tl.where(small, 103.27892990343185, 0.0)", "0.0", T_ODD),
    Fault(DRAW, "tl.maximum(bits, 1).to(tl.float32)", "1.1754943508222875e-38", T_LAW),
    Fault(DRAW, "bits ^ 0xFFFFFFFF", "bits", T_RACE),
    Fault(DRAW, "tl.minimum(tl.maximum(count, 0), num_visible)", "(count + 1)", T_COUNTS),
    Fault(DRAW, "(patch >= wanted[:, None])", "(patch > wanted[:, None])", T_COUNTS),
    Fault(DRAW, "row[:, None] * num_visible", "row[:, None] * patches", T_DRAW),
    Fault(DRAW, "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS", (f"{FAR}sample_visible",)),
    # gather_layer_norm: masks, eps, sets, layers, padding
    Fault(NORM, "tl.sum(x * x, axis=1) / width + eps", "tl.sum(x * x, axis=1) / width", T_NORM),
    Fault(NORM, "tl.sum(x * x, axis=1) / width + eps", "tl.sum(x * x, axis=1) / BLOCK + eps", T_NORM),
    Fault(NORM, "mean = tl.sum(x, axis=1) / width", "mean = tl.sum(x, axis=1) / BLOCK", T_NORM),
    Fault(NORM, "x = tl.where(mask, x - mean[:, None], 0.0)", "x = x - mean[:, None]", T_NORM),
    Fault(NORM, "                    y += p\n", "                    y = p\n", T_NORM),
    Fault(NORM, "y = tl.where(read, y, 0.0)", "y = y", T_NORM),
    Fault(NORM, "p_mask = read & (p_id >= 0)[:, None]", "p_mask = read", T_NORM),
    Fault(NORM, "there = here & (place >= 0)", "there = here", T_NORM),
    Fault(NORM, "(row_set // masks).to(tl.int64) * x_b", "row_set.to(tl.int64) * x_b", T_NORM),
    Fault(NORM_BACK, "statistics_2 + s_row", "s_row", T_NORM),
    Fault(NORM_BACK, "there = there | valid", "there = valid", T_NORM),
    Fault(NORM_BACK, "                    g += tl.load(g_ptr", "                    g = tl.load(g_ptr", T_NORM),
    Fault(NORM_BACK, "dx = dx * rstd[:, None]", "dx = dx", T_NORM),
    Fault(NORM_BACK, "- (means / width)[:, None]", "", T_NORM),
    Fault(NORM_BACK, "- x * (shares / width)[:, None]", "", T_NORM),
    Fault(NORM_BACK, "dw += g * x", "dw = g * x", T_NORM),
    Fault(NORM_BACK, "db += g\n", "db = g\n", T_NORM),
    Fault(NORM_BACK, "inverse_ptr + row_set * length + place, -1", "inverse_ptr + row_set * length + place, 0", T_NORM),
    Fault(NORM_BACK, "slot, mask=place >= 0)", "slot, mask=place > 0)", T_NORM),
    Fault(NORM, "accumulate=True", "accumulate=False", T_NORM),
    Fault(NORM, "(ids < 0) | (row_ids < 0)", "ids < 0", T_NORM),
    Fault(NORM, "x.new_empty(shape, dtype=dtype)", "x.new_empty(shape)", T_FAKES),
    Fault(NORM, "other=0).to(tl.int64)\n            else", "other=0)\n            else", NORM_FAR),
    Fault(NORM, "place = (row - row_set * kept).to(tl.int64)", "place = row - row_set * kept", NORM_FAR),
    Fault(NORM, "(row_set // masks).to(tl.int64) * x_b", "(row_set // masks) * x_b", NORM_FAR),
    Fault(NORM, "tl.cast(layer, tl.int64) * x_k", "layer * x_k", NORM_FAR),
    Fault(NORM_BACK, "+ slot.to(tl.int64) * g_m", "+ slot * g_m", NORM_FAR),
    Fault(NORM_BACK, "+ row_set.to(tl.int64) * g_r", "+ row_set * g_r", NORM_FAR),
    Fault(NORM_BACK, "+ place.to(tl.int64) * x_l", "+ place * x_l", NORM_FAR),
    Fault(NORM_BACK, "x_row = layer.to(tl.int64) * x_k", "x_row = layer * x_k", NORM_FAR),
    # cosine_alignment_loss: signs, scales, weights, sets
    Fault(LOSS_KERNEL, "loss = 2.0 - 2.0 * cosine", "loss = 1.0 - cosine", T_LOSS),
    Fault(LOSS_KERNEL, "a = -2.0 * y_inv", "a = -1.0 * y_inv", T_LOSS),
    Fault(LOSS_KERNEL, "cosine * y_inv * y_inv * factor", "cosine * y_inv * factor", T_LOSS),
    Fault(LOSS_KERNEL, "norm > floor", "norm >= 0", T_SHORT),
    Fault(LOSS, "1e-4 if half else 1e-12", "1e-12", T_SHORT),
    Fault(LOSS_KERNEL, "centred = tl.where(mask, x - mean[:, None], 0.0)", "centred = x - mean[:, None]", T_LOSS),
    Fault(LOSS_KERNEL, "y = x * w + b", "y = x * w", T_LOSS),
    Fault(LOSS, "return (target_ids >= 0).float()", "return torch.ones_like(target_ids).float()", T_LOSS),
    Fault(LOSS, ".masked_fill(target_ids < 0, 0)", "", T_NOTHING),
    Fault(LOSS_KERNEL, "column, mask=read, other=0.0)", "column, mask=mask, other=0.0)", T_NOTHING, 0),
    Fault(LOSS_KERNEL, "rstd = tl.where(there, rstd, 0.0)", "rstd = rstd", T_NOTHING),
    Fault(LOSS_KERNEL, "factor = tl.where(there, factor, 0.0)", "factor = factor", T_NOTHING),
    Fault(PIXELS, ".masked_fill(token_ids < 0, 0)", "", T_PIXEL_SETS),
    Fault(LOSS_OP, "0 if shared else sets * rows", "0", T_LOSS),
    Fault(LOSS_KERNEL, "(row_set // masks).to(tl.int64) * t_b", "row_set.to(tl.int64) * t_b", T_LOSS),
    Fault(LOSS, "(count // row_weights.numel())", "1", T_LOSS, 1),
    Fault(LOSS_KERNEL, "total += loss * factor", "total = loss * factor", T_LOSS),
    Fault(LOSS_KERNEL, "tl.abs(d) - 0.5 * beta", "tl.abs(d)", T_LOSS),
    Fault(LOSS_KERNEL, "tl.where(d < 0, -1.0, 0.0)", "-1.0", T_EQUAL),
    Fault(LOSS_KERNEL, "(factor / width)[:, None]", "factor[:, None]", T_LOSS),
    Fault(LOSS_KERNEL, "- x * (share / width)[:, None]", "", T_LOSS),
    Fault(LOSS_KERNEL, "partial_ptr + plane + place", "partial_ptr + place", T_LOSS),
    Fault(LOSS_OP, "or keeps_graph():", ":", T_TWICE),
    Fault(LOSS_KERNEL, "if not IN_PLACE or factor != 1.0:", "if not IN_PLACE:", T_TWICE),
    Fault(LOSS_OP, "else affine * grad_loss", "else affine", T_LOSS),
    Fault(LOSS_KERNEL, "tl.where(d < 0, -1.0, d)))", "-1.0))", T_NAN_LOSS),
    Fault(LOSS_OP, "grad_loss * row_weights", "grad_loss", T_LOSS),
    Fault(LOSS_KERNEL, "mask=here, other=0).to(tl.int64)", "mask=here, other=0)", LOSS_FAR),
    Fault(LOSS_KERNEL, "row_set.to(tl.int64) * x_r", "row_set * x_r", LOSS_FAR),
    Fault(LOSS_KERNEL, "place.to(tl.int64) * x_m", "place * x_m", LOSS_FAR),
    Fault(LOSS_KERNEL, "(row_set // masks).to(tl.int64) * t_b", "(row_set // masks) * t_b", LOSS_FAR),
    Fault(LOSS_KERNEL, "layer = tl.program_id(1).to(tl.int64)", "layer = tl.program_id(1)", LOSS_FAR),
    # gather_patches and patch_embed: halos, channels, layouts
    Fault(PATCHES, "within % WINDOW - HALO_HEIGHT", "within % WINDOW", T_PATCHES),
    Fault(PATCHES, "tl.maximum(y, 0), height - 1)", "tl.maximum(y, 0), height)", T_PATCHES),
    Fault(PATCHES, "(column // CHANNELS - HALO_WIDTH)", "(column // CHANNELS)", T_PATCHES),
    Fault(PATCHES, "channel = column % CHANNELS", "channel = column // CHANNELS", T_PATCHES),
    Fault(PATCHES, "channel = within // WINDOW % CHANNELS", "channel = within // WINDOW", T_EMBED),
    Fault(PATCHES, "time = within // (WINDOW * CHANNELS)", "time = within // WINDOW", T_EMBED),
    Fault(PATCHES, "time = within // WINDOW % TUBELET", "time = within // WINDOW", T_PATCHES),
    Fault(PATCHES, "* TUBELET + time", "+ time", T_PATCHES),
    Fault(PATCHES, "values = tl.where(read, values, 0)", "values = values", T_PATCHES),
    Fault(PATCHES, "top = 255 if", "top = 256 if", T_PATCHES),
    Fault(PATCHES, "(row_set // masks).to(tl.int64)", "row_set.to(tl.int64)", T_EMBED),
    Fault(PATCHES, '"BTCHW": (0, 2, 1, 3, 4)}', '"BTCHW": (0, 1, 2, 3, 4)}', T_EMBED),
    Fault(PATCHES, "frame.to(tl.int64) * stride_t", "frame * stride_t", PATCHES_FAR),
    Fault(PATCHES, "y.to(tl.int64) * stride_h", "y * stride_h", PATCHES_FAR),
    Fault(PATCHES, "(row_set // masks).to(tl.int64) * stride_b", "(row_set // masks) * stride_b", PATCHES_FAR),
    Fault(PATCHES, "channel.to(tl.int64) * stride_c", "channel * stride_c", PATCHES_FAR),
    Fault("patch_embed.py", "embedded = embedded.masked_fill((token_ids < 0)[..., None], 0)", "pass", T_EMBED),
    Fault("patch_embed.py", "check_id_values(", "print(", T_EMBED_AGAIN),
    Fault("patch_embed.py", "mean, std, layout, padded, dtype))", "mean, layout, padded, dtype))", T_EMBED_AGAIN),
    Fault(PATCHES, "and sees_ids(token_ids):", "and False:", T_EMBED_AGAIN),
    Fault("patch_embed.py", "if len(position) != rows.shape[1]:", "if plan is None and len(position) != rows.shape[1]:",
          T_EMBED_REFUSED),
    Fault("patch_embed.py", "            _check_position(position, weight)\n", "            pass\n", T_EMBED_REFUSED),
    Fault("linear.py", "x.dtype == torch.float64 or", "", T_EMBED),
    # cls_scores
    Fault(SCORES, "total / heads", "total", T_SCORES),
    Fault(SCORES, "depth**-0.5", "1.0", T_SCORES),
    Fault(SCORES, 'float("-inf"))', "0.0)", T_SCORES),
    Fault(SCORES, "logits - tl.max(logits, axis=0)", "logits", T_SCORES),
    Fault(SCORES, "(grad - tl.sum(weights * grad, axis=0))", "grad", T_SCORES),
    Fault(SCORES, "token - prefix", "token - 1", T_SCORES, 0),
    Fault(SCORES, "token.to(tl.int64)[:, None] * k_l", "token[:, None] * k_l", SCORES_FAR),
    Fault(SCORES, "tl.cast(head, tl.int64) * k_h", "head * k_h", SCORES_FAR),
    Fault(SCORES, "head.to(tl.int64) * k_h", "head * k_h", SCORES_FAR),
    # add_layer_norm: the sum, drop path, biases, the norm, its two gradients
    Fault(ADD, "added *= tl.load(scale_ptr + sample", "added += tl.load(scale_ptr + sample", T_ADD),
    Fault(ADD, "scale_ptr + sample", "scale_ptr + sample * 0", T_ADD, 0),
    Fault(ADD, "x += added * factor", "x += added", T_ADD_FORMS),
    Fault(ADD, "x = stored.to(tl.float32)", "x = x", T_ADD_TYPES),
    Fault(ADD, "/ width + eps)", "/ width)", T_ADD),
    Fault(ADD, "mean = tl.sum(x, axis=1) / width", "mean = tl.sum(x, axis=1) / BLOCK", T_ADD),
    Fault(ADD, "centred = tl.where(mask, x - mean[:, None], 0.0)", "centred = x - mean[:, None]", T_ADD),
    Fault(ADD, "place = tl.load(row_ids_ptr + row", "place = 0 * tl.load(row_ids_ptr + row", T_ADD),
    Fault(ADD, "position_ptr + p_row[:, None]", "position_ptr + 0 * p_row[:, None]", T_ADD),
    Fault(ADD, "y_ptr + y_row[:, None] + column, y.to", "y_ptr + y_row[:, None] + column, x.to", T_ADD),
    Fault(ADD, "tl.int64) + row, rstd", "tl.int64) + row, mean", T_ADD),
    Fault(ADD, "sample.to(tl.int64) * residual_b", "sample * residual_b", ADD_FAR),
    Fault(ADD, "(of_y, out_dtype)", "(of_y, residual.dtype)", T_ADD_TYPES),
    Fault(ADD, "// max(1, len(row_ids) // max(1, len(residual)))", "% len(residual)", T_ADD_SETS),
    Fault(ADD, ", branch.masked_fill(nothing, 0)", ", branch", T_ADD_SETS),
    Fault(ADD, "masked = y.masked_fill(nothing, 0)", "masked = y", T_ADD_SETS),
    Fault(ADD, "else x.masked_fill(nothing, 0), masked", "else x, masked", T_ADD_SETS),
    Fault(ADD, "torch.where(position_ids < 0, len(position), position_ids)", "position_ids.clamp_min(0)", T_ADD_SETS),
    Fault(ADD_BACK, "branch_bias_ptr + column", "branch_bias_ptr + 0 * column", T_ADD),
    Fault(ADD_BACK, "dx += gx\n", "dx += 0\n", T_ADD),
    Fault(ADD_BACK, "dx *= factor", "dx *= 1.0", T_ADD_FORMS),
    Fault(ADD_BACK, "dx *= scale", "dx *= 1.0", T_ADD),
    Fault(ADD_BACK, "dx *= rstd[:, None]", "dx *= 1.0", T_ADD),
    Fault(ADD_BACK, "- (means / width)[:, None]", "", T_ADD),
    Fault(ADD_BACK, "- x * (shares / width)[:, None]", "", T_ADD),
    Fault(ADD_BACK, "dw += g * x", "dw = g * x", T_ADD),
    Fault(ADD_BACK, "db += g\n", "db = g\n", T_ADD),
    Fault(ADD_BACK, "tl.store(slot + plane, db", "tl.store(slot, db", T_ADD),
    Fault(ADD_BACK, "slot + 2 * plane", "slot + plane", T_ADD),
    Fault(ADD_BACK, "grad_residual.zero_()", "pass", T_ADD),
    Fault(ADD_BACK, "scale is None and factor == 1 and", "scale is None and", T_ADD_FORMS),
    Fault(ADD_BACK, "(sample * length + place) * width", "(sample * kept + place) * width", T_ADD),
    Fault(ADD_BACK, "order = (row - row_sample * kept).to(tl.int64)", "order = row - row_sample * kept", ADD_FAR),
    # reductions that the norms and the losses share
    Fault("reductions.py", "row < programs", "row < programs - 1", T_SUMS),
    Fault("reductions.py", "total += tl.load(partial_ptr", "total = tl.load(partial_ptr", T_SUMS),
    Fault("reductions.py", "* width * PLANE", "* width", T_ADD),
    Fault("reductions.py", "c, d = tl.split(right)", "c, d = tl.split(left)", T_PIXELS, 0),
    # matmul, linear, mlp: tiles and the epilogue
    Fault(PRODUCT, "x = _activate(x, ACTIVATION)", "x = x", T_LINEAR),
    Fault(PRODUCT, "x += residual.to(tl.float32)", "x = residual.to(tl.float32)", T_LINEAR),
    Fault(PRODUCT, "x += tl.load(bias_ptr + column", "x -= tl.load(bias_ptr + column", T_LINEAR),
    Fault(PRODUCT, "x = x * tl.sigmoid(1.702 * x)", "x = x * tl.sigmoid(x)", T_LINEAR),
    Fault(PRODUCT, "1.702 * x * (1.0 - gate)", "x * (1.0 - gate)", T_MLP),
    Fault(PRODUCT, "0.3989422804014327 * x", "0.3989422804014327", T_MLP),
    Fault(PRODUCT, "within = deep < k - start", "within = deep < k", T_LINEAR),
    Fault(PRODUCT, "tl.where(here[:, None], x, 0.0), axis=0", "x, axis=0", T_MLP),
    Fault(PRODUCT, "first_column + PART, row_tile", "first_column, row_tile", T_ONCE, 0),
    Fault(PRODUCT, "first_column + 2 * PART", "first_column + PART", T_WIDE),
    Fault(PRODUCT, "first_column + 3 * PART", "first_column + 2 * PART", T_WIDE),
    Fault(PRODUCT, "third, fourth = _halves(right)", "third, fourth = _halves(left)", T_WIDE),
    Fault(PRODUCT, "tile // (SWATH * column_tiles)", "0 * tile", T_SWATH),
    Fault(PRODUCT, "tl.minimum(row_tiles - swath * SWATH, SWATH)", "tl.minimum(row_tiles, SWATH)", T_SWATH),
    Fault(PRODUCT, "swath * SWATH + inside % height", "swath * SWATH", T_LINEAR),
    Fault(MATMUL, "k % tile[\"DEPTH\"] == 0", "True", T_LINEAR),
    Fault(MATMUL, "row * (1 if INTERPRETED else dtype.itemsize) % 16 == 0", "True", T_STRIDES),
    Fault(LINEAR, "slope.sum(0, dtype=torch.float32)", "slope.sum(0)", T_HALF),
    Fault(LINEAR, "scaled = reference.QUICK * before.float()", "scaled = reference.QUICK * before", T_LARGE_HALF),
    Fault(LINEAR, "slope.T @ rows", "flat.to(rows.dtype).T @ rows", T_LINEAR),
    Fault(MLP, "sums.sum(0)", "sums[0]", T_MLP),
    Fault(MLP, "flat.sum(0, dtype=torch.float32)", "narrow.sum(0)", T_HALF),
    Fault(MLP, "narrow.T @ hidden", "narrow.T @ before", T_MLP),
    # 8 bits: scales, groups, rounding
    Fault(EIGHT, "tl.floor(x + 0.5)", "tl.floor(x)", T_ROWS),
    Fault("reductions.py", "tl.abs(x), float(", "x, float(", T_ROWS),
    Fault(EIGHT, "1e-12) / LARGEST", "0.0) / LARGEST", (f"{EIGHTS}zero_rows_stay_zero",)),
    Fault("reductions.py", "x == x", "x < 1e38", T_EIGHT_RANGE),
    Fault("reductions.py", "x == x", "True", T_EIGHT_ODD),
    Fault(EIGHT, "x = total.to(tl.float32)", "x = x", T_ROWS),
    Fault(EIGHT, "scale_ptr + row, scale", "scale_ptr + row, 1.0 / scale", T_ROWS),
    Fault(MATMUL, "if activation not in _ACTIVATIONS:", "if False:", T_EIGHT_ERRORS),
    Fault(EIGHT, "if out_dtype not in _RESULTS:", "if False:", T_EIGHT_ERRORS),
    Fault(EIGHT, "1e-12) / LARGEST", "1e-12) / (LARGEST - 1)", T_EIGHT_RANGE),
    Fault(PRODUCT, "mask=here & (first_column + 0 * row < n)", "mask=here", T_GROUPS),
    Fault(PRODUCT, "scale_place += m", "scale_place += 0", T_CHAIN),
    Fault(PRODUCT, "(first_column // PART).to(tl.int64) * m", "(first_column // PART).to(tl.int64) * 0", T_GROUPS),
    Fault(PRODUCT, "largest_magnitudes(tl.where(valid[None, :], x, 0.0))", "tl.max(x, axis=1)", T_GROUPS),
    # pixel_loss: places, statistics, colours
    Fault(PIXELS, "token // grid_width % grid_height * PATCH", "token // grid_width * PATCH", T_PIXELS),
    Fault(PIXELS, "channel = column % CHANNELS", "channel = column // PIXELS", T_PIXELS),
    Fault(PIXELS, '"SHIFTS": tuple(shift)', '"SHIFTS": tuple(shift[:1] * len(shift))', T_COLOURS),
    Fault(PIXELS, "/ (PIXELS - 1)", "/ PIXELS", T_PIXELS),
    Fault(PIXELS, "(FEATURES - 1)", "FEATURES", T_PIXELS),
    Fault(PIXELS, "* (2.0 / FEATURES)", "* (1.0 / FEATURES)", T_PIXELS),
    Fault(PIXELS, "pixel // PATCH_WIDTH % PATCH_HEIGHT", "pixel // PATCH_HEIGHT % PATCH_HEIGHT", T_PIXEL_FORMS),
    Fault(PIXELS, "(left + pixel % PATCH_WIDTH)", "(left + pixel % PATCH_HEIGHT)", T_PIXEL_FORMS),
    Fault(PIXELS, "token % grid_width * PATCH_WIDTH", "token % grid_width * PATCH_HEIGHT", T_PIXEL_FORMS),
    Fault(PIXELS, "tl.where(channel == first + 3, d, sums)", "sums", T_PIXEL_FORMS),
    Fault(PIXELS, "static_range(0, CHANNELS, 4)", "static_range(0, 4, 4)", T_PIXEL_FORMS),
    Fault(PIXELS, "target - _channel_sums(target, channel, CHANNELS) / PIXELS, 0.0)",
          "target - _channel_sums(target, channel, CHANNELS) / PIXELS, 1.0)", T_PIXEL_FORMS),
    Fault(PIXELS, "1 / token_ids.numel() if mean else 1.0", "1.0", T_PIXELS),
    Fault(PIXELS, "(0 if MEAN else row)", "row", T_PIXELS),
    Fault(PIXELS, "difference = tl.where(inside, x", "difference = tl.where(column < BLOCK, x", T_PIXEL_NOTHING),
    Fault(PIXELS, "sample = (row_set // masks).to(tl.int64)", "sample = row_set // masks", PIXELS_FAR),
    Fault(PIXELS, "row_set.to(tl.int64) * x_b", "row_set * x_b", PIXELS_FAR),
    Fault(PIXELS, "sample = (row_set // masks)", "sample = row_set", T_PIXEL_SETS),
    Fault(PIXELS, "written & (tl.zeros((BLOCK,), tl.int32) + token >= 0)", "written", T_PIXEL_SETS),
    Fault(PIXELS, "element_ty), mask=written", "element_ty), mask=inside", T_PIXEL_SETS),
    Fault(PIXELS, "time.to(tl.int64) * stride_t", "time * stride_t", PIXELS_FAR),
    Fault(PIXELS, "weights.sum()\n\n\ndef _weigh", "weights.numel()\n\n\ndef _weigh", T_PIXEL_MEAN),
    # DTensors
    Fault("sharding.py", "placements(axes[name], Partial())", "placements(axes[name], Replicate())", T_SHARDS),
    Fault("sharding.py", "if sets * whole != part * all_sets:", "if False:", T_SHARDS),
    # checks, transforms, masks
    Fault(CHECKS, "(ids < (-1 if padded else 0)) | (ids >= limit)", "ids >= limit", T_NORM),
    Fault(CHECKS, "isinstance(number, bool) or", "", ("test_gather_patches.py",)),
    Fault(CHECKS, "& (ordered[:, 1:] >= 0)", "", T_NORM),
    Fault("dispatch.py", "return True\n    return forward_ad", "return False\n    return forward_ad", T_TRANSFORMS),
    Fault("dispatch.py", "forward_ad._current_level >= 0 and any(", "False and any(", T_TRANSFORMS),
    Fault("dispatch.py", "if again is not None and torch.is_grad_enabled()", "if False", T_TRANSFORMS),
    Fault("dispatch.py", 'frozenset({"sample_visible", "eight_bit"})', "frozenset()", ("test_inductor.py",)),
    Fault("masks.py", "mask.cumsum(1) - 1", "mask.cumsum(1)", ("test_masks.py",)),
    Fault("dispatch.py", "x.is_contiguous() or x.stride()", "True", T_KEYS),
    Fault("dispatch.py", "x.device, x.requires_grad\n", "x.device\n", T_KEYS),
    Fault("dispatch.py", "[op, torch.is_grad_enabled(),", "[op,", T_KEYS),
    Fault("dispatch.py", "backend.INTERPRETED, settings, kinds]", "backend.INTERPRETED, settings]", T_EMBED_REFUSED),
    Fault("dispatch.py", "(*x, *map(type, x))", "tuple(x)", T_EMBED_REFUSED),
    Fault("dispatch.py", "tensors[place] = copy(tensors[place])", "pass", T_COPIES),
    Fault("dispatch.py", "if plan.copies else launch(plan, *inputs)", "if False else launch(plan, *inputs)", T_COPIES),
    Fault("launch.py", "outer != size * inner", "False", T_ROW_STRIDES),
    Fault("launch.py", "if size != 1", "", T_ROW_STRIDES),
    Fault("launch.py", "if addresses & 15:", "if False:", ("test_launch.py",)),
    Fault("launch.py", "addresses |= x.data_ptr()", "addresses = x.data_ptr()", ("test_launch.py",)),
]  # fmt: skip


def broken(fault: Fault) -> str:
    """The source with the fault. Raises ValueError if `old` does not occur as often as the fault says."""
    source = (PACKAGE / fault.file).read_text()
    pieces = source.split(fault.old)
    if len(pieces) == 1 or (fault.which is None and len(pieces) > 2):
        raise ValueError(f"{fault.file} has {fault.old!r} {len(pieces) - 1} times")
    at = (fault.which or 0) + 1
    return fault.old.join(pieces[:at]) + fault.new + fault.old.join(pieces[at:])


def run_tests(fault: Fault, folder: Path) -> int:
    """Run the tests in this process; 0 if all passed."""
    import pytest

    shutil.copytree(PACKAGE, folder / "umt_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "umt_kernels" / fault.file).write_text(broken(fault))
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-c", str(TESTS.parent / "pyproject.toml")]
    for name in fault.tests:  # in this order: of arguments that overlap pytest makes one
        if status := int(pytest.main([*options, "--rootdir", str(TESTS.parent), str(TESTS / name)])):
            return status
    return 0


def start(fault: Fault, folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = run_tests(fault, folder)
        finally:
            os._exit(status)
    return pid


def main(*words: str) -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import triton  # noqa: F401

    torch.set_num_threads(1)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for on in (True, False):  # what the tests' fixtures import, imported once
        torch.use_deterministic_algorithms(on)
    assert "umt_kernels" not in sys.modules
    chosen = [fault for fault in FAULTS if not words or any(word in fault.file or word in fault.old for word in words)]
    for fault in chosen:
        broken(fault)
    begun = time.monotonic()
    # First without a fault: a test that always fails would seem to find every fault.
    controls = {fault.tests: replace(fault, new=fault.old) for fault in chosen}
    if failed := run_all(list(controls.values()), wanted=False):
        print(f"{len(failed)} groups of tests fail without a fault")
        return 1
    survived = run_all(list(chosen), wanted=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} faults caught in {time.monotonic() - begun:.0f} s")
    return 1 if survived or not chosen else 0


def run_all(waiting: list[Fault], wanted: bool) -> list[Fault]:
    """Run the tests of every fault, one fault per core. Returns the faults whose tests did not fail as `wanted`."""
    running: dict[int, tuple[Fault, tempfile.TemporaryDirectory, float]] = {}
    others = []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            fault, folder = waiting.pop(0), tempfile.TemporaryDirectory(prefix="mutate-")
            running[start(fault, Path(folder.name))] = (fault, folder, time.monotonic())
        time.sleep(0.05)
        for pid, (fault, folder, since) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() - since > SECONDS:
                os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, 0)
            if done:
                del running[pid]
                code = os.waitstatus_to_exitcode(status)
                noticed = code not in (0, 2, 3, 4, 5)  # passed, or no test was run: an error in this list
                if noticed != wanted or code in (2, 3, 4, 5):
                    others.append(fault)
                seconds = time.monotonic() - since
                if wanted:
                    verdict = "caught" if noticed else f"NOT CAUGHT ({code})"
                    print(f"{verdict} {fault.file}: {fault.old!r} -> {fault.new!r} ({seconds:.0f} s)", flush=True)
                elif code:
                    print(f"FAILS WITHOUT A FAULT ({code}) {' '.join(fault.tests)}", flush=True)
                folder.cleanup()
    return others


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

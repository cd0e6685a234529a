"""8-bit rows and products against their definition in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from umt_kernels import EightBit, add_layer_norm_8bit, linear_8bit, quantize_rows
from umt_kernels.backend import INTERPRETED

matmul = importlib.import_module("umt_kernels.matmul")
DTYPES = {torch.int8: (127.0, 0.5 / 127), torch.float8_e4m3fn: (448.0, 2.0**-4)}
"""Largest number, and the largest rounding error as a share of the largest number in the row."""


@pytest.fixture(params=[80, 90])
def form(
    request: pytest.FixtureRequest,
    kernels: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    few_programs: None,
) -> None:
    """In the interpreter with and without tensor descriptors; otherwise the available form, once."""
    if kernels and device.type == "cpu":
        monkeypatch.setattr(matmul, "target", lambda device: (request.param, 2))
    elif request.param != 80:
        pytest.skip("the device's own form runs once")


def drawn(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(device)


def wide(x: EightBit, group: int = 128) -> Tensor:
    """The represented numbers, in float64."""
    values = x.values.double().flatten(0, -2)
    scale = x.scale.double()
    scale = scale[:, None] if scale.dim() == 1 else scale.T.repeat_interleave(group, 1)[:, : values.shape[1]]
    return (values * scale).view(x.values.shape)


def normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def check_rounding(actual: EightBit, expected: Tensor, dtype: torch.dtype, slack: float = 1.05) -> None:
    """Each number is within a rounding of `expected`, the largest of each row or group is at the end of the range."""
    largest, share = DTYPES[dtype]
    assert actual.values.dtype == dtype
    per_row = expected.abs().amax(-1, keepdim=True)
    assert ((actual.scale.double() - per_row.flatten() / largest).abs() <= 1e-5 * per_row.flatten() + 1e-12).all()
    within = (wide(actual) - expected).abs() <= slack * share * per_row + 1e-9
    if INTERPRETED and dtype != torch.int8:  # the interpreter's conversion loses the carry just below a power of two
        assert within.double().mean() > 0.85 or within.numel() < 50
    else:
        assert within.all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 48), (7, 130), (3, 2100)])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_rows_and_norms_are_rounded_to_the_nearest(device, form, dtype, shape, source):
    x, branch = (3 * drawn(device, *shape) + 0.5).to(source), drawn(device, *shape[::-1]).view(shape).to(source)
    check_rounding(quantize_rows(x, dtype), x.double(), dtype)
    weight, bias = 1 + drawn(device, shape[-1]), drawn(device, 1 + shape[-1])[1:].contiguous()
    total, rows = add_layer_norm_8bit(x, branch, weight, bias, 1e-3, dtype)
    assert total.dtype == source
    assert (total.double() - x.double() - branch.double()).abs().max() <= (0.07 if source == torch.bfloat16 else 1e-5)
    check_rounding(rows, normed(total.double(), weight, bias, 1e-3), dtype)
    same, alone = add_layer_norm_8bit(total, None, weight, bias, 1e-3, dtype)
    assert same is total
    assert torch.equal(alone.values.float(), rows.values.float())
    assert torch.equal(alone.scale, rows.scale)


def test_zero_rows_stay_zero(device, form):
    for dtype in DTYPES:
        rows = quantize_rows(torch.zeros(3, 16, device=device), dtype)
        assert (rows.values.float() == 0).all()
        assert rows.scale.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-9, 1.0, 3e38])
def test_the_largest_number_is_the_end_of_the_range(device, form, dtype, size):
    """It neither wraps around nor becomes NaN, for rows of any magnitude."""
    x = size * torch.tensor([[1.0, -1.0, 0.5, 0.0], [-1.0, 0.999, 0.25, 1e-30]], device=device)
    values, scale = quantize_rows(x, dtype)
    largest = DTYPES[dtype][0]
    assert values.double().abs().amax(1).tolist() == [largest, largest]
    assert torch.equal(values.double().sign()[0].cpu(), torch.tensor([1.0, -1.0, 1.0, 0.0], dtype=torch.float64))
    assert (scale.double() / size * largest - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(150, 80, 208), (33, 256, 72), (1, 16, 8)])
@pytest.mark.parametrize("activation", [None, "gelu", "quick_gelu"])
def test_products_match_float64(device, form, dtype, shape, activation, assert_near):
    """The products of the rounded operands: int32 sums are exact, float32 sums nearly."""
    m, k, n = shape
    x, weight = quantize_rows(drawn(device, m, k), dtype), quantize_rows(drawn(device, n, k, scale=k**-0.5), dtype)
    bias = drawn(device, n)
    y = wide(x) @ wide(weight).T + bias.double()
    if activation == "gelu":
        y = torch.nn.functional.gelu(y)
    elif activation == "quick_gelu":
        y = y * torch.sigmoid(1.702 * y)
    assert_near(linear_8bit(x, weight, bias, activation=activation, out_dtype=torch.float32), y)
    assert_near(linear_8bit(x, weight, bias, activation=activation), y)
    rounded = linear_8bit(x, weight, bias, activation=activation, out_dtype=dtype)
    assert rounded.scale.shape == (-(-n // 128), m)
    for group in range(rounded.scale.shape[0]):
        columns = slice(128 * group, 128 * (group + 1))
        part = EightBit(rounded.values[:, columns].contiguous(), rounded.scale[group])
        check_rounding(part, y[:, columns], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [128, 200, 512])
def test_an_mlp_of_8_bit_products(device, form, dtype, hidden, assert_near):
    """The second product reads the output of the first one's epilogue, with a scale per row and 128 columns."""
    m, d = 140, 48
    x = quantize_rows(drawn(device, 2, m // 2, d), dtype)
    first = quantize_rows(drawn(device, hidden, d, scale=d**-0.5), dtype)
    second = quantize_rows(drawn(device, d, hidden, scale=hidden**-0.5), dtype)
    middle = linear_8bit(x, first, drawn(device, hidden), activation="quick_gelu", out_dtype=dtype)
    assert middle.values.shape == (2, m // 2, hidden)
    y = linear_8bit(middle, second, drawn(device, d), out_dtype=torch.float32)
    assert_near(y, wide(middle) @ wide(second).T + drawn(device, d).double())


@pytest.mark.parametrize("large", [False, True])
def test_an_epilogue_that_counts_the_wrong_groups_is_detected(device, form, monkeypatch, large):
    """Groups differ much in magnitude, so another group's scale gives large errors. `large` tiles have two groups."""
    config = matmul.config
    if large:  # as for the sizes of the models
        monkeypatch.setattr(matmul, "config", lambda m, *rest: config(128 * 100, *rest))
    weight = drawn(device, 384, 32, scale=0.2)
    weight[128:256] *= 100
    weight[256:] *= 0.01
    x = quantize_rows(drawn(device, 130, 32), torch.int8)
    rounded = linear_8bit(x, quantize_rows(weight, torch.int8), out_dtype=torch.int8)
    expected = wide(x) @ wide(quantize_rows(weight, torch.int8)).T
    for group in range(3):
        columns = slice(128 * group, 128 * (group + 1))
        error = (wide(rounded) - expected)[:, columns].abs().max() / expected[:, columns].abs().max()
        assert error < 0.01


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, w: quantize_rows(x, torch.int32), TypeError, ["dtype = torch.int32", "torch.int8"]),
        (lambda x, w: quantize_rows(x.long(), torch.int8), TypeError, ["x has dtype torch.int64"]),
        (
            lambda x, w: add_layer_norm_8bit(x, x[:2], x[0], x[0], 1e-5, torch.int8),
            ValueError,
            ["branch", "[2, 8]", "[4, 8]"],
        ),
        (
            lambda x, w: add_layer_norm_8bit(x, x, x[0, :4], x[0], 1e-5, torch.int8),
            ValueError,
            ["weight", "[4]", "[8]"],
        ),
        (
            lambda x, w: linear_8bit(quantize_rows(x[:, :4], torch.int8), quantize_rows(w, torch.int8)),
            ValueError,
            ["x [4, 4]", "weight [6, 8]"],
        ),
        (
            lambda x, w: linear_8bit(quantize_rows(x, torch.int8), quantize_rows(w, torch.float8_e4m3fn)),
            TypeError,
            ["weight is torch.float8_e4m3fn", "x is torch.int8"],
        ),
        (
            lambda x, w: linear_8bit(quantize_rows(x, torch.int8)._replace(scale=x[0]), quantize_rows(w, torch.int8)),
            ValueError,
            ["scales [8] of x", "[4] or [1, 4]"],
        ),
        (
            lambda x, w: linear_8bit(quantize_rows(x, torch.int8), quantize_rows(w, torch.int8), x[0]),
            ValueError,
            ["bias", "[8]", "[6]"],
        ),
        (
            lambda x, w: linear_8bit(quantize_rows(x, torch.int8), quantize_rows(w, torch.int8), activation="relu"),
            ValueError,
            ["activation = 'relu'", "quick_gelu"],
        ),
        (
            lambda x, w: linear_8bit(quantize_rows(x, torch.int8), quantize_rows(w, torch.int8), out_dtype=torch.int32),
            TypeError,
            ["out_dtype = torch.int32", "bfloat16"],
        ),
        (lambda x, w: linear_8bit(x, quantize_rows(w, torch.int8)), TypeError, ["x is a Tensor", "quantize_rows"]),
        (lambda x, w: quantize_rows(x[:, :0], torch.int8), ValueError, ["x has shape [4, 0]"]),
        (lambda x, w: quantize_rows(x[0, 0], torch.int8), ValueError, ["x has shape []"]),
        (lambda x, w: add_layer_norm_8bit(x, x, None, x[0], 1e-5, torch.int8), TypeError, ["weight is None", "[8]"]),
    ],
)
def test_errors_name_the_value_and_the_place(call, error, words):
    with pytest.raises(error) as caught:
        call(torch.ones(4, 8), torch.ones(6, 8))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_a_nan_or_infinity_is_no_row_of_numbers(device, dtype, odd):
    """An int8 cannot be NaN or infinite, so the row's scale must be; other rows do not change."""
    x = torch.ones(3, 24, device=device)
    x[1, 5] = odd
    values, scale = quantize_rows(x, dtype)
    rows = values.double() * scale.double()[:, None]
    assert rows.isfinite().all(1).tolist() == [True, False, True]
    assert not rows[1].isfinite().any()
    weight = quantize_rows(torch.eye(24, device=device), dtype)
    hidden = linear_8bit(EightBit(values, scale), weight, out_dtype=dtype)
    out = linear_8bit(hidden, weight)
    assert out.isfinite().all(1).tolist() == [True, False, True]

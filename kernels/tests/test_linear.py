"""linear and mlp against products written out in float64, with and without tensor descriptors."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor
from umt_kernels import linear, mlp

matmul = importlib.import_module("umt_kernels.matmul")
ON_THE_CPU = torch.device("cpu")
ACTIVATIONS = [None, "gelu", "quick_gelu"]


@pytest.fixture(params=[80, 90])
def backend(
    request: pytest.FixtureRequest,
    kernels: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    fresh_plans: None,
) -> str:
    """All backends that run here: the kernel in both of its forms, or PyTorch."""
    if kernels and device.type == "cpu":
        monkeypatch.setattr(matmul, "target", lambda device: (request.param, 2))
    elif request.param != 80:
        pytest.skip("the GPU's own form runs once")
    return "triton" if kernels else "torch"


def drawn(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, **scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale.get("scale", 1.0)).to(device, dtype)


def activated(x: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return x / (1 + torch.exp(-1.702 * x)) if activation else x


def with_gradients(y: Tensor, leaves: list[Tensor | None]) -> list[Tensor]:
    upstream = torch.linspace(-1, 2, y.numel(), device=y.device).view_as(y).to(torch.bfloat16).to(y.dtype)
    given = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, given, upstream)]


def widened(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def compare(actual: list[Tensor], expected: list[Tensor], assert_near, arithmetic: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs, arithmetic)


# rows, inputs, outputs: one tile, several with all edges cut, a depth that no tile divides, one row
SHAPES = [(64, 32, 64), (150, 80, 208), (33, 48, 80), (1, 16, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_linear_matches_float64(device, backend, shape, activation, with_residual, assert_near):
    m, k, n = shape
    tensors = [
        drawn(device, (m, k), torch.float32),
        drawn(device, (n, k), torch.float32, scale=k**-0.5),
        drawn(device, (n,), torch.float32),
        drawn(device, (m, n), torch.float32) if with_residual else None,
    ]
    x, w, b, r = wide = widened(tensors)
    expected = activated(x @ w.T + b, activation) + (0 if r is None else r)
    x, w, b, r = given = [None if t is None else t.requires_grad_() for t in tensors]
    y = linear(x, w, b, activation=activation, residual=r, backend=backend)
    compare(with_gradients(y, given), with_gradients(expected, wide), assert_near, 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("with_residual", [False, True])
def test_mlp_matches_float64(device, backend, shape, activation, with_residual, assert_near):
    m, d, h = shape
    tensors = [
        drawn(device, (m, d), torch.float32),
        drawn(device, (h, d), torch.float32, scale=d**-0.5),
        drawn(device, (h,), torch.float32),
        drawn(device, (d, h), torch.float32, scale=h**-0.5),
        drawn(device, (d,), torch.float32),
        drawn(device, (m, d), torch.float32) if with_residual else None,
    ]
    x, w1, b1, w2, b2, r = wide = widened(tensors)
    expected = activated(x @ w1.T + b1, activation) @ w2.T + b2 + (0 if r is None else r)
    x, *parameters, r = given = [None if t is None else t.requires_grad_() for t in tensors]
    y = mlp(x, *parameters, activation=activation, residual=r, backend=backend)
    compare(with_gradients(y, given), with_gradients(expected, wide), assert_near, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_float32_residual(device, backend, dtype, assert_near):
    """As in the student under autocast: float32 parameters and residual stream, half-precision products."""
    m, d, h = 140, 80, 208
    tensors = [
        drawn(device, (2, m // 2, d), dtype),
        drawn(device, (h, d), torch.float32, scale=d**-0.5),
        drawn(device, (h,), torch.float32),
        drawn(device, (d, h), torch.float32, scale=h**-0.5),
        drawn(device, (d,), torch.float32),
        drawn(device, (2, m // 2, d), torch.float32),
    ]
    rounded = [t.to(dtype) if t.dim() == 2 else t for t in tensors]
    x, w1, b1, w2, b2, r = wide = widened(rounded)
    expected = activated(x @ w1.T + b1, "gelu") @ w2.T + b2 + r
    x, *parameters, r = given = [t.requires_grad_() for t in tensors]
    with torch.autocast(device.type, dtype):
        y = mlp(x, *parameters, residual=r, backend=backend)
    assert y.dtype == torch.float32
    actual = with_gradients(y, given)
    assert [t.dtype for t in actual[1:]] == [t.dtype for t in given]
    compare(actual, with_gradients(expected, wide), assert_near, 3e-2)


def test_the_result_is_rounded_once(device, needs_kernels, assert_near, monkeypatch, fresh_plans):
    """Bias, activation and residual are float32 inside: PyTorch's chain rounds after each."""
    monkeypatch.setattr(matmul, "target", lambda device: (90, 2))
    x, w = drawn(device, (140, 64), torch.bfloat16), drawn(device, (144, 64), torch.bfloat16, scale=0.125)
    b, r = drawn(device, (144,), torch.float32), drawn(device, (140, 144), torch.bfloat16)
    y = linear(x, w, b, activation="quick_gelu", residual=r, backend="triton")
    expected = activated(x.double() @ w.double().T + b.double(), "quick_gelu") + r.double()
    assert y.dtype == torch.bfloat16
    assert_near(y, expected, 1e-5)


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch, fresh_plans: None) -> None:
    """Tiles of 256 columns, as for the sizes of the models, on small products."""
    config = matmul.config
    monkeypatch.setattr(matmul, "config", lambda m, *rest: config(128 * 100, *rest))


def test_wide_tiles(device, backend, needs_kernels, wide_tiles, assert_near):
    """Finished in four parts of 64 columns, the last of them cut."""
    m, k, n = 140, 40, 472
    tensors = [
        drawn(device, (m, k), torch.bfloat16),
        drawn(device, (n, k), torch.bfloat16, scale=k**-0.5),
        drawn(device, (n,), torch.float32),
        drawn(device, (m, n), torch.bfloat16),
    ]
    assert matmul.config(m, n, 2, matmul.target(device)[0])["PARTS"] == 4
    x, w, b, r = wide = widened(tensors)
    expected = activated(x @ w.T + b, "gelu") + r
    assert_near(linear(*tensors[:3], activation="gelu", residual=tensors[3], backend="triton"), expected, 1e-5)
    x, w, b, _ = given = [t.requires_grad_() for t in tensors]
    narrow = drawn(device, (k, n), torch.bfloat16, scale=n**-0.5).requires_grad_()
    y = mlp(x, w, b, narrow, None, backend="triton")
    exact = activated(wide[0] @ wide[1].T + wide[2], "gelu") @ narrow.double().T
    ours, theirs = (with_gradients(out, tensors[:3]) for out, tensors in ((y, given), (exact, wide)))
    compare(ours, theirs, assert_near, 3e-2)


def test_more_tiles_than_a_swath(device, backend, assert_near):
    x, w = drawn(device, (600, 8), torch.float32), drawn(device, (150, 8), torch.float32)
    assert_near(linear(x, w, backend=backend), x.double() @ w.double().T)


def test_gradients_of_float32_biases_are_sums_in_float32(device, needs_kernels):
    """bfloat16 cannot represent 257."""
    x, weight = drawn(device, (257, 16), torch.bfloat16), drawn(device, (16, 16), torch.bfloat16)
    bias = torch.zeros(16, device=device, requires_grad=True)
    linear(x, weight, bias, backend="triton").sum().backward()
    assert (bias.grad == 257).all()
    bias.grad = None
    mlp(x, weight, None, weight, bias, backend="triton").sum().backward()
    assert (bias.grad == 257).all()


def test_the_derivative_of_quick_gelu_at_large_float16_numbers(device, needs_kernels):
    """1.702 times 50,000 is beyond float16; the derivative there is 1."""
    x = torch.full((1, 16), 50000.0, dtype=torch.float16, device=device, requires_grad=True)
    linear(x, torch.eye(16, device=device).half(), activation="quick_gelu", backend="triton").sum().backward()
    assert (x.grad == 1).all()


@pytest.mark.parametrize("strided", ["x", "residual", "weight"])
def test_strides_that_tensor_descriptors_cannot_have(device, backend, strided, assert_near):
    x, w = drawn(device, (70, 40), torch.float32), drawn(device, (50, 40), torch.float32)
    r = drawn(device, (70, 50), torch.float32)
    expected = x.double() @ w.double().T + r.double()
    if strided == "x":
        x = x.T.contiguous().T
    elif strided == "weight":
        w = torch.cat((w, w), 1)[:, 1:41].roll(1, 1)[:, :40]
        expected = x.double() @ w.double().T + r.double()
        w = torch.cat((w.new_full((50, 1), float("nan")), w), 1)[:, 1:]
    else:
        r = torch.cat((r, r), 1)[:, :50]
    assert_near(linear(x, w, residual=r, backend=backend), expected)


def test_no_rows(device, backend):
    x, w = torch.zeros(2, 0, 8, device=device, requires_grad=True), torch.zeros(16, 8, device=device)
    y = linear(x, w.requires_grad_(), backend=backend)
    assert y.shape == (2, 0, 16)
    y.sum().backward()
    assert (w.grad == 0).all()
    assert mlp(x, w, None, w.T, None, backend=backend).shape == (2, 0, 8)


def test_only_requested_inputs_get_a_gradient(device, backend, assert_near):
    x, w1 = drawn(device, (20, 16), torch.float32), drawn(device, (24, 16), torch.float32)
    w2, b1 = drawn(device, (16, 24), torch.float32), drawn(device, (24,), torch.float32).requires_grad_()
    mlp(x, w1, b1, w2, None, backend=backend).sum().backward()
    wide = b1.detach().double().requires_grad_()
    (activated(x.double() @ w1.double().T + wide, "gelu") @ w2.double().T).sum().backward()
    assert_near(b1.grad, wide.grad)
    assert x.grad is w1.grad is w2.grad is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(4, 7)}, ValueError, ["x [4, 7]", "weight [6, 8]"]),
        ({"weight": torch.zeros(6)}, ValueError, ["weight [6]", "[n, k]"]),
        ({"bias": torch.zeros(8)}, ValueError, ["bias", "[8]", "[6]"]),
        ({"residual": torch.zeros(6)}, ValueError, ["residual", "[6]", "[4, 6]"]),
        ({"activation": "relu"}, ValueError, ["activation = 'relu'", "quick_gelu"]),
        ({"backend": "cublas"}, ValueError, ["backend = 'cublas'", "'torch'"]),
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, ["x has dtype torch.int64"]),
        ({"weight": torch.zeros(6, 8, device="meta")}, ValueError, ["weight is on meta", "x is on cpu"]),
        ({"x": torch.zeros(4, 8, dtype=torch.float64), "backend": "triton"}, RuntimeError, ["float64", "GPU"]),
    ],
)
def test_errors_name_the_value_and_the_place(change, error, words):
    given = {"x": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6), **change}
    with pytest.raises(error) as caught:
        linear(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)
    for word in words:
        assert word in str(caught.value)


def test_mlp_names_its_parameters():
    x, w = torch.zeros(4, 8), torch.zeros(6, 8)
    with pytest.raises(ValueError, match=r"fc1_bias has shape \[8\]; give \[6\]"):
        mlp(x, w, torch.zeros(8), w.T, None)
    with pytest.raises(ValueError, match=r"fc2_weight \[6, 8\]"):
        mlp(x, w, None, w, None)
    with pytest.raises(ValueError, match="activation = None"):
        mlp(x, w, None, w.T, None, activation=None)


def test_pytorch_runs_until_a_measurement_says_otherwise(device, monkeypatch):
    x, w = torch.ones(4, 8, device=device), torch.ones(6, 8, device=device)
    ran = []
    monkeypatch.setattr(importlib.import_module("umt_kernels.linear"), "prepare", lambda *a: ran.append(a) or 1 / 0)
    monkeypatch.setattr(matmul, "runs_triton", lambda *tensors: True)
    linear(x, w)
    assert ran == []
    monkeypatch.setattr(matmul, "FASTER", frozenset({("linear", matmul.target(device)[0])}))
    with pytest.raises(ZeroDivisionError):
        linear(x, w)
    monkeypatch.setattr(matmul, "FORCED", "torch")
    linear(x, w)
    monkeypatch.setattr(matmul, "FASTER", frozenset())
    monkeypatch.setattr(matmul, "FORCED", "triton")
    with pytest.raises(ZeroDivisionError):
        linear(x, w)
    linear(x, w, backend="torch")


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [1, 2])
def test_tiles_are_legal_for_every_size(capability, itemsize):
    for m, n in ((1, 8), (4096, 768), (100864, 3072), (20480, 1024)):
        for grouped, quantised, two in itertools.product((False, True), repeat=3):
            tiles = matmul.config(m, n, itemsize, capability, grouped, quantised, two)
            assert tiles["ROWS"] == matmul._tile_rows(itemsize)
            assert tiles["COLUMNS"] // tiles["PARTS"] == (matmul.GROUP if quantised else 64)
            assert tiles["DEPTH"] * itemsize == 128
            buffers = tiles["num_stages"] - (capability not in matmul.TENSOR_DESCRIPTORS)
            held = (tiles["ROWS"] + tiles["COLUMNS"]) * 128 * buffers
            assert held <= {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}[capability] * 1024

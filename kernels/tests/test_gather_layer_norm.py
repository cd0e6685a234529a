"""gather_layer_norm against LayerNorm written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from umt_kernels import gather_layer_norm, gather_rms_norm

EPS = 1e-3  # large enough to have an effect


def case(device: torch.device, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return {
        "x": 0.1 * draw(2, 9, 16) + 1,
        "weight": draw(16),
        "bias": draw(16),
        "row_ids": torch.tensor([[1, 8, 0, 4], [3, 2, 7, 8]], device=device),
        "position": draw(20, 16),
        "position_ids": torch.tensor([[19, 0, 0, 7], [1, 2, 3, 4]], device=device),
    }


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, row_ids: Tensor | None, position: Tensor | None, position_ids: Tensor
) -> Tensor:
    rows = x.double() if row_ids is None else torch.stack([s[i] for s, i in zip(x.double(), row_ids, strict=True)])
    centred = rows - rows.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double() + bias.double()
    return y if position is None else y + position.double()[position_ids.long()]


def run(case: dict[str, Tensor]) -> Tensor:
    case = dict(case)
    return gather_layer_norm(case.pop("x"), case.pop("weight"), case.pop("bias"), EPS, **case)


@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("with_position", [True, False])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_matches_float64(device, with_rows, with_position, ids_dtype):
    given = case(device)
    for name in ("row_ids", "position_ids"):
        given[name] = given[name].to(ids_dtype)
    if not with_rows:
        given["row_ids"] = None
        given["position_ids"] = torch.arange(18, dtype=ids_dtype, device=device).view(2, 9)
    expected = reference(**{**given, "position": given["position"] if with_position else None})
    if not with_position:
        given["position"] = given["position_ids"] = None
    out = run(given)
    assert out.dtype == torch.float64
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < 1e-12
    narrow = {k: v.float() if v is not None and v.is_floating_point() else v for k, v in given.items()}
    assert (run(narrow) - expected).abs().max() < 1e-5


def test_bf16_is_rounded_once_and_keeps_float32_parameters(device, assert_near):
    given = case(device)
    given["x"] = given["x"].bfloat16()
    expected = reference(**given)
    for name in ("weight", "bias", "position"):
        given[name] = given[name].float()
    out = run(given)
    assert out.dtype == torch.bfloat16
    assert_near(out, expected)


def test_autocast_changes_nothing(device):
    given = case(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        inside = run(given)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, run(given))


def test_gradcheck(device):
    given = case(device)
    for name in ("x", "weight", "bias", "position"):
        given[name] = given[name][..., :5]
    inputs = [given.pop(name).requires_grad_() for name in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda x, w, b: gather_layer_norm(x, w, b, EPS, **given), inputs)


def test_gradients_match_float64_autograd(device):
    given = case(device, torch.float32)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    upstream = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1)).to(device)
    for tensors in (given, wide):
        for name in ("x", "weight", "bias", "position"):
            tensors[name].requires_grad_()
    run(given).backward(upstream)
    reference(**wide).backward(upstream.double())
    for name in ("x", "weight", "bias", "position"):
        assert (given[name].grad - wide[name].grad).abs().max() < 1e-4, name
    assert (given["position"].grad[0] != 0).all()  # two rows use it
    assert (given["position"].grad[5] == 0).all()  # no row uses it
    kept = torch.zeros(2, 9, dtype=torch.bool, device=device).scatter_(1, given["row_ids"], True)
    assert (given["x"].grad[~kept] == 0).all()
    assert (given["x"].grad[kept] != 0).any(-1).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(9, 16)}, ValueError, ["x [9, 16]", "[b, l, d]"]),
        ({"weight": torch.zeros(8)}, ValueError, ["weight [8]"]),
        ({"bias": torch.zeros(1)}, ValueError, ["bias [1]"]),
        ({"row_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 9, 3]])}, ValueError, ["row_ids[1, 2] = 9", "9 rows"]),
        ({"row_ids": torch.tensor([[0, 1, -2, 3], [0, 1, 2, 3]])}, ValueError, ["row_ids[0, 2] = -2"]),
        ({"row_ids": torch.zeros(2, 4)}, TypeError, ["row_ids", "torch.float32"]),
        ({"row_ids": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, ["row_ids", "[3, 4]", "[2, m]", "multiple"]),
        ({"row_ids": torch.tensor([[0, 1, -2, 3], [0, 1, 2, 3]]), "padded": True}, ValueError, ["row_ids[0, 2] = -2"]),
        ({"out_dtype": torch.int32}, TypeError, ["out_dtype = torch.int32"]),
        ({"row_ids": torch.zeros(2, 4, dtype=torch.int32, device="meta")}, ValueError, ["row_ids is on meta"]),
        ({"weight": torch.zeros(16, device="meta")}, ValueError, ["weight is on meta", "x is on cpu"]),
        ({"x": torch.zeros(2, 9, 16, dtype=torch.int64)}, TypeError, ["x has dtype torch.int64"]),
        ({"bias": torch.zeros(16, dtype=torch.complex64)}, TypeError, ["bias has dtype torch.complex64"]),
        ({"position": torch.zeros(20, 16, dtype=torch.int32)}, TypeError, ["position has dtype torch.int32"]),
        ({"position": torch.tensor(1.0)}, ValueError, ["position []", "[n, 16]"]),
        ({"position_ids": torch.full((2, 4), 20)}, ValueError, ["position_ids[0, 0] = 20", "20 rows"]),
        ({"position_ids": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, ["position_ids [2, 3]", "[2, 4]"]),
        ({"position": torch.zeros(20, 8)}, ValueError, ["position [20, 8]", "[n, 16]"]),
        ({"position": None}, ValueError, ["position and position_ids", "both"]),
        ({"position_ids": None}, ValueError, ["position and position_ids", "both"]),
    ],
)
def test_errors_name_the_value_and_the_place(change, error, words):
    with pytest.raises(error) as caught:
        run({**case(torch.device("cpu"), torch.float32), **change})
    for word in words:
        assert word in str(caught.value)


def test_a_row_may_be_given_twice_where_nothing_is_scattered(device):
    given = case(device, torch.float32)
    twice = torch.tensor([[0, 1, 2, 3], [5, 1, 8, 1]], device=device)
    given |= {"row_ids": twice, "position": None, "position_ids": None}
    out = run(given)
    assert torch.equal(out[1, 1], out[1, 3])
    given["x"].requires_grad_()
    if device.type == "cuda":
        return  # ids are not checked there
    with pytest.raises(ValueError, match=r"row_ids\[1, 3\] = 1, as is row_ids\[1, 1\]; give each row once"):
        run(given)


def test_a_negative_eps_is_refused():
    with pytest.raises(ValueError, match=r"eps = -1e-06"):
        gather_layer_norm(torch.zeros(1, 2, 3), torch.zeros(3), torch.zeros(3), -1e-6)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# samples, rows, kept rows, width: one row, all rows, no powers of two, more rows than one program takes, a wide row
SHAPES = [(1, 1, 1, 3), (2, 5, 5, 24), (3, 7, 4, 100), (2, 60, 45, 33), (1, 3, 2, 2100)]


def drawn(
    device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, ids: torch.dtype = torch.int64
) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments with bf16 or fp16 `x`, float32 weight and bias, and an upstream gradient."""
    batch, length, kept, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    given = {
        "x": (2 * torch.randn(batch, length, width, generator=generator) + 1).to(device, dtype),
        "weight": torch.randn(width, generator=generator).to(device),
        "bias": torch.randn(width, generator=generator).to(device),
        "row_ids": torch.stack([torch.randperm(length, generator=generator)[:kept] for _ in range(batch)]),
        "position": torch.randn(11, width, generator=generator).to(device),
        "position_ids": torch.randint(11, (batch, kept), generator=generator),
    }
    for name in ("row_ids", "position_ids"):
        given[name] = given[name].to(device, ids)
    return given, torch.randn(batch, kept, width, generator=generator).to(device, dtype)


def differentiated(given: dict[str, Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    given = {**given, **{name: given[name].detach().requires_grad_() for name in ("x", "weight", "bias")}}
    y = run(given)
    inputs = [given[name] for name in ("x", "weight", "bias")]
    return y.detach(), *torch.autograd.grad(y, inputs, upstream.to(y.dtype))


def widened(given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {k: v.double() if v is not None and v.is_floating_point() else v for k, v in given.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "spread", "last dimension strided"])
def test_kernel_against_float64(device, shape, dtype, layout, few_programs, spread, assert_near):
    given, upstream = drawn(device, shape, dtype, torch.int32 if layout == "spread" else torch.int64)
    expected = differentiated(widened(given), upstream)
    if layout == "spread":
        given = {name: spread(value) for name, value in given.items()}
        upstream = spread(upstream)
    elif layout != "contiguous":
        given["x"], upstream = (x.mT.contiguous().mT for x in (given["x"], upstream))
    actual = differentiated(given, upstream)
    assert [x.dtype for x in actual] == [dtype, dtype, torch.float32, torch.float32]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs)


def test_rows_of_one_number_are_their_own_mean(device):
    given, _ = drawn(device, (2, 5, 4, 1), torch.float32)
    expected = given["bias"] + given["position"][given["position_ids"]]
    assert (run(given) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("left_out", [("row_ids",), ("position", "position_ids")])
def test_kernel_without_ids_or_position(device, left_out, few_programs, assert_near):
    given, upstream = drawn(device, (2, 70, 70, 40), torch.float32)
    given.update(dict.fromkeys(left_out))
    for ours, theirs in zip(differentiated(given, upstream), differentiated(widened(given), upstream), strict=True):
        assert_near(ours, theirs)


def test_weights_of_the_dtype_of_x_get_gradients_of_that_dtype(device, assert_near):
    given, upstream = drawn(device, (2, 9, 6, 24), torch.bfloat16)
    given.update({name: given[name].bfloat16() for name in ("weight", "bias", "position")})
    actual = differentiated(given, upstream)
    assert {x.dtype for x in actual} == {torch.bfloat16}
    for ours, theirs in zip(actual, differentiated(widened(given), upstream), strict=True):
        assert_near(ours, theirs)


def test_rows_with_a_large_mean_keep_their_variance(device, assert_near):
    """The mean is subtracted before squaring: E[x^2] - E[x]^2 would lose all digits here."""
    given, _ = drawn(device, (2, 5, 4, 64), torch.float32)
    given["x"] = given["x"] + 3000
    assert_near(run(given), run(widened(given)), 1e-3)


def test_gradient_of_a_sum_which_is_one_number_expanded(device, assert_near):
    given, _ = drawn(device, (2, 5, 3, 12), torch.float32)
    wide = widened(given)
    for tensors in (given, wide):
        tensors["bias"].requires_grad_()
        (2 * run(tensors)).sum().backward()
    assert_near(given["bias"].grad, wide["bias"].grad)
    assert (given["bias"].grad == 12).all()


def test_backward_twice_no_grad_and_one_gradient(device):
    given, upstream = drawn(device, (2, 9, 6, 24), torch.float32)
    _, grad_x, grad_weight, _ = differentiated(given, upstream)
    given["x"].requires_grad_()
    y = run(given)
    y.backward(upstream, retain_graph=True)
    y.backward(upstream)
    assert torch.equal(given["x"].grad, 2 * grad_x)
    assert given["weight"].grad is None
    with torch.no_grad():
        assert torch.equal(run(given), y)
        assert not run(given).requires_grad
    given["x"] = given["x"].detach()
    given["weight"].requires_grad_()
    run(given).backward(upstream)
    assert torch.equal(given["weight"].grad, grad_weight)


def test_weight_gradients_are_the_same_every_time(device, few_programs):
    given, upstream = drawn(device, (2, 60, 45, 33), torch.float32)
    first, second = differentiated(given, upstream), differentiated(given, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("batch", "kept"), [(0, 4), (2, 0)])
def test_no_rows_are_kept(device, batch, kept):
    x = torch.randn(batch, 5, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    ids = torch.zeros(batch, kept, dtype=torch.int64, device=device)
    y = gather_layer_norm(x, weight, weight.detach(), EPS, row_ids=ids)
    assert y.shape == (batch, kept, 8)
    y.sum().backward()
    assert (x.grad == 0).all()
    assert (weight.grad == 0).all()


def by_hand(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_ids: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    rms: bool,
) -> Tensor:
    """Row by row in float64: [k, r, m, d]."""
    layers = x.double() if x.dim() == 4 else x.double()[None]
    batch, length, width = layers.shape[1:]
    if row_ids is None:
        row_ids = torch.arange(length, device=x.device).expand(batch, -1)
    out = []
    for layer in layers:
        for index, ids in enumerate(row_ids.tolist()):
            for place, row in enumerate(ids):
                if row < 0:
                    out.append(torch.zeros(width, dtype=torch.float64, device=x.device))
                    continue
                y = layer[index // (len(row_ids) // batch), row]
                centred = y if rms else y - y.mean()
                y = centred / (centred.square().mean() + EPS).sqrt()
                y = y if weight is None else y * weight.double()
                y = y if bias is None else y + bias.double()
                if position is not None and position_ids[index, place] >= 0:
                    y = y + position.double()[position_ids[index, place]]
                out.append(y)
    stacked = torch.stack(out).view(len(layers), *row_ids.shape, width)
    return stacked if x.dim() == 4 else stacked[0]


# Sets per sample, kept rows, layers (0: x has no such axis), and the options
FORMS = [
    (2, 3, 0, ()),
    (1, 4, 3, ("position",)),
    (3, 4, 0, ("padded", "position")),
    (2, 5, 2, ("padded", "position", "rms")),
    (1, 5, 0, ("rms",)),
    (1, 0, 2, ("rms", "position")),
    (1, 4, 0, ("no weight", "position")),
    (2, 4, 2, ("no bias", "padded")),
    (1, 0, 0, ("no weight", "no bias")),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_forms_for_other_models(device, form, out_dtype, few_programs, spread, assert_near):
    sets, kept, layers, switches = form
    batch, length, width = 2, 7, 20
    generator = torch.Generator().manual_seed(kept + layers)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    row_ids = None
    if kept:
        row_ids = torch.stack([torch.randperm(length, generator=generator)[:kept] for _ in range(batch * sets)])
    position_ids = torch.randint(6, (batch * sets, kept or length), generator=generator)
    if "padded" in switches:
        row_ids[0, 1] = row_ids[2, 3] = row_ids[2, 0] = -1
        position_ids[1, 2] = position_ids[2, 0] = -1
    tensors = {
        "x": spread(draw(*[layers] * bool(layers), batch, length, width) + 1),
        "weight": None if "no weight" in switches else draw(width),
        "bias": None if "no bias" in switches or "rms" in switches else draw(width),
        "position": draw(6, width) if "position" in switches else None,
    }
    ids = {"row_ids": None if row_ids is None else row_ids.to(device)}
    ids["position_ids"] = position_ids.to(device) if "position" in switches else None

    def run_op(x, weight, bias, position):
        settings = {**ids, "position": position, "padded": "padded" in switches, "out_dtype": out_dtype}
        if "rms" in switches:
            return gather_rms_norm(x, weight, EPS, **settings)
        return gather_layer_norm(x, weight, bias, EPS, **settings)

    def by_definition(x, weight, bias, position):
        return by_hand(x, weight, bias, ids["row_ids"], position, ids["position_ids"], "rms" in switches)

    results, upstream = [], None
    for function in (run_op, by_definition):
        given = [None if x is None else x.detach().requires_grad_() for x in tensors.values()]
        y = function(*given)
        upstream = draw(*y.shape).to(out_dtype) if upstream is None else upstream
        grads = torch.autograd.grad(y, [x for x in given if x is not None], upstream.to(y.dtype))
        results.append([y.detach(), *grads])
    assert results[0][0].dtype == out_dtype
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


def test_a_row_that_no_set_keeps_gets_zeros_even_with_eps_0(device):
    x = torch.zeros(1, 3, 4, device=device)
    x[0, 1] = torch.arange(4.0)
    x.requires_grad_()
    y = gather_layer_norm(x, None, None, 0.0, row_ids=torch.tensor([[1]], device=device))
    y.square().sum().backward()
    assert (x.grad[0, ::2] == 0).all()
    assert x.grad.isfinite().all()


def test_a_position_id_of_minus_1_adds_nothing_without_row_ids(device, assert_near):
    """Once its gradient went to the last row of the table."""
    x, table = torch.randn(1, 4, 6, device=device), torch.randn(3, 6, device=device).requires_grad_()
    ids = torch.tensor([[-1, 1, -1, 0]], device=device)
    y = gather_layer_norm(x, None, None, 1e-6, position=table, position_ids=ids, padded=True)
    assert_near(y.detach()[0, 0], torch.nn.functional.layer_norm(x[0, 0].double(), (6,), eps=1e-6))
    y.sum().backward()
    assert_near(table.grad, torch.tensor([[1.0], [1.0], [0.0]], device=device).expand(3, 6))

"""cosine_alignment_loss against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from umt_kernels import alignment_loss, cosine_alignment_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-3  # large enough to have an effect


def pair(
    device: torch.device, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (3, 2, 5, 8)
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(*shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (5 * (targets + noise)).to(device, dtype), (0.2 * targets).to(device, dtype)


def formula(
    predictions: Tensor,
    targets: Tensor,
    target_ids: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    p, t = predictions.double(), targets.double()
    if weight is not None:
        centred = p - p.mean(-1, keepdim=True)
        p = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        p = p * weight.double()[:, None, None] + bias.double()[:, None, None]
    if target_ids is not None:
        t = torch.stack([t[:, sample, ids.long()] for sample, ids in enumerate(target_ids)], 1)
    cosine = (p * t).sum(-1) / (p.square().sum(-1).sqrt() * t.square().sum(-1).sqrt())
    return (2 - 2 * cosine).mean()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
)
def test_matches_the_formula(device, dtype, tolerance):
    predictions, targets = pair(device, dtype)
    loss = cosine_alignment_loss(predictions, targets)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(loss - formula(predictions, targets)) < tolerance


def test_known_values(device):
    right, up = (torch.tensor(x, device=device).view(1, 1, 1, 2) for x in ([1.0, 0.0], [0.0, 1.0]))
    assert abs(cosine_alignment_loss(right, 3 * right)) < 1e-6
    assert cosine_alignment_loss(right, up) == 2
    assert abs(cosine_alignment_loss(right, -right) - 4) < 1e-6
    assert abs(cosine_alignment_loss(torch.cat((right, right), 2), torch.cat((up, -right), 2)) - 3) < 1e-6
    ids = torch.tensor([[1, 1, 0]], device=device)
    loss = cosine_alignment_loss(right.expand(1, 1, 3, 2), torch.cat((up, -right), 2), target_ids=ids)
    assert abs(loss - 10 / 3) < 1e-6


@pytest.mark.parametrize("with_norm", [False, True])
def test_gradcheck(device, with_norm):
    predictions, targets = pair(device, shape=(2, 1, 3, 4))
    ids = torch.tensor([[2, 0, 2]], device=device)
    inputs = [predictions.requires_grad_()]
    if with_norm:
        inputs += [x.clone().requires_grad_() for x in pair(device, shape=(2, 4))]

    def loss(predictions: Tensor, *affine: Tensor) -> Tensor:
        weight, bias = affine or (None, None)
        return cosine_alignment_loss(predictions, targets, target_ids=ids, weight=weight, bias=bias, eps=EPS)

    assert torch.autograd.gradcheck(loss, inputs)


def drawn(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, with_ids: bool, with_norm: bool
) -> dict[str, Tensor | None]:
    layers, batch, rows, targets, width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    given: dict[str, Tensor | None] = dict.fromkeys(("target_ids", "weight", "bias"))
    given["predictions"] = (3 * draw(layers, batch, rows, width) + 0.5).to(dtype)
    given["targets"] = draw(layers, batch, targets if with_ids else rows, width).to(dtype)
    if with_ids:
        given["target_ids"] = torch.randint(targets, (batch, rows), generator=generator).to(device)
    if with_norm:
        given["weight"], given["bias"] = 1 + 0.3 * draw(layers, width), 0.3 * draw(layers, width)
    return given


def run(given: dict[str, Tensor | None]) -> Tensor:
    given = dict(given)
    return cosine_alignment_loss(given.pop("predictions"), given.pop("targets"), **given, eps=EPS)


def differentiated(function, given: dict[str, Tensor | None], upstream: float, wide: bool) -> list[Tensor]:
    given = {**given}
    names = [name for name in ("predictions", "weight", "bias") if given[name] is not None]
    for name in names:
        given[name] = (given[name].double() if wide else given[name]).detach().requires_grad_()
    loss = function(given)
    grads = torch.autograd.grad(loss, [given[name] for name in names], torch.full_like(loss, upstream))
    return [loss.detach(), *grads]


# A gradient is rounded twice: when the forward pass stores it, and when it is scaled.
# layers, samples, rows, targets per sample, width: one row, no powers of two, more rows than a program takes, wide
SHAPES = [(1, 1, 1, 1, 3), (2, 3, 5, 7, 24), (3, 2, 50, 9, 100), (2, 1, 2, 4, 2050)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "spread", "transposed"])
def test_kernel_against_float64(device, shape, dtype, with_ids, with_norm, layout, few_programs, spread, assert_near):
    given = drawn(device, shape, dtype, with_ids, with_norm)
    expected = differentiated(lambda given: formula(**given), given, 1.7, wide=True)
    if layout == "spread":
        given = {name: value if value is None else spread(value) for name, value in given.items()}
        if with_ids:
            given["target_ids"] = spread(given["target_ids"].int())
    elif layout == "transposed":
        for name in ("predictions", "targets", "target_ids", "weight", "bias"):
            given[name] = None if given[name] is None else given[name].mT.contiguous().mT
    actual = differentiated(run, given, 1.7, wide=False)
    assert [x.dtype for x in actual] == [torch.float32, dtype, torch.float32, torch.float32][: len(actual)]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs, roundings=2)


def test_layers_and_samples_may_lie_in_any_order(device, assert_near):
    given = drawn(device, (3, 2, 5, 7, 24), torch.float32, True, True)
    expected = differentiated(run, given, 1.0, wide=True)
    for name in ("predictions", "targets"):
        given[name] = given[name].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    for ours, theirs in zip(differentiated(run, given, 1.0, wide=False), expected, strict=True):
        assert_near(ours, theirs, roundings=2)


def test_one_target_for_all_rows(device, assert_near):
    """Strides of 0."""
    given = drawn(device, (3, 2, 5, 5, 24), torch.float32, False, False)
    given["targets"] = given["targets"][:1, :1, :1].expand(3, 2, 5, 24)
    expected = differentiated(lambda given: formula(**given), given, 1.0, wide=True)
    for ours, theirs in zip(differentiated(run, given, 1.0, wide=False), expected, strict=True):
        assert_near(ours, theirs, roundings=2)


def test_targets_may_have_another_dtype(device, assert_near):
    given = drawn(device, (2, 3, 5, 7, 24), torch.bfloat16, True, True)
    given["targets"] = given["targets"].float() * 1.01
    expected = differentiated(lambda given: formula(**given), given, 1.0, wide=True)
    for ours, theirs in zip(differentiated(run, given, 1.0, wide=False), expected, strict=True):
        assert_near(ours, theirs, roundings=2)


def test_norms_of_the_dtype_of_predictions_get_gradients_of_that_dtype(device, assert_near):
    given = drawn(device, (2, 3, 5, 7, 24), torch.bfloat16, True, True)
    given.update({name: given[name].bfloat16() for name in ("weight", "bias")})
    expected = differentiated(lambda given: formula(**given), given, 1.0, wide=True)
    actual = differentiated(run, given, 1.0, wide=False)
    assert [x.dtype for x in actual] == [torch.float32, *[torch.bfloat16] * 3]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs, roundings=2)


@pytest.mark.parametrize("scale", [65536.0, 2.0**-10])
def test_float16_gradients_survive_a_loss_scale(device, scale, assert_near):
    """GradScaler's first scale, 65536, overflows float16; without it the gradient of a mean is tiny."""
    given = drawn(device, (2, 2, 60, 60, 64), torch.float16, False, False)
    given["predictions"].mul_(100)
    expected = differentiated(lambda given: formula(**given), given, scale, wide=True)
    for ours, theirs in zip(differentiated(run, given, scale, wide=False), expected, strict=True):
        assert_near(ours, theirs, 1e-3, roundings=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_matches_float64_and_targets_get_none(device, dtype):
    predictions, targets = (x.requires_grad_() for x in pair(device, dtype))
    wide = predictions.detach().double().requires_grad_()
    cosine_alignment_loss(predictions, targets).backward()
    formula(wide, targets.detach()).backward()
    assert targets.grad is None
    assert predictions.grad.dtype == dtype
    error = (predictions.grad - wide.grad).norm() / wide.grad.norm()
    assert error < (1e-5 if dtype == torch.float32 else 8e-3)


def test_backward_twice_no_grad_and_one_gradient(device):
    given = drawn(device, (2, 3, 5, 7, 24), torch.float32, True, True)
    _, grad, grad_weight, _ = differentiated(run, given, 1.0, wide=False)
    given["predictions"].requires_grad_()
    loss = run(given)
    loss.backward(retain_graph=True)
    assert torch.equal(given["predictions"].grad, grad)
    loss.backward(torch.full_like(loss, 3.0))
    assert (given["predictions"].grad - 4 * grad).abs().max() < 1e-6 * grad.abs().max()
    assert given["weight"].grad is None
    with torch.no_grad():
        assert torch.equal(run(given), loss)
        assert not run(given).requires_grad
    given["predictions"] = given["predictions"].detach()
    assert not run(given).requires_grad
    given["weight"].requires_grad_()
    run(given).backward()
    assert torch.equal(given["weight"].grad, grad_weight)


def test_scaling_a_row_changes_nothing(device):
    predictions, targets = pair(device)
    scale = torch.rand(3, 2, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 100 + 0.01
    scale = scale.to(device)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        p, t, s = (x.to(dtype) for x in (predictions, targets, scale))
        loss = cosine_alignment_loss(p, t)
        assert abs(cosine_alignment_loss(p * s, t) - loss) < tolerance
        assert abs(cosine_alignment_loss(p, t * s) - loss) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("length", [0.0, 1e-6])
def test_a_prediction_without_a_direction_gets_no_gradient(device, dtype, length):
    """In float16 also a very short prediction: its gradient grows with 1 / length, beyond the largest float16."""
    predictions, targets = pair(device, torch.float64)
    predictions[0, 0, 0] *= length
    targets[1, 1, 1] = 0
    given = predictions.to(dtype).requires_grad_()
    loss = cosine_alignment_loss(given, targets.to(dtype))
    (65536 * loss if dtype == torch.float16 else loss).backward()
    assert given.grad.isfinite().all()
    assert (given.grad[1, 1, 1] == 0).all()
    assert (given.grad[0, 0, 0] == 0).all() == (length == 0 or dtype == torch.float16)
    assert (given.grad[0, 0, 1] != 0).any()
    if length == 0:
        expected = 2 - 2 * torch.cosine_similarity(given.double(), targets.to(dtype).double(), dim=-1)
        assert abs(loss - expected.mean()) < 1e-6


def test_autocast_changes_nothing(device):
    predictions, targets = pair(device, torch.float32)
    predictions.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        inside = cosine_alignment_loss(predictions, targets)
    outside = cosine_alignment_loss(predictions, targets)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    (inner,) = torch.autograd.grad(inside, predictions)
    (outer,) = torch.autograd.grad(outside, predictions)
    assert torch.equal(inner, outer)


ONES = torch.ones(2, 3, 5, 4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"targets": torch.ones(2, 3, 5, 6)}, ValueError, ["[2, 3, 5, 4]", "[2, 3, 5, 6]", "width"]),
        ({"targets": torch.ones(1, 3, 5, 4)}, ValueError, ["[2, 3, 5, 4]", "[1, 3, 5, 4]", "layers"]),
        ({"targets": torch.ones(2, 1, 5, 4)}, ValueError, ["[2, 1, 5, 4]", "samples"]),
        ({"targets": torch.ones(2, 3, 7, 4)}, ValueError, ["[2, 3, 7, 4]", "target_ids"]),
        ({"predictions": torch.ones(3, 5, 4)}, ValueError, ["[3, 5, 4]", "[k, b, m, c]"]),
        ({"predictions": ONES[:, :0], "targets": ONES[:, :0]}, ValueError, ["[2, 0, 5, 4]", "empty"]),
        ({"predictions": ONES[:, :, :0], "targets": ONES[:, :, :0]}, ValueError, ["[2, 3, 0, 4]", "empty"]),
        ({"target_ids": torch.full((3, 5), 5)}, ValueError, ["target_ids[0, 0] = 5", "5 rows"]),
        ({"target_ids": torch.tensor([[0], [0], [-1]]).expand(3, 5)}, ValueError, ["target_ids[2, 0] = -1"]),
        ({"target_ids": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, ["target_ids [3, 4]", "[3, 5]"]),
        ({"target_ids": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, ["target_ids", "[2, 5]", "[3, m]"]),
        ({"target_ids": torch.zeros(3, 5)}, TypeError, ["target_ids", "torch.float32"]),
        ({"target_ids": torch.zeros(3, 5, dtype=torch.int64, device="meta")}, ValueError, ["target_ids is on meta"]),
        (
            {"targets": torch.ones(2, 3, 5, 4, device="meta")},
            ValueError,
            ["targets is on meta", "predictions is on cpu"],
        ),
        ({"targets": torch.ones(2, 3, 5, 4, dtype=torch.int64)}, TypeError, ["targets has dtype torch.int64"]),
        ({"predictions": [1.0]}, TypeError, ["predictions is a list"]),
        ({"weight": torch.ones(2, 4)}, ValueError, ["weight and bias", "both"]),
        ({"bias": torch.ones(2, 4)}, ValueError, ["weight and bias", "both"]),
        ({"weight": torch.ones(4), "bias": torch.ones(2, 4)}, ValueError, ["weight", "[4]", "[2, 4]"]),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2, 3)}, ValueError, ["bias", "[2, 3]", "[2, 4]"]),
    ],
)
def test_errors_name_the_value_and_the_place(change, error, words):
    given = {"predictions": ONES, "targets": ONES, "target_ids": None, "weight": None, "bias": None, **change}
    with pytest.raises(error) as caught:
        run(given)
    for word in words:
        assert word in str(caught.value)


def row_by_hand(distance: str, y: Tensor, t: Tensor) -> Tensor:
    d = (y - t).abs()
    if distance == "cosine":
        return 2 - 2 * torch.cosine_similarity(y, t, dim=0)
    if distance == "smooth_l1":
        return torch.where(d < BETA, d.square() / (2 * BETA), d - BETA / 2).mean()
    return (d if distance == "l1" else d.square()).mean()


def rows_by_hand(
    distance: str, p: Tensor, t: Tensor, weight: Tensor | None, bias: Tensor | None, ids: Tensor
) -> Tensor:
    """[k, r, m] in float64, row by row; ids -1 give 0."""
    p, t = p.double(), t.double()
    if weight is not None:
        centred = p - p.mean(-1, keepdim=True)
        p = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        p = p * weight.double()[:, None, None] + bias.double()[:, None, None]
    sets = len(ids) // t.shape[1]
    rows = [
        row_by_hand(distance, y[index, place], target[index // sets, wanted]) * (wanted >= 0)
        for y, target in zip(p, t, strict=True)
        for index, row in enumerate(ids.tolist())
        for place, wanted in enumerate(row)
    ]
    return torch.stack(rows).view(len(p), *ids.shape)


BETA = 0.7
# distance, reduction, row weights, sets per sample (0: no ids), ids of -1, a norm before, layers (0: no such axis)
FORMS = [
    ("cosine", "none", "per layer", 2, True, True, 2),
    ("cosine", "mean", "shared", 1, True, True, 3),
    ("cosine", "mean", None, 1, True, False, 0),
    ("cosine", "sum", "shared", 3, False, False, 0),
    ("cosine", "mean", "per layer", 0, False, True, 2),
    ("l1", "mean", None, 0, False, False, 0),
    ("l1", "sum", "per layer", 2, True, True, 2),
    ("l1", "none", None, 1, False, False, 1),
    ("smooth_l1", "mean", "shared", 1, True, True, 2),
    ("smooth_l1", "none", None, 0, False, False, 0),
    ("mse", "mean", None, 1, True, True, 0),
    ("mse", "mean", "per layer", 2, False, False, 2),
    ("mse", "none", "shared", 2, True, False, 2),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forms_for_other_models(device, form, dtype, few_programs, assert_near):
    distance, reduction, weighted, sets, padded, norm, layers = form
    batch, kept, tokens, width, k = 2, 4, 4 if sets == 0 else 7, 20, max(1, layers)
    rows = batch * max(1, sets)
    generator = torch.Generator().manual_seed(len(distance) + sets)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    predictions, targets = draw(k, rows, kept, width, dtype=dtype), draw(k, batch, tokens, width, dtype=dtype)
    weight, bias = (1 + 0.3 * draw(k, width), 0.3 * draw(k, width)) if norm else (None, None)
    ids = torch.stack([torch.randperm(tokens, generator=generator)[:kept] for _ in range(rows)]).to(device)
    if sets == 0:
        ids = torch.arange(kept, device=device).expand(rows, -1)
    if padded:
        ids[0, 1] = ids[1, 3] = -1
    factors = None if weighted is None else draw(*[k] * (weighted == "per layer"), rows, kept).abs()

    def run_op(p: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        if layers == 0:
            p, w, b = p[0], *(x if x is None else x[0] for x in (w, b))
        return alignment_loss(
            p,
            targets[0] if layers == 0 else targets,
            distance,
            target_ids=ids if sets else None,
            weight=w,
            bias=b,
            eps=EPS,
            beta=BETA,
            row_weights=factors[0] if layers == 0 and weighted == "per layer" else factors,
            padded=padded,
            reduction=reduction,
        )

    def by_definition(p: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        loss = rows_by_hand(distance, p, targets, w, b, ids)
        factor = torch.ones_like(loss) if factors is None else factors.double().expand(loss.shape)
        factor = factor * (ids >= 0)
        if reduction == "none":
            return (loss * factor)[0] if layers == 0 else loss * factor
        return (loss * factor).sum() / (factor.sum() if reduction == "mean" else 1)

    results, upstream = [], None
    for function in (run_op, by_definition):
        wide = function is by_definition
        given = [
            None if x is None else (x.double() if wide else x).detach().requires_grad_()
            for x in (predictions, weight, bias)
        ]
        loss = function(*given)
        upstream = 0.5 + draw(*loss.shape).abs() if upstream is None else upstream
        grads = torch.autograd.grad(loss, [x for x in given if x is not None], upstream.to(loss.dtype))
        results.append([loss.detach(), *grads])
    assert results[0][0].dtype == torch.float32
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs, roundings=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distance": "l2"}, ["distance = 'l2'", "cosine, l1, smooth_l1, mse"]),
        ({"reduction": "max"}, ["reduction = 'max'", "mean, sum or none"]),
        ({"beta": -1.0}, ["beta = -1.0"]),
        ({"row_weights": torch.ones(2, 5)}, ["row_weights", "[2, 5]", "[2, 3, 5]"]),
        ({"target_ids": torch.full((3, 5), -2), "padded": True}, ["target_ids[0, 0] = -2"]),
        ({"predictions": torch.ones(2, 6, 5, 4)}, ["[2, 6, 5, 4]", "samples"]),
    ],
)
def test_errors_of_the_general_form(change, words):
    given = {"predictions": ONES, "targets": ONES, "distance": "mse", **change}
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the words follow
        alignment_loss(**given)
    for word in words:
        assert word in str(caught.value)


def test_the_last_backward_scales_in_place_and_earlier_ones_do_not(device):
    given = drawn(device, (2, 3, 5, 7, 24), torch.float32, True, False)
    x = given["predictions"].requires_grad_()
    loss = run(given)
    (first,) = torch.autograd.grad(2 * loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(3 * loss, x)
    assert torch.equal(first, kept)
    assert (second - 1.5 * first).abs().max() < 1e-6 * first.abs().max()


@pytest.mark.parametrize("distance", ["l1", "smooth_l1", "mse"])
def test_a_prediction_equal_to_its_target_gets_no_gradient(device, distance):
    targets = torch.arange(6.0, device=device).view(1, 2, 3)
    predictions = (targets + torch.tensor([0.0, 2.0, -2.0], device=device)).requires_grad_()
    alignment_loss(predictions, targets, distance, reduction="sum").backward()
    assert (predictions.grad[..., 0] == 0).all()
    assert (predictions.grad[..., 1] > 0).all()
    assert (predictions.grad[..., 2] < 0).all()


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_one_column_under_a_norm_gets_no_gradient(device, distance):
    """A single column is always normalised to 0; a gradient left by rounding would be multiplied by 1 / sqrt(eps)."""
    x = torch.linspace(-2, 3, 6, device=device).view(1, 2, 3, 1).requires_grad_()
    gain, shift = torch.full((1, 1), 1.3, device=device), torch.full((1, 1), 0.7, device=device)
    alignment_loss(x, torch.ones_like(x) / 3, distance, weight=gain, bias=shift, eps=1e-12, reduction="sum").backward()
    assert (x.grad == 0).all()


def test_a_nan_reaches_the_gradient(device):
    """The slope of smooth_l1 is a sign; for NaN it must be neither 1 nor -1."""
    x = torch.tensor([float("nan"), 2.0, -2.0], device=device).view(1, 1, 3).requires_grad_()
    alignment_loss(x, torch.zeros_like(x), "smooth_l1", reduction="sum").backward()
    assert x.grad.isnan().tolist() == [[[True, False, False]]]


@pytest.mark.parametrize("distance", ["cosine", "l1", "smooth_l1", "mse"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("norm", [False, True])
def test_what_lies_in_a_row_of_nothing_does_not_count(device, kernels, distance, reduction, norm):
    """Attention without keys gives NaN: neither that nor a weight or an upstream gradient of NaN goes further."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[0, -1, 2], [-1, -1, -1]], device=device)
    predictions, targets = (torch.randn(2, 2, n, 6, generator=generator).to(device) for n in (3, 4))
    affine = [torch.rand(2, 6, generator=generator).to(device).requires_grad_() for _ in range(2)] if norm else []
    given = dict(zip(("weight", "bias"), affine, strict=False))
    given["eps"] = 0.0 if kernels else 1e-6  # a row of zeros has no norm then
    results = []
    for filling in (0.5, float("nan")):
        nothing = (ids < 0).expand(2, 2, 3)
        filled = torch.where(nothing[..., None], filling * torch.arange(6, device=device), predictions).requires_grad_()
        weights = torch.where(ids < 0, filling, 2.0)
        loss = alignment_loss(
            filled, targets, distance, target_ids=ids, row_weights=weights, padded=True, reduction=reduction, **given
        )
        upstream = torch.where(nothing, filling, 1.5) if reduction == "none" else torch.tensor(1.5, device=device)
        results.append([loss.detach(), *torch.autograd.grad(loss, [filled, *affine], upstream)])
        assert (results[-1][1][nothing] == 0).all()
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)

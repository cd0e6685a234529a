"""cosine_alignment_loss against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from umt_kernels import cosine_alignment_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-3  # large enough to be seen


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


# A gradient is rounded twice: where the forward pass keeps it, and when it is scaled.
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
    """65536, GradScaler's first scale, is no float16; and without it the gradient of a mean is a small number."""
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


def test_second_derivatives_are_refused(device, needs_kernels):
    predictions, targets = pair(device, torch.float32)
    loss = cosine_alignment_loss(predictions.requires_grad_(), targets)
    (grad,) = torch.autograd.grad(loss, predictions, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (loss + grad.square().sum()).backward()


def test_scaling_a_row_changes_nothing(device):
    predictions, targets = pair(device)
    scale = torch.rand(3, 2, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 100 + 0.01
    scale = scale.to(device)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        p, t, s = (x.to(dtype) for x in (predictions, targets, scale))
        loss = cosine_alignment_loss(p, t)
        assert abs(cosine_alignment_loss(p * s, t) - loss) < tolerance
        assert abs(cosine_alignment_loss(p, t * s) - loss) < tolerance


def test_rows_of_zeros_are_finite(device):
    predictions, targets = pair(device, torch.float32)
    predictions[0, 0, 0] = 0
    targets[1, 1, 1] = 0
    loss = cosine_alignment_loss(predictions.requires_grad_(), targets)
    loss.backward()
    wide, wide_targets = predictions.detach().double(), targets.double()
    assert abs(loss - cosine_alignment_loss(wide, wide_targets)) < 1e-6  # the reference: 1e-12 in place of a norm of 0
    assert predictions.grad.isfinite().all()
    assert (predictions.grad[1, 1, 1] == 0).all()


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

"""add_layer_norm against the sum and the norm written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from umt_kernels import add_layer_norm

EPS = 1e-3  # large enough to have an effect
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = {
    "plain": set(),
    "drop path, bias": {"scale", "branch_bias"},
    "number": {"number"},
    "rows, position": {"row_ids", "position", "position_ids"},
    "everything": {"scale", "branch_bias", "row_ids", "position", "position_ids"},
}
# samples, rows, kept rows, width: one row, all rows, no powers of two, more rows than one program takes, a wide row
SHAPES = [(1, 1, 1, 3), (3, 7, 4, 100), (2, 60, 45, 33), (1, 3, 2, 2100)]
TENSORS = ("residual", "branch", "weight", "bias", "branch_bias")


def drawn(
    device: torch.device, shape: tuple[int, int, int, int], form: str, dtype: torch.dtype = torch.float32
) -> dict:
    """Arguments with residual and branch of `dtype`, and float32 parameters."""
    batch, length, kept, width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    given = {
        "residual": (2 * draw(batch, length, width) + 1).to(dtype),
        "branch": draw(batch, kept if "row_ids" in FORMS[form] else length, width).to(dtype),
        "weight": draw(width),
        "bias": draw(width),
        "branch_bias": draw(width),
        "scale": torch.linspace(0, 1.5, batch + 1).flip(0)[:batch].to(device),
        "row_ids": torch.stack([torch.randperm(length, generator=generator)[:kept] for _ in range(batch)]).to(device),
        "position": draw(11, width),
        "position_ids": torch.randint(11, (batch, kept), generator=generator).to(device),
    }
    optional = ("branch_bias", "scale", "row_ids", "position", "position_ids")
    given |= {name: None for name in optional if name not in FORMS[form]}
    return {**given, "scale": 1.5} if form == "number" else given


def widened(given: dict) -> dict:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def expected(given: dict, rms: bool = False, post_norm: bool = False, stored: Tensor | None = None) -> tuple:
    """The plain computation. `stored` is the rounded sum, the input of the norm."""
    rows, added = given["residual"], given["branch"]
    if given["row_ids"] is not None:
        rows = torch.stack([sample[i] for sample, i in zip(rows, given["row_ids"], strict=True)])
    if given["branch_bias"] is not None:
        added = added + given["branch_bias"]
    if isinstance(given["scale"], float):
        added = added * given["scale"]
    elif given["scale"] is not None:
        added = added * given["scale"][:, None, None]
    x = rows + added
    normed = x if stored is None else x + (stored.double() - x).detach()
    centred = normed if rms else normed - normed.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = y if given["weight"] is None else y * given["weight"]
    y = y if given["bias"] is None else y + given["bias"]
    y = y if given["position"] is None else y + given["position"][given["position_ids"]]
    return (y if post_norm else x), y


def run(given: dict, **settings) -> tuple[Tensor, Tensor]:
    given = dict(given)
    return add_layer_norm(*(given.pop(n) for n in ("residual", "branch", "weight", "bias")), EPS, **given, **settings)


def gradients(outputs: tuple[Tensor, Tensor], given: dict, used: str = "both") -> list[Tensor]:
    """Gradients of a sum over the outputs that are `used`, weighted so that each element counts differently."""
    leaves = [given[name] for name in TENSORS if given[name] is not None]
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for output, name, low in zip(outputs, ("residual", "norm"), (-1.0, 0.5), strict=True):
        if used in (name, "both"):
            upstream = torch.linspace(low, low + 2, output.numel(), dtype=torch.float32, device=output.device)
            total = total + (output.double() * upstream.view_as(output).double()).sum()
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def leaves(given: dict) -> dict:
    return {k: v.detach().requires_grad_() if k in TENSORS and v is not None else v for k, v in given.items()}


@pytest.fixture(autouse=True)
def _two_programs(few_programs: None) -> None:
    """Each program loops over its rows."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_match_float64(device, shape, post_norm, form, dtype, assert_near):
    given = drawn(device, shape, form, dtype)
    wide, given = leaves(widened(given)), leaves(given)
    outputs = run(given, post_norm=post_norm)
    truth = expected(wide, post_norm=post_norm, stored=None if post_norm else outputs[0])
    assert [x.dtype for x in outputs] == [dtype, dtype]
    for ours, theirs in zip(outputs, truth, strict=True):
        assert_near(ours, theirs)
    pairs = zip(gradients(outputs, given), gradients(truth, wide), strict=True)
    for name, (ours, theirs) in zip([n for n in TENSORS if given[n] is not None], pairs, strict=True):
        assert ours.dtype == given[name].dtype
        # The upstream gradient reaches the op in the dtype of its outputs.
        assert_near(ours, theirs, arithmetic=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("used", ["residual", "norm"])
@pytest.mark.parametrize(("post_norm", "rms"), list(itertools.product([False, True], repeat=2)))
def test_one_output_used_and_rms(device, used, post_norm, rms, assert_near):
    given = drawn(device, (3, 70, 50, 24), "everything")  # several passes of a program
    wide, given = leaves(widened(given)), leaves(given)
    outputs = run(given, post_norm=post_norm, rms=rms)
    truth = expected(wide, rms, post_norm)
    for ours, theirs in zip(outputs, truth, strict=True):
        assert_near(ours, theirs)
    for ours, theirs in zip(gradients(outputs, given, used), gradients(truth, wide, used), strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("kept", [("weight",), ("bias",), ()])
def test_without_weight_or_bias(device, kept, post_norm, assert_near):
    given = drawn(device, (2, 5, 3, 24), "rows, position")
    given |= {name: None for name in ("weight", "bias") if name not in kept}
    wide, given = leaves(widened(given)), leaves(given)
    outputs, truth = run(given, post_norm=post_norm), expected(wide, post_norm=post_norm)
    for ours, theirs in zip(outputs, truth, strict=True):
        assert_near(ours, theirs)
    for ours, theirs in zip(gradients(outputs, given), gradients(truth, wide), strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize(
    ("residual", "branch", "out"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),  # the student under autocast
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("post_norm", [False, True])
def test_every_dtype_is_its_own(device, residual, branch, out, post_norm, assert_near):
    given = drawn(device, (2, 9, 5, 40), "drop path, bias")
    given |= {"residual": given["residual"].to(residual), "branch": given["branch"].to(branch)}
    wide, given = leaves(widened(given)), leaves(given)
    outputs = run(given, out_dtype=out, post_norm=post_norm)
    assert [x.dtype for x in outputs] == [residual, out]
    truth = expected(wide, post_norm=post_norm, stored=None if post_norm else outputs[0])
    for ours, theirs in zip(outputs, truth, strict=True):
        assert_near(ours, theirs)
    for ours, theirs in zip(gradients(outputs, given), gradients(truth, wide), strict=True):
        assert_near(ours, theirs, arithmetic=2e-2)


@pytest.mark.parametrize("layout", ["spread", "last dimension strided"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_any_layout(device, layout, post_norm, spread):
    given = drawn(device, (2, 9, 5, 40), "everything")
    outputs = run(leaves(given), post_norm=post_norm)
    if layout == "spread":
        moved = {name: spread(value) for name, value in given.items()}
    else:
        moved = {**given, **{name: given[name].mT.contiguous().mT for name in ("residual", "branch")}}
    for ours, theirs in zip(run(moved, post_norm=post_norm), outputs, strict=True):
        assert torch.equal(ours, theirs)
    strided = leaves(moved)
    plain = leaves(given)
    for ours, theirs in zip(
        gradients(run(strided, post_norm=post_norm), strided), gradients(run(plain, post_norm=post_norm), plain),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(ours, theirs)


def test_the_branch_gets_the_residuals_gradient_where_they_are_equal(device, needs_kernels):
    given = leaves(drawn(device, (2, 5, 3, 24), "plain"))
    residual, branch, *_ = gradients(run(given), given)
    assert residual.data_ptr() == branch.data_ptr()


def test_without_rows(device):
    for form in FORMS:
        given = leaves(drawn(device, (2, 5, 0, 24), form))
        if "row_ids" not in FORMS[form]:
            given |= {"residual": given["residual"][:, :0], "branch": given["branch"][:, :0]}
        outputs = run(given)
        assert outputs[0].shape == outputs[1].shape == (2, 0, 24)
        assert all((grad == 0).all() for grad in gradients(outputs, given))


def test_gradcheck(device):
    given = widened(drawn(device, (2, 4, 3, 5), "everything"))
    inputs = [given.pop(name).requires_grad_() for name in TENSORS]
    for post_norm in (False, True):
        assert torch.autograd.gradcheck(
            lambda *x, post=post_norm: run({**given, **dict(zip(TENSORS, x, strict=True))}, post_norm=post), inputs
        )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"residual": torch.zeros(7, 16)}, ValueError, ["residual", "[7, 16]", "[b, l, d]"]),
        ({"branch": torch.zeros(3, 5, 16)}, ValueError, ["branch", "[3, 5, 16]", "[3, 4, 16]"]),
        ({"weight": torch.zeros(8)}, ValueError, ["weight", "[8]", "[16]"]),
        ({"bias": torch.zeros(1)}, ValueError, ["bias", "[1]", "[16]"]),
        ({"branch_bias": torch.zeros(2, 16)}, ValueError, ["branch_bias", "[2, 16]"]),
        ({"scale": torch.zeros(2)}, ValueError, ["scale", "[2]", "[3]"]),
        ({"scale": torch.zeros(3, dtype=torch.int64)}, TypeError, ["scale", "torch.int64"]),
        ({"row_ids": torch.full((3, 4), 7)}, ValueError, ["row_ids[0, 0] = 7", "7 rows"]),
        ({"row_ids": torch.zeros(3, 4)}, TypeError, ["row_ids", "torch.float32"]),
        ({"row_ids": torch.zeros(4, 4, dtype=torch.int64)}, ValueError, ["row_ids", "[4, 4]", "multiple"]),
        ({"row_ids": torch.zeros(6, 4, dtype=torch.int64)}, ValueError, ["branch", "[6, 4, 16]"]),
        ({"row_ids": torch.full((3, 4), -1)}, ValueError, ["row_ids[0, 0] = -1", "7 rows"]),
        ({"position": None}, ValueError, ["position and position_ids", "both"]),
        ({"position": torch.zeros(11, 8)}, ValueError, ["position [11, 8]", "[n, 16]"]),
        ({"position": torch.zeros(11, 16, requires_grad=True)}, ValueError, ["position", "gradient"]),
        ({"position_ids": torch.full((3, 4), 11)}, ValueError, ["position_ids[0, 0] = 11", "11 rows"]),
        ({"weight": torch.zeros(16, device="meta")}, ValueError, ["weight is on meta", "residual is on cpu"]),
        ({"out_dtype": torch.int8}, TypeError, ["out_dtype = torch.int8"]),
    ],
)
def test_errors_name_the_value_and_the_place(change, error, words):
    with pytest.raises(error) as caught:
        run({**drawn(torch.device("cpu"), (3, 7, 4, 16), "everything"), **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_sets_of_a_sample_and_ids_of_nothing(device, padded, post_norm, dtype, assert_near):
    """Against each set as a separate sample; rows with id -1 are zeros for any value of the branch."""
    batch, length, sets, kept, width = 2, 7, 3, 4, 24
    given = drawn(device, (batch * sets, length, kept, width), "everything", dtype)
    given["residual"] = given["residual"][:batch]
    nothing = torch.zeros(batch * sets, kept, dtype=torch.bool, device=device)
    if padded:
        nothing[1, 2] = nothing[4] = True
        given["branch"][4, 0] = float("nan")
        given["row_ids"] = given["row_ids"].masked_fill(nothing, -1)
        given["position_ids"][0, 1] = -1
    given = leaves(given)
    outputs = run(given, padded=padded, post_norm=post_norm)
    there = ~nothing[..., None]
    wide = leaves({**widened(given), "branch": given["branch"].detach().double().masked_fill(~there, 0)})
    table = torch.cat((wide["position"], wide["position"][:1] * 0))
    one = {**wide, "position": table, "position_ids": given["position_ids"] % len(table)}
    one["residual"], one["row_ids"] = wide["residual"].repeat_interleave(sets, 0), given["row_ids"].clamp_min(0)
    stored = None if post_norm else outputs[0].detach()
    truth = [torch.where(there, x, 0) for x in expected(one, post_norm=post_norm, stored=stored)]
    for ours, theirs in zip(outputs, truth, strict=True):
        assert ours.dtype == dtype
        assert_near(ours.detach(), theirs)
        assert (ours[nothing] == 0).all()
    found = gradients(outputs, given)
    for ours, theirs in zip(found, gradients(truth, wide), strict=True):
        assert_near(ours, theirs, arithmetic=1e-5 if dtype == torch.float32 else 2e-2)
    again = gradients(run(given, padded=padded, post_norm=post_norm), given)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


def test_a_row_twice_where_the_residual_has_a_gradient():
    given = drawn(torch.device("cpu"), (1, 5, 3, 8), "rows, position")
    given["row_ids"] = torch.tensor([[1, 4, 1]])
    run(given)
    given["residual"].requires_grad_()
    with pytest.raises(ValueError, match=r"row_ids\[0, 2\] = 1, as is row_ids\[0, 0\]"):
        run(given)

"""patch_embed against F.conv3d in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD, patch_embed
from umt_kernels.backend import runs_triton
from umt_kernels.patch_embed import implicit_patch_embed

PATCH = 4


def case(device: torch.device, kind: str, halo: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind == "uint8":
        clip = torch.randint(0, 256, (2, 4, 12, 8, 3), generator=generator, dtype=torch.uint8)
    else:
        clip = torch.randn(2, 3, 4, 12, 8, generator=generator).to(dtype)
    window = PATCH + 2 * halo
    return {
        "clip": clip.to(device),
        "weight": torch.randn(5, 3, 2, window, window, generator=generator).to(device, dtype),
        "bias": torch.randn(5, generator=generator).to(device, dtype),
        "token_ids": torch.tensor([[0, 11, 3], [8, 5, 2]], device=device),
        "position": torch.randn(12, 5, generator=generator).to(device, dtype),
    }


def convolved(
    clip: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor | None, position: Tensor | None
) -> Tensor:
    if clip.dtype == torch.uint8:
        mean, std = (torch.tensor(x, dtype=torch.float64, device=clip.device) for x in (IMAGENET_MEAN, IMAGENET_STD))
        clip = ((clip.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    halo = (weight.shape[-1] - PATCH) // 2
    clip = F.pad(clip.double(), (halo, halo, halo, halo, 0, 0), mode="replicate")
    bias = None if bias is None else bias.double()
    tokens = F.conv3d(clip, weight.double(), bias, stride=(weight.shape[2], PATCH, PATCH)).flatten(2).mT
    if position is not None:
        tokens = tokens + position.double()
    if token_ids is None:
        return tokens
    return torch.stack([rows[ids.long()] for rows, ids in zip(tokens, token_ids, strict=True)])


def run(given: dict[str, Tensor | None]) -> Tensor:
    given = dict(given)
    return patch_embed(given.pop("clip"), given.pop("weight"), given.pop("bias"), PATCH, **given)


@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("halo", [0, 1])
@pytest.mark.parametrize("left_out", [(), ("bias",), ("position",), ("token_ids",), ("token_ids", "position")])
def test_value_and_gradients(device, kind, halo, left_out, assert_near):
    given = {**case(device, kind, halo), **dict.fromkeys(left_out)}
    results = []
    for function in (run, lambda given: convolved(**given)):
        tensors = {k: v if v is None else v.detach().clone() for k, v in given.items()}
        inputs = [tensors[name].requires_grad_() for name in ("weight", "bias") if tensors[name] is not None]
        if tensors["position"] is not None and function is run:
            tensors["position"].requires_grad_()
        embedded = function(tensors)
        upstream = torch.linspace(-1, 2, embedded.numel(), device=device).view_as(embedded).to(embedded.dtype)
        embedded.backward(upstream)
        if function is run and tensors["position"] is not None:
            assert tensors["position"].grad is None
        results.append([embedded.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


def test_float64_takes_the_reference(device):
    given = case(device, "float", 1, torch.float64)
    assert (run(given) - convolved(**given)).abs().max() < 1e-12


def test_gradcheck(device):
    given = case(device, "float", 0, torch.float64)
    given["position"] = given["position"][:, :2]
    inputs = [given.pop(name)[:2].requires_grad_() for name in ("weight", "bias")]
    clip = given.pop("clip")
    assert torch.autograd.gradcheck(lambda w, b: patch_embed(clip, w, b, PATCH, **given), inputs)


def test_autocast_embeds_in_its_dtype(device):
    given = case(device, "uint8")
    exact = convolved(**given)
    with torch.autocast(device.type, torch.bfloat16):
        rounded = run({**given, "position": None})
    assert rounded.dtype == torch.bfloat16
    given["position"] = None
    assert (rounded.double() - convolved(**given)).abs().max() < 0.02 * exact.abs().max()


def test_autocast_leaves_float64_alone(device):
    given = case(device, "float", 1, torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        embedded = run(given)
    assert (embedded - convolved(**given)).abs().max() < 1e-12


def test_bias_and_position_may_have_another_dtype(device, assert_near):
    given = {name: x.bfloat16() if name in ("bias", "position") else x for name, x in case(device, "uint8").items()}
    given["bias"].requires_grad_()
    embedded = run(given)
    assert embedded.dtype == torch.float32
    assert_near(embedded, convolved(**given))
    embedded.sum().backward()
    assert (given["bias"].grad == 6).all()


def test_empty_batch(device):
    given = case(device, "uint8")
    given.update(clip=given["clip"][:0], token_ids=given["token_ids"][:0])
    weight = given["weight"].requires_grad_()
    embedded = run(given)
    assert embedded.shape == (0, 3, 5)
    embedded.sum().backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(5, 3, 4, 4)}, ["[5, 3, 4, 4]", "[d, 3, t, k, k]"]),
        ({"weight": torch.zeros(5, 1, 2, 4, 4)}, ["[5, 1, 2, 4, 4]"]),
        ({"weight": torch.zeros(5, 3, 2, 4, 6)}, ["[5, 3, 2, 4, 6]"]),
        ({"weight": torch.zeros(5, 3, 2, 5, 5)}, ["5 px", "patch_size = 4"]),
        ({"weight": torch.zeros(5, 3, 2, 2, 2)}, ["2 px", "patch_size = 4"]),
        ({"weight": torch.zeros(5, 3, 3, 4, 4)}, ["T = 4", "multiple of 3"]),
        ({"position": torch.zeros(12, 4)}, ["position", "[12, 4]", "[tokens, 5]"]),
        ({"position": torch.zeros(11, 5), "token_ids": None}, ["11 rows", "12 tokens"]),
        ({"position": torch.zeros(11, 5)}, ["token_ids[0, 1] = 11", "11 rows"]),
        ({"token_ids": torch.tensor([[0], [12]])}, ["token_ids[1, 0] = 12", "12 tokens"]),
        ({"bias": torch.zeros(1)}, ["bias", "[1]", "[5]"]),
        ({"bias": torch.zeros(5, device="meta")}, ["bias is on meta", "clip is on cpu"]),
        ({"weight": torch.zeros(5, 3, 2, 4, 4, device="meta")}, ["weight is on meta", "clip is on cpu"]),
        ({"position": torch.zeros(12, 5, device="meta")}, ["position is on meta", "clip is on cpu"]),
    ],
)
def test_errors_name_the_value_and_the_place(change, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the words follow
        run({**case(torch.device("cpu"), "uint8"), **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["weight", "bias", "position"])
def test_parameters_are_floats(name):
    given = case(torch.device("cpu"), "uint8")
    with pytest.raises(TypeError, match=f"{name} has dtype torch.int64"):
        run({**given, name: given[name].long()})


@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("halo", [0, 1])
def test_the_implicit_gemm_is_the_same_embedding(device, kind, halo):
    x = case(device, kind, halo)
    if not runs_triton(x["clip"]):
        pytest.skip("a kernel without a reference of its own")
    embedded = implicit_patch_embed(
        x["clip"], x["weight"], x["bias"], PATCH, x["token_ids"], x["position"], torch.float32
    )
    assert (embedded - convolved(**x)).abs().max() < 1e-4

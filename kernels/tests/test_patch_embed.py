"""patch_embed against F.conv3d in float64."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD, gather_patches, launch, patch_embed, sample_visible

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
        names = ("weight", "bias", "position")
        inputs = [tensors[name].requires_grad_() for name in names if tensors[name] is not None]
        if tensors["position"] is not None and function is run:
            tensors["position"].requires_grad_()
        embedded = function(tensors)
        upstream = torch.linspace(-1, 2, embedded.numel(), device=device).view_as(embedded).to(embedded.dtype)
        embedded.backward(upstream)
        results.append([embedded.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


def test_float64_runs_the_reference(device):
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


def test_a_second_call_of_the_same_shapes(device, assert_near):
    """The plan is kept, but ids, clip, weights and normalisation come from the second call."""
    given = case(device, "uint8")
    run(given)
    for change in (
        {},
        {"token_ids": given["token_ids"].flip(1)},
        {"clip": 255 - given["clip"]},
        {"std": (0.3, 0.2, 0.4)},
    ):
        changed = {**given, "weight": 2 * given["weight"], "bias": -given["bias"], **change}
        std = changed.pop("std", None)
        expected = convolved(**changed)
        if std is not None:
            changed["std"] = std
            scale = torch.tensor(IMAGENET_STD, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
            plain = {**changed, "weight": changed["weight"].double() * scale.to(device).view(1, 3, 1, 1, 1)}
            del plain["std"]
            expected = convolved(**plain)
        assert_near(run(changed), expected)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"token_ids\[0, 1\] = 12, but a clip has 12 tokens"):
            run({**given, "token_ids": given["token_ids"].where(given["token_ids"] != 11, 12)})
        few = {**given, "position": given["position"][:11].contiguous()}
        run({**few, "token_ids": given["token_ids"].clamp_max(10)})
        with pytest.raises(ValueError, match=r"token_ids\[0, 1\] = 11, but position has 11 rows"):
            run(few)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"position": torch.zeros(12, 1)}, ValueError, r"position has shape \[12, 1\]"),
        (
            {"position": torch.zeros(1, 5), "token_ids": None},
            ValueError,
            "position has 1 rows, but a clip has 12 tokens",
        ),
        ({"patch_size": 4.0}, TypeError, "patch_size = 4.0"),
        ({"patch_size": (4, 4.0)}, TypeError, r"patch_size\[1\] = 4.0"),
    ],
)
def test_a_call_is_refused_every_time(device, change, error, words):
    """Also after one that was not, and that equals it in all but the argument's type."""
    given = {
        name: x.to(device) if isinstance(x, Tensor) else x for name, x in {**case(device, "uint8"), **change}.items()
    }
    patch, ids = given.pop("patch_size", PATCH), given["token_ids"]
    clip, weight, bias, position = (given[name] for name in ("clip", "weight", "bias", "position"))
    position = position if "position" in change else None
    for size in (PATCH, (PATCH, PATCH)):
        patch_embed(clip, weight, bias, size, token_ids=ids)
    for _ in range(2):
        with pytest.raises(error, match=words):
            patch_embed(clip, weight, bias, patch, token_ids=ids, position=position)


def test_what_a_kept_plan_does_not_depend_on(device, assert_near):
    """One call after another of the same shapes, in every order of what may differ."""
    given, ways = case(device, "uint8"), []
    exact = convolved(**given)
    for ids, table, size, std in itertools.product(
        (torch.int64, torch.int32),
        (torch.float32, torch.float64, torch.bfloat16),
        (PATCH, np.int64(PATCH), [PATCH, PATCH]),
        (IMAGENET_STD, list(IMAGENET_STD), None),
    ):
        ways.append(
            ({**given, "token_ids": given["token_ids"].to(ids), "position": given["position"].to(table)}, size, std)
        )
    for wrap, grad in ((torch.nn.Parameter, True), (lambda x: x, False)):
        for changed, size, std in ways:
            clip, weight, bias = (changed[name] for name in ("clip", "weight", "bias"))
            rest = {name: changed[name] for name in ("token_ids", "position")}
            mode = contextlib.nullcontext() if grad else torch.inference_mode()
            with mode:
                weight, bias = wrap(weight.clone()), wrap(bias.clone())
                embedded = patch_embed(clip, weight, bias, size, std=std, **rest)
            assert embedded.requires_grad == grad
            assert embedded.dtype == torch.promote_types(torch.float32, rest["position"].dtype)
            assert_near(embedded.detach().float(), convolved(**changed))
            if grad:
                embedded.sum().backward()
                assert (bias.grad == 6).all()
    with torch.autocast(device.type, torch.bfloat16):
        rounded = run({**given, "position": None})
    assert rounded.dtype == torch.bfloat16
    assert_near(run(given), exact)


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
        ({"weight": torch.zeros(5, 3, 4)}, ["[5, 3, 4]", "[d, 3, t, k, k]"]),
        ({"weight": torch.zeros(5, 1, 2, 4, 4)}, ["[5, 1, 2, 4, 4]"]),
        ({"weight": torch.zeros(5, 3, 2, 4, 5)}, ["5 px", "patch_size = 4"]),
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


LAYOUTS = {"BTHWC": (0, 2, 3, 4, 1), "BTCHW": (0, 2, 1, 3, 4), "BCTHW": (0, 1, 2, 3, 4), "BHWC": None, "BCHW": None}
# layout, channels, dtype, patch, halo, tubelet, sets per clip (0: all tokens), ids of -1
FORMS = [
    ("BTCHW", 3, torch.uint8, (4, 4), (0, 0), 2, 1, False),
    ("BTCHW", 3, torch.uint8, (4, 6), (1, 2), 1, 2, True),
    ("BTHWC", 1, torch.uint8, (2, 6), (0, 1), 2, 0, False),
    ("BTHWC", 5, torch.float32, (6, 4), (1, 0), 1, 3, True),
    ("BCTHW", 4, torch.float32, (4, 6), (2, 1), 2, 2, True),
    ("BCTHW", 17, torch.uint8, (4, 6), (0, 0), 2, 0, False),
    ("BHWC", 3, torch.uint8, (4, 6), (0, 0), 1, 1, True),
    ("BCHW", 2, torch.float32, (4, 4), (1, 1), 1, 2, False),
    ("BCHW", 3, torch.uint8, (4, 4), (0, 0), 1, 0, False),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copied", [False, True])
def test_forms_for_other_models(device, form, copied, assert_near):
    """Against a float64 convolution of the clip in [B,C,T,H,W], row by row."""
    layout, channels, dtype, patch, halo, tubelet, sets, padded = form
    generator = torch.Generator().manual_seed(channels)
    frames = 1 if len(layout) == 4 else 4
    shape = (2, channels, frames, 12, 12)
    clip = torch.randint(0, 256, shape, generator=generator) if dtype == torch.uint8 else torch.rand(shape)
    clip = clip.to(device, dtype)
    mean, std = ([(i + shift) / channels for i in range(channels)] for shift in (0.1, 0.7))
    wide = clip.double() / (255 if dtype == torch.uint8 else 1)
    wide = (wide - torch.tensor(mean, device=device).view(-1, 1, 1, 1)) / torch.tensor(std, device=device).view(
        -1, 1, 1, 1
    )
    size = [inner + 2 * outer for inner, outer in zip(patch, halo, strict=True)]
    weight = torch.randn(6, channels, tubelet, *size, generator=generator).to(device).requires_grad_()
    tokens = frames // tubelet * (12 // patch[0]) * (12 // patch[1])
    position = torch.randn(tokens, 6, generator=generator).to(device).requires_grad_()
    bias = torch.randn(6, generator=generator).to(device).requires_grad_()
    token_ids = torch.randint(tokens, (2 * sets, 5), generator=generator).to(device) if sets else None
    if padded:
        token_ids[0, 2] = token_ids[-1, 0] = token_ids[-1, 4] = -1

    padded_clip = F.pad(wide, (halo[1], halo[1], halo[0], halo[0], 0, 0), mode="replicate")
    everything = F.conv3d(padded_clip, weight.double(), bias.double(), stride=(tubelet, *patch)).flatten(2).mT
    everything = everything + position.double()
    expected = everything
    if sets:
        expected = torch.stack([everything[row // sets][ids] for row, ids in enumerate(token_ids)])
        expected = torch.where((token_ids >= 0)[..., None], expected, 0)

    if len(layout) == 5:
        given = clip.permute(LAYOUTS[layout])
    else:
        given = clip[:, :, 0].permute(0, 2, 3, 1) if layout == "BHWC" else clip[:, :, 0]
    given = given.contiguous() if copied else given
    kernel = weight[:, :, 0] if len(layout) == 4 else weight
    embedded = patch_embed(
        given,
        kernel,
        bias,
        patch,
        token_ids=token_ids,
        position=position,
        mean=mean,
        std=std,
        layout=layout,
        padded=padded,
    )
    upstream = torch.linspace(-1, 2, embedded.numel(), device=device).view_as(embedded)
    assert_near(embedded.detach(), expected.detach(), 3e-5)
    inputs = [weight, bias, position]
    grads = torch.autograd.grad(expected, inputs, upstream.double(), retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(embedded, inputs, upstream), grads, strict=True):
        assert_near(ours, theirs, 3e-5)


def test_planar_uint8_frames_are_read_without_a_copy(device, needs_kernels, monkeypatch):
    """A decoder's [B,T,3,H,W] is read without a copy into another order."""
    clip = torch.randint(0, 256, (1, 2, 3, 8, 8), dtype=torch.uint8, device=device)
    seen = []
    monkeypatch.setattr(launch.Plan, "launch", lambda plan, tensors, outputs: seen.append(tensors[0].data_ptr()))
    gather_patches(clip[:, :, :, ::2], 4, layout="BTCHW")
    assert seen == [clip.data_ptr()]


def test_floats_are_normalised_only_when_asked(device):
    clip = torch.rand(1, 3, 1, 4, 4, device=device)
    plain = gather_patches(clip, 4)
    assert torch.equal(plain[0, 0], clip.flatten())
    asked = gather_patches(clip, 4, mean=(0.5, 0.25, 0.0), std=(0.5, 2.0, 1.0))
    expected = (clip - torch.tensor([0.5, 0.25, 0.0], device=device).view(1, 3, 1, 1, 1)) / torch.tensor(
        [0.5, 2.0, 1.0], device=device
    ).view(1, 3, 1, 1, 1)
    assert (asked[0, 0] - expected.flatten()).abs().max() < 1e-6


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_integers_are_sizes(device, integer):
    clip = case(device, "uint8")["clip"]
    rows = gather_patches(clip, integer(4), integer(2), halo=integer(1))
    assert torch.equal(rows, gather_patches(clip, 4, 2, halo=1))
    assert sample_visible(torch.ones(2, 5, device=device), integer(3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("clip", "settings", "words"),
    [
        (torch.zeros(1, 2, 5, 8, 8, dtype=torch.uint8), {"layout": "BTCHW"}, ["5 channels", "mean and std"]),
        (torch.zeros(1, 2, 8, 8), {"layout": "BTCHW"}, ["[1, 2, 8, 8]", "'BTCHW'"]),
        (torch.zeros(1, 2, 8, 8), {"layout": "HWC"}, ["layout = 'HWC'", "BTHWC"]),
        (torch.zeros(1, 2, 8, 8), {}, ["[1, 2, 8, 8]", "2 channels", "[B,3,H,W]", "layout="]),
        (torch.zeros(1, 2, 8, 8), {"layout": "BCHW", "mean": [0.0, 0.0]}, ["mean", "both or neither"]),
        (torch.zeros(1, 2, 8, 8), {"layout": "BCHW", "mean": [0.0], "std": [1.0]}, ["2 numbers"]),
        (torch.zeros(1, 3, 8, 8), {"patch_size": (4, 4, 4)}, ["patch_size = (4, 4, 4)"]),
        (torch.zeros(1, 3, 8, 8), {"patch_size": (4, 3)}, ["W = 8", "multiple of 3"]),
        (torch.zeros(2, 3, 8, 8), {"token_ids": torch.zeros(3, 1, dtype=torch.int64)}, ["[3, 1]", "multiple"]),
        (torch.zeros(1, 3, 8, 8), {"token_ids": torch.tensor([[-2]]), "padded": True}, ["token_ids[0, 0] = -2"]),
    ],
)
def test_errors_of_the_general_form(clip, settings, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the words follow
        gather_patches(clip, **{"patch_size": 4, **settings})
    for word in words:
        assert word in str(caught.value)

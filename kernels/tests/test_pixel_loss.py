"""pixel_loss against targets written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from umt_kernels import pixel_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-2  # large enough to have an effect


def targets(
    clip: Tensor,
    ids: Tensor,
    patch: int | tuple[int, int],
    tubelet: int,
    normalise: str,
    eps_in_root: bool,
    scale: float | Tensor,
    shift: float | Tensor,
    order: str | None = None,
) -> Tensor:
    """Token by token and pixel by pixel, float64."""
    order = order or ("BTHWC" if clip.dtype == torch.uint8 else "BCTHW")
    tall, wide = (patch, patch) if isinstance(patch, int) else patch
    pixels = clip.permute([order.index(axis) for axis in "BTHWC"]).double() * scale + shift
    height, width = pixels.shape[2] // tall, pixels.shape[3] // wide
    sets = len(ids) // len(clip)
    rows = []
    for sample, token in itertools.product(range(len(ids)), range(ids.shape[1])):
        frame, rest = divmod(max(0, int(ids[sample, token])), height * width)
        top, left = rest // width * tall, rest % width * wide
        cube = pixels[sample // sets, frame * tubelet :, top : top + tall, left : left + wide][:tubelet].flatten(0, 2)
        if normalise == "token":
            cube = cube.reshape(-1, 1)
        if normalise != "none":
            centred = cube - cube.mean(0)
            variance = centred.square().sum(0) / (len(cube) - 1)
            cube = centred / ((variance + EPS) ** 0.5 if eps_in_root else variance**0.5 + EPS)
        rows.append(cube.reshape(-1))
    return torch.stack(rows).view(*ids.shape, -1)


def inputs(device: torch.device, uint8: bool, patch: int, tubelet: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(patch)
    frames, height, width = 3 * tubelet, 2 * patch, 4 * patch
    if uint8:
        clip = torch.randint(0, 256, (2, frames, height, width, 3), generator=generator, dtype=torch.uint8)
    else:
        clip = torch.randn(2, 3, frames, height, width, generator=generator)
    ids = torch.stack([torch.randperm(24, generator=generator)[:5] for _ in range(2)])
    predictions = torch.randn(2, 5, 3 * tubelet * patch**2, generator=generator).to(dtype)
    return predictions.to(device), clip.to(device), ids.to(device)


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize(("patch", "tubelet"), [(4, 2), (7, 1), (16, 2)])
@pytest.mark.parametrize(("normalise", "eps_in_root"), [("none", False), ("channel", False), ("token", True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(device, assert_near, uint8, patch, tubelet, normalise, eps_in_root, dtype):
    predictions, clip, ids = inputs(device, uint8, patch, tubelet, dtype)
    predictions.requires_grad_()
    scale, shift = (1 / 255, 0.0) if uint8 else (0.5, 0.25)
    options = {"normalise": normalise, "eps": EPS, "eps_in_root": eps_in_root}
    wanted = targets(clip, ids, patch, tubelet, normalise, eps_in_root, scale, shift)
    errors = (predictions.detach().double() - wanted).square().mean(-1)
    given = {} if uint8 else {"scale": (scale,) * 3, "shift": (shift,) * 3}
    rows = pixel_loss(predictions, clip, ids, patch, tubelet, **options, **given, reduction="none")
    assert rows.dtype == torch.float32
    assert_near(rows, errors)
    upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (grad,) = torch.autograd.grad(rows, predictions, upstream)
    exact = 2 * (predictions.detach().double() - wanted) * upstream[..., None] / predictions.shape[2]
    assert grad.dtype == dtype
    assert_near(grad, exact)
    mean = pixel_loss(predictions, clip, ids, patch, tubelet, **options, **given)
    assert_near(mean, errors.mean())
    (grad,) = torch.autograd.grad(mean, predictions, torch.tensor(3.0, device=device))
    exact = 2 * (predictions.detach().double() - wanted) * 3 / predictions.numel()
    assert_near(grad, exact)


def test_weighted_mean_is_over_the_whole_batch(device, assert_near):
    predictions, clip, ids = inputs(device, True, 4, 2, torch.float32)
    predictions.requires_grad_()
    weights = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], device=device)
    rows = pixel_loss(predictions, clip, ids, 4, reduction="none").detach()
    loss = pixel_loss(predictions, clip, ids, 4, weights=weights)
    assert_near(loss.detach(), (rows * weights).sum() / 5)
    loss.backward()
    assert torch.equal(predictions.grad.abs().amax(-1) > 0, weights > 0)


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("normalise", ["none", "channel", "token"])
def test_several_masks_of_a_clip_and_ids_of_nothing(device, assert_near, uint8, normalise):
    _, clip, _ = inputs(device, uint8, 4, 2, torch.float32)
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(24, generator=generator)[:5] for _ in range(6)]).to(device)
    ids[0, 1] = ids[3] = ids[5, 4] = -1
    predictions = torch.randn(6, 5, 96, generator=generator).to(device).requires_grad_()
    weights = torch.rand(6, 5, generator=generator).to(device)
    options = {"normalise": normalise, "eps": EPS, "eps_in_root": True, "padded": True}
    wanted = targets(clip, ids, 4, 2, normalise, True, 1 / 255 if uint8 else 1.0, 0.0)
    there = (ids >= 0).double()
    errors = (predictions.detach().double() - wanted).square().mean(-1) * there
    rows = pixel_loss(predictions, clip, ids, 4, **options, reduction="none")
    assert_near(rows.detach(), errors)
    (grad,) = torch.autograd.grad(rows.sum(), predictions)
    assert torch.equal((grad == 0).all(-1), ids < 0)  # written, not NaN
    assert_near(pixel_loss(predictions, clip, ids, 4, **options).detach(), errors.sum() / there.sum())
    odd = weights.masked_fill(ids < 0, float("nan"))  # is not looked at
    weighted = pixel_loss(predictions, clip, ids, 4, **options, weights=odd).detach()
    assert_near(weighted, (errors * weights).sum() / (there * weights).sum())


@pytest.mark.parametrize("normalise", ["channel", "token"])
def test_an_id_of_nothing_has_no_error_even_with_eps_0(device, normalise):
    predictions, clip, ids = inputs(device, True, 4, 2, torch.float32)
    ids[:, 0] = -1
    predictions.requires_grad_()
    rows = pixel_loss(predictions, clip, ids, 4, normalise=normalise, eps=0.0, padded=True, reduction="none")
    (grad,) = torch.autograd.grad(rows.sum(), predictions)
    assert rows.isfinite().all()
    assert torch.equal(rows == 0, ids < 0)
    assert torch.equal((grad == 0).all(-1), ids < 0)


# layout, channels, dtype of the clip, patch, tubelet; the last one is beyond the kernel's channels
FORMS = [
    ("BTHWC", 1, torch.uint8, (2, 6), 2),
    ("BTHWC", 5, torch.float32, (6, 4), 1),
    ("BTCHW", 3, torch.uint8, (4, 6), 2),
    ("BCTHW", 4, torch.float16, (4, 3), 1),
    ("BHWC", 2, torch.float32, (3, 4), 1),
    ("BCHW", 9, torch.uint8, (6, 2), 1),
    ("BTCHW", 17, torch.float32, (2, 3), 2),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalise", ["none", "channel", "token"])
def test_forms_for_other_models(device, form, normalise, assert_near):
    layout, channels, dtype, patch, tubelet = form
    generator = torch.Generator().manual_seed(channels)
    sizes = dict(zip("BTHWC", (2, 2 * tubelet, 12, 24, channels), strict=True))
    shape = [sizes[axis] for axis in layout]
    clip = torch.randint(0, 256, shape, generator=generator) if dtype == torch.uint8 else torch.rand(shape)
    clip = clip.to(device, dtype)
    scale, shift = ([(i + start) / channels for i in range(channels)] for start in (0.5, 2.0))
    tokens = (
        sizes["T"] // tubelet * (12 // patch[0]) * (24 // patch[1])
        if "T" in layout
        else 12 * 24 // patch[0] // patch[1]
    )
    ids = torch.stack([torch.randperm(tokens, generator=generator)[:4] for _ in range(4)]).to(device)
    predictions = torch.randn(4, 4, channels * tubelet * patch[0] * patch[1], generator=generator).to(device)
    predictions.requires_grad_()
    options = {"normalise": normalise, "eps": EPS, "scale": scale, "shift": shift, "layout": layout}
    order = layout if "T" in layout else layout[0] + "T" + layout[1:]
    video = clip if "T" in layout else clip.unsqueeze(1)
    of_channels = [torch.tensor(x, dtype=torch.float64, device=device) for x in (scale, shift)]
    wanted = targets(video, ids, patch, tubelet, normalise, False, *of_channels, order)
    errors = (predictions.detach().double() - wanted).square().mean(-1)
    rows = pixel_loss(predictions, clip, ids, patch, tubelet, **options, reduction="none")
    assert_near(rows.detach(), errors)
    again = pixel_loss(predictions, clip, ids, patch, tubelet, **options)  # by its own plan, then by a kept one
    for mean in (again, pixel_loss(predictions, clip, ids, patch, tubelet, **options)):
        assert_near(mean.detach(), errors.mean())
        (grad,) = torch.autograd.grad(mean, predictions)
        assert_near(grad, 2 * (predictions.detach().double() - wanted) / predictions.numel())


@pytest.mark.parametrize("uint8", [False, True])
def test_images_are_clips_of_one_frame(device, uint8):
    predictions, clip, ids = inputs(device, uint8, 4, 1, torch.float32)
    frame = clip[:, :1] if uint8 else clip[:, :, :1]
    expected = pixel_loss(predictions, frame, ids % 8, 4, 1)
    assert torch.equal(pixel_loss(predictions, frame.squeeze(1 if uint8 else 2), ids % 8, 4, 1), expected)


def test_each_colour_has_its_own_scale_and_shift(device, assert_near):
    predictions, clip, ids = inputs(device, False, 4, 2, torch.float32)
    scale, shift = (0.5, 2.0, -1.0), (0.1, 0.2, 0.3)
    moved = clip * torch.tensor(scale, device=device).view(3, 1, 1, 1) + torch.tensor(shift, device=device).view(
        3, 1, 1, 1
    )
    one = pixel_loss(predictions, clip, ids, 4, normalise="none", scale=scale, shift=shift, reduction="none")
    two = pixel_loss(predictions, moved, ids, 4, normalise="none", reduction="none")
    assert_near(one, two.double(), arithmetic=1e-6)


def test_views_are_read_without_a_copy(device, spread):
    predictions, clip, ids = inputs(device, True, 4, 2, torch.float32)
    plain = pixel_loss(predictions, clip, ids, 4, reduction="none")
    assert torch.equal(pixel_loss(spread(predictions), spread(clip), spread(ids), 4, reduction="none"), plain)
    flipped = clip.flip(3)
    assert not torch.equal(pixel_loss(predictions, flipped, ids, 4, reduction="none"), plain)


def test_a_patch_of_one_colour_has_target_zero(device):
    predictions = torch.ones(1, 1, 96, device=device)
    clip = torch.full((1, 2, 4, 4, 3), 7, dtype=torch.uint8, device=device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for normalise in ("channel", "token"):
        assert abs(float(pixel_loss(predictions, clip, ids, 4, normalise=normalise)) - 1) < 0.1


def test_statistics_are_float32_under_autocast(device):
    predictions, clip, ids = inputs(device, True, 4, 2, torch.bfloat16)
    plain = pixel_loss(predictions, clip, ids, 4)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(pixel_loss(predictions, clip, ids, 4), plain)


def test_float64_is_differentiable(device):
    predictions, clip, ids = inputs(device, True, 2, 1, torch.float64)
    small = predictions[:1, :2].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pixel_loss(x, clip[:1], ids[:1, :2], 2, 1), small)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"predictions": torch.zeros(2, 5, 95)}, ValueError, "predictions have shape [2, 5, 95]; give [2, 5, 96]"),
        ({"token_ids": torch.full((2, 5), 24)}, ValueError, "token_ids[0, 0] = 24, but a clip has 24 tokens"),
        ({"clip": torch.zeros(2, 6, 8, 16, 3)}, ValueError, "a torch.float32 clip is [B,3,T,H,W], others need layout="),
        ({"clip": torch.zeros(2, 6, 8, 16, 3, dtype=torch.int32)}, TypeError, "clip has dtype torch.int32"),
        ({"layout": "BTCHW"}, ValueError, "clip has W = 3, which is not a positive multiple of 4"),
        ({"layout": "BHWC"}, ValueError, "but layout = 'BHWC'"),
        ({"patch_size": (4, 6)}, ValueError, "W = 16, which is not a positive multiple of 6"),
        ({"patch_size": (4, 4, 4)}, ValueError, "patch_size = (4, 4, 4)"),
        ({"token_ids": torch.full((2, 5), -1)}, ValueError, "token_ids[0, 0] = -1"),
        ({"token_ids": torch.zeros(3, 5, dtype=torch.int64)}, ValueError, "or a multiple of that many rows"),
        ({"patch_size": 5}, ValueError, "H = 8, which is not a positive multiple of 5"),
        ({"normalise": "colour"}, ValueError, "normalise = 'colour'"),
        ({"reduction": "sum"}, ValueError, "reduction = 'sum'"),
        ({"weights": torch.ones(2, 4)}, ValueError, "weights [2, 4]"),
        ({"scale": (1.0, 1.0)}, ValueError, "3 numbers each"),
        ({"scale": 0.5}, TypeError, "scale = 0.5; give 3 numbers"),
        ({"eps": -1.0}, ValueError, "eps = -1.0"),
        ({"predictions": torch.zeros(2, 5, 96, dtype=torch.int64)}, TypeError, "predictions has dtype torch.int64"),
    ],
)
def test_errors_name_inputs_that_do_not_fit(change, error, words):
    predictions, clip, ids = inputs(torch.device("cpu"), True, 4, 2, torch.float32)
    given = {"predictions": predictions, "clip": clip, "token_ids": ids, "patch_size": 4, **change}
    with pytest.raises(error) as caught:
        pixel_loss(**given)
    assert words in str(caught.value)

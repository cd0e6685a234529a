"""gather_patches and weight_matrix against F.unfold and a float64 F.conv3d."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD, gather_patches, weight_matrix

PATCH = 4
# frames, height, width: no two grids alike, none square
SIZES = [(4, 12, 8), (2, 4, 16)]


def uint8_clip(batch: int, frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, frames, height, width, 3), generator=generator, dtype=torch.uint8)


def float_clip(batch: int, frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, frames, height, width, generator=generator, dtype=torch.float64)


def normalised(clip: Tensor) -> Tensor:
    """uint8 [B,T,H,W,3] -> float64 [B,3,T,H,W]."""
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return ((clip.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)


def convolved(clip: Tensor, weight: Tensor, tubelet: int, halo: int) -> Tensor:
    """F.conv3d on the replicate-padded clip, tokens flattened: [B, N, d]."""
    padded = F.pad(clip, (halo, halo, halo, halo, 0, 0), mode="replicate")
    return F.conv3d(padded, weight, stride=(tubelet, PATCH, PATCH)).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("halo", [0, 1, 2])
@pytest.mark.parametrize("make", [uint8_clip, float_clip])
def test_rows_times_weight_is_the_convolution(device, size, tubelet, halo, make):
    clip = make(2, *size).to(device)
    generator = torch.Generator().manual_seed(2)
    window = PATCH + 2 * halo
    weight = torch.randn(5, 3, tubelet, window, window, generator=generator, dtype=torch.float64).to(device)
    rows = gather_patches(clip, PATCH, tubelet, halo=halo, dtype=torch.float64)
    reference = convolved(normalised(clip) if clip.dtype == torch.uint8 else clip, weight, tubelet, halo)
    assert rows.shape == (2, reference.shape[1], 3 * tubelet * window**2)
    # uint8 pixels are normalised in float32
    tolerance = 1e-4 if clip.dtype == torch.uint8 else 1e-12
    assert (rows @ weight_matrix(weight, clip).T - reference).abs().max() < tolerance


@pytest.mark.parametrize("make", [uint8_clip, float_clip])
def test_rows_are_those_of_unfold(device, make):
    clip = make(2, 3, 12, 8).to(device)
    frames = normalised(clip) if clip.dtype == torch.uint8 else clip
    unfolded = F.unfold(frames.transpose(1, 2).flatten(0, 1), PATCH, stride=PATCH)  # [B*T, F, P]
    reference = unfolded.transpose(1, 2).reshape(2, -1, 3 * PATCH**2)  # channel first
    if clip.dtype == torch.uint8:
        reference = reference.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
    assert (gather_patches(clip, PATCH, dtype=torch.float64) - reference).abs().max() < 1e-6


@pytest.mark.parametrize("make", [uint8_clip, float_clip])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tubelet", "halo"), [(1, 0), (2, 1)])
def test_token_ids_choose_rows_in_their_order(device, make, ids_dtype, tubelet, halo):
    clip = make(2, 4, 12, 8).to(device)
    whole = gather_patches(clip, PATCH, tubelet, halo=halo)
    ids = torch.tensor([[0, whole.shape[1] - 1, 5, 5], [7, 2, 11, 0]], dtype=ids_dtype, device=device)
    rows = gather_patches(clip, PATCH, tubelet, token_ids=ids, halo=halo)
    for sample in range(2):
        assert torch.equal(rows[sample], whole[sample, ids[sample].long()])


def by_conv_windows(clip: Tensor, patch: int, tubelet: int, halo: int) -> Tensor:
    """All rows in float64, from the definition: pad, cut windows, flatten in the clip's order of memory."""
    frames = normalised(clip) if clip.dtype == torch.uint8 else clip.double()
    padded = F.pad(frames, (halo, halo, halo, halo, 0, 0), mode="replicate")
    window = patch + 2 * halo
    cut = padded.unfold(2, tubelet, tubelet).unfold(3, window, patch).unfold(4, window, patch)
    cut = cut.flatten(2, 4).transpose(1, 2)  # [B, N, 3, t, window, window]
    return (cut.permute(0, 1, 3, 4, 5, 2) if clip.dtype == torch.uint8 else cut).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("clip_dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "patch", "tubelet", "halo"),
    [
        ((1, 1, 4, 4), 4, 1, 0),  # one patch
        ((1, 1, 5, 5), 5, 1, 2),  # one patch, with its halo outside the clip
        ((2, 6, 10, 15), 5, 3, 0),
        ((2, 4, 14, 21), 7, 2, 1),
        ((3, 2, 40, 32), 4, 1, 0),  # more lines than one program reads
        ((2, 2, 3, 3), 1, 1, 1),
        ((1, 1, 16, 32), 16, 1, 1),
    ],
)
def test_kernel_against_float64(device, size, patch, tubelet, halo, clip_dtype, dtype, assert_near):
    clip = (uint8_clip(*size) if clip_dtype == torch.uint8 else float_clip(*size).to(clip_dtype)).to(device)
    expected = by_conv_windows(clip, patch, tubelet, halo)
    rows = gather_patches(clip, patch, tubelet, halo=halo, dtype=dtype)
    assert rows.dtype == dtype
    assert_near(rows, expected, 1e-6)
    last = torch.tensor([[expected.shape[1] - 1]], dtype=torch.int32, device=device).expand(size[0], 1)
    rows = gather_patches(clip, patch, tubelet, token_ids=last, halo=halo, dtype=dtype)
    assert_near(rows, expected[:, -1:], 1e-6)


@pytest.mark.parametrize("make", [uint8_clip, float_clip])
@pytest.mark.parametrize("halo", [0, 1])
def test_views_into_larger_tensors(device, make, halo, spread):
    """Frames, rows and columns cropped out of a decoder's buffer, and ids out of a wider table."""
    clip = make(2, 4, 12, 8).to(device)
    clip = clip if clip.dtype == torch.uint8 else clip.float()
    ids = torch.tensor([[0, 11, 5], [7, 2, 11]], device=device)
    expected = gather_patches(clip, PATCH, 2, token_ids=ids, halo=halo)
    assert torch.equal(gather_patches(spread(clip), PATCH, 2, token_ids=spread(ids), halo=halo), expected)
    if clip.dtype == torch.uint8:  # pixels stay contiguous, as the kernel needs them
        wide = torch.full((3, 9, 30, 11, 3), 255, dtype=torch.uint8, device=device)
        crop = wide[1:, 1::2, 5:17, 2:10]
        crop.copy_(clip)
        assert crop.stride()[3:] == (3, 1)
        assert torch.equal(gather_patches(crop, PATCH, 2, token_ids=ids, halo=halo), expected)
    repeated = clip[:1].expand(2, -1, -1, -1, -1)
    assert torch.equal(
        gather_patches(repeated, PATCH, 2, token_ids=ids, halo=halo),
        gather_patches(repeated.contiguous(), PATCH, 2, token_ids=ids, halo=halo),
    )


@pytest.mark.parametrize("halo", [0, 1])
def test_pixels_of_other_tokens_do_not_leak(device, halo):
    clip = float_clip(1, 2, 12, 12).float().to(device)
    hidden = torch.full_like(clip, float("nan"))
    hidden[..., 1, : 4 + halo, 4 - halo : 8 + halo] = clip[..., 1, : 4 + halo, 4 - halo : 8 + halo]
    ids = torch.tensor([[10]], device=device)  # frame 1, row 0, column 1
    expected = gather_patches(clip, PATCH, token_ids=ids, halo=halo)
    assert torch.equal(gather_patches(hidden, PATCH, token_ids=ids, halo=halo), expected)


@pytest.mark.parametrize("make", [uint8_clip, float_clip])
def test_an_id_of_minus_1_gives_a_row_of_zeros(device, make):
    ids = torch.tensor([[3, -1, 0]], device=device)
    clip = make(1, 1, 8, 8)
    clip = (clip if clip.dtype == torch.uint8 else clip.float()).to(device)
    rows = gather_patches(clip, PATCH, token_ids=ids, padded=True)
    assert (rows[0, 1] == 0).all()
    assert (rows[0, [0, 2]] != 0).any(-1).all()


def test_the_clip_gets_no_gradient(device):
    clip = float_clip(1, 2, 8, 8).float().to(device).requires_grad_()
    assert not gather_patches(clip, PATCH).requires_grad


def test_mean_and_std_are_those_given(device):
    clip = uint8_clip(1, 1, 4, 4).to(device)
    rows = gather_patches(clip, PATCH, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    mean, std = (torch.tensor(x, device=device) for x in ([0.1, 0.2, 0.3], [1.0, 2.0, 4.0]))
    expected = ((clip[0, 0] / 255 - mean) / std).flatten()
    assert (rows[0, 0] - expected).abs().max() < 1e-6


def test_clips_need_not_be_contiguous(device):
    pixels = uint8_clip(2, 8, 12, 16).to(device)[:, ::2, :, ::2].flip(0)
    assert not pixels[:, :, :, 1:].is_contiguous()
    assert torch.equal(gather_patches(pixels, PATCH, 2, halo=1), gather_patches(pixels.contiguous(), PATCH, 2, halo=1))
    channels_last = (
        float_clip(2, 4, 12, 8).float().to(device).permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    )
    expected = gather_patches(channels_last.contiguous(), PATCH, 2)
    assert torch.equal(gather_patches(channels_last, PATCH, 2), expected)


def test_autocast_does_not_round(device):
    clip = uint8_clip(1, 2, 8, 8).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        rows = gather_patches(clip, PATCH)
    assert torch.equal(rows, gather_patches(clip, PATCH))


@pytest.mark.parametrize("make", [uint8_clip, float_clip])
def test_empty_batch_and_no_tokens(device, make):
    empty, two = make(0, 2, 8, 8).to(device), make(2, 2, 8, 8).to(device)
    assert gather_patches(empty, PATCH).shape == (0, 8, 48)
    none = torch.zeros(0, 3, dtype=torch.int64, device=device)
    assert gather_patches(empty, PATCH, token_ids=none).shape == (0, 3, 48)
    assert gather_patches(two, PATCH, token_ids=none.new_zeros(2, 0)).shape == (2, 0, 48)


@pytest.mark.parametrize(
    ("clip", "settings", "error", "words"),
    [
        (torch.zeros(1, 2, 8, 8, 3, dtype=torch.int32), {}, TypeError, ["torch.int32", "uint8"]),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), {}, ValueError, ["[8, 8, 3]", "[B,T,H,W,3]"]),
        (torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), {}, ValueError, ["[1, 3, 2, 8, 8]", "8 channels"]),
        (torch.zeros(1, 2, 8, 8, 3), {}, ValueError, ["[1, 2, 8, 8, 3]", "2 channels", "[B,3,T,H,W]"]),
        (torch.zeros(1, 3, 3, 8, 8), {"tubelet_size": 2}, ValueError, ["T = 3", "multiple of 2"]),
        (torch.zeros(1, 3, 2, 10, 8), {}, ValueError, ["H = 10", "multiple of 4"]),
        (torch.zeros(1, 3, 2, 8, 9), {}, ValueError, ["W = 9", "multiple of 4"]),
        (torch.zeros(1, 3, 0, 8, 8), {}, ValueError, ["T = 0"]),
        (torch.zeros(1, 3, 2, 8, 8), {"patch_size": 0}, ValueError, ["H = 8", "multiple of 0"]),
        (torch.zeros(1, 3, 2, 8, 8), {"halo": -1}, ValueError, ["halo = -1"]),
        (torch.zeros(1, 3, 2, 8, 8), {"halo": 0.5}, TypeError, ["halo = 0.5", "int"]),
        (torch.zeros(1, 3, 2, 8, 8), {"patch_size": 4.0}, TypeError, ["patch_size = 4.0", "int"]),
        (torch.zeros(1, 3, 2, 8, 8), {"tubelet_size": True}, TypeError, ["tubelet_size = True", "int"]),
        (torch.zeros(1, 3, 2, 8, 8), {"dtype": torch.int32}, TypeError, ["dtype = torch.int32"]),
        (torch.zeros(1, 3, 2, 8, 8), {"mean": (0.0, 0.0)}, ValueError, ["mean = (0.0, 0.0)", "three"]),
        (torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8), {"std": (1.0,)}, ValueError, ["std = (1.0,)", "three"]),
        (
            torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8),
            {"std": (1.0, 0.0, 1.0)},
            ValueError,
            ["std = (1.0, 0.0, 1.0)"],
        ),
        (torch.zeros(1, 3, 2, 8, 8).numpy(), {}, TypeError, ["clip is a ndarray", "tensor"]),
    ],
)
def test_errors_name_the_value_and_the_place(clip, settings, error, words):
    with pytest.raises(error) as caught:
        gather_patches(clip, **{"patch_size": PATCH, **settings})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (torch.tensor([[0, 1, 2], [3, 4, 8]]), ValueError, ["token_ids[1, 2] = 8", "8 tokens"]),
        (torch.tensor([[0, -1], [0, 1]]), ValueError, ["token_ids[0, 1] = -1", "8 tokens"]),
        (torch.tensor([[0, 1]]), ValueError, ["token_ids", "[1, 2]", "[2, m]"]),
        (torch.tensor([0, 1]), ValueError, ["token_ids", "[2]", "[2, m]"]),
        (torch.tensor([[0.0], [1.0]]), TypeError, ["token_ids", "torch.float32", "int64"]),
        (torch.ones(2, 8, dtype=torch.bool), TypeError, ["token_ids", "torch.bool"]),
        (torch.zeros(2, 1, dtype=torch.int64, device="meta"), ValueError, ["token_ids is on meta", "clip is on cpu"]),
    ],
)
def test_bad_token_ids_are_named(ids, error, words):
    with pytest.raises(error) as caught:
        gather_patches(torch.zeros(2, 3, 2, 8, 8), PATCH, token_ids=ids)
    for word in words:
        assert word in str(caught.value)

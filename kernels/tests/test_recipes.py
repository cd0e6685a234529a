"""The encoders of the page of recipes equal those of transformers with copied weights, in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from umt_kernels import IMAGENET_MEAN, IMAGENET_STD, mask_to_ids

WIDTH, HEADS, HIDDEN, PATCH, DEPTH = 24, 2, 40, 4, 2
FRAMES, SIDE = 4, 16
GRID = SIDE // PATCH
TOKENS = FRAMES // 2 * GRID**2
SIZES = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "hidden": HIDDEN, "patch": PATCH}
# transformers' names of a block's weights, which differ between models and versions.
PLACES = {
    "norm1": ("layernorm_before", "norm1"),
    "norm2": ("layernorm_after", "norm2"),
    "q": ("attention.attention.query", "attention.query", "attention.q_proj"),
    "k": ("attention.attention.key", "attention.key", "attention.k_proj"),
    "v": ("attention.attention.value", "attention.value", "attention.v_proj"),
    "proj": ("attention.output.dense", "attention.proj", "attention.o_proj"),
    "fc1": ("intermediate.dense", "mlp.fc1"),
    "fc2": ("output.dense", "mlp.fc2"),
}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    return names


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def layers_of(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    layers: list[dict[str, Tensor]] = [{} for _ in range(DEPTH)]
    for name, value in state.items():
        if not name.startswith("predictor") and (found := re.search(r"layers?\.(\d+)\.(.*)$", name)):
            layers[int(found[1])][found[2]] = value
    return layers


def copy_weights(encoder: nn.Module, model: nn.Module) -> None:
    """Copy the weights of a model of transformers into an encoder of the page."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    state = model.state_dict()
    for block, layer in zip(encoder.blocks, layers_of(state), strict=True):

        def get(role: str, kind: str, layer: dict[str, Tensor] = layer) -> Tensor | None:
            return next((layer[f"{p}.{kind}"] for p in PLACES[role] if f"{p}.{kind}" in layer), None)

        for role in ("norm1", "norm2", "proj", "fc1", "fc2"):
            for kind in ("weight", "bias"):
                getattr(getattr(block, role), kind).data = get(role, kind)
        block.qkv.weight.data = torch.cat([get(role, "weight") for role in "qkv"])
        biases = [get(role, "bias") for role in "qkv"]
        block.qkv.bias.data = torch.cat([state_zero(block) if b is None else b for b in biases])
    for kind in ("weight", "bias"):
        conv = next(v for k, v in state.items() if re.search(rf"patch_embeddings\.proj(ection)?\.{kind}$", k))
        getattr(encoder.embed.proj, kind).data = conv
        norm = next(v for k, v in state.items() if re.search(rf"^(encoder\.)?layernorm\.{kind}$", k))
        getattr(encoder.norm, kind).data = norm


def state_zero(block: nn.Module) -> Tensor:
    return torch.zeros(WIDTH, dtype=block.fc1.weight.dtype)


def clip() -> tuple[Tensor, Tensor]:
    """uint8 [B,T,3,H,W], and the same normalised."""
    frames = torch.randint(0, 256, (2, FRAMES, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return frames.to(torch.uint8), (frames / 255 - mean) / std


def hidden_tokens(counts: list[int]) -> Tensor:
    hidden = torch.ones(len(counts), TOKENS, dtype=torch.bool)
    for row, count in zip(hidden, counts, strict=True):
        row[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(count))[:count]] = False
    return hidden


def video_mae(page: dict[str, Any], transformers: Any) -> tuple[nn.Module, nn.Module]:
    config = transformers.VideoMAEConfig(
        image_size=SIDE, patch_size=PATCH, num_frames=FRAMES, hidden_size=WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, intermediate_size=HIDDEN, use_mean_pooling=False,
    )  # fmt: skip
    model = transformers.VideoMAEModel(config).double().eval()
    encoder = page["VideoMAEEncoder"](TOKENS, **SIZES).double()
    copy_weights(encoder, model)
    assert (encoder.position - model.embeddings.position_embeddings[0]).abs().max() < 1e-6
    encoder.position = model.embeddings.position_embeddings[0].double()  # its table was rounded to float32
    return encoder, model


def test_videomae(page, transformers):
    encoder, model = video_mae(page, transformers)
    uint8, normalised = clip()
    hidden = hidden_tokens([6, 6])
    expected = model(normalised, bool_masked_pos=hidden).last_hidden_state
    assert (encoder(normalised, hidden, 6) - expected).abs().max() < 1e-12
    assert (encoder(uint8, hidden, 6) - expected).abs().max() < 1e-4  # pixels are normalised in float32


def test_videomae_with_rows_of_unequal_counts(page, transformers):
    encoder, model = video_mae(page, transformers)
    _, normalised = clip()
    hidden = hidden_tokens([4, 9])
    encoded, ids = page["encode_ragged"](encoder, normalised, hidden, 9)
    for row, count in enumerate((4, 9)):
        expected = model(normalised[row : row + 1], bool_masked_pos=hidden[row : row + 1]).last_hidden_state[0]
        assert (ids[row] >= 0).sum() == count
        assert (encoded[row, :count] - expected).abs().max() < 1e-12


def test_vjepa2(page, transformers):
    config = transformers.VJEPA2Config(
        crop_size=SIDE, patch_size=PATCH, frames_per_clip=FRAMES, tubelet_size=2, hidden_size=WIDTH,
        num_hidden_layers=DEPTH, num_attention_heads=HEADS, mlp_ratio=HIDDEN / WIDTH, pred_hidden_size=WIDTH,
        pred_num_attention_heads=HEADS, pred_num_hidden_layers=1, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.VJEPA2Model(config).double().eval()
    encoder = page["VJEPAEncoder"]((GRID, GRID), **SIZES).double()
    copy_weights(encoder, model)
    _, normalised = clip()
    every = torch.arange(TOKENS).expand(2, -1)
    targets = model(normalised, skip_predictor=True).last_hidden_state
    assert (encoder(normalised, every) - targets).abs().max() < 1e-12

    visible = torch.stack([torch.randperm(TOKENS, generator=torch.Generator().manual_seed(i))[:5] for i in range(4)])
    encoded = encoder(normalised, visible)  # two masks for each of two clips
    tokens = model.encoder.embeddings(normalised)
    for index, ids in enumerate(visible):
        x = tokens[index // 2, ids][None]
        for layer in model.encoder.layer:
            x = layer(x, ids[None])[0]
        assert (encoded[index] - model.encoder.layernorm(x)[0]).abs().max() < 1e-12

    hidden = mask_to_ids(hidden_tokens([20, 20, 20, 20]), TOKENS - 20)
    predictions = torch.randn(4, TOKENS - 20, WIDTH, dtype=torch.float64)
    normed = F.layer_norm(targets, (WIDTH,)).repeat_interleave(2, 0)
    wanted = normed.gather(1, hidden.long()[..., None].expand(-1, -1, WIDTH))
    loss = page["jepa_loss"](predictions, targets, hidden)
    assert abs(loss - (predictions - wanted).abs().mean()) < 1e-12


def test_mae(page, transformers):
    config = transformers.ViTMAEConfig(
        image_size=SIDE, patch_size=PATCH, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        intermediate_size=HIDDEN, mask_ratio=0.75,
    )  # fmt: skip
    model = transformers.ViTMAEModel(config).double().eval()
    encoder = page["MAEEncoder"](GRID**2, **SIZES).double()
    copy_weights(encoder, model)
    encoder.cls.data = model.embeddings.cls_token.data
    encoder.position.data = model.embeddings.position_embeddings.data[0]
    _, normalised = clip()
    image = normalised[:, 0].contiguous()
    noise = torch.rand(2, GRID**2, generator=torch.Generator().manual_seed(2))
    outputs = model(image, noise=noise)
    ids = noise.argsort(1)[:, : GRID**2 // 4]
    encoded, hidden = encoder(image, ids)
    assert (encoded - outputs.last_hidden_state).abs().max() < 1e-12
    assert torch.equal(hidden, outputs.mask.bool())
    predictions, patches = torch.randn(2, 2, GRID**2, 48, dtype=torch.float64)
    loss = page["mae_loss"](predictions, patches, hidden)
    assert abs(loss - ((predictions - patches).square().mean(-1) * outputs.mask).sum() / outputs.mask.sum()) < 1e-12
    drawn, hidden = encoder(image)
    assert drawn.shape == (2, 1 + GRID**2 // 4, WIDTH)
    assert (hidden.sum(1) == 12).all()


@pytest.mark.parametrize("normalise", ["none", "token"])
def test_mae_loss_of_pixels(page, transformers, normalise):
    config = transformers.ViTMAEConfig(
        image_size=SIDE, patch_size=PATCH, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS,
        intermediate_size=HIDDEN, decoder_hidden_size=WIDTH, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=HEADS, decoder_intermediate_size=HIDDEN, norm_pix_loss=normalise == "token",
    )  # fmt: skip
    _, normalised = clip()
    image = normalised[:, 0].contiguous()
    outputs = transformers.ViTMAEForPreTraining(config).double()(image)
    hidden = outputs.mask.bool()
    rows = outputs.logits[hidden].view(2, 12, 48)
    assert abs(page["mae_loss_of_pixels"](rows, image, hidden, 12, normalise) - outputs.loss) < 1e-12


def test_the_encoders_train_in_float32_with_the_kernels(page, device):
    """float64 above runs the reference; float32 runs the kernels where available."""
    torch.manual_seed(0)
    uint8, _ = clip()
    encoder = page["VideoMAEEncoder"](TOKENS, **SIZES).to(device)
    wide = page["VideoMAEEncoder"](TOKENS, **SIZES).double().to(device)
    wide.load_state_dict(encoder.state_dict())
    hidden = hidden_tokens([6, 6]).to(device)
    grads = []
    for module in (encoder, wide):
        module(uint8.to(device), hidden, 6).pow(3).mean().backward()
        grads.append(module.embed.proj.weight.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[1].abs().max()

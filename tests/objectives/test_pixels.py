"""Pixel objectives against recorded numbers of the published VideoMAE, VideoMAE V2 and MAE-ST."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from golden import read_recorded
from torch import Tensor, nn
from umt_kernels.reference import pixel_targets

from umt_fast.config import ClassifierConfig, ConfigError, MaeStConfig, VideoMaeConfig
from umt_fast.masking import hidden_ids
from umt_fast.models.classifier import VideoClassifier
from umt_fast.models.pixels import MAE_ST_MEAN, MAE_ST_STD, MaeSt, MaeStClassifier, VideoMae
from umt_fast.models.token_sampler import AdaMae
from umt_fast.objectives.pixels import (
    Reconstruction,
    adamae_step,
    mae_st_step,
    restore,
    videomae_step,
)
from umt_fast.weights import load_classifier

GOLDEN = Path(__file__).parents[1] / "golden" / "pixels"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_MEAN, IMAGENET_STD = IMAGENET


class Recorded:
    """A recorded case: settings and tensors. Wide tensors hold their first 24 columns; clips are stored as bytes."""

    def __init__(self, name: str) -> None:
        metadata, self.tensors = read_recorded(GOLDEN / f"{name}.safetensors")
        self.settings = json.loads(metadata["config"])
        mae_st = self.settings["kind"].startswith("mae_st")
        mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in ((MAE_ST_MEAN, MAE_ST_STD) if mae_st else IMAGENET))
        for key, value in self.tensors.items():
            if value.dtype == torch.uint8:
                self.tensors[key] = (value / 255 - mean) / std

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def model(self) -> nn.Module:
        given = self.settings
        load = "finetune-load" in given["kind"]
        sizes = {
            "image_size": given["image"],
            "patch_size": given["patch"],
            "frames": given["frames"],
            "width": given["enc_width"],
            "depth": given["enc_depth"],
            "heads": given["enc_heads"],
            "decoder_width": given["dec_width"],
            "decoder_depth": given["dec_depth"],
            "decoder_heads": given["dec_heads"],
        }
        if given["kind"].startswith("mae_st"):
            options = {
                "tubelet_size": given["t_patch"],
                "target_frames": given["pred_t_dim"],
                "class_token": given["cls_embed"],
                "separable_positions": given["sep_pos_embed"],
                "qkv_bias": not given["no_qkv_bias"],
                "normalise_targets": given["norm_pix_loss"],
            }
            config = MaeStConfig(**sizes, **options)
            model: nn.Module = MaeStClassifier(config, given["num_classes"]) if load else MaeSt(config)
        else:
            kind = {"adamae": AdaMae}.get(given["kind"], VideoMae)
            model = kind(VideoMaeConfig(**sizes, tubelet_size=given["tubelet"]))
        if load:
            return model
        model.load_state_dict(self.part("model."))
        return model


def shown(mask: Tensor) -> Tensor:
    """The ids [B, n] of the visible tokens of a recorded mask, which is True where hidden."""
    return (~mask).nonzero()[:, 1].view(len(mask), -1)


def step(model: nn.Module, clip: Tensor, mask: Tensor, decode_mask: Tensor | None = None) -> Reconstruction:
    if isinstance(model, MaeSt):
        return mae_st_step(model, model.config, clip, shown(mask))
    decoded = None if decode_mask is None else shown(decode_mask)
    return videomae_step(model, model.config, clip, shown(mask), decoded)


def assert_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Relative norm within 1e-4; gradients of key biases are rounding noise, as softmax cancels the biases."""
    parameters = dict(model.named_parameters())
    for name, grad in expected.items():
        if "attn.k.bias" not in name:
            assert float((parameters[name].grad - grad).norm() / grad.norm()) < 1e-4, name


@pytest.mark.parametrize("name", ["videomae_pretrain", "videomaev2_pretrain", "mae_st_recipe", "mae_st_variant"])
def test_losses_predictions_and_gradients(name):
    case = Recorded(name)
    model, tensors = case.model(), case.tensors
    out = step(model, tensors["clip"], tensors["mask"], tensors.get("decode_mask"))
    out.loss.backward()
    assert abs(float(out.loss.detach() - tensors["loss"])) < 1e-5
    assert_gradients(model, case.part("grad."))
    visible = tensors.get("ids_keep", shown(tensors["mask"]))  # MAE-ST's recorded order is that of its draw
    assert (model.encode(tensors["clip"], visible) - tensors["enc_out"]).abs().max() < 1e-5
    if "pred" in tensors:
        every = isinstance(model, MaeSt)
        predictions = model(tensors["clip"], visible) if every else out.predictions
        assert (predictions[..., :24] - tensors["pred"]).abs().max() < 1e-5


def test_decoder_sees_visible_tokens_first_and_then_mask_tokens():
    case = Recorded("videomaev2_pretrain")
    model, tensors = case.model(), case.tensors
    visible, decoded = shown(tensors["mask"]), shown(tensors["decode_mask"])
    found = model.decoder_input(model.encode(tensors["clip"], visible), visible, decoded)
    assert (found - tensors["dec_in"]).abs().max() < 1e-5


def test_running_cells_and_uneven_masks_average_over_the_batch():
    case = Recorded("videomaev2_pretrain")
    names = {key.rsplit(".", 1)[0] for key in case.tensors if key.startswith("case.")}
    assert len(names) >= 6
    for name in sorted(names):
        model, given = case.model(), case.part(f"{name}.")
        out = step(model, case.tensors["clip"], given["mask"], given["decode_mask"])
        out.loss.backward()
        assert abs(float(out.loss.detach() - given["loss"])) < 1e-5, name
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
        assert float(norm / given["grad_norm"]) == pytest.approx(1, abs=1e-4), name


def test_targets_of_videomae():
    case = Recorded("videomae_pretrain")
    tensors = case.tensors
    hidden = hidden_ids(shown(tensors["mask"]), tensors["mask"].shape[1])
    assert torch.equal(hidden, tensors["mask"].nonzero()[:, 1].view(len(hidden), -1))
    given = (tensors["clip"], hidden, case.settings["patch"], case.settings["tubelet"])
    targets = pixel_targets(*given, "channel", 1e-6, False, IMAGENET_STD, IMAGENET_MEAN)
    assert (targets[..., :24] - tensors["targets"]).abs().max() < 1e-4
    plain = pixel_targets(*given, "none", 1e-6, False, IMAGENET_STD, IMAGENET_MEAN)
    assert (plain[:, 0, :24] - tensors["targets_unnormalised_token0"][:, :24]).abs().max() < 1e-5


def test_head_leaves_out_tokens_that_are_not_scored():
    case = Recorded("videomaev2_pretrain")
    model, tensors = case.model(), case.tensors
    visible, decoded = shown(tensors["mask"]), shown(tensors["decode_mask"])
    both = (~tensors["mask"] & ~tensors["decode_mask"]).sum(1)
    assert len(both.unique()) == 1
    overlap = int(both[0])
    assert overlap > 0
    weighted = videomae_step(model, model.config, tensors["clip"], visible, decoded)
    lean = videomae_step(model, model.config, tensors["clip"], visible, decoded, overlap)
    assert lean.predictions.shape[1] == weighted.predictions.shape[1] - overlap
    assert abs(float(lean.loss.detach() - weighted.loss.detach())) < 1e-6


@pytest.mark.parametrize("name", ["videomae_adamw5", "videomaev2_adamw5", "mae_st_adamw5"])
def test_five_steps_of_adamw(name):
    case = Recorded(name)
    model, given = case.model(), case.settings
    no_decay = set(given["no_decay"])
    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [parameters[key] for key in parameters if key not in no_decay],
            "weight_decay": given["weight_decay"],
        },
        {"params": [parameters[key] for key in parameters if key in no_decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=given["betas"], eps=given["eps"])
    for number, rate in enumerate(case.tensors["lr"].tolist()):
        batch = case.part(f"step{number}.")
        out = step(model, batch["clip"], batch["mask"], batch.get("decode_mask"))
        out.loss.backward()
        assert abs(float(out.loss.detach() - case.tensors["losses"][number])) < 1e-5
        norm = nn.utils.clip_grad_norm_(model.parameters(), given["clip_grad"] or math.inf)
        assert float(norm / case.tensors["grad_norms"][number]) == pytest.approx(1, abs=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for key, value in case.part("final.").items():
        tolerance = 1e-4 if "attn.k.bias" in key else 2e-6  # key biases are driven by rounding noise
        assert (parameters[key] - value).abs().max() < tolerance, key


def test_sampling_network_of_adamae():
    case = Recorded("adamae")
    model, tensors = case.model().eval(), case.tensors  # evaluation: recorded without dropout
    out = adamae_step(model, model.config, tensors["clip"], 16, tensors["visible"])
    out.loss.backward()
    assert (out.probabilities - tensors["probs"]).abs().max() < 1e-6
    assert torch.equal(out.visible, tensors["visible"].sort(1).values)
    assert (out.predictions[..., :24] - tensors["pred"]).abs().max() < 1e-5
    for name in ("loss", "reconstruction", "sampling"):
        recorded = tensors["loss" if name == "loss" else f"loss_{name}"]
        assert abs(float(getattr(out, name).detach() - recorded)) < 1e-5 * float(recorded.abs())
    noise = ("get_token_probs.1.bias", "get_token_probs.0.mlp.fc2.bias")  # softmax cancels them
    assert_gradients(model, {key: grad for key, grad in case.part("grad.").items() if not key.endswith(noise)})
    drawn = adamae_step(model, model.config, tensors["clip"], 16, generator=torch.Generator().manual_seed(0))
    assert drawn.visible.shape == (2, 16)
    assert all(len(row.unique()) == 16 for row in drawn.visible)


@pytest.mark.parametrize(
    ("name", "top_key", "prefix"),
    [
        ("videomae_finetune_load", "model", ""),
        ("videomae_finetune_load", "module", "_orig_mod."),
        ("videomaev2_finetune_load", "module", ""),  # a compiled model: the recorded keys begin with `_orig_mod.`
        ("mae_st_finetune_load", "model_state", ""),
    ],
)
def test_pretrained_files_load_into_classifiers(name, top_key, prefix):
    case = Recorded(name)
    given, tensors = case.settings, case.tensors
    result = case.part("result.")
    if name == "mae_st_finetune_load":
        model = case.model()
    else:
        sizes = (given["image"], given["patch"], given["tubelet"], given["frames"])
        config = ClassifierConfig(
            *sizes, given["enc_width"], given["enc_depth"], given["enc_heads"], given["num_classes"], positions="direct"
        )
        model = VideoClassifier(config)
    fresh = {key: result[key] for key in given["left_at_init"]}  # what the recorder left as it was built
    if "head_reinit" in given:
        fresh["head.weight"] = result["head.weight"]
    model.load_state_dict(fresh, strict=False)
    source = {prefix + key: value for key, value in case.part("source.").items()}
    report = load_classifier(model, {top_key: source})
    assert set(report.missing) == set(fresh)
    state = model.state_dict()
    assert set(state) == set(result)
    assert all(torch.equal(state[key], result[key]) for key in result)
    assert (model.eval()(tensors["clip"]) - tensors["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["videomae_pretrain", "mae_st_recipe"])
def test_uint8_clips_and_normalised_ones_agree(name):
    model = Recorded(name).model()
    config = model.config
    pixels = torch.randint(0, 256, (2, config.frames, config.image_size, config.image_size, 3), dtype=torch.uint8)
    if isinstance(model, MaeSt):
        clip = ((pixels / 255 - 0.45) / 0.225).permute(0, 4, 1, 2, 3)
    else:
        clip = ((pixels / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 4, 1, 2, 3)
    mask = torch.ones(2, config.tokens, dtype=torch.bool)
    mask[:, ::5] = False
    one, two = step(model, pixels, mask), step(model, clip, mask)
    assert abs(float(one.loss.detach() - two.loss.detach())) < 1e-4
    assert (one.predictions - two.predictions).abs().max() < 1e-4


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", [VideoMaeConfig, MaeStConfig])
def test_exact_predictions_restore_the_clip(kind, normalise):
    """Tokens that are neither visible nor predicted are grey."""
    other = {"target_frames": 4} if kind is MaeStConfig else {}
    config = kind(32, 8, 2, 8, 16, 1, 1, 8, 1, 1, normalise_targets=normalise, **other)
    clip = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    visible = torch.arange(0, 64, 4).expand(2, -1)
    scored = hidden_ids(visible, 64)[:, 5:]
    shown = clip[:, config.target_frame_ids] if kind is MaeStConfig else clip
    over, scale, shift = "channel" if normalise else "none", (1 / 255,) * 3, (0.0,) * 3
    if kind is MaeStConfig:
        over = "token" if normalise else "none"
        scale, shift = (1 / 255 / 0.225,) * 3, (-2.0,) * 3
    predictions = pixel_targets(shown, scored, 8, len(shown[0]) // 4, over, 0.0, False, scale, shift)
    restored = restore(config, clip, Reconstruction(torch.zeros(()), predictions, scored, visible))
    cells = (restored.int() - shown.int()).abs().unflatten(1, (4, -1)).unflatten(3, (4, 8)).unflatten(5, (4, 8))
    error = cells.amax((2, 4, 6, 7)).flatten(1)  # of each token
    grey = torch.ones(64, dtype=torch.bool)
    grey[visible[0]] = grey[scored[0]] = False
    assert (error[:, ~grey] <= 1).all()
    pixels = restored.unflatten(1, (4, -1)).unflatten(3, (4, 8)).unflatten(5, (4, 8)).permute(0, 1, 3, 5, 2, 4, 6, 7)
    assert grey.sum() == 5
    assert (pixels.flatten(1, 3)[:, grey] == 128).all()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiles_to_one_graph_and_recomputes(recompute):
    case = Recorded("videomaev2_pretrain")
    model, tensors = case.model(), case.tensors
    visible, decoded = shown(tensors["mask"]), shown(tensors["decode_mask"])
    expected = videomae_step(model, model.config, tensors["clip"], visible, decoded)
    model.set_recompute(recompute)
    if recompute == "none":
        model.compile(fullgraph=True, dynamic=False, backend="eager")
    out = videomae_step(model, model.config, tensors["clip"], visible, decoded)
    assert (out.predictions - expected.predictions).abs().max() < 1e-6
    out.loss.backward()
    assert_gradients(model, case.part("grad."))


def test_target_frames_of_the_published_recipe():
    assert MaeStConfig().target_frame_ids == [0, 2, 4, 6, 8, 10, 12, 15]


def test_sizes_of_the_giant_model():
    config = VideoMaeConfig(
        patch_size=14, width=1408, depth=40, heads=16, decoder_width=512, decoder_heads=8, mlp_width=6144
    )
    assert (config.tokens, config.decoder_mlp_width) == (2048, 2234)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (VideoMaeConfig, {"decoder_heads": 7}, "decoder_width = 384 is not a positive multiple of decoder_heads = 7"),
        (VideoMaeConfig, {"decoder_depth": 0}, "decoder_depth = 0"),
        (VideoMaeConfig, {"drop_path": 1.0}, "drop_path = 1.0"),
        (MaeStConfig, {"target_frames": 12}, "target_frames = 12"),
        (MaeStConfig, {"target_frames": 32}, "target_frames = 32 is more than frames = 16"),
    ],
)
def test_impossible_settings_are_refused(kind, settings, words):
    with pytest.raises(ConfigError) as caught:
        kind(**settings)
    assert words in str(caught.value)

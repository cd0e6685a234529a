"""Fine-tuning of masked autoencoders: their recipes row by row, and their files through train.finetune."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from train import evaluate, finetune
from umt_fast.config import (
    AugmentConfig,
    ClassifierConfig,
    ComputeConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    InitConfig,
    LabelledDataConfig,
    MaeStConfig,
    MixConfig,
    RunConfig,
    TestConfig,
    VideoMaeConfig,
)
from umt_fast.models.pixels import MaeSt, VideoMae
from umt_fast.recipe import load_recipe
from umt_fast.run.world import World
from umt_fast.weights import WeightsError, read_model, write_weights

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))
MODELS = {
    "s16": (384, 12, 6, 16, None),
    "b16": (768, 12, 12, 16, None),
    "l16": (1024, 24, 16, 16, None),
    "h16": (1280, 32, 16, 16, None),
    "g14": (1408, 40, 16, 14, 6144),
}
# As published: rate for 256 videos, GPUs, videos per GPU, clips per video, epochs, classes; layer decay, drop path,
# head dropout, min_lr, weight decay and clipping if they differ from 0.75, 0.1, 0, 1e-6, 0.05 and none.
PUBLISHED = {
    "videomae_s16_k400": ((5e-4, 32, 12, 2, 150, 400), {}),
    "videomae_b16_k400": ((1e-3, 64, 8, 1, 100, 400), {}),
    "videomae_b16_e1600_k400": ((5e-4, 64, 6, 2, 75, 400), {}),
    "videomae_l16_k400": ((2e-3, 64, 2, 2, 35, 400), {}),
    "videomae_h16_k400": ((1e-3, 64, 8, 2, 50, 400), {"drop_path": 0.2, "head": 0.5, "min_lr": 1e-5}),
    "videomae_s16_ssv2": ((1e-3, 32, 12, 2, 40, 174), {"decay": 0.7}),
    "videomae_b16_ssv2": ((5e-4, 64, 8, 1, 50, 174), {}),
    "videomae_b16_e2400_ssv2": ((5e-4, 64, 6, 2, 30, 174), {}),
    "videomae_b16_ucf101": (
        (5e-4, 8, 16, 2, 100, 101),
        {"decay": 0.7, "drop_path": 0.2, "head": 0.5, "min_lr": 1e-5},
    ),
    "videomaev2_b16_k400": ((7e-4, 32, 16, 1, 90, 400), {}),
    "videomaev2_b16_k710": ((7e-4, 32, 16, 2, 90, 710), {}),
    "videomaev2_b16_ssv2": ((2e-3, 16, 16, 1, 25, 174), {"decay": 0.65}),
    "videomaev2_l16_k400": ((2e-3, 32, 6, 1, 35, 400), {"drop_path": 0.2}),
    "videomaev2_l16_ssv2": ((5e-4, 32, 6, 1, 20, 174), {"drop_path": 0.2}),
    **{
        f"videomaev2_h16_k{k}": ((1e-3, 32, 4, 1, 40, k), {"drop_path": 0.2, "head": 0.5, "decay": 0.8})
        for k in (400, 600, 710)
    },
    "videomaev2_h16_ssv2": ((5e-4, 32, 4, 1, 20, 174), {"drop_path": 0.2, "decay": 0.8}),
    "videomaev2_g14_k710": (
        (1e-3, 32, 3, 2, 35, 710),
        {"drop_path": 0.3, "decay": 0.9, "weight_decay": 0.1, "clip": 5.0},
    ),
    "videomaev2_g14_direct_k400": ((1e-3, 64, 3, 2, 30, 400), {"drop_path": 0.2, "decay": 0.9, "weight_decay": 0.1}),
    **{
        f"videomaev2_g14_k{k}": (
            (1e-5, 32, 3, 2, 3, k),
            {"drop_path": 0.25, "decay": 0.9, "weight_decay": 0.1, "warm_up": 1},
        )
        for k in (400, 600)
    },
    "videomaev2_g14_ssv2": ((3e-4, 32, 3, 2, 20, 174), {"drop_path": 0.25, "decay": 0.9}),
    "videomaev2_g14_ucf101": ((1e-3, 8, 3, 2, 50, 101), {"drop_path": 0.35, "head": 0.5, "decay": 0.9}),
    "videomaev2_g14_hmdb51": ((5e-4, 8, 3, 2, 15, 51), {"drop_path": 0.35, "head": 0.5, "decay": 0.9, "rate": 2}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_videomae(name):
    (rate, gpus, videos, clips, epochs, classes), other = PUBLISHED[name]
    recipe = load_recipe(FinetuneConfig, finetune.RECIPES / f"{name}.toml")
    model, optim, data, test = recipe.classifier, recipe.optim, recipe.data, recipe.test
    sizes = (model.width, model.depth, model.heads, model.patch_size, model.mlp_width)
    assert sizes == MODELS[name.split("_")[1]]
    assert (model.frames, model.tubelet_size, model.image_size, model.positions) == (16, 2, 224, "direct")
    assert (model.num_classes, data.crops_per_clip, optim.batch_size) == (classes, clips, videos * clips)
    step = optim.batch_size * gpus / 256  # ours count clips, the published rates videos
    scale = videos * gpus / 256
    assert optim.lr * step == pytest.approx(rate * scale)
    assert optim.min_lr * step == pytest.approx(other.get("min_lr", 1e-6) * scale)
    assert optim.warmup_lr * step == pytest.approx(1e-6 * scale)
    assert (optim.epochs, optim.warmup_epochs) == (epochs, other.get("warm_up", 5))
    assert (optim.layer_decay, model.drop_path) == (other.get("decay", 0.75), other.get("drop_path", 0.1))
    assert (model.head_dropout, optim.weight_decay) == (other.get("head", 0), other.get("weight_decay", 0.05))
    assert (optim.clip_grad, optim.betas, recipe.init.scale) == (other.get("clip"), (0.9, 0.999), 0.001)
    assert recipe.mix == MixConfig(mixup=0.8, cutmix=1.0, switch=0.5, smoothing=0.1)
    ssv2 = name.endswith("ssv2")
    assert recipe.augment == AugmentConfig(operations=4, magnitude=7, erase=0.25, flip=0.0 if ssv2 else 0.5)
    if ssv2:
        assert (data.rule, test.segments, test.crops) == ("segment", 2, 3)
    else:
        assert (data.rule, data.rate, test.segments, test.crops) == ("strided", other.get("rate", 4), 5, 3)


def test_recipe_of_mae_st():
    names = {path.stem for path in finetune.RECIPES.glob("*mae*.toml")}
    assert names == {*PUBLISHED, "mae_st_l16_k400"}
    recipe = load_recipe(FinetuneConfig, finetune.RECIPES / "mae_st_l16_k400.toml")
    model, optim, data = recipe.classifier, recipe.optim, recipe.data
    assert (model.architecture, model.width, model.depth, model.heads) == ("mae_st", 1024, 24, 16)
    assert (model.frames, model.tubelet_size, model.drop_path, model.head_dropout) == (16, 2, 0.2, 0.3)
    assert (optim.lr, optim.epochs, optim.warmup_epochs, optim.layer_decay) == (2.4e-3, 50, 5, 0.75)
    assert (optim.clip_grad, optim.min_lr, optim.warmup_lr, optim.repeat_peak) == (5.0, 0.0, 0.0, False)
    assert (data.crops_per_clip, data.rule, data.fps) == (2, "dense", 7.5)
    assert (recipe.augment.operations, recipe.augment.magnitude) == (2, 7)


SIZES = {"image_size": 32, "patch_size": 16, "frames": 4, "tubelet_size": 2, "width": 32, "depth": 2, "heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture
def config(demo_videos: Path, tmp_path: Path) -> FinetuneConfig:
    paths = [line.rpartition(",")[0] for line in demo_videos.read_text().splitlines()]
    listed = tmp_path / "list.csv"
    listed.write_text("".join(f"{path},{number % 2}\n" for number, path in enumerate(paths)))
    return FinetuneConfig(
        classifier=ClassifierConfig(**SIZES, num_classes=2, positions="direct", head_dropout=0.3, drop_path=0.2),
        init=InitConfig(checkpoint=f"{tmp_path / 'init.pth'}"),
        data=LabelledDataConfig(train=f"{listed}", test=f"{listed}", workers=0, rule="dense"),
        augment=AugmentConfig(mode="fast"),
        optim=FinetuneOptimConfig(epochs=2, warmup_epochs=0.5, batch_size=4, lr=6.4e-2),
        test=TestConfig(segments=2, crops=1, clips_per_pass=4),
        compute=ComputeConfig(precision="fp32", attention="sdpa"),
        run=RunConfig(dir=str(tmp_path), name="run", log_every=2),
    )


def of_architecture(config: FinetuneConfig, kind: str) -> tuple[FinetuneConfig, torch.nn.Module]:
    """The config for a file of a kind of autoencoder, and the autoencoder."""
    if kind != "mae_st":
        return config, VideoMae(VideoMaeConfig(**SIZES, **DECODER))
    sizes = ClassifierConfig(**SIZES, num_classes=2, architecture="mae_st", head_dropout=0.3, drop_path=0.2)
    return dataclasses.replace(config, classifier=sizes), MaeSt(MaeStConfig(**SIZES, **DECODER, target_frames=2))


@pytest.mark.parametrize("kind", ["videomae", "mae_st"])
def test_a_pretrained_file_is_fine_tuned_resumed_and_tested(config, kind, tmp_path, capsys):
    config, pretrained = of_architecture(config, kind)
    write_weights(tmp_path / "init.pth", pretrained.state_dict())
    cut_run = RunConfig(dir=str(tmp_path), name="cut")
    assert finetune.train(config, ALONE)
    assert "tensors from" in capsys.readouterr().out
    assert finetune.train(dataclasses.replace(config, run=dataclasses.replace(cut_run, stop_at=2)), ALONE)
    assert finetune.train(dataclasses.replace(config, run=cut_run), ALONE)
    whole, cut = (read_model(tmp_path / name / "best.pth")[0] for name in ("run", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    if kind == "mae_st":
        assert {"norm.weight", "pos_embed_spatial", "cls_token"} <= whole.keys()
    else:
        assert "fc_norm.weight" in whole
    arguments = ["--checkpoint", f"{tmp_path / 'run' / 'best.pth'}", "--data.test", config.data.test]
    arguments += ["--data.workers", "0", "--test.segments", "2", "--test.crops", "1", "--compute.precision", "fp32"]
    evaluate.main([*arguments, "--run.dir", str(tmp_path), "--run.name", "evaluated"])
    reports = [np.load(found) for found in sorted(tmp_path.glob("*/**/predictions.npz"))]
    assert len(reports) == 3  # of both runs and of the evaluation
    assert all(np.abs(report["probabilities"] - reports[0]["probabilities"]).max() < 1e-6 for report in reports)


def test_files_of_another_architecture_are_refused(config, tmp_path):
    _, mae_st = of_architecture(config, "mae_st")
    write_weights(tmp_path / "init.pth", mae_st.state_dict())
    with pytest.raises(WeightsError, match=r"not in the file, gets new values: blocks\.0\.attn\.q_bias"):
        finetune.train(config, ALONE)

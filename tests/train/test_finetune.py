"""Fine-tuning from labelled videos to a tested classifier: exact, resumable, and the same on several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import start_ranks

pytest.importorskip("av")

from train import evaluate, finetune, finetune_validation
from umt_fast import ClassifierConfig, StudentConfig, VideoClassifier, VideoStudent
from umt_fast.config import (
    AugmentConfig,
    ComputeConfig,
    ConfigError,
    FinetuneConfig,
    FinetuneOptimConfig,
    InitConfig,
    LabelledDataConfig,
    MixConfig,
    RunConfig,
    TestConfig,
)
from umt_fast.data.labels import LabelError
from umt_fast.errors import RunError
from umt_fast.evaluation.classification import Scores
from umt_fast.recipe import load_recipe
from umt_fast.run import world as processes
from umt_fast.run.world import World
from umt_fast.weights import WeightsError, read_model, write_weights

pytestmark = pytest.mark.usefixtures("one_thread")

MATH = ComputeConfig(precision="fp32", attention="math")
SIZES = {"image_size": 32, "patch_size": 16, "frames": 2, "width": 32, "depth": 2, "heads": 2}
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def lists(demo_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv of eight videos in two classes, and val.csv of three of them and one unreadable file."""
    folder = tmp_path_factory.mktemp("lists")
    paths = [line.rpartition(",")[0] for line in demo_videos.read_text().splitlines()]
    lines = [f"{path},{'spin' if number % 2 else 'orbit'}\n" for number, path in enumerate(paths)]
    (folder / "train.csv").write_text("".join(lines))
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "val.csv").write_text("".join([*lines[:3], f"{folder / 'bad.mp4'},spin\n"]))
    return folder


@pytest.fixture
def config(lists: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        classifier=ClassifierConfig(**SIZES, num_classes=2, drop_path=0.2),
        data=LabelledDataConfig(
            train=f"{lists}/train.csv",
            validation=f"{lists}/val.csv",
            test=f"{lists}/val.csv",
            workers=0,
            crops_per_clip=2,
        ),
        augment=AugmentConfig(mode="fast"),
        optim=FinetuneOptimConfig(epochs=2, warmup_epochs=0.5, batch_size=4, lr=6.4e-2, ema_decay=0.9),
        test=TestConfig(segments=2, crops=2, clips_per_pass=4),
        compute=ComputeConfig(precision="fp32", attention="sdpa"),
        run=RunConfig(dir=str(tmp_path), name="run", log_every=2, save_every=3),
    )


def change(config: FinetuneConfig, section: str, **values) -> FinetuneConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def weights_of(config: FinetuneConfig) -> dict[str, torch.Tensor]:
    """Weights of the last checkpoint, including the moving average's."""
    path = max((config.run.folder / "checkpoints").glob("*.pth"))
    content = torch.load(path, weights_only=True)
    average = {f"average.{key}": value for key, value in content.get("average", {}).items()}
    return {**content["model"], **average}


@pytest.mark.parametrize("mode", ["published", "fast", "none"])
def test_a_resumed_run_is_the_undisturbed_one_to_a_bit(config, mode):
    config = change(config, "augment", mode=mode)
    assert finetune.train(config, ALONE)
    whole = weights_of(config)
    cut = change(config, "run", name="cut")
    assert finetune.train(change(cut, "run", name="cut", stop_at=3), ALONE)
    assert finetune.train(cut, ALONE)
    assert (cut.run.folder / "checkpoints").is_dir()
    resumed = weights_of(cut)
    assert resumed.keys() == whole.keys()
    assert any(key.startswith("average.") for key in whole)
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
    start = VideoClassifier(config.classifier)
    assert not torch.equal(whole["blocks.0.mlp.fc1.weight"], start.blocks[0].mlp.fc1.weight)
    best = [torch.load(run.run.folder / "best.pth", weights_only=True) for run in (config, cut)]
    assert best[0]["step"] == best[1]["step"]
    assert best[0]["top1"] == best[1]["top1"]


def test_a_validation_missed_by_a_stop_runs_at_the_next_start(config, monkeypatch):
    """After a signal in the last step of the last epoch, the next start validates, writes best.pth and tests."""
    with monkeypatch.context() as patch:
        patch.setattr(finetune.StopSignal, "requested", lambda _: job_steps.append(1) or len(job_steps) == 8)
        job_steps: list[int] = []
        patch.setattr(finetune.Validation, "test", lambda *_: None)
        finetune.train(config, ALONE)
    content = torch.load(max((config.run.folder / "checkpoints").glob("*.pth")), weights_only=True)
    assert content["schedule"]["validated"] == 4
    before = torch.load(config.run.folder / "best.pth", weights_only=True)["step"]
    assert before == 4
    (config.run.folder / "best.pth").unlink()
    monkeypatch.setattr(finetune_validation, "score", lambda *_: Scores(3, 100.0, 100.0, 100.0, 0.0))
    finetune.train(config, ALONE)
    assert torch.load(config.run.folder / "best.pth", weights_only=True)["step"] == 8
    assert (config.run.folder / "test" / "test.json").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_saves_and_stops_the_run(config, monkeypatch, number):
    real, updates = finetune.update, iter(range(2))

    def update(*given):
        if next(updates, None) == 1:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # until the watching thread has read it
        return real(*given)

    monkeypatch.setattr(finetune, "update", update)
    assert not finetune.train(change(config, "run", save_every=100), ALONE)
    assert torch.load(next((config.run.folder / "checkpoints").glob("*")), weights_only=True)["clips_seen"] == 8


def test_checkpoints_by_the_clock_and_a_folder_that_is_removed_meanwhile(config, monkeypatch):
    config = change(config, "run", save_minutes=0.0, save_every=100, log_every=1, keep=9, stop_at=4)
    real, updates = finetune.update, iter(range(2))

    def update(*given):
        if next(updates, None) == 1:
            shutil.rmtree(config.run.folder)
        return real(*given)

    monkeypatch.setattr(finetune, "update", update)
    assert finetune.train(config, ALONE)
    assert [path.name for path in sorted((config.run.folder / "checkpoints").glob("*"))] == [
        f"clips_{n:010d}.pth" for n in (8, 12, 16)
    ]
    assert (config.run.folder / finetune_validation.BEST).exists()


def test_a_resumed_run_lists_an_attention_that_changed(config, capsys):
    assert finetune.train(change(config, "run", stop_at=1), ALONE)
    assert finetune.train(dataclasses.replace(change(config, "run", stop_at=2), compute=MATH), ALONE)
    said = capsys.readouterr().out
    assert "note: compute.attention was sdpa when it was saved, now math" in said
    assert "note: attention of classifier was sdpa when it was saved, now math" in said


def test_a_run_leaves_its_report_and_best_weights(config, capsys):
    finetune.train(config, ALONE)
    folder = config.run.folder
    assert (folder / "classes.txt").read_text() == "orbit\nspin\n"
    content = json.loads((folder / "test" / "test.json").read_text())
    assert content["videos"] == 3
    assert content["unreadable"][0]["row"] == 4
    assert "validation after step 4" in capsys.readouterr().out
    state, settings = read_model(folder / "best.pth")
    assert settings["classes"] == ["orbit", "spin"]
    assert all(value.isfinite().all() for value in state.values())
    arguments = ["--checkpoint", f"{folder / 'best.pth'}", "--data.test", config.data.test, "--data.workers", "0"]
    arguments += ["--compute.precision", "fp32", "--run.dir", config.run.dir, "--test.clips-per-pass", "4"]
    evaluate.main(arguments)
    assert "the checkpoint's classes" not in capsys.readouterr().out
    again = np.load(Path(config.run.dir) / "evaluate" / "predictions.npz")
    before = np.load(folder / "test" / "predictions.npz")
    assert np.allclose(again["probabilities"], before["probabilities"], atol=1e-6)
    assert again["path"].tolist() == before["path"].tolist()
    numbered = Path(config.run.dir) / "numbered.csv"
    numbered.write_text("".join(f"{path},1\n" for path in before["path"]))
    evaluate.main([*arguments, "--data.test", str(numbered)])
    assert "taken for the checkpoint's classes: 0 orbit, 1 spin\n" in capsys.readouterr().out


def train_as_a_rank(*configs: FinetuneConfig) -> None:
    torch.set_num_threads(1)
    world = processes.start("cpu")
    for config in configs:
        finetune.train(config, world)
    world.close()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one_on_the_joined_batch_and_test_alike(config, tmp_path: Path, parallel):
    """With FSDP one run is stopped half-way and resumed, and another has a moving average."""
    config = change(config, "mix", mixup=0.0, cutmix=0.0)
    config = change(config, "compute", parallel=parallel)
    if parallel == "fsdp":
        config = change(config, "optim", ema_decay=0.0)
    config = change(config, "classifier", drop_path=0.0)
    alone, two = (change(config, "run", name=name) for name in ("alone", "two"))
    two = change(two, "optim", batch_size=2)
    parts, averaged = [two], []
    if parallel == "fsdp":
        averaged = [change(change(each, "optim", ema_decay=0.9), "run", stop_at=2) for each in (two, alone)]
        averaged = [change(each, "run", name=f"{each.run.name}-average") for each in averaged]
        parts = [change(two, "run", stop_at=5), two, averaged[0]]
    ranks = start_ranks(train_as_a_rank, [parts] * 2)
    for each in (alone, *averaged[1:]):
        finetune.train(each, ALONE)
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output
    for pair in ((alone, two), *([averaged] if averaged else [])):
        one, other = (weights_of(each) for each in pair)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.allclose(other[key], value, rtol=0, atol=1e-6), key
    best = two.run.folder / "best.pth"
    arguments = ["--checkpoint", f"{best}", "--data.test", config.data.test, "--data.workers", "0"]
    arguments += ["--compute.precision", "fp32", "--compute.attention", "sdpa", "--test.clips-per-pass", "4"]
    evaluate.main([*arguments, "--run.dir", f"{tmp_path}"])
    by_two, by_one = (np.load(path / "predictions.npz") for path in (two.run.folder / "test", tmp_path / "evaluate"))
    assert by_two["row"].tolist() == [0, 1, 2]
    assert np.array_equal(by_one["probabilities"], by_two["probabilities"])


def test_starts_from_a_pre_trained_encoder(config, tmp_path: Path):
    student = VideoStudent(StudentConfig(**{**SIZES, "frames": 4}, align_layers=1, target_width=8))
    write_weights(tmp_path / "student.pth", student.state_dict())
    model = VideoClassifier(config.classifier)
    lines = finetune.load_init(model, change(config, "init", checkpoint=f"{tmp_path / 'student.pth'}"))
    assert torch.equal(model.blocks[1].attn.qkv.weight, student.encoder.blocks[1].attn.qkv.weight)
    assert any("gets new values: head.weight" in line for line in lines)
    wider = VideoStudent(StudentConfig(**{**SIZES, "width": 64}, align_layers=1, target_width=8))
    write_weights(tmp_path / "wider.pth", wider.state_dict())
    other = change(config, "init", checkpoint=f"{tmp_path / 'wider.pth'}")
    sizes = "it has 2 blocks of width 64, the model 2 of 32"
    with pytest.raises(
        WeightsError, match=rf"does not fit: {sizes} .*\n.*\[64, 3, 1, 16, 16\] in the file, \[32, 3, 1, "
    ):
        finetune.load_init(model, other)
    finetune.load_init(model, change(other, "init", strict=False))
    with pytest.raises(WeightsError, match=r"no weights at .*none\.pth: no such file or folder\.$"):
        finetune.load_init(model, change(config, "init", checkpoint=f"{tmp_path / 'none.pth'}"))
    with pytest.raises(ConfigError, match="cuda_graph is for pre-training"):
        change(config, "compute", cuda_graph=True)


def test_cuts_a_head_by_the_users_map(config, tmp_path: Path):
    source = VideoClassifier(ClassifierConfig(**SIZES, num_classes=7))
    write_weights(tmp_path / "seven.pth", source.state_dict())
    (tmp_path / "map.json").write_text("[5, 2]")
    init = InitConfig(checkpoint=f"{tmp_path / 'seven.pth'}", class_map=f"{tmp_path / 'map.json'}")
    model = VideoClassifier(config.classifier)
    finetune.load_init(model, dataclasses.replace(config, init=init))
    assert torch.equal(model.head.weight, source.head.weight[[5, 2]])
    for content in ("[1]", '{"a": 1}', "[1, true]", "[", "[1, 2, 3]"):
        (tmp_path / "map.json").write_text(content)
        with pytest.raises(WeightsError, match="class map"):
            finetune.load_init(model, dataclasses.replace(config, init=init))


def test_wrong_lists_end_the_run_before_it_begins(config, lists: Path, tmp_path: Path):
    (tmp_path / "wrong.csv").write_text("a.mp4,orbit\nb.mp4,hop\n")
    with pytest.raises(LabelError, match=r"wrong\.csv, line 2: no class 'hop'"):
        finetune.read_lists(change(config, "data", validation=f"{tmp_path / 'wrong.csv'}"))
    (tmp_path / "gone.csv").write_text("x.mp4,orbit\ny.mp4,spin\n")
    with pytest.raises(RunError, match=r"none of the first 2 files of .*gone\.csv is there"):
        finetune.read_lists(change(config, "data", test=f"{tmp_path / 'gone.csv'}"))
    (tmp_path / "classes.txt").write_text("orbit\nspin\nswim\n")
    with pytest.raises(ConfigError, match=r"has 3 classes, the model 2; give --classifier\.num-classes 3"):
        finetune.read_lists(change(config, "data", classes=f"{tmp_path / 'classes.txt'}"))
    counted, *_ = finetune.read_lists(change(config, "data", classes=f"{tmp_path / 'classes.txt'}", count_classes=True))
    assert counted.classifier.num_classes == 3


def test_a_resumed_run_keeps_what_its_weights_depend_on(config):
    finetune.train(change(config, "run", stop_at=1), ALONE)
    with pytest.raises(RunError, match=r"mix\.mixup = 0\.8, this run has 0\.1"):
        finetune.train(change(config, "mix", mixup=0.1), ALONE)


def test_evaluate_refuses_what_is_not_a_classifier(tmp_path: Path, capsys):
    student = VideoStudent(StudentConfig(**SIZES, align_layers=1, target_width=8))
    write_weights(tmp_path / "student.pth", student.state_dict())
    with pytest.raises(SystemExit, match=r"student\.pth has no head: it is not fine-tuned"):
        evaluate.main(["--checkpoint", f"{tmp_path / 'student.pth'}", "--data.test", "x.csv"])


def test_short_flags():
    given = ["--init", "x.pth", "--init.strict", "false", "--data.count-classes", "True", "--init=y.pth"]
    flags = ["--init.checkpoint", "x.pth", "--init.no-strict", "--data.count-classes", "--init.checkpoint=y.pth"]
    assert finetune.short_flags([*given, "--recipe", "a"]) == [*flags, "--recipe", "a"]


# As the published scripts have them: epochs, warm-up, learning rate that is used on 16 GPUs, layer decay,
# drop path, weight decay, frames, pixels, videos per GPU, clips per video, views, classes.
PUBLISHED = {
    "k710_b16": (35, 2, 4e-4, 0.75, 0.1, 0.05, 8, 224, 16, 2, (4, 3), 710),
    "k710_l16": (20, 2, 2e-4, 0.85, 0.2, 0.05, 8, 224, 16, 2, (4, 3), 710),
    **{f"k{k}_b16": (5, 1, 4e-5, 0.75, 0.1, 0.05, 8, 224, 16, 2, (4, 3), k) for k in (400, 600, 700)},
    **{f"k{k}_l16": (5, 1, 2e-5, 0.85, 0.2, 0.05, 8, 224, 16, 2, (4, 3), k) for k in (400, 600, 700)},
    **{f"k{k}_l16_f16": (5, 1, 1e-5, 0.85, 0.2, 0.05, 16, 224, 8, 2, (4, 1), k) for k in (400, 600, 700)},
    "mit_b16": (40, 5, 2e-4, 0.75, 0.1, 0.05, 8, 224, 32, 1, (4, 3), 339),
    "mit_l16": (20, 5, 2e-4, 0.85, 0.2, 0.05, 8, 224, 32, 1, (4, 3), 339),
    "mit_b16_384": (4, 1, 1e-5, 0.75, 0.1, 0.1, 8, 384, 16, 1, (4, 3), 339),
    "mit_l16_384": (4, 1, 5e-6, 0.85, 0.2, 0.1, 8, 384, 8, 1, (6, 3), 339),
    "ssv2_b16": (30, 5, 4e-4, 0.75, 0.1, 0.05, 8, 224, 16, 2, (2, 3), 174),
    "ssv2_l16": (14, 4, 8e-4, 0.85, 0.2, 0.05, 8, 224, 16, 2, (2, 3), 174),
}


def test_every_recipe_is_the_published_one():
    found = {path.stem for path in finetune.RECIPES.glob("*.toml")}
    assert {name for name in found if "mae" not in name} == {*PUBLISHED, "tiny"}  # the others: test_finetune_pixels.py
    for name, expected in PUBLISHED.items():
        recipe = load_recipe(FinetuneConfig, finetune.RECIPES / f"{name}.toml")
        model, optim, data = recipe.classifier, recipe.optim, recipe.data
        large = "_l16" in name
        assert (model.width, model.depth, model.heads) == ((1024, 24, 16) if large else (768, 12, 12)), name
        rate = optim.lr * 16 * optim.batch_size / 256
        got = (optim.epochs, optim.warmup_epochs, pytest.approx(rate), optim.layer_decay, model.drop_path)
        got += (optim.weight_decay, model.frames, model.image_size, optim.batch_size // data.crops_per_clip)
        got += (data.crops_per_clip, (recipe.test.segments, recipe.test.crops), model.num_classes)
        assert got == expected, name
        segments = name.startswith("ssv2")
        assert (data.rule, recipe.augment.flip) == (("segment", 0) if segments else ("sparse", 0.5)), name
        assert recipe.mix == MixConfig(), name
        assert dataclasses.replace(recipe.augment, flip=0.5) == AugmentConfig(), name
        assert (optim.betas, optim.eps, optim.min_lr, optim.warmup_lr) == ((0.9, 0.999), 1e-8, 1e-6, 1e-6), name
        assert recipe.init.scale == 0.001, name
        assert (model.tubelet_size, optim.clip_grad, optim.ema_decay) == (1, None, 0), name

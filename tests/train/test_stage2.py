"""Stage 2 as a user runs it: pictures and videos by turns, resumed to the bit, fine-tuned, and stopped by bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av")

from train import stage2
from umt_fast import weights
from umt_fast.config import CaptionDataConfig, ComputeConfig, ConfigError, JointConfig, OptimConfig, Stage2Config
from umt_fast.evaluation.video_text import load_model
from umt_fast.recipe import load_recipe
from umt_fast.run.stop import EXIT_STOPPED

ROOT = Path(__file__).parents[2]
WORDS = ("a", "red", "blue", "circle", "square", "star", "that", "spins", "orbits", "bounces")

SMALL = """
bert = "random"
teacher_weights = "random"
[student]
image_size = 32
frames = 2
width = 16
depth = 2
heads = 2
drop_path = 0.2
align_layers = 2
target_width = 8
[teacher]
image_size = 32
width = 16
depth = 2
heads = 2
align_layers = 2
target_width = 8
[text]
width = 16
depth = 3
heads = 2
fusion_layer = 1
vocab_size = 80
max_positions = 40
mlp_width = 32
dropout = 0.1
[joint]
width = 8
[data]
workers = 0
max_words = 10
[optim]
epochs = 2
warmup_epochs = 1
batch_size = 2
lr = 1e-3
min_lr = 1e-5
betas = [0.9, 0.999]
[compute]
precision = "fp32"
attention = "sdpa"
[run]
device = "cpu"
log_every = 1
"""


class Runner:
    """Runs train.stage2 on the small recipe with lists of eight videos and six pictures."""

    def __init__(self, folder: Path, videos: Path) -> None:
        self.folder = folder
        (folder / "small.toml").write_text(SMALL)
        self.paths = [line.split(",")[0] for line in videos.read_text().splitlines()]
        self.videos = self.list_of("videos.json", "video", self.paths)
        pictures = []
        for number in range(6):
            pictures.append(str(folder / f"{number}.png"))
            pixels = np.random.default_rng(number).integers(0, 256, (24, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures[-1])
        self.images = self.list_of("images.json", "image", pictures)

    def list_of(self, name: str, kind: str, paths: list[str], **more: object) -> str:
        rng = np.random.default_rng(len(name))
        entries = [{kind: path, "caption": " ".join(rng.choice(WORDS, 4)), **more} for path in paths]
        (self.folder / name).write_text(json.dumps(entries))
        return str(self.folder / name)

    def arguments(self, name: str, *options: str, images: bool = True) -> list[str]:
        lists = ["--data.videos", self.videos, *(("--data.images", self.images) if images else ())]
        recipe = ["--recipe", str(self.folder / "small.toml"), "--run.dir", str(self.folder), "--run.name", name]
        return [*recipe, *lists, *options]

    def run(self, name: str, *options: str, images: bool = True) -> Path:
        stage2.main(self.arguments(name, *options, images=images))
        return self.folder / name

    def run_two(self, name: str, *options: str) -> Path:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train.stage2"]
        done = subprocess.run(
            [sys.executable, *command, *self.arguments(name, *options)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        return self.folder / name


@pytest.fixture(scope="module")
def runner(tmp_path_factory, demo_videos) -> Runner:
    return Runner(tmp_path_factory.mktemp("stage2"), demo_videos)


@pytest.fixture(scope="module")
def whole(runner, one_thread) -> Path:
    """A whole run: two epochs of 4 batches of videos and 3 of pictures."""
    return runner.run("whole")


def last_checkpoint(folder: Path) -> dict:
    return torch.load(max((folder / "checkpoints").glob("*.pth")), weights_only=True)


def assert_equal(one, two, where=""):
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list):
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where


@pytest.mark.usefixtures("one_thread")
def test_a_stopped_run_goes_on_to_the_same_bits(runner, whole):
    """In the second epoch, after batches of both kinds."""
    runner.run("stopped", "--run.stop-at", "9")
    folder = runner.run("stopped")
    expected, found = last_checkpoint(whole), last_checkpoint(folder)
    for part in ("model", "optimizer", "rng", "schedule"):
        assert_equal(found[part], expected[part], part)
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").open()] for f in (whole, folder)]
    assert len(losses[0]) == 14
    assert losses[0] == losses[1]


def test_two_processes_go_on_to_the_same_bits(runner):
    """And within an epoch: it has 2 batches of videos and 1 of pictures."""
    expected = last_checkpoint(runner.run_two("two"))
    runner.run_two("two_stopped", "--run.stop-at", "2")
    found = last_checkpoint(runner.run_two("two_stopped"))
    for part in ("model", "optimizer", "rng"):
        assert_equal(found[part], expected[part], part)
    assert len(found["rng"]) == 2


def test_kinds_alternate_and_every_list_is_walked_once_an_epoch():
    plan = stage2.Alternation({"image": 3, "video": 5}, seed=1)
    kinds = [plan.kind(step) for step in range(80)]
    for epoch in range(10):
        assert kinds[8 * epoch : 8 * epoch + 8].count("image") == 3
    assert len({tuple(kinds[8 * epoch : 8 * epoch + 8]) for epoch in range(10)}) > 5
    for step in range(80):
        assert plan.count("video", step) == kinds[:step].count("video")
    assert stage2.Alternation({"image": 0, "video": 2}, 0).kind(1) == "video"


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_can_be_fine_tuned_evaluated_and_queried(runner, whole):
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert all(line[loss] > 0 for line in metrics for loss in ("uta", "vtc", "vtm", "mlm"))
    assert metrics[-1]["lr"] >= 1e-5
    checkpoint = max((whole / "checkpoints").glob("*.pth"))
    assert any(key.startswith("clip_teacher.") for key in last_checkpoint(whole)["model"])
    loaded = load_model(checkpoint)
    assert loaded.model.config.vision.heads == 2
    start = ("--init", str(checkpoint), "--optim.epochs", "1")
    tuned = runner.run("tuned", "--job", "retrieval", "--student.frames", "3", *start, images=False)
    assert load_model(max((tuned / "checkpoints").glob("*.pth"))).model.config.vision.frames == 3
    assert (tuned / "vocab.txt").read_text() == (whole / "vocab.txt").read_text()
    metrics = [json.loads(line) for line in (tuned / "metrics.jsonl").open()]
    assert metrics[0]["uta"] == metrics[0]["mlm"] == 0
    questions = runner.list_of("qa.json", "video", runner.paths[:4], question="what spins", answer=["star", "circle"])
    asked = runner.run("asked", "--job", "qa", "--data.videos", questions, *start, images=False)
    model = load_model(max((asked / "checkpoints").glob("*.pth")), answers=True).model
    assert len(model.text_decoder.bert.encoder.layer) == 2


@pytest.mark.usefixtures("one_thread")
def test_a_stage_1_checkpoint_starts_the_video_encoder(runner, capsys, tmp_path):
    from umt_fast import StudentConfig, VideoStudent

    student = VideoStudent(StudentConfig(32, 16, 1, 8, 16, 2, 2, 0.0, 2, 8))
    weights.write_weights(tmp_path / "stage1.pth", weights.umt_state_dict(student))
    folder = runner.run("from_stage1", "--init", str(tmp_path / "stage1.pth"), "--run.stop-at", "1", "--optim.lr", "0")
    model = last_checkpoint(folder)["model"]
    for key, value in student.state_dict().items():
        assert torch.equal(model[f"vision_encoder.{key}"], value), key
    assert f"video encoder: {tmp_path / 'stage1.pth'}" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.usefixtures("one_thread")
def test_a_warning_saves_and_stops_the_run(runner, monkeypatch, number):
    """Also when the run's folder was removed meanwhile."""
    real, updates, name = stage2.clip_gradients, iter(range(2)), f"warned-{number}"

    def clip(*given):
        if next(updates, None) == 1:
            shutil.rmtree(runner.folder / name)
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # until the watching thread has read it
        return real(*given)

    monkeypatch.setattr(stage2, "clip_gradients", clip)
    with pytest.raises(SystemExit) as ended:
        runner.run(name, "--run.save-every", "100")
    assert ended.value.code == EXIT_STOPPED
    assert last_checkpoint(runner.folder / name)["clips_seen"] == 4


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_lists_an_attention_that_changed(runner, capsys):
    runner.run("changed", "--run.stop-at", "1")
    runner.run("changed", "--run.stop-at", "2", "--compute.attention", "math")
    said = capsys.readouterr().out
    assert "note: attention of student was sdpa when it was saved, now math" in said


@pytest.mark.usefixtures("one_thread")
def test_broken_and_missing_files_are_replaced_and_named(runner):
    broken = runner.folder / "broken.mp4"
    broken.write_bytes(b"not a video")
    listed = runner.list_of("broken.json", "video", [*runner.paths, str(broken), "missing.mp4"])
    options = ("--data.videos", listed, "--data.max-bad-fraction", "0.5", "--optim.epochs", "1")
    folder = runner.run("broken", *options, images=False)
    bad = (folder / "bad_files.txt").read_text()
    assert "broken.mp4" in bad
    assert "missing.mp4" in bad


@pytest.mark.usefixtures("one_thread")
def test_captions_of_any_length_are_taken(runner):
    texts = ["", "word " * 10_000, "?!,.", "\U0001f600 \u4e2d", *["a star"] * 4]
    entries = [{"video": path, "caption": text} for path, text in zip(runner.paths, texts, strict=True)]
    (runner.folder / "odd.json").write_text(json.dumps(entries))
    odd = ("--data.videos", str(runner.folder / "odd.json"), "--optim.epochs", "1")
    folder = runner.run("odd", *odd, images=False)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--optim.batch-size", "9"], "6 images, 8 videos do not fill one batch of 9"),
        (["--data.videos", "none.json"], "cannot read none.json"),
        (["--job", "retrieval"], "takes --data.videos alone"),
        (["--job", "qa"], "takes --data.videos alone"),
        (["--init", "none.pth"], "no weights at none.pth"),
        (["--vocabulary", "none.txt"], "cannot read the vocabulary none.txt"),
        (["--bert", "/no/such/bert"], "no folder /no/such/bert"),
        (["--dry-run"], "--dry-run is for train.pretrain"),
    ],
)
def test_settings_that_cannot_run_end_with_a_one_line_error(runner, options, says):
    with pytest.raises(SystemExit, match=says):
        runner.run(f"bad_{abs(hash(tuple(options)))}", *options)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compute": ComputeConfig(cuda_graph=True)}, "cuda_graph is for stage 1"),
        ({"compute": ComputeConfig(parallel="fsdp")}, "stage 2 trains with ddp"),
        ({"optim": OptimConfig(batch_size=1)}, "optim.batch_size = 1: matching needs negatives; use 2 or more"),
        ({"joint": JointConfig(width=0)}, "joint_width = 0 is not 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, says):
    with pytest.raises(ConfigError, match=says):
        Stage2Config(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"max_words": 2}, "max_words = 2"), ({"crops_per_clip": 2}, "stage 2 makes one clip of a video")],
)
def test_data_that_cannot_be_is_named(changes, says):
    with pytest.raises(ConfigError, match=says):
        CaptionDataConfig(**changes)


def test_fine_tuning_without_a_start_is_refused(runner):
    with pytest.raises(SystemExit, match="fine-tunes a stage-2 checkpoint; give it with --init"):
        runner.run("no_start", "--job", "retrieval", images=False)


@pytest.mark.parametrize("path", sorted(stage2.RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_as_published(path):
    config = load_recipe(Stage2Config, path)
    if path.stem == "tiny":
        return
    large = path.stem.endswith("l16")
    assert config.student.width == config.text.width == (1024 if large else 768)
    assert (config.text.depth, config.text.fusion_layer) == ((24, 19) if large else (12, 9))
    assert config.joint.width == (768 if large else 512)
    assert config.text.dropout == 0.1
    assert config.optim.weight_decay == 0.02
    assert config.optim.betas == (0.9, 0.999)
    assert config.optim.min_lr == pytest.approx(config.optim.lr / 100)
    if config.job == "pretrain":
        assert (config.student.frames, config.optim.batch_size, config.optim.epochs) == (4, 128, 10)
        assert config.optim.lr == 1e-4
        assert config.teacher.target_width == config.joint.width
        assert (config.objective.video_mask_ratio, config.objective.image_mask_ratio) == (0.8, 0.5)
    else:
        assert (config.student.frames, config.optim.batch_size) == (12, 32)
        assert (config.data.max_seconds is not None) == ("didemo" in path.stem)
        assert config.data.join_captions == ("didemo" in path.stem or path.stem.startswith("ret_anet"))
        assert config.data.same_caption == ("ssv2" in path.stem)

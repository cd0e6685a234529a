"""Stage 2 as a user runs it: pictures and videos alternate; exact resuming; fine-tuning; errors for bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import stage2_cases
import torch
from stage2_runs import WORDS, Runner, assert_equal, last_checkpoint

pytest.importorskip("av")

from train import stage2, stage2_data, stage2_model
from umt_fast import VideoTextModel, video_text_step, weights
from umt_fast.config import (
    CaptionDataConfig,
    ComputeConfig,
    ConfigError,
    JointConfig,
    OptimConfig,
    Stage2Config,
    TextConfig,
    VideoTextObjective,
)
from umt_fast.data import open_loader
from umt_fast.data.tokens import Tokenizer, make_vocabulary
from umt_fast.evaluation.video_text import load_model
from umt_fast.recipe import load_recipe
from umt_fast.run.stop import EXIT_STOPPED


@pytest.fixture(scope="module")
def runner(tmp_path_factory, demo_videos) -> Runner:
    return Runner(tmp_path_factory.mktemp("stage2"), demo_videos)


@pytest.fixture(scope="module")
def whole(runner, one_thread) -> Path:
    """A whole run: two epochs of 4 batches of videos and 3 of pictures."""
    return runner.run("whole")


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


@pytest.mark.parametrize("left_out", [{"uta"}, {"vtc"}, {"vtm"}, {"mlm"}, {"vtm", "mlm"}, {"vtc", "vtm", "mlm"}])
@pytest.mark.parametrize("teacher", [True, False])
def test_parameters_that_no_loss_reaches_are_frozen(left_out, teacher):
    """Only these: DDP waits for a gradient of every other parameter."""
    config = stage2_cases.SMALL if teacher else replace(stage2_cases.SMALL, teacher=None)
    objective = VideoTextObjective(**dict.fromkeys(left_out, 0.0))
    model = VideoTextModel(config)
    clip = torch.randint(0, 256, (4, 2, 32, 32, 3), dtype=torch.uint8)
    total = video_text_step(model, clip, *stage2_cases.some_texts(4), torch.arange(4), objective=objective).total
    if not total.requires_grad:
        pytest.skip("no loss is left")
    total.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(stage2_model.freeze_unused(model, objective)) == {name for name, p in trained.items() if p.grad is None}


def test_two_processes_go_on_to_the_same_bits(runner):
    """Also within an epoch, which has 2 batches of videos and 1 of pictures."""
    expected = last_checkpoint(runner.run_two("two"))
    runner.run_two("two_stopped", "--run.stop-at", "2")
    found = last_checkpoint(runner.run_two("two_stopped"))
    for part in ("model", "optimizer", "rng"):
        assert_equal(found[part], expected[part], part)
    assert len(found["rng"]) == 2


def test_kinds_alternate_and_every_list_is_read_once_an_epoch():
    plan = stage2_data.Alternation({"image": 3, "video": 5}, seed=1)
    kinds = [plan.kind(step) for step in range(80)]
    for epoch in range(10):
        assert kinds[8 * epoch : 8 * epoch + 8].count("image") == 3
    assert len({tuple(kinds[8 * epoch : 8 * epoch + 8]) for epoch in range(10)}) > 5
    for step in range(80):
        assert plan.count("video", step) == kinds[:step].count("video")
    assert stage2_data.Alternation({"image": 0, "video": 2}, 0).kind(1) == "video"


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
    real, updates, name = stage2.update, iter(range(2)), f"warned-{number}"

    def update(*given):
        if next(updates, None) == 1:
            shutil.rmtree(runner.folder / name)
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # until the watching thread has read it
        return real(*given)

    monkeypatch.setattr(stage2, "update", update)
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
@pytest.mark.parametrize("job", ["pretrain", "retrieval"])
@pytest.mark.usefixtures("one_thread")
def test_a_batch_whose_samples_all_match_trains_on_the_other_losses(runner, whole, job, capsys):
    """For example when a batch holds one video many times, or only captions of one video."""
    listed = runner.list_of("same.json", "video", runner.paths[:1] * 4)
    start = () if job == "pretrain" else ("--init", str(max((whole / "checkpoints").glob("*.pth"))))
    options = ("--job", job, "--data.videos", listed, "--optim.epochs", "1", *start)
    if job == "pretrain":  # there rows of two lists have one number
        one = runner.list_of("one.json", "video", runner.paths[:1])
        options = ("--job", job, "--data.videos", one, one, "--optim.epochs", "1")
    folder = runner.run(f"same_{job}", *options, images=False)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert metrics[0]["vtm"] == 0
    assert metrics[0]["vtc"] > 0
    assert "samples of a batch match each other" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_a_replaced_video_keeps_its_caption_and_in_retrieval_its_number(runner):
    """The published behaviour and its alternative, on batches with one replaced video."""
    from train import stage2_objective
    from umt_fast.recipe import load_recipe

    recipe = load_recipe(Stage2Config, runner.folder / "small.toml")
    listed = runner.list_of("replaced.json", "video", [*runner.paths[:3], "gone.mp4"])
    seen = []

    def record(model, clip, ids, mask, idx, objective):
        seen.append((idx.tolist(), ids))
        raise InterruptedError

    for job, captions in (("pretrain", "published"), ("retrieval", "published"), ("pretrain", "replacement")):
        data = replace(recipe.data, videos=(listed,), replaced_captions=captions)
        config = replace(recipe, job=job, data=data, optim=replace(recipe.optim, batch_size=4))
        lists, _ = stage2_data.read_lists(config)
        tokenizer = Tokenizer(make_vocabulary(WORDS))
        streams = {"video": stage2_data.make_stream(config, "video", lists["video"].videos)}
        with open_loader(streams["video"], torch.device("cpu"), start=0, batches=1, batch_size=4) as loader:
            batch = next(loader)
        model = torch.nn.Linear(1, 1)
        objective = stage2_objective.make_objective(config, model, tokenizer, lists, streams, False, print)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage2_objective, "video_text_step", record)
            with pytest.raises(InterruptedError):
                objective("video", batch)
        asked = [next(streams["video"].attempts(visit))[0] for visit in batch.visits]
        assert asked != batch.rows
        videos = lists["video"].videos
        shown = [videos[row].caption for row in (asked if captions == "published" else batch.rows)]
        assert torch.equal(seen[-1][1], tokenizer(shown, config.data.max_words)[0])
        assert seen[-1][0] == (asked if job == "retrieval" else batch.rows)


@pytest.mark.usefixtures("one_thread")
def test_the_log_has_time_and_mfu_of_each_kind(whole, runner, capsys):
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert all(line["mfu"] > 0 and line["step_ms"] > 0 for line in metrics)
    folder = runner.run("kinds", "--run.log-every", "7", "--optim.epochs", "1")
    (line,) = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert line["image_ms"] > 0
    assert line["video_mfu"] > 0
    assert "image ms" in capsys.readouterr().out


def test_captions_of_any_length_are_accepted(runner):
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
        (["--job", "retrieval"], "takes only --data.videos"),
        (["--job", "qa"], "takes only --data.videos"),
        (["--init", "none.pth"], "no weights at none.pth"),
        (["--vocabulary", "none.txt"], "cannot read the vocabulary none.txt"),
        (["--bert", "/no/such/bert"], "no folder /no/such/bert"),
        (["--dry-run"], "--dry-run is for train.pretrain"),
        (["--data.videos", "gone.json=/no/such/root"], "cannot read gone.json"),
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
        ({"joint": JointConfig(width=0)}, "joint.joint_width = 0: must be a finite number >= 1"),
        ({"text": TextConfig(max_positions=31)}, "data.max_words = 32, but the text encoder has 31 positions"),
    ],
)
def test_impossible_settings_are_named(changes, says):
    with pytest.raises(ConfigError, match=says):
        Stage2Config(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"max_words": 2}, "max_words = 2"), ({"crops_per_clip": 2}, "stage 2 makes one clip of a video")],
)
def test_impossible_data_is_named(changes, says):
    with pytest.raises(ConfigError, match=says):
        CaptionDataConfig(**changes)


def test_fine_tuning_without_a_start_is_refused(runner):
    with pytest.raises(SystemExit, match="fine-tunes a stage-2 checkpoint; give it with --init"):
        runner.run("no_start", "--job", "retrieval", images=False)


PUBLISHED = {  # learning rate, epochs, warm-up epochs, drop path, longest text, of the 5M checkpoints
    "mc_msrvtt_b16": (8e-5, 5, 0, 0.2, 32),
    "mc_msrvtt_l16": (4e-5, 5, 0, 0.3, 32),
    "qa_anet_b16": (4e-5, 12, 1, 0.2, 25),
    "qa_anet_l16": (4e-5, 10, 1, 0.3, 25),
    "qa_msrvtt_b16": (2e-5, 8, 1, 0.2, 25),
    "qa_msrvtt_l16": (2e-5, 8, 1, 0.4, 25),
    "qa_msvd_b16": (2e-5, 15, 1, 0.2, 25),
    "qa_msvd_l16": (6e-5, 6, 1, 0.4, 25),
    "ret_anet_b16": (4e-5, 20, 1, 0.1, 150),
    "ret_anet_l16": (4e-5, 20, 1, 0.2, 150),
    "ret_didemo_b16": (2e-5, 15, 1, 0.1, 64),
    "ret_didemo_l16": (4e-5, 5, 1, 0.3, 64),
    "ret_lsmdc_b16": (2e-5, 10, 1, 0.2, 96),
    "ret_lsmdc_l16": (2e-5, 8, 1, 0.2, 96),
    "ret_msrvtt_b16": (2e-5, 10, 0, 0.2, 32),
    "ret_msrvtt_l16": (2e-5, 7, 1, 0.3, 32),
    "ret_msvd_b16": (1e-5, 5, 0, 0.2, 64),
    "ret_msvd_l16": (1e-5, 3, 0, 0.3, 64),
    "ret_ssv2_label_b16": (5e-5, 10, 0, 0.1, 25),
    "ret_ssv2_label_l16": (5e-5, 10, 0, 0.2, 25),
    "ret_ssv2_template_b16": (1e-4, 10, 1, 0.1, 25),
    "ret_ssv2_template_l16": (1e-4, 10, 1, 0.2, 25),
    **{f"{corpus}_b16": (1e-4, 10, 1, 0.1, 32) for corpus in ("5m", "17m", "25m")},
    **{f"{corpus}_l16": (1e-4, 10, 1, 0.2, 32) for corpus in ("5m", "17m", "25m")},
}


@pytest.mark.parametrize("path", sorted(stage2.RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_as_published(path):
    config = load_recipe(Stage2Config, path)
    if path.stem == "tiny":
        return
    optim, data = config.optim, config.data
    found = (optim.lr, optim.epochs, optim.warmup_epochs, config.student.drop_path, data.max_words)
    assert found == PUBLISHED[path.stem]
    assert (data.max_answer_words, data.flip, data.antialias, data.closing_sep, data.last_frames) == (
        5,
        0.5,
        *[False] * 3,
    )
    assert (data.identity, data.replaced_captions, config.joint.temperature) == ("published", "published", 0.07)
    assert (data.validation_job == "multiple_choice") == path.stem.startswith("mc_")
    assert (config.compute.recompute == "full") == (config.job != "pretrain")
    large = path.stem.endswith("l16")
    assert (config.student.depth, config.student.heads, config.student.patch_size) == (
        (24, 16, 16) if large else (12, 12, 16)
    )
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
        assert config.teacher.image_size == (196 if large else 224)
        assert config.student.align_layers == config.teacher.align_layers == 6
        assert (config.objective.video_mask_ratio, config.objective.image_mask_ratio) == (0.8, 0.5)
    else:
        assert (config.student.frames, config.optim.batch_size) == (12, 32)
        assert (config.data.max_seconds is not None) == ("didemo" in path.stem)
        assert config.data.join_captions == ("didemo" in path.stem or path.stem.startswith("ret_anet"))
        assert config.data.same_caption == ("ssv2" in path.stem)

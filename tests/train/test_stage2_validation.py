"""Validation after every epoch of stage 2: its figures, the best weights, and no effect on training."""

from __future__ import annotations

import json

import pytest
import torch
from forked import start_ranks
from stage2_runs import Runner, assert_equal, last_checkpoint

pytest.importorskip("av")

from train import stage2, stage2_validation
from umt_fast import weights
from umt_fast.config import DataConfig
from umt_fast.data.captions import read_retrieval
from umt_fast.evaluation import video_text_report
from umt_fast.evaluation.video_text import EmbedSettings, load_model


@pytest.fixture(scope="module")
def runner(tmp_path_factory, demo_videos) -> Runner:
    return Runner(tmp_path_factory.mktemp("validated"), demo_videos)


@pytest.fixture(scope="module")
def start(runner, one_thread) -> str:
    folder = runner.run("start", "--run.stop-at", "1")
    return str(max((folder / "checkpoints").glob("*.pth")))


def tune(runner: Runner, name: str, start: str, *options: str, job: str = "retrieval"):
    return runner.run(name, "--job", job, "--init", start, *options, images=False)


@pytest.mark.usefixtures("one_thread")
def test_the_best_epoch_is_kept_and_training_does_not_notice(runner, start, capsys, monkeypatch):
    """A run with a validation list, stopped and resumed, gives the same bits as a run without one."""
    plain = tune(runner, "plain", start)
    found = []
    score = video_text_report.retrieval.score

    def worse_each_time(*arguments, **options):
        result = score(*arguments, **options)
        found.append(result)
        result.recalls["r_mean"] = 50.0 - len(found)
        return result

    monkeypatch.setattr(stage2_validation.retrieval, "score", worse_each_time)
    validation = ("--data.validation", runner.videos)
    tune(runner, "validated", start, *validation, "--run.stop-at", "5")
    folder = tune(runner, "validated", start, *validation)
    assert len(found) == 2  # two epochs of 4 steps
    out = capsys.readouterr().out
    assert "validation after step 4: R@1 / 5 / 10 in percent, text to video" in out
    assert "of 8 videos" in out
    for part in ("model", "optimizer", "rng"):
        assert_equal(last_checkpoint(folder)[part], last_checkpoint(plain)[part], part)
    best = torch.load(folder / "best.pth", weights_only=True)
    assert best["step"] == 4  # the first epoch
    assert best["validation"]["r_mean"] == 49.0
    last = last_checkpoint(folder)["model"]
    assert any(not torch.equal(best["model"][key], last[key]) for key in last)
    again, _ = video_text_report.run_retrieval(
        load_model(folder / "best.pth"),
        read_retrieval(runner.videos),
        folder / "again",
        EmbedSettings(2, 10),
        DataConfig(workers=0),
    )
    assert torch.equal(again.coarse_v2t, found[0].coarse_v2t)
    assert not (plain / "best.pth").exists()


@pytest.mark.usefixtures("one_thread")
def test_questions_are_validated_by_accuracy(runner, start, capsys):
    questions = runner.list_of("asked.json", "video", runner.paths[:4], question="what spins", answer="star")
    (runner.folder / "answers.json").write_text('["star", "circle", "blue"]')
    options = ("--data.videos", questions, "--data.validation", questions, "--optim.epochs", "1")
    answers = ("--data.answers", str(runner.folder / "answers.json"))
    folder = tune(runner, "asked", start, *options, *answers, job="qa")
    best = torch.load(folder / "best.pth", weights_only=True)
    assert f"accuracy {best['validation']['accuracy']:.2f}% of 4 questions" in capsys.readouterr().out
    assert "text_decoder.bert.embeddings.word_embeddings.weight" in best["model"]
    with pytest.raises(SystemExit, match=r"needs data\.answers"):
        tune(runner, "unanswered", start, *options, job="qa")


@pytest.mark.usefixtures("one_thread")
def test_multiple_choice_is_validated_by_accuracy(runner, start, capsys):
    choices = [{"video": path, "caption": ["a star", "a circle"], "answer": 0} for path in runner.paths[:3]]
    (runner.folder / "choices.json").write_text(json.dumps(choices))
    options = ("--data.validation", str(runner.folder / "choices.json"), "--data.validation-job", "multiple_choice")
    tune(runner, "chosen", start, *options, "--optim.epochs", "1")
    assert "of 3 videos" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_pre_training_is_reported_and_keeps_its_last_checkpoint(runner, capsys):
    folder = runner.run("pretrained", "--data.validation", runner.videos, "--optim.epochs", "1")
    assert "validation after step 7: R@1 / 5 / 10" in capsys.readouterr().out
    assert not (folder / "best.pth").exists()
    assert weights.read_model(max((folder / "checkpoints").glob("*.pth")))[0]


def test_two_processes_validate_as_one(runner, start):
    """Each process embeds its part; best weights and figures are for the whole list. Without VTM, DDP must not wait for
    the fusion layers."""
    options = ("--job", "retrieval", "--init", start, "--data.validation", runner.videos, "--optim.epochs", "1")
    folder = runner.run_two("two", *options, "--objective.vtm", "0", images=False)
    best = torch.load(folder / "best.pth", weights_only=True)
    result, _ = video_text_report.run_retrieval(
        load_model(folder / "best.pth"),
        read_retrieval(runner.videos),
        folder / "again",
        EmbedSettings(2, 10),
        DataConfig(workers=0),
    )
    assert best["validation"] == result.recalls


def test_a_full_disk_is_named_by_every_process(runner, start):
    """Only one of them writes the best weights; the others must not wait for it."""
    options = ("--job", "retrieval", "--init", start, "--data.validation", runner.videos, "--optim.epochs", "1")
    arguments = runner.arguments("full", *options, "--objective.vtm", "0", images=False)
    for rank in start_ranks(stage2.main, [(arguments,)] * 2, largest_file=50_000):
        output, _ = rank.communicate(timeout=60)
        assert rank.returncode == 1
        assert "best.pth" in output.rpartition("error: ")[2], output


@pytest.mark.parametrize(
    ("validation", "says"),
    [("none.json", "cannot read none.json"), ("gone.json", "none of the first 1 files of gone.json is there")],
)
def test_a_list_that_cannot_be_validated_ends_the_run_before_its_first_step(
    runner, start, validation, says, monkeypatch
):
    monkeypatch.chdir(runner.folder)
    (runner.folder / "gone.json").write_text('[{"video": "gone.mp4", "caption": "a star"}]')
    with pytest.raises(SystemExit, match=says):
        tune(runner, f"bad_{validation}", start, "--data.validation", validation)

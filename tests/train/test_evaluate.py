"""The command line of train.evaluate."""

from __future__ import annotations

import pytest

from train import evaluate, evaluate_video_text
from umt_fast.config import ConfigError


@pytest.mark.parametrize("checkpoint", [["--checkpoint", "x.pth"], ["--checkpoint=x.pth"]])
def test_a_test_has_the_settings_of_the_training(monkeypatch, checkpoint):
    monkeypatch.setattr(evaluate_video_text, "read_model", lambda path: ({}, {"data": {"max_words": 7}}))
    config = evaluate_video_text.read_settings([*checkpoint, "--data.test", "t.json"])
    assert (config.data.max_words, config.checkpoint) == (7, "x.pth")


@pytest.mark.parametrize("job", [["--job", "labels"], ["--job=labels"], []])
def test_a_list_may_be_called_as_a_job_is(monkeypatch, job):
    seen = []

    def read_settings(flags):
        seen.append(flags)
        raise ConfigError("enough")

    monkeypatch.setattr(evaluate, "read_settings", read_settings)
    with pytest.raises(SystemExit, match="enough"):
        evaluate.main([*job, "--checkpoint", "x", "--data.test", "labels"])
    assert seen == [["--checkpoint", "x", "--data.test", "labels"]]


def test_an_unknown_job_lists_the_known_ones():
    with pytest.raises(SystemExit, match="--job retreival: there are labels, retrieval, multiple_choice, qa"):
        evaluate.main(["--job", "retreival"])

"""The fine-tuning half of the demo, with two videos of each motion, one step an epoch and one seed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

from train import demo
from umt_fast import StudentConfig, VideoStudent
from umt_fast.data import synthetic
from umt_fast.recipe import load_recipe
from umt_fast.weights import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_compares_both_starts_on_videos_that_no_run_has_seen(tmp_path: Path, monkeypatch, capsys):
    sizes = {"image_size": 32, "width": 32, "depth": 1, "heads": 2, "frames": 2}

    def small(*arguments):
        config = load_recipe(*arguments)
        optim = dataclasses.replace(config.optim, epochs=1, batch_size=8, warmup_epochs=0)
        data = dataclasses.replace(config.data, workers=0)
        classifier = dataclasses.replace(config.classifier, **sizes)
        compute = dataclasses.replace(config.compute, precision="fp32", attention="sdpa")
        return dataclasses.replace(config, optim=optim, data=data, classifier=classifier, compute=compute)

    for name, value in (("LABELLED", 16), ("HELD_OUT", 16), ("SEEDS", (0,)), ("load_recipe", small)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(synthetic, "FRAMES", 6)
    student = VideoStudent(StudentConfig(**sizes, align_layers=1, target_width=8))
    write_weights(tmp_path / "x.pth", student.state_dict())
    torch.manual_seed(0)
    monkeypatch.setattr("sys.argv", ["demo", "--init", f"{tmp_path / 'x.pth'}", "--out", f"{tmp_path / 'out'}"])
    demo.main()
    found = json.loads((tmp_path / "out" / "top1.json").read_text())
    assert {name: len(values) for name, values in found.items()} == {"random weights": 1, "stage-1 encoder": 1}
    lists = [(tmp_path / "out" / "videos" / f"{name}.csv").read_text().splitlines() for name in ("train", "test")]
    for lines in lists:
        assert sorted({line.rpartition(",")[2] for line in lines}) == sorted(synthetic.MOTIONS)
        assert len(lines) == 16
    assert not set(lists[0]) & set(lists[1])
    contents = [Path(line.rpartition(",")[0]).read_bytes() for lines in lists for line in lines]
    assert len(set(contents)) == 32
    assert "init: " in capsys.readouterr().out

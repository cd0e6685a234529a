"""Both parts of the demo, in small: the teacher of stage 1, and the comparison of two starting points."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from train import demo, demo_teacher
from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent
from umt_fast.data import synthetic
from umt_fast.recipe import load_recipe
from umt_fast.weights import load_clip_teacher, read_weights

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = TeacherConfig(32, 16, width=32, depth=2, heads=2, target_width=16, align_layers=2)


def test_the_teacher_is_the_clip_that_pre_training_loads(tmp_path: Path, capsys):
    options = ["--frames", "32", "--steps", "2", "--image-size", "32", "--width", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["demo_teacher", "--out", f"{tmp_path / 'new' / 'teacher.safetensors'}", *options])
        patch.setattr(demo_teacher, "load_recipe", lambda *_: type("Recipe", (), {"teacher": TEACHER}))
        demo_teacher.main()
    assert "wrote" in capsys.readouterr().out
    weights = read_weights(tmp_path / "new" / "teacher.safetensors")
    config = dataclasses.replace(TEACHER, heads=1)
    teacher, model = ClipTeacher(config), demo_teacher.FrameModel(config)
    load_clip_teacher(teacher, weights)
    model.load_state_dict(weights)
    clip = torch.randint(256, (2, 3, 32, 32, 3), dtype=torch.uint8)
    frames, _ = next(demo_teacher.batches(clip.flatten(0, 1), torch.zeros(6, 1, 1), 6, 0))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    every = torch.arange(4).expand(2, 3, 4)
    targets = teacher.targets(teacher.encode(clip), every)[-1].view(6, 4, 16)
    assert torch.allclose(model(frames)[:, 1:], targets[order], atol=1e-5)


def test_the_teacher_learns_what_lies_where():
    torch.manual_seed(0)
    frames, facts = (torch.from_numpy(part) for part in demo_teacher.render(1, 64, 32))
    model, answers = demo_teacher.FrameModel(TEACHER), demo_teacher.Answers(TEACHER)
    optimizer = torch.optim.AdamW([*model.parameters(), *answers.parameters()], 3e-3)
    first: dict[str, float] = {}
    for _, (pictures, known) in zip(range(60), demo_teacher.batches(frames, facts, 32, 0), strict=False):
        losses = answers(model(pictures), known)
        first = first or {name: loss.item() for name, loss in losses.items()}
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    for name in ("shapes on patches", "place of patches", "hue of patches"):
        assert losses[name].item() < 0.9 * first[name], name


def test_facts_of_a_frame_are_what_it_shows():
    """The large shape is bright at the place in its facts."""
    for number in range(8):
        frame, (large, small) = synthetic.render_frame(np.random.default_rng(number), 64)
        assert frame.shape == (64, 64, 3)
        assert 0.1 <= small.radius < large.radius < 0.6 or large.phase != 0  # a pulse may shrink it
        column, row = int(large.x * 64), int(large.y * 64)
        covered = np.hypot(large.x - small.x, large.y - small.y) < small.radius + 0.05
        if 1 < column < 62 and 1 < row < 62 and not covered:
            assert frame[row, column].max() > 200, number


def test_compares_both_starts_on_videos_that_no_run_has_seen(tmp_path: Path, monkeypatch, capsys):
    sizes = {"image_size": 32, "width": 32, "depth": 1, "heads": 2, "frames": 2}

    def small(*arguments):
        config = load_recipe(*arguments)
        optim = dataclasses.replace(config.optim, epochs=1, batch_size=8, warmup_epochs=0)
        data = dataclasses.replace(config.data, workers=0)
        classifier = dataclasses.replace(config.classifier, **sizes)
        compute = dataclasses.replace(config.compute, attention="sdpa")
        return dataclasses.replace(config, optim=optim, data=data, classifier=classifier, compute=compute)

    for name, value in (("LABELLED", 16), ("HELD_OUT", 16), ("SEEDS", (0,)), ("load_recipe", small)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(synthetic, "FRAMES", 6)
    student = VideoStudent(StudentConfig(**sizes, align_layers=1, target_width=8))
    torch.save({"model": student.state_dict(), "config": {"student": sizes}}, tmp_path / "x.pth")
    torch.manual_seed(0)
    monkeypatch.setattr("sys.argv", ["demo", "--init", f"{tmp_path / 'x.pth'}", "--out", f"{tmp_path / 'out'}"])
    demo.main()
    found = json.loads((tmp_path / "out" / "top1.json").read_text())
    assert {name: len(values) for name, values in found.items()} == {"random weights": 1, "stage-1 encoder": 1}
    frozen = json.loads((tmp_path / "out" / "frozen.json").read_text())
    assert list(frozen) == ["motion", "shape", "colour"]
    assert all(list(values) == list(found) for values in frozen.values())
    assert (tmp_path / "out" / "confusion.png").stat().st_size > 1000
    lists = [(tmp_path / "out" / "videos" / f"{name}.csv").read_text().splitlines() for name in ("train", "test")]
    for lines in lists:
        assert sorted({line.rpartition(",")[2] for line in lines}) == sorted(synthetic.MOTIONS)
        assert len(lines) == 16
    assert not set(lists[0]) & set(lists[1])
    contents = [Path(line.rpartition(",")[0]).read_bytes() for lines in lists for line in lines]
    assert len(set(contents)) == 32
    shown = capsys.readouterr().out
    assert "init: random weights" in shown
    assert "tensors from" in shown
    assert "chance is 25%" in shown
    assert "colour, 12 labels; chance is 17%" in shown
    monkeypatch.setattr("sys.argv", ["demo", "--init", f"{tmp_path / 'none.pth'}", "--out", f"{tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match=r"no weights at .*none\.pth"):
        demo.main()

"""Stage-2 models from files: retrieval and questions over lists, saved embeddings, search."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import stage2_cases as stage2
import torch

pytest.importorskip("av")

from umt_fast import VideoQaModel, VideoTextModel, weights
from umt_fast.config import DataConfig
from umt_fast.data.captions import CaptionError, Question, read_retrieval
from umt_fast.data.tokens import Tokenizer, make_vocabulary
from umt_fast.evaluation import retrieval, search, video_text, video_text_report
from umt_fast.evaluation.video_text import EmbedSettings, load_model
from umt_fast.weights import WeightsError

WORDS = [f"a {shape} {motion}" for shape in ("circle", "square") for motion in ("bounces", "orbits", "spins", "pulses")]
DATA = DataConfig(workers=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's folder with a stage-2 model and a question-answering model, both random."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer(make_vocabulary(WORDS))
    tokenizer.write(folder / "vocab.txt")
    torch.manual_seed(3)
    text = replace(stage2.SMALL.text, width=16, vocab_size=len(tokenizer.vocabulary), max_positions=40)
    for name, kind in (("retrieval", VideoTextModel), ("qa", VideoQaModel)):
        config = replace(stage2.SMALL, teacher=None, text=text)
        model = kind(config)
        settings = {"student": dataclasses.asdict(config.vision), "text": dataclasses.asdict(config.text)}
        (folder / "checkpoints").mkdir(exist_ok=True)
        content = {"model": weights.video_text_state_dict(model), "config": settings}
        torch.save(content, folder / "checkpoints" / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def listed(demo_videos, tmp_path_factory) -> str:
    """Eight videos with a caption each, one of them missing."""
    paths = [line.split(",")[0] for line in demo_videos.read_text().splitlines()]
    entries = [{"video": path, "caption": text} for path, text in zip(paths, WORDS, strict=True)]
    entries[5]["video"] = "missing.mp4"
    path = tmp_path_factory.mktemp("list") / "test.json"
    path.write_text(json.dumps(entries))
    return str(path)


def test_a_list_is_embedded_once_and_its_report_written(trained, listed, tmp_path, monkeypatch):
    loaded = load_model(trained / "checkpoints" / "retrieval.pth")
    assert loaded.model.config.vision.frames == 2
    assert not loaded.model.training
    found, settings = read_retrieval(listed), EmbedSettings(batch_size=3)
    result, bad = video_text_report.run_retrieval(loaded, found, tmp_path, settings, DATA, k=4)
    assert [Path(path).name for path, _ in bad] == ["missing.mp4"]
    content = json.loads((tmp_path / "retrieval.json").read_text())
    assert content["recalls"] == result.recalls
    assert content["videos"] == content["texts"] == 8
    assert content["unreadable"][0]["path"] == "missing.mp4"
    assert (tmp_path / "retrieval.png").stat().st_size > 2000
    assert (result.coarse_v2t[5] == retrieval.NOT_RANKED).all()
    assert (result.rerank_t2v[:, 5] == retrieval.NOT_RANKED).all()
    monkeypatch.setattr(video_text, "open_loader", None)  # nothing may be decoded again
    again, bad_again = video_text_report.run_retrieval(loaded, found, tmp_path, settings, DATA, k=4)
    assert torch.equal(again.rerank_v2t, result.rerank_v2t)
    assert again.recalls == result.recalls
    assert again.coarse_recalls == result.coarse_recalls
    assert bad_again == bad
    wider, _ = video_text_report.run_retrieval(loaded, found, tmp_path, settings, DATA, k=8)  # other scores
    assert not torch.equal(wider.rerank_v2t, result.rerank_v2t)
    (tmp_path / "scores.safetensors").write_bytes(b"spoiled")
    again, _ = video_text_report.run_retrieval(loaded, found, tmp_path, settings, DATA, k=4)
    assert torch.equal(again.rerank_v2t, result.rerank_v2t)
    with monkeypatch.context() as patch:
        patch.setattr(retrieval, "match_pairs", None)  # nor may a pair be scored again
        again, bad_again = video_text_report.run_retrieval(loaded, found, tmp_path, settings, DATA, k=4)
    assert torch.equal(again.rerank_t2v, result.rerank_t2v)
    assert bad_again == bad
    assert "text to video" in video_text_report.recall_table(result.recalls, result.coarse_recalls)
    picked = video_text_report.pick_queries(found, result, 3)
    assert [query.split("   ")[0] for query, _ in picked] == [found.texts[0], found.texts[2], found.texts[5]]
    for (query, hits), text in zip(picked, (0, 2, 5), strict=True):
        place = int(result.rerank_t2v[text].argsort(descending=True, stable=True).tolist().index(text)) + 1
        assert query.endswith(f"(right at place {place} of 8)")
        assert [hit.right for hit in hits] == [number == place for number in range(1, 6)]
    assert picked[0][1][4].label.startswith("not re-ranked  ")  # k is 4
    with pytest.raises(TypeError):  # another setting is another embedding
        video_text_report.run_retrieval(loaded, found, tmp_path, replace(settings, antialias=True), DATA)


def test_unusual_texts_are_accepted(trained, listed, tmp_path):
    """Texts that are empty, have 10,000 words or no letter: as captions, questions, answers and queries."""
    odd = ["", "word " * 10_000, "?!,.", "\U0001f600 \u4e2d"]
    entries = json.loads(Path(listed).read_text())[:4]
    for entry, text in zip(entries, odd, strict=True):
        entry["caption"] = text
    (tmp_path / "odd.json").write_text(json.dumps(entries))
    found = read_retrieval(str(tmp_path / "odd.json"))
    loaded = load_model(trained / "checkpoints" / "retrieval.pth")
    result, _ = video_text_report.run_retrieval(loaded, found, tmp_path, EmbedSettings(), DATA)
    assert result.rerank_v2t.isfinite().all()
    asking = load_model(trained / "checkpoints" / "qa.pth", answers=True)
    questions = [
        Question(entry["video"], text, str(i), ()) for i, (entry, text) in enumerate(zip(entries, odd, strict=True))
    ]
    said, _ = video_text_report.answer_questions(asking, questions, [*odd[1:], "a"], EmbedSettings(), DATA)
    assert len(said) == 4


def test_files_that_changed_are_embedded_again(trained, listed, tmp_path, monkeypatch):
    """Although the list has not changed."""
    video = tmp_path / "video.mp4"
    paths = [entry["video"] for entry in json.loads(Path(listed).read_text())]
    video.write_bytes(Path(paths[0]).read_bytes())
    (tmp_path / "test.json").write_text(json.dumps([{"video": str(video), "caption": "a"}]))
    loaded, found = load_model(trained / "checkpoints" / "retrieval.pth"), read_retrieval(str(tmp_path / "test.json"))
    first, _ = video_text.embed_set(loaded, found, EmbedSettings(), DATA, cache=tmp_path)
    video.write_bytes(Path(paths[1]).read_bytes())
    second, _ = video_text.embed_set(loaded, found, EmbedSettings(), DATA, cache=tmp_path)
    assert not torch.equal(first.tokens, second.tokens)


def test_embeddings_equal_those_of_the_clips(trained, listed):
    """Decoding a list gives the same result as `retrieval.evaluate` on its clips."""
    loaded = load_model(trained / "checkpoints" / "retrieval.pth")
    found = read_retrieval(listed)
    parts = [video_text.embed_set(loaded, found, EmbedSettings(), DATA, rank, 2)[0] for rank in (0, 1)]
    whole, _ = video_text.embed_set(loaded, found, EmbedSettings(batch_size=5), DATA)
    assert (torch.cat([part.video for part in parts]) - whole.video).abs().max() < 1e-6
    assert (torch.cat([part.tokens for part in parts]) - whole.tokens).abs().max() < 1e-5
    assert whole.tokens.shape == (8, 8, 16)
    scores = retrieval.score(loaded.model, whole, found.texts_of_videos)
    assert scores.coarse_v2t.shape == (8, 8)


def test_chance_is_that_of_a_random_ranking(listed):
    found = read_retrieval(listed)
    expected = video_text_report.chance(found)
    assert expected["txt_r1"] == expected["img_r1"] == 12.5
    assert expected["img_r5"] == 62.5
    assert expected["txt_r10"] == 100
    several = replace(found, texts_of_videos=[[0, 1], [2], [3], [4], [5], [6], [7]], videos=found.videos[:7])
    torch.manual_seed(0)
    share = [retrieval.recalls(s, s.T, several.texts_of_videos)["txt_r1"] for s in torch.rand(2000, 7, 8)]
    assert sum(share) / len(share) == pytest.approx(video_text_report.chance(several)["txt_r1"], abs=1)


def test_questions_are_answered_over_a_list(trained, demo_videos):
    loaded = load_model(trained / "checkpoints" / "qa.pth", answers=True)
    paths = [line.split(",")[0] for line in demo_videos.read_text().splitlines()]
    questions = [Question(path, "What spins?", str(i), ("circle",)) for i, path in enumerate([*paths[:3], "gone.mp4"])]
    answers = ["circle", "square", "a circle spins"]
    said, bad = video_text_report.answer_questions(loaded, questions, answers, EmbedSettings(batch_size=2), DATA)
    assert set(said) == {"0", "1", "2"}
    assert set(said.values()) <= set(answers)
    assert len(bad) == 1
    with pytest.raises(CaptionError, match="2 questions have the id 0; an answer is found by its id"):
        video_text_report.answer_questions(loaded, questions[:1] * 2, answers, EmbedSettings(), DATA)
    right = 100 * sum(answer == "circle" for answer in said.values()) / 4
    assert video_text_report.question_accuracy(said, questions) == right


def test_a_folder_is_indexed_once_and_searched(trained, demo_videos, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    for line in demo_videos.read_text().splitlines()[:3]:
        path = Path(line.split(",")[0])
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.mp4").write_bytes(b"nothing")
    options = ["--checkpoint", str(trained / "checkpoints" / "retrieval.pth"), "--videos", str(folder)]
    options += ["--device", "cpu", "--seconds", "1.1", "--count", "4"]
    search.main([*options, "a circle bounces", "square"])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "a circle bounces"
    assert lines[5] == "square"
    scores = [float(line.split()[0]) for line in lines[1:5]]
    assert scores == sorted(scores, reverse=True)
    assert all(str(folder) in line for line in lines[1:5])
    assert "broken.mp4" in err
    assert err.splitlines()[-2].split() == ["match", "cosine", "part", "video"]
    assert (folder / ".umt-fast-search" / "found.png").stat().st_size > 2000
    monkeypatch.setattr(search, "build_index", None)
    decoded = []
    read_clip = search._read_clip
    monkeypatch.setattr(search, "_read_clip", lambda *given: decoded.append(given[2:]) or read_clip(*given))
    search.main([*options, "a circle bounces", "square", "a star"])
    assert len(decoded) == len(set(decoded))  # once for all queries
    capsys.readouterr()
    search.main([*options, "a circle bounces"])
    assert capsys.readouterr().out.splitlines() == lines[:5]
    index = search.read_index(folder / ".umt-fast-search" / "index.safetensors", "another model", 8, 8)
    assert index is None


def test_parts_of_a_video_cover_it(trained, demo_videos):
    from umt_fast.data.manifest import read_manifest

    loaded = load_model(trained / "checkpoints" / "retrieval.pth")
    index = search.build_index(loaded, read_manifest(str(demo_videos)), 1.0)
    for row in range(8):
        parts = index.seconds[index.rows == row]
        assert len(parts) == 3  # 48 frames at 15 a second
        assert parts[0, 0] == 0
        assert parts[-1, 1] == pytest.approx(3.2, abs=0.05)
        assert (parts[1:, 0] == parts[:-1, 1]).all()


def test_evaluate_runs_each_job(trained, listed, tmp_path, capsys):
    from train import evaluate

    checkpoints, options = trained / "checkpoints", ["--run.dir", str(tmp_path), "--data.workers", "0"]
    options += ["--run.device", "cpu", "--compute.precision", "fp32"]

    def run(job: str, name: str, data: str, *more: str) -> tuple[str, Path]:
        arguments = ["--job", job, "--checkpoint", str(checkpoints / f"{name}.pth"), "--data.test", data]
        evaluate.main([*arguments, *options, "--run.name", job, *more])
        return capsys.readouterr().out, tmp_path / job

    out, folder = run("retrieval", "retrieval", listed, "--frames", "3", "--k", "4")
    assert "8 videos, 8 texts" in out
    assert "missing.mp4" in out
    assert "12.50" in out  # of chance
    assert json.loads((folder / "retrieval.json").read_text())["frames"] == 3
    assert {path.name for path in folder.iterdir()} >= {"retrieval.png", "scores.safetensors"}
    entries = json.loads(Path(listed).read_text())
    choices = [{"video": entry["video"], "caption": WORDS[:4], "answer": 1} for entry in entries]
    (tmp_path / "mc.json").write_text(json.dumps(choices))
    out, folder = run("multiple_choice", "retrieval", str(tmp_path / "mc.json"))
    chosen = json.loads((folder / "multiple_choice.json").read_text())["chosen"]
    assert f"accuracy {100 * list(chosen.values()).count(1) / 8:.2f}% of 8 videos" in out
    (tmp_path / "answers.json").write_text('["star", "circle"]')
    asked = [{"video": entry["video"], "question": "what is it?", "answer": "star"} for entry in entries]
    (tmp_path / "qa.json").write_text(json.dumps(asked))
    out, folder = run("qa", "qa", str(tmp_path / "qa.json"), "--data.answers", str(tmp_path / "answers.json"))
    said = json.loads((folder / "qa.json").read_text())["answers"]
    assert "7 of 8 questions answered from a list of 2" in out
    assert f"accuracy {100 * list(said.values()).count('star') / 8:.2f}" in out
    wrong = '[{"video": "a.mp4", "caption": ["x", "y"], "answer": %s}]'
    asks = "entry 0: give a video, a list of captions and the place of the right one"
    for content, says in ((wrong % 2, asks), (wrong % "true", asks), ("[]", r"mc\.json lists nothing")):
        (tmp_path / "mc.json").write_text(content)
        with pytest.raises(SystemExit, match=says):
            run("multiple_choice", "retrieval", str(tmp_path / "mc.json"))
    with pytest.raises(SystemExit, match=r"give --data\.answers a JSON list"):
        run("qa", "qa", str(tmp_path / "qa.json"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--checkpoint", "none.pth"], "no weights at none.pth"),
        (["--seconds", "0"], "--seconds 0.0 --count 5: give numbers above 0"),
        (["--videos", "/no/such/folder"], "/no/such/folder"),
        (["--vocabulary", "none.txt"], "no vocabulary for .*looked for none.txt"),
    ],
)
def test_a_search_that_cannot_be_made_ends_in_one_line(trained, demo_videos, change, says):
    options = ["--checkpoint", str(trained / "checkpoints" / "retrieval.pth"), "--videos", str(demo_videos.parent)]
    with pytest.raises(SystemExit, match=says):
        search.main([*options, *change, "x"])
    with pytest.raises(SystemExit, match="has no words"):
        search.main([*options, "--seconds", "9", "--index", str(demo_videos.parent / "index"), "?!"])


def test_a_model_of_the_other_job_is_named(trained):
    with pytest.raises(WeightsError, match=r"qa.pth is fine-tuned for questions: test it with train.evaluate --job qa"):
        load_model(trained / "checkpoints" / "qa.pth")
    assert load_model(trained / "checkpoints" / "qa.pth", answers=True).notes == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"student": [3], "text": {"heads": "two"}}, "heads"),
        ({"student": {"heads": 5}, "text": {"heads": 2}}, "width = 16 is not a positive multiple of heads = 5"),
        ({"student": {"heads": 2, "frames": "x"}, "text": {"heads": 2}}, "checkpoint"),
    ],
)
def test_settings_in_a_file_are_not_trusted(trained, tmp_path, settings, says):
    content = torch.load(trained / "checkpoints" / "retrieval.pth", weights_only=True)
    torch.save({**content, "config": settings}, tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match=says):
        load_model(tmp_path / "checkpoint.pth", trained)


def test_files_that_are_not_a_stage_2_model_are_refused(trained, tmp_path):
    torch.save({"model": {"encoder.x": torch.ones(2)}}, tmp_path / "stage1.pth")
    with pytest.raises(WeightsError, match="is not a stage-2 model: it has no vision_encoder"):
        load_model(tmp_path / "stage1.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    with pytest.raises(WeightsError, match="has 6 words, but the model"):
        load_model(trained / "checkpoints" / "retrieval.pth", tmp_path)

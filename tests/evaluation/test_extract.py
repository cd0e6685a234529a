"""Features in a folder, and probes fitted on them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from umt_fast import ClassifierConfig, VideoClassifier, load_encoder
from umt_fast.config import DataConfig
from umt_fast.data.labels import read_labelled
from umt_fast.data.loader import ClipLoader
from umt_fast.evaluation import features, probe
from umt_fast.evaluation.extract import Extraction, Features, FeaturesError, extract, read_features, shard_path
from umt_fast.evaluation.views import Views, view_stream
from umt_fast.files import lock_folder
from umt_fast.run.world import World
from umt_fast.weights import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"image_size": 32, "patch_size": 16, "frames": 2, "width": 64, "depth": 2, "heads": 1}
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "x.pth"
    write_weights(path, VideoClassifier(ClassifierConfig(**SIZES, num_classes=2)).state_dict())
    return path


@pytest.fixture(scope="module")
def listing(demo_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("list")
    lines = demo_videos.read_text().splitlines()[:5]
    paths = [line.rpartition(",")[0] for line in lines]
    paths.insert(2, str(folder / "none.mp4"))
    (folder / "list.csv").write_text("".join(f"{path},{'ab'[i % 2]}\n" for i, path in enumerate(paths)))
    return folder / "list.csv"


def command(checkpoint: Path, listing: Path, out: Path, *more: str) -> list[str]:
    options = ["--checkpoint", f"{checkpoint}", "--data", f"{listing}", "--out", f"{out}", "--workers", "0"]
    return [*options, "--frames", "2", "--image-size", "32", "--precision", "fp32", "--shard", "2", *more]


@pytest.mark.parametrize(("kind", "layer"), [("pooled", -1), ("tokens", -1), ("pooled", 0)])
def test_the_command_writes_what_the_encoder_gives(checkpoint, listing, tmp_path, kind, layer):
    more = ["--kind", kind, "--layer", str(layer), "--segments", "2", "--clips-per-pass", "4"]
    features.main(command(checkpoint, listing, tmp_path / "f", *more))
    found = read_features(tmp_path / "f")
    assert found.rows.tolist() == [0, 1, 3, 4, 5]
    assert found.labels.tolist() == [0, 1, 1, 0, 1]
    assert found.classes == ["a", "b"]
    assert found.features.shape == ((5, 2, 64) if kind == "pooled" else (5, 2, 8, 64))
    assert len(list((tmp_path / "f").glob("*.safetensors"))) == 3
    encoder, views = load_encoder(checkpoint, frames=2, image_size=32), Views(2, 32, segments=2)
    videos = read_labelled(str(listing)).videos
    with ClipLoader(
        view_stream(videos, views, DataConfig(workers=0)), start=0, end=6, batches=3, batch_size=4
    ) as loader:
        clips = torch.cat([batch.clip for batch in loader])
    with torch.inference_mode():
        (hidden,) = encoder.hidden(clips, (layer,))
        expected = encoder.pool_tokens(hidden) if kind == "pooled" else encoder.norm(hidden)
    assert torch.allclose(found.features.flatten(0, 1), expected, atol=1e-5)


def test_a_folder_is_of_one_extraction_at_a_time(checkpoint, listing, tmp_path):
    with lock_folder(tmp_path / "f"), pytest.raises(SystemExit, match=r"another run is using .*choose another --out"):
        features.main(command(checkpoint, listing, tmp_path / "f"))
    assert not (tmp_path / "f" / "features.json").exists()


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_an_interrupted_extraction_goes_on(checkpoint, listing, tmp_path, capsys, kind):
    out = tmp_path / "f"
    again = command(checkpoint, listing, out, "--format", kind)
    features.main(again)
    said = capsys.readouterr().out
    assert "none.mp4: No such file" in said
    assert f"features of 5 of 6 videos in {out}" in said
    whole = read_features(out)
    shard_path(out, 1, kind).unlink()
    with pytest.raises(FeaturesError, match="lacks 1 of 3 shards"):
        read_features(out)
    before = shard_path(out, 0, kind).stat().st_mtime_ns
    features.main(again)
    assert shard_path(out, 0, kind).stat().st_mtime_ns == before
    assert "2 of 3 shards are there already" in capsys.readouterr().out
    assert torch.equal(read_features(out).features, whole.features)
    assert len(list(out.glob(f"*.{kind}"))) == 3
    with pytest.raises(SystemExit, match=r"holds features with settings .* give another --out"):
        features.main([*again, "--layer", "0"])
    other = {"npz": "safetensors", "safetensors": "npz"}[kind]
    with pytest.raises(SystemExit, match=f"holds features with format = {kind}, these have {other}"):
        features.main([*again, "--format", other])
    shard_path(out, 2, kind).write_bytes(b"no shard")
    with pytest.raises(FeaturesError, match=r"cannot read .*features_00002"):
        read_features(out)


def test_npz_shards_are_plain_arrays(checkpoint, listing, tmp_path):
    features.main(command(checkpoint, listing, tmp_path / "f", "--format", "npz", "--half"))
    features.main(command(checkpoint, listing, tmp_path / "g", "--half"))
    assert torch.equal(read_features(tmp_path / "f").features, read_features(tmp_path / "g").features)
    with np.load(tmp_path / "f" / "features_00001.npz", allow_pickle=False) as arrays:
        assert arrays["features"].dtype == np.float16
        assert (arrays["rows"].tolist(), arrays["labels"].tolist()) == ([3], [1])
        assert "none.mp4" in json.loads(str(arrays["unreadable"]))[0][0]
    index = json.loads((tmp_path / "g" / "features.json").read_text())
    index.pop("format")  # as earlier versions wrote it
    (tmp_path / "g" / "features.json").write_text(json.dumps(index))
    features.main(command(checkpoint, listing, tmp_path / "g", "--half"))
    (tmp_path / "g" / "features.json").write_text(json.dumps({**index, "format": "../x"}))
    with pytest.raises(FeaturesError, match=r"format = '\.\./x'"):
        read_features(tmp_path / "g")


def test_processes_share_out_the_shards(checkpoint, listing, tmp_path):
    encoder, listed = load_encoder(checkpoint, frames=2, image_size=32), read_labelled(str(listing))
    settings = Extraction(Views(2, 32), shard=2)
    arguments = encoder, listed.videos, listed.labels.tolist(), settings, DataConfig(workers=0)
    extract(*arguments, ALONE, tmp_path / "one", {})
    for rank in (0, 1):

        @dataclasses.dataclass(frozen=True)
        class Apart(World):
            def gather(self, value):
                return [value]

        extract(*arguments, Apart(rank, 2, torch.device("cpu")), tmp_path / "two", {"n": 1})
    assert torch.equal(read_features(tmp_path / "one").features, read_features(tmp_path / "two").features)


def test_a_list_without_labels(checkpoint, demo_videos, tmp_path):
    paths = [line.rpartition(",")[0] for line in demo_videos.read_text().splitlines()[:2]]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    features.main(command(checkpoint, tmp_path / "list.txt", tmp_path / "f"))
    found = read_features(tmp_path / "f")
    assert found.labels.tolist() == [-1, -1]
    with pytest.raises(FeaturesError, match="--train has features without labels"):
        probe.check("knn", found, found)


def clusters(count: int, tokens: int | None = None) -> Features:
    """Three classes as noisy directions; with `tokens`, only one token shows the class."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    centres = torch.eye(3, 12) * 4
    if tokens is None:
        made = centres[labels] + torch.randn(count, 12, generator=generator)
        return Features(made[:, None], torch.arange(count), labels, ["x", "y", "z"])
    made = torch.randn(count, tokens, 12, generator=generator)
    made[torch.arange(count), torch.randint(tokens, (count,), generator=generator)] += 3 * centres[labels]
    return Features(made[:, None], torch.arange(count), labels, ["x", "y", "z"])


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_probes_find_separable_classes(kind):
    scores = probe.probe(kind, clusters(120), clusters(61), probe.AttentiveSettings())
    assert scores.top1 > 95
    shuffled = clusters(120)
    shuffled.labels = shuffled.labels[torch.randperm(120, generator=torch.Generator().manual_seed(1))]
    assert probe.probe(kind, shuffled, clusters(61), probe.AttentiveSettings()).top1 < 60


def test_the_attentive_probe_finds_the_token():
    settings = probe.AttentiveSettings(epochs=30, lr=1e-2, heads=2)
    scores = probe.probe("attentive", clusters(150, tokens=6), clusters(61, tokens=6), settings)
    assert scores.top1 > 90
    again = probe.probe("attentive", clusters(150, tokens=6), clusters(61, tokens=6), settings)
    assert again == scores
    with pytest.raises(FeaturesError, match="needs features of kind tokens"):
        probe.probe("attentive", clusters(30), clusters(30), settings)


def test_the_nearest_neighbours_vote_by_similarity():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    got = probe.knn(train, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]]), 2, k=2, temperature=0.1)
    near = torch.nn.functional.normalize(train[1], dim=0)[0]
    votes = torch.tensor([1.0, float(((near - 1) / 0.1).exp())], dtype=torch.float64)
    assert torch.allclose(got[0], votes / votes.sum())


def test_the_probe_command(checkpoint, listing, tmp_path, capsys):
    features.main(command(checkpoint, listing, tmp_path / "f"))
    folders = ["--train", f"{tmp_path / 'f'}", "--test", f"{tmp_path / 'f'}"]
    probe.main(["knn", *folders, "--out", f"{tmp_path / 'scores.json'}"])
    assert "knn: top-1" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["videos"] == 5
    with pytest.raises(SystemExit, match="the attentive probe needs features of kind tokens"):
        probe.main(["attentive", *folders])
    with pytest.raises(SystemExit, match=r"cannot read .*none"):
        probe.main(["knn", "--train", f"{tmp_path / 'none'}", "--test", f"{tmp_path / 'f'}"])
    for flag, value in (("--neighbours", "0"), ("--epochs", "0"), ("--lr", "nan"), ("--heads", "0")):
        with pytest.raises(SystemExit, match=f"error: .*{flag} {value}"):
            probe.main(["knn", *folders, flag, value])


def test_features_of_other_classes_say_which():
    train, test = clusters(30), clusters(30)
    test.classes = ["cat", "dog"]
    with pytest.raises(FeaturesError, match=r"the classes differ: --train .*; --test cat, dog; .*--classes FILE"):
        probe.probe("knn", train, test, probe.AttentiveSettings())


def _features(**other: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"features": torch.ones(2, 1, 4), "rows": torch.arange(2), "labels": torch.tensor([0, 1])} | other


@pytest.mark.parametrize(
    ("index", "shard", "says"),
    [
        ({"shards": 10**15}, {}, "is not a number of files"),
        ({"shards": "x"}, {}, "is not a number of files"),
        ({"shards": True}, {}, "is not a number of files"),
        ({"shards": 2}, {}, "lacks 1 of 2 shards"),
        ({"shards": 1 << 20}, {}, "lacks 1048575 of"),
        ({"classes": "ab"}, {}, "classes is not a list of names"),
        ({"classes": ["a"]}, {}, "labels from 0 to 1 of 1 classes"),
        ({}, {"labels": torch.tensor([0, 1 << 40])}, "labels from 0"),
        ({}, {"labels": torch.tensor([-2, 1])}, "labels from -2"),
        ({}, {"rows": torch.arange(3)}, "are not 2 integers"),
        ({}, {"rows": torch.ones(2)}, "are not 2 integers"),
        ({}, {"features": torch.ones(2, 4)}, r"features of \[2, 4\]"),
        ({}, {"features": torch.full((2, 1, 4), float("nan"))}, "not finite"),
        ({}, {"more": torch.ones(1)}, "not features, rows and labels"),
    ],
)
def test_a_folder_of_features_is_not_trusted(tmp_path, index, shard, says):
    (tmp_path / "features.json").write_text(json.dumps({"shards": 1, "classes": ["a", "b"]} | index))
    save_file(_features(**shard), shard_path(tmp_path, 0))
    with pytest.raises(FeaturesError, match=says):
        read_features(tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["features.json", "features_00000.safetensors"])
def test_a_pipe_in_a_folder_of_features_does_not_hang(tmp_path, name):
    (tmp_path / "features.json").write_text('{"shards": 1}')
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(FeaturesError, match=r"not a regular file|lacks 1"):
        read_features(tmp_path)


def test_features_in_a_zip_bomb_or_a_damaged_npz_are_refused(tmp_path):
    (tmp_path / "features.json").write_text('{"shards": 1, "format": "npz", "settings": {"format": "npz"}}')
    path = shard_path(tmp_path, 0, "npz")
    arrays = {key: value.numpy() for key, value in _features(features=torch.zeros(2, 1, 1 << 24)).items()}
    np.savez_compressed(path, **arrays)
    small = {**arrays, "features": np.ones((2, 1, 4), np.float32)}
    assert path.stat().st_size < 1 << 20
    with pytest.raises(FeaturesError, match="would unpack to"):
        read_features(tmp_path)
    np.savez(path, **small)
    whole = path.read_bytes()
    for damage in (b"{'descr': (((", b"{'descr': 1e5 ", b"{'descr':'\\n "):
        path.write_bytes(whole.replace(b"{'descr': '<f", damage))
        with pytest.raises(FeaturesError, match=r"cannot read .*npz"):
            read_features(tmp_path)
    np.savez(path, **{**small, "rows": np.array([{}, {}], object)})
    with pytest.raises(FeaturesError, match=r"cannot read .*npz"):
        read_features(tmp_path)

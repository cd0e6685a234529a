from __future__ import annotations

import functools
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from umt_fast import ClassifierConfig, VideoClassifier
from umt_fast.config import DataConfig
from umt_fast.data import sampling
from umt_fast.data.decode import read_frames
from umt_fast.data.index import VideoList
from umt_fast.data.labels import LabelledVideos, read_labelled
from umt_fast.data.loader import NothingReadable
from umt_fast.data.views import crop_boxes, resize_bilinear, resized_size
from umt_fast.evaluation.classification import Predictions, confusion, merge_views, predict, ranked, score
from umt_fast.evaluation.report import write_report
from umt_fast.evaluation.views import Views
from umt_fast.run.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


def test_merges_as_published(recorded):
    case = recorded("d_merge")
    t, order = case.tensors, case.tensors["sampler_row"]
    views = case.config["test_num_segment"] * case.config["test_num_crop"]
    merged = merge_views(t["logits"][order], t["row_video"][order], views)
    assert torch.equal(merged, t["merged_probs"])
    assert torch.equal(ranked(merged, 1)[:, 0], t["merged_pred"])
    scores = score(merged, t["labels"])
    assert (scores.top1, scores.top5) == (case.config["final_top1"], case.config["final_top5"])
    assert torch.equal(merge_views(t["logits"][order].numpy(), t["row_video"][order].numpy(), np.int64(views)), merged)
    other = score(merge_views(t["logits"], t["row_video"], views, merge="logits"), t["labels"])
    assert other.top1 == case.config["top1_if_logits_were_averaged"]


def test_numbered_views_merge_alike_in_any_order_and_count_once(recorded):
    t = recorded("d_merge").tensors
    numbers = t["row_chunk"] * 3 + t["row_split"]
    merged = merge_views(t["logits"], t["row_video"], numbers)
    assert torch.allclose(merged, t["merged_probs"], rtol=0, atol=1e-15)
    order = torch.cat((torch.randperm(len(numbers)), torch.arange(7)))
    assert torch.equal(merge_views(t["logits"][order], t["row_video"][order], numbers[order]), merged)


@pytest.mark.parametrize(
    ("rows", "views", "says"),
    [([0, 0, 1], 2, "video 1 has 1 views, not 2"), ([0, 0], 1, "rows"), ([0, 0, 1], torch.tensor([0, 1]), "views")],
)
def test_refuses_views_that_do_not_add_up(rows, views, says):
    with pytest.raises(ValueError, match=says):
        merge_views(torch.randn(3, 4), torch.tensor(rows), views)


def test_scores_of_known_predictions():
    probabilities = torch.eye(6, dtype=torch.float64)[[0, 1, 2, 2]] * 0.9 + 0.1 / 6
    labels = torch.tensor([0, 1, 1, 5])
    scores = score(probabilities, labels)
    assert scores.top1 == 50
    assert scores.top5 == 75  # of equal probabilities the lower class is first, so 5 is the sixth
    assert scores.mean_class == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    right, wrong = 0.9 + 0.1 / 6, 0.1 / 6
    assert scores.loss == pytest.approx(-torch.tensor([right, right, wrong, wrong]).double().log().mean().item())
    assert confusion(labels, ranked(probabilities, 1)[:, 0], 6)[1].tolist() == [0, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="for 6 classes"):
        score(probabilities, labels + 1)


SIDE, FRAMES = 32, 2


class Threads:
    """Ranks as threads, which meet in `gather`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list = [None] * size

    def gather(self, rank: int, value):
        self.values[rank] = value
        self.barrier.wait()
        gathered = list(self.values)
        self.barrier.wait()
        return gathered

    def run(self, function) -> list:
        results: list = [None] * self.size

        def call(rank: int) -> None:
            world = SimpleNamespace(rank=rank, size=self.size, device=torch.device("cpu"))
            world.gather = functools.partial(self.gather, rank)
            results[rank] = function(world)

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture(scope="module")
def listed(demo_videos: Path, tmp_path_factory) -> LabelledVideos:
    """Seven videos and one file that is none, with labels of five classes."""
    folder = tmp_path_factory.mktemp("list")
    (folder / "bad.mp4").write_bytes(b"no video")
    lines = demo_videos.read_text().splitlines()[:7]
    lines.insert(3, f"{folder / 'bad.mp4'},1")
    paths = [line.rpartition(",")[0] for line in lines]
    (folder / "list.csv").write_text("".join(f"{path},{number % 5}\n" for number, path in enumerate(paths)))
    return read_labelled(str(folder / "list.csv"))


@pytest.fixture(scope="module")
def model() -> VideoClassifier:
    torch.manual_seed(0)
    sizes = {"image_size": SIDE, "frames": FRAMES, "width": 32, "depth": 2, "heads": 2}
    return VideoClassifier(ClassifierConfig(**sizes, num_classes=5), init_scale=10.0).eval()


@pytest.mark.parametrize("views", [Views(FRAMES, SIDE, segments=2, crops=3), Views(FRAMES, SIDE, validation=True)])
def test_every_number_of_processes_gives_the_same_bits(listed, model, views):
    config = DataConfig(workers=0)

    def test(world) -> Predictions:
        return predict(model, listed.videos, views, config, world, clips_per_pass=4)

    (alone,) = Threads(1).run(test)
    assert alone.rows.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert [row for row, _, _ in alone.bad] == [3]
    for size in (2, 3):
        for found in Threads(size).run(test):
            assert torch.equal(found.rows, alone.rows)
            assert torch.equal(found.probabilities, alone.probabilities)
            assert found.bad == alone.bad


def test_predictions_are_those_of_views_decoded_one_by_one(listed, model):
    views = Views(FRAMES, SIDE, segments=2, crops=3)
    (found,) = Threads(1).run(lambda world: predict(model, listed.videos, views, DataConfig(workers=0), world))
    video = listed.videos[4]
    single = []
    for time in range(2):
        frames = read_frames(video, lambda n, t=time: sampling.test_frames(n, FRAMES, "sparse", 2, t))
        size = resized_size(*frames[0].shape[:2], SIDE)
        for box in crop_boxes(*size, SIDE, 3):
            single.append(torch.from_numpy(np.stack([resize_bilinear(frame, *size, box) for frame in frames])))
    expected = model(torch.stack(single)).double().softmax(-1).mean(0)
    assert torch.allclose(found.probabilities[3], expected, atol=1e-6)


def test_the_report_names_what_went_wrong(listed, model, tmp_path: Path):
    views = Views(FRAMES, SIDE, segments=1, crops=1)
    (found,) = Threads(1).run(lambda world: predict(model, listed.videos, views, DataConfig(workers=0), world))
    scores = write_report(tmp_path, found, listed, {"checkpoint": "x.pth"})
    content = json.loads((tmp_path / "test.json").read_text())
    assert content["top1"] == scores.top1
    assert content["videos"] == 7
    assert content["unreadable"][0]["row"] == 4
    assert content["unreadable"][0]["path"].endswith("bad.mp4")
    assert content["checkpoint"] == "x.pth"
    assert content["worst_classes"][0]["top1"] <= content["worst_classes"][-1]["top1"]
    saved = np.load(tmp_path / "predictions.npz")
    assert saved["row"].tolist() == found.rows.tolist()
    assert saved["label"].tolist() == [0, 1, 2, 4, 0, 1, 2]
    assert np.array_equal(saved["probabilities"], found.probabilities.numpy())
    assert saved["path"][0] == listed.videos[0].path
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert (tmp_path / "mistakes.png").stat().st_size > 1000


def test_a_list_without_readable_videos(model, tmp_path: Path):
    videos = VideoList.of_paths([str(tmp_path / "none.mp4")])
    with pytest.raises(NothingReadable, match=r"none of the 1 videos could be read; the first, .*none\.mp4"):
        predict(model, videos, Views(FRAMES, SIDE), DataConfig(workers=0), World(0, 1, torch.device("cpu")))

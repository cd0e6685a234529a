"""The guide channel follows crops and flips of the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from umt_fast.config import DataConfig
from umt_fast.data.crops import View
from umt_fast.data.decode import container
from umt_fast.data.guides import GuidedStream, cut_labels, find_mask, motion_channel
from umt_fast.data.index import VideoList
from umt_fast.data.loader import ClipDataset
from umt_fast.data.motion import read_motion
from umt_fast.data.video import BadVideo, Video

CONFIG = DataConfig(frame_step=1, flip=0.5, crops_per_clip=2, workers=0)


def make(where, write_video, guide, **settings) -> GuidedStream:
    path = write_video(where / "a.mp4", frames=12, size=(96, 64))
    return GuidedStream(VideoList.of_paths([str(path)]), CONFIG, 4, 32, 0, guide=guide, grid=4, **settings)


def test_motion_is_that_of_the_crop(tmp_path, write_video):
    stream = make(tmp_path, write_video, "motion")
    batch = ClipDataset(stream)[[0, 1]]
    assert batch.clip.shape == (4, 4, 32, 32, 4)
    rng = stream.attempts(0)
    _, generator = next(rng)
    video = stream.videos[0]
    from umt_fast.data.decode import open_video

    with open_video(video) as reader:
        ids = stream.choose_frames(video, reader.timeline, generator)
    views = stream.draw_views(96, 64, generator)
    for clip, view in zip(batch.clip, views, strict=False):
        expected = motion_channel(read_motion(video, ids, 4, view), 32)
        assert np.array_equal(clip[..., 3].numpy(), expected)
    assert batch.clip[..., 3].max() > 4  # the picture moves by three pixels a frame
    plain = make(tmp_path, write_video, "motion")
    assert torch.equal(ClipDataset(plain)[[0, 1]].clip, batch.clip)


def test_motion_comes_with_the_frames(tmp_path, write_video, monkeypatch):
    """Without a second pass over the file."""
    opened = []
    monkeypatch.setattr(container, "opened", lambda *given, real=container.opened: opened.append(1) or real(*given))
    clip = ClipDataset(make(tmp_path, write_video, "motion"))[[0]].clip
    assert clip[..., 3].any()
    assert len(opened) == 1


def test_labels_are_cut_as_the_pixels_are(tmp_path, write_video):
    """The mask is one picture of half the size, white above: the guide has its two values and no other."""
    masks = tmp_path / "masks"
    masks.mkdir()
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16] = 200
    Image.fromarray(picture).save(masks / "a.png")
    stream = make(tmp_path, write_video, "regions", folder=str(masks))
    clip = ClipDataset(stream)[[0]].clip
    assert set(clip[..., 3].unique().tolist()) <= {0, 200}
    Image.fromarray(picture).save(masks / "b.png")
    with pytest.raises(BadVideo, match=r"no mask video c\.\* in --mask\.regions"):
        find_mask(str(masks), Video("elsewhere/c.mp4"))
    assert find_mask(str(masks), Video("elsewhere/b.mp4")).name == "b.png"


@pytest.mark.parametrize("flip", [False, True])
def test_cut_labels(flip):
    labels = np.arange(8 * 12, dtype=np.uint8).reshape(1, 8, 12)
    cut = cut_labels(labels, View(4, 2, 4, 4, flip), 12, 8, 4)[0]
    assert np.array_equal(cut[:, ::-1] if flip else cut, labels[0, 2:6, 4:8])
    half = labels[:, ::2, ::2]  # a mask of half the size
    assert np.array_equal(cut_labels(half, View(4, 2, 4, 4, False), 12, 8, 2)[0], half[0, 1:3, 2:4])


def test_a_mask_video_that_ends_early_is_a_bad_video(tmp_path, write_video):
    masks = tmp_path / "masks"
    masks.mkdir()
    write_video(masks / "a.mp4", frames=3)
    stream = make(tmp_path, write_video, "regions", folder=str(masks))
    batch = ClipDataset(stream)[[0]]
    assert not len(batch.clip)
    assert "its mask video has 3 frames" in batch.bad[0][1]


def test_captions_beside_mask_videos_are_no_masks(tmp_path):
    for name in ("a.txt", "a.json", "a.cls", "a.png", "a.b.png"):
        (tmp_path / name).touch()
    assert find_mask(str(tmp_path), Video("/videos/a.mp4")).name in ("a.png", "a.b.png")
    (tmp_path / "c.txt").touch()
    with pytest.raises(BadVideo, match=r"no mask video c\.\*"):
        find_mask(str(tmp_path), Video("/videos/c.mp4"))

"""Frames of a view against the published evaluation with OpenCV's resize, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from umt_fast.data.sampling import test_frames, validation_frames
from umt_fast.data.views import centre_box, crop_boxes, resize_bilinear, resized_size

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def test_published_sizes_and_boxes(recorded_sampling):
    for row in recorded_sampling["crops"]["rows"]:
        size = resized_size(row["height"], row["width"], row["short_side"])
        assert list(size) == row["resized"], row
        assert list(centre_box(*size, row["crop"])) == row["validation_box"], row
        for crops in (1, 3, 5):
            boxes = [list(box) for box in crop_boxes(*size, row["short_side"], crops)]
            assert boxes == row[f"test_boxes_{crops}"], row


def test_published_pixels(recorded):
    case = recorded("e_pixels")
    views = [key for key in case.tensors if not key.startswith("clip")]
    assert len(views) >= 4
    for key in views:
        kind, rule, number, *view = key.split(".")
        rule = "segment" if rule == "ssv2" else rule
        clip, settings = case.tensors[f"clip.{number}"].numpy(), case.config["cases"][int(number)]
        size = resized_size(settings["height"], settings["width"], settings["short_side"])
        if kind == "validation":
            ids = validation_frames(len(clip), case.config["num_frames"], rule)
            box = centre_box(*size, settings["crop"])
        else:
            time, crop = map(int, view)
            ids = test_frames(len(clip), case.config["num_frames"], rule, case.config["test_num_segment"], time)
            box = crop_boxes(*size, settings["short_side"], case.config["test_num_crop"])[crop]
        part = torch.from_numpy(resize_bilinear(clip[ids], *size, box).copy())
        assert torch.equal(((part.float() / 255 - MEAN) / STD).permute(3, 0, 1, 2), case.tensors[key]), key


@pytest.mark.parametrize("size", [(5, 9), (17, 31), (40, 64), (64, 40)])
def test_resize_is_bilinear_to_one_level_and_the_part_is_of_the_whole(size):
    frames = np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), dtype=np.uint8)
    whole = resize_bilinear(frames, *size)
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(frames).double().permute(0, 3, 1, 2), size, mode="bilinear"
    )
    assert np.abs(whole - exact.permute(0, 2, 3, 1).numpy()).max() < 1
    for box in crop_boxes(*size, min(size), 3):
        part = resize_bilinear(frames, *size, box)
        assert np.array_equal(part, whole[:, box.top : box.top + box.height, box.left : box.left + box.width])


def test_refuses_a_view_larger_than_the_frame():
    with pytest.raises(ValueError, match="a view of 40 x 40 pixels does not fit a frame of 50 x 30"):
        centre_box(30, 50, 40)

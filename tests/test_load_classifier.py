"""A classifier from other files, by the published rules, and from files that these rules cannot load."""

from __future__ import annotations

import pytest
import torch

from umt_fast import ClassifierConfig, StudentConfig, VideoClassifier, VideoStudent
from umt_fast.weights import WeightsError, load_classifier

SIZES = {"image_size": 48, "patch_size": 16, "width": 32, "depth": 2, "heads": 2}
CASES = ["b1_plain", "b2_learnable_pos", "b3_tubelet2", "b4_head710_to_400", "b5_head710_to_600", "b6_head_other"]


@pytest.mark.parametrize("name", [*CASES, "b7_delete_head_backbone"])
def test_published_files(recorded, classifier_config, name):
    case = recorded(name)
    model = VideoClassifier(classifier_config(case.config["finetune"]))
    model.load_state_dict(case.part("init."), strict=False)
    state, top = case.part("pretrain."), case.config["top_key"]
    maps = case.config["label_maps"] or {}
    report = load_classifier(
        model,
        {top: state} if top else state,
        delete_head=case.config["delete_head"],
        class_map=maps.get(str(case.config["finetune"]["num_classes"])),
    )
    expected = case.part("model.")
    assert expected.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert torch.equal(model.pos_embed, case.tensors["pos_embed_used"])
    assert sorted(report.loaded) == sorted(case.config["loaded"])
    assert sorted(report.missing) == sorted(case.config["missing"])
    assert sorted(report.unexpected) == sorted(case.config["unexpected"])
    assert sorted(report.other_shape) == sorted(case.config["wrong_shape_kept_fresh"])
    assert report.unforeseen() == []
    if "logits" in case.tensors:
        assert (model(case.tensors["video"]) - case.tensors["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize(("frames", "side"), [(4, 48), (16, 48), (8, 64), (4, 96), (16, 32)])
def test_positions_of_files_that_the_published_code_cannot_load(frames, side):
    """For the same number of frames (16, 4) unchanged; for another size resampled from the file's table."""
    config = ClassifierConfig(**{**SIZES, "image_size": side}, frames=frames, learnable_positions=True)
    source = VideoClassifier(config)
    same = VideoClassifier(ClassifierConfig(**{**SIZES, "image_size": side}, frames=frames))
    load_classifier(same, source.state_dict())
    assert torch.equal(same.pos_embed, source.pos_embed)
    doubled = VideoClassifier(ClassifierConfig(**{**SIZES, "image_size": side}, frames=2 * frames))
    load_classifier(doubled, source.state_dict(), frames=frames)
    grid = source.pos_embed.view(frames, -1, 32)
    between = doubled.pos_embed.view(2 * frames, -1, 32)
    assert torch.allclose(between[1], 0.75 * grid[0] + 0.25 * grid[1], atol=1e-6)


@pytest.mark.parametrize(("frames", "side", "to"), [(16, 224, 384), (4, 224, 96), (12, 224, 384)])
def test_positions_of_224_pixels_for_another_size_without_settings(frames, side, to):
    """Neither 8 frames nor the model's own grid divides the rows, so the grid of 224 pixels is assumed."""
    sizes = {"patch_size": 16, "width": 8, "depth": 1, "heads": 1, "num_classes": 2, "learnable_positions": True}
    source = VideoClassifier(ClassifierConfig(image_size=side, frames=frames, **sizes))
    model = VideoClassifier(ClassifierConfig(image_size=to, frames=frames, **sizes))
    assert load_classifier(model, source.state_dict()).lines() == []
    grids = source.pos_embed.view(frames, 14, 14, 8).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grids, size=(to // 16, to // 16), mode="bicubic")
    assert torch.allclose(model.pos_embed[0], wanted.permute(0, 2, 3, 1).flatten(0, 2), atol=1e-6)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(prefix):
    config = ClassifierConfig(**SIZES, num_classes=3)
    source, model = VideoClassifier(config), VideoClassifier(config)
    report = load_classifier(model, {"model": {prefix + key: value for key, value in source.state_dict().items()}})
    assert report.lines() == []
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())


def test_a_student_of_ours_gives_its_encoder():
    student = VideoStudent(StudentConfig(**SIZES, frames=2, align_layers=1, target_width=16))
    model = VideoClassifier(ClassifierConfig(**SIZES, frames=2, num_classes=3))
    report = load_classifier(model, student.state_dict())
    assert report.unforeseen() == []
    assert torch.equal(model.blocks[1].mlp.fc1.weight, student.encoder.blocks[1].mlp.fc1.weight)
    first = VideoClassifier(ClassifierConfig(**SIZES, frames=2, num_classes=3, pool="first"))
    assert "norm.weight" in load_classifier(first, student.state_dict()).loaded


@pytest.mark.parametrize("class_map", [None, [1, 0]])
def test_a_bias_that_does_not_fit_its_head_is_refused(class_map):
    config = ClassifierConfig(**SIZES, frames=2, num_classes=3)
    state = VideoClassifier(config).state_dict()
    for shape in ((), (2,), (1, 3)):
        with pytest.raises(WeightsError, match=r"head\.bias is"):
            load_classifier(VideoClassifier(config), {**state, "head.bias": torch.zeros(shape)}, class_map=class_map)


def test_a_table_without_positions_is_left_out():
    model = VideoClassifier(ClassifierConfig(**SIZES, frames=2, num_classes=3, learnable_positions=True))
    report = load_classifier(model, {**model.state_dict(), "pos_embed": torch.zeros(0, 0, 0)})
    assert "pos_embed" in report.other_shape


def test_reports_mistakes_but_not_intended_differences():
    source = VideoClassifier(ClassifierConfig(**SIZES, num_classes=7))
    wider = VideoClassifier(ClassifierConfig(**{**SIZES, "width": 64}, num_classes=7))
    report = load_classifier(wider, source.state_dict())
    assert any("blocks.0.norm1.weight, [32] in the file, [64] in the model" in line for line in report.unforeseen())
    deeper = VideoClassifier(ClassifierConfig(**{**SIZES, "depth": 3}, num_classes=9))
    report = load_classifier(deeper, source.state_dict())
    assert all("blocks.2" in line for line in report.unforeseen())
    assert any("head.weight, [7, 32] in the file, [9, 32] in the model" in line for line in report.lines())
    with pytest.raises(WeightsError, match="rows 0 to 7 of a head of 7 classes"):
        load_classifier(
            VideoClassifier(ClassifierConfig(**SIZES, num_classes=2)), source.state_dict(), class_map=[0, 7]
        )

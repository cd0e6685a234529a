"""The recorded cases of the published stage 2, and models of their sizes.

Most files of `golden/stage2` are parts of the recorded files, to keep the repository small. If the folder
UMT_FAST_GOLDEN_STAGE2 has the whole files, the tests marked by `whole` run too.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from golden import read_recorded
from torch import Tensor

from umt_fast.config import StudentConfig, TeacherConfig, TextConfig, VideoTextConfig
from umt_fast.objectives.video_text import Draws

GOLDEN = Path(__file__).parents[1] / "golden" / "stage2"
WHOLE = os.environ.get("UMT_FAST_GOLDEN_STAGE2", "")
whole = pytest.mark.skipif(not WHOLE, reason="needs the whole recorded files: UMT_FAST_GOLDEN_STAGE2=FOLDER")


@dataclass
class Case:
    config: dict
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def draws(self, prefix: str = "") -> Draws:
        """The recorded draws of a step."""
        t = self.part(f"{prefix}draw.")
        clips, frames = self[f"{prefix}in.video"].shape[:2]
        seen = (t["visual_mask"] == 0).view(clips, frames, -1).nonzero()[:, 2].view(clips, frames, -1)
        return Draws(seen, t["vision_neg"], t["text_neg"])


def read(name: str, full: bool = False) -> Case:
    """A recorded case."""
    metadata, tensors = read_recorded((Path(WHOLE) if full else GOLDEN) / f"{name}.safetensors")
    return Case(json.loads(metadata["config"]), tensors)


def video_text_config(config: dict) -> VideoTextConfig:
    vision, text, teacher = config["vision"], config["text"], config.get("teacher")
    ids = {f"{name}_id": number for name, number in config["special_ids"].items() if name != "unk"}
    sizes = {
        "image_size": vision["img_size"],
        "patch_size": vision["patch"],
        "frames": vision["num_frames"],
        "width": vision["width"],
        "depth": vision["depth"],
        "heads": vision["heads"],
    }
    if teacher is None:
        student, clip = StudentConfig(**sizes, align_layers=1), None
    else:
        layers, width = vision["clip_return_layer"], teacher["output_dim"]
        student = StudentConfig(**sizes, align_layers=layers, target_width=width)
        clip = TeacherConfig(
            image_size=teacher["img_size"],
            patch_size=teacher["patch"],
            input_size=vision["img_size"],
            width=teacher["width"],
            depth=teacher["layers"],
            heads=teacher["heads"],
            target_width=width,
            align_layers=layers,
        )
    return VideoTextConfig(
        vision=student,
        teacher=clip,
        text=TextConfig(
            width=text["hidden_size"],
            depth=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            fusion_layer=text["fusion_layer"],
            vocab_size=text["vocab_size"],
            max_positions=text["max_position_embeddings"],
            mlp_width=text["intermediate_size"],
            **ids,
        ),
        joint_width=config["embed_dim"],
        temperature=config["temp"],
    )


SMALL = VideoTextConfig(
    vision=StudentConfig(image_size=32, frames=2, width=16, depth=3, heads=2, align_layers=2, target_width=8),
    teacher=TeacherConfig(image_size=32, width=16, depth=2, heads=2, align_layers=2, target_width=8),
    text=TextConfig(12, 3, 2, 1, 30, 12, 24, cls_id=2, sep_id=3, mask_id=4),
    joint_width=8,
)
"""A model that runs in milliseconds, with frames of 2 x 2 patches."""


def some_texts(rows: int, length: int = 8, words: int = 30) -> tuple[Tensor, Tensor]:
    """Random texts of 2 to `length` tokens, padded, and their mask."""
    mask = (torch.arange(length) < torch.randint(2, length + 1, (rows, 1))).long()
    ids = torch.randint(5, words, (rows, length)) * mask
    ids[:, 0] = 2
    return ids, mask

"""Every masking rule of a pixel run: number of visible tokens, their choice, and the error for a missing input."""

from __future__ import annotations

import math
import re
import sys
import types

import pytest
import torch

from umt_fast.config import ConfigError, MaeStPretrainConfig, PixelMaskConfig, VideoMaeConfig, VideoMaePretrainConfig
from umt_fast.objectives.pixel_masks import PixelMasks

SIZES = VideoMaeConfig(32, 8, 2, 8, 16, 1, 1, decoder_width=8, decoder_depth=1, decoder_heads=1)  # 4 x 16 tokens
CLIP = torch.randint(256, (3, 8, 32, 32, 3), dtype=torch.uint8)


@pytest.fixture
def source(monkeypatch):
    """A module `given` with functions for the rules flow and text, and the arguments of their calls."""
    module = types.ModuleType("given")
    module.calls = []

    def flow(clip):
        return torch.zeros(len(clip), clip.shape[1] - 1, 2, *clip.shape[2:4])

    def likeness(clip, captions):
        module.calls.append(captions)
        return torch.arange(16.0).expand(len(clip), 4, 16)

    module.infinite = lambda clip: flow(clip) + math.inf
    module.flow, module.likeness, module.wrong, module.number = flow, likeness, lambda clip: clip, 3
    monkeypatch.setitem(sys.modules, "given", module)
    return module


def draw(guide=None, embed=lambda clip: torch.randn(len(clip), 64, 5), captions=(), **settings):
    masks = PixelMasks(SIZES, PixelMaskConfig(**settings))
    masks.captions = captions
    torch.manual_seed(0)
    found = masks.draw(CLIP, guide, embed)
    assert found.visible.shape == (3, masks.num_visible)
    assert (found.visible.diff(dim=1) > 0).all()
    if found.decoded is not None:
        assert found.decoded.shape == (3, masks.num_decoded)
    return found


@pytest.mark.parametrize(
    ("rule", "ratio", "visible"),
    [
        *(("tube", 0.75, 16), ("random", 0.9, 7), ("frame", 0.9, 7), ("mae_st", 0.9, 6)),
        *(("everest", 0.9, 6), ("motion", 0.9, 8), ("region", 0.9, 6), ("flow", 0.9, 4), ("text", 0.9, 8)),
        ("adamae", 0.95, 3),
    ],
)
def test_counts_are_those_of_the_published_codes(rule, ratio, visible, source):
    given = {"region": {"regions": "x", "order": (0,)}, "flow": {"source": "given:flow"}}
    given["text"] = {"source": "given:likeness"}
    masks = PixelMasks(SIZES, PixelMaskConfig(rule, ratio, **given.get(rule, {})))
    assert masks.num_visible == visible


def test_motion_hides_what_moves():
    guide = torch.zeros(3, 8, 32, 32, dtype=torch.uint8)
    guide[:, 2:4, :16] = 40  # the second frame of tokens: its upper half moves
    found = draw(guide, rule="motion", ratio=0.5)
    by_frame = found.visible.view(3, 4, 8) % 16
    assert (by_frame[:, 1] >= 8).all()


def test_regions_are_shown_in_order():
    guide = torch.zeros(3, 8, 32, 32, dtype=torch.uint8)
    guide[:, ::2, 16:] = 250  # the lower half, not quite the grey value that is asked for
    guide[:, 1::2, :16] = 250  # the second frame of a tubelet does not count
    upper = draw(guide, rule="region", ratio=0.75, regions="x", order=(0, 255))
    assert (upper.visible % 16 < 8).all()
    lower = draw(guide, rule="region", ratio=0.75, regions="x", order=(255, 0))
    assert (lower.visible % 16 >= 8).all()


def test_regions_are_shuffled_for_every_clip():
    """A third of the frame is background; the second region differs between clips."""
    guide = torch.zeros(3, 8, 32, 32, dtype=torch.uint8)
    guide[:, :, 8:16], guide[:, :, 16:] = 100, 200
    masks = PixelMasks(
        SIZES, PixelMaskConfig("region", 0.25, regions="x", order=(0, 100, 200), shuffled=2, least_share=0.3)
    )
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        for row in masks._scores(CLIP, guide)[:, 0]:
            shown = row.view(4, 4).any(1).tolist()
            assert shown[0]
            seen.add(tuple(shown))
    assert seen == {(True, True, False, False), (True, False, True, True)}


def test_flow_carries_the_map(source):
    """Without motion the visible places are those of the map in every frame."""
    found = draw(rule="flow", ratio=0.75, source="given:flow")
    torch.manual_seed(0)
    centres = torch.rand(3, 16).topk(4).indices.sort().values
    assert torch.equal(found.visible.view(3, 4, 4) % 16, centres[:, None].expand(-1, 4, -1))


def test_text_hides_what_is_like_the_caption(source):
    found = draw(rule="text", ratio=0.75, source="given:likeness", captions=["a", "b", "c"])
    assert (found.visible.view(3, 4, 4) % 16 == torch.arange(4)).all()
    assert source.calls == [["a", "b", "c"]]


def test_everest_decodes_the_other_candidates():
    tokens = torch.randn(3, 4, 16, 5)
    tokens[:, :, 12:] = tokens[:, :1, 12:]  # the last row of patches never changes
    found = draw(rule="everest", ratio=0.75, candidate_ratio=0.25, embed=lambda _: tokens.flatten(1, 2))
    both = torch.cat((found.visible, found.decoded), 1).sort(1).values
    assert (both.diff(dim=1) > 0).all()
    assert both.shape[1] == 48
    assert (both % 16 < 12).all()
    assert found.overlap == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "region"}, "needs mask videos and the order"),
        ({"rule": "region", "regions": "x"}, "give --mask.regions FOLDER and --mask.order"),
        ({"rule": "region", "regions": "x", "order": (0, 1), "shuffled": 3}, "mask.shuffled = 3: must be in 0..2"),
        ({"rule": "region", "regions": "x", "order": (0, 0)}, "mask.order = (0, 0): must be grey values"),
        ({"rule": "region", "regions": "x", "order": (0, 256)}, "from 0 to 255, each once"),
        ({"rule": "everest", "ratio": 0.76, "candidate_ratio": 0.759}, "decodes 0 tokens of 4 frames"),
        ({"rule": "flow", "source": "given:infinite"}, "returned values that are not finite"),
        ({"rule": "flow"}, "needs optical flow: give --mask.source MODULE:FUNCTION"),
        ({"rule": "text", "source": "file.py"}, "needs similarity to the caption"),
        ({"rule": "everest", "candidate_ratio": 0.9}, "mask.candidate_ratio = 0.9: must be below mask.ratio = 0.9"),
        ({"rule": "everest", "decoder_ratio": 0.5}, "not for mask.rule = everest"),
        ({"rule": "tube", "ratio": 0.01}, "leaves 64 of 64 tokens visible"),
        ({"rule": "adamae", "ratio": 0.999}, "leaves 0 of 64 tokens visible"),
        ({"rule": "flow", "source": "nowhere:flow"}, "mask.source = nowhere:flow: No module named 'nowhere'"),
        ({"rule": "flow", "source": "given:other"}, "no attribute 'other'"),
        ({"rule": "flow", "source": "given:number"}, "is not a function"),
        ({"rule": "flow", "source": "given:wrong"}, "returned torch.uint8 [3, 8, 32, 32, 3]; return a float tensor"),
    ],
)
def test_missing_input_is_named(settings, words, source):
    with pytest.raises(ConfigError, match=re.escape(words)):
        draw(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (VideoMaePretrainConfig, {"objective": "adamae"}, "belong together"),
        (VideoMaePretrainConfig, {"mask": PixelMaskConfig("adamae")}, "belong together"),
        (MaeStPretrainConfig, {"mask": PixelMaskConfig("everest")}, "not for objective = mae_st"),
    ],
)
def test_rules_and_objectives_that_do_not_fit(kind, settings, words):
    with pytest.raises(ConfigError, match=words):
        kind(**settings)

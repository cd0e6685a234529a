from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from umt_fast.config import DataConfig
from umt_fast.data.crops import Crop, View, draw_view
from umt_fast.data.video import BadVideo

SCALES = (1.0, 0.875, 0.75, 0.66)
SIDE = 224
FRAMES = [(340, 256), (256, 340), (1920, 1080), (200, 200), (226, 300), (400, 222), (222, 400), (224, 224), (40, 30)]


def _sizes(width: int, height: int) -> list[int]:
    """Crop sides of a frame, largest first, from the text of the design."""
    sizes = []
    for scale in (1.0, 0.875, 0.75, 0.66):
        size = int(min(width, height) * scale)
        sizes.append(224 if size in (222, 223, 225, 226) else size)
    return sizes


def _pairs(width: int, height: int) -> list[tuple[int, int]]:
    """(width, height) of the crops: neighbouring ranks; none larger than the frame."""
    sizes = _sizes(width, height)
    ranks = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)]
    return [(min(sizes[i], width), min(sizes[j], height)) for i, j in ranks]


def _corners(width: int, height: int, crop: tuple[int, int]) -> list[tuple[int, int]]:
    """The 13 corners of a crop, in steps of a quarter of the slack."""
    x, y = (width - crop[0]) // 4, (height - crop[1]) // 4
    corners = [(0, 0), (4 * x, 0), (0, 4 * y), (4 * x, 4 * y)]
    centre = [(2 * x, 2 * y)]
    edges = [(2 * x, 0), (2 * x, 4 * y), (0, 2 * y), (4 * x, 2 * y)]
    quarters = [(x, y), (3 * x, y), (x, 3 * y), (3 * x, 3 * y)]
    return corners + centre + edges + quarters


def _views(width: int, height: int, count: int, flip: float = 0.5) -> list[View]:
    rng = np.random.default_rng(0)
    return [draw_view(width, height, SIDE, SCALES, flip, rng) for _ in range(count)]


def test_the_recipes_defaults_are_those_of_the_design():
    assert DataConfig().crop_scales == SCALES
    assert DataConfig().flip == 0.5


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_drawn_views_are_the_admissible_ones(frame):
    admissible = {(*corner, *pair) for pair in _pairs(*frame) for corner in _corners(*frame, pair)}
    drawn = {(view.x, view.y, view.width, view.height) for view in _views(*frame, 4000)}
    assert drawn == admissible


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_views_stay_in_the_frame(frame):
    for view in _views(*frame, 500):
        assert view.x >= 0
        assert view.y >= 0
        assert view.width >= 1
        assert view.height >= 1
        assert view.x + view.width <= frame[0]
        assert view.y + view.height <= frame[1]


@pytest.mark.parametrize("frame", [(1, 1), (2, 1), (1, 9), (3, 3), (5000, 2)], ids=str)
def test_the_smallest_frames(frame):
    for view in _views(*frame, 200):
        assert view.width >= 1
        assert view.height >= 1
        assert 0 <= view.x <= frame[0] - view.width
        assert 0 <= view.y <= frame[1] - view.height


@pytest.mark.parametrize("short", [222, 223, 224, 225, 226])
def test_sides_near_the_clips_become_the_clips(short):
    largest = max(view.width for view in _views(400, short, 300))
    assert largest == 224


@pytest.mark.parametrize("short", [220, 228])
def test_other_sides_stay(short):
    widths = {view.width for view in _views(400, short, 300)}
    assert short in widths
    assert 224 not in widths


def test_pairs_and_positions_are_drawn_uniformly():
    views = _views(640, 480, 26000)
    pairs = Counter((view.width, view.height) for view in views)
    assert set(pairs) == set(_pairs(640, 480))
    assert all(abs(count - 2600) < 5 * 2600**0.5 for count in pairs.values())
    # A crop as high as the frame has equal corners; the other crops have 13 different ones.
    smaller = [view for view in views if view.height < 480]
    places = Counter(_corners(640, 480, (v.width, v.height)).index((v.x, v.y)) for v in smaller)
    expected = len(smaller) / 13
    assert len(places) == 13
    assert all(abs(count - expected) < 5 * expected**0.5 for count in places.values())


@pytest.mark.parametrize("flip", [0.0, 0.25, 0.5, 1.0])
def test_flip_frequency(flip):
    views = _views(340, 256, 4000, flip)
    assert abs(np.mean([view.flip for view in views]) - flip) <= 4 * (flip * (1 - flip) / 4000) ** 0.5


def test_flip_is_independent_of_the_crop():
    views = _views(340, 256, 20000)
    for width in _sizes(340, 256):
        share = np.mean([view.flip for view in views if view.width == width])
        assert abs(share - 0.5) < 0.04


def test_one_scale():
    rng = np.random.default_rng(0)
    assert draw_view(32, 32, 32, (1.0,), 0.0, rng) == View(0, 0, 32, 32, False)


def test_views_are_a_function_of_the_generator():
    assert _views(340, 256, 20) == _views(340, 256, 20)


def _frame(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _cut(frames: list[np.ndarray], view: View, side: int) -> np.ndarray:
    out = np.full((len(frames), side, side, 3), 77, np.uint8)
    cut = Crop(view, out)
    for place, frame in enumerate(frames):
        cut.add([place], frame)
    cut.finish()
    return out


def _shown(frame: np.ndarray, view: View, side: int) -> np.ndarray:
    before, shown = _cut([np.zeros_like(frame), frame], view, side)
    assert not before.any()
    return shown


@pytest.mark.parametrize(
    "view",
    [
        View(0, 0, 256, 256, False),
        View(84, 32, 224, 192, False),
        View(13, 57, 168, 192, False),
        View(40, 16, 224, 224, False),  # as large as the clip: no resizing
        View(0, 0, 224, 168, False),
        View(339, 255, 1, 1, False),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_a_cut_is_pillows_crop_and_resize(view, flip):
    frame = _frame(340, 256)
    box = (view.x, view.y, view.x + view.width, view.y + view.height)
    picture = Image.fromarray(frame).crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    shown = _shown(frame, View(view.x, view.y, view.width, view.height, flip), SIDE)
    error = shown.astype(int) - np.asarray(picture)
    assert abs(error).max() <= 1  # rounding
    assert abs(error.mean()) < 0.01  # to both sides alike
    if (view.width, view.height) == (SIDE, SIDE):
        assert not error.any()


def test_a_cut_of_a_frame_turned_upright():
    """The decoder's rotated frames are views with other strides."""
    frame = _frame(256, 340)
    view = View(20, 10, 168, 192, True)
    assert np.array_equal(_shown(np.rot90(frame), view, 96), _shown(np.rot90(frame).copy(), view, 96))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("sizes", [[(90, 120)] * 3, [(90, 120), (60, 80), (90, 120)]])
def test_a_clip_is_its_frames_one_by_one(sizes, flip):
    """Also when the video changes its size, and a frame is smaller than the crop."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    view = View(40, 5, 60, 50, flip)
    for frame, shown in zip(frames, _cut(frames, view, 48), strict=True):
        assert np.array_equal(_shown(frame, view, 48), shown)


def test_a_video_that_shrinks_out_of_the_view_is_bad():
    cut = Crop(View(40, 5, 60, 50, False), np.zeros((2, 48, 48, 3), np.uint8))
    cut.add([0], _frame(120, 90))
    with pytest.raises(BadVideo, match="shrink to 40 x 90"):
        cut.add([1], _frame(40, 90))


def test_a_frame_in_several_places():
    frames = [_frame(120, 90), _frame(120, 90)[::-1]]
    view = View(3, 4, 70, 60, False)
    out = np.zeros((4, 48, 48, 3), np.uint8)
    cut = Crop(view, out)
    cut.add([0, 3], frames[0])
    cut.add([2, 1], frames[1])
    cut.finish()
    for shown, frame in zip(out, [frames[0], frames[1], frames[1], frames[0]], strict=True):
        assert np.array_equal(shown, _shown(frame, view, 48))

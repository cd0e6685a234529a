"""sample_visible: the form of a draw, and its distribution."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch import Tensor
from umt_kernels import launch, sample_visible
from umt_kernels.backend import INTERPRETED, triton

if triton is not None:
    import triton.language as tl

module = importlib.import_module("umt_kernels.sample_visible")

# chi-square values exceeded with probability 0.001, by degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.4)
CRITICAL = {7: 24.322, 9: 27.877, 11: 31.264}
UNEVEN = (0.30, 0.02, 0.15, 0.01, 0.22, 0.08, 0.05, 0.17)


FEWER = 40 if INTERPRETED else 1
"""The interpreter is slow."""


def generator(seed: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def indicators(drawn: Tensor, patches: int) -> Tensor:
    """Drawn ids [R, n] -> float64 [R, P], 1 where drawn."""
    return torch.zeros(len(drawn), patches, dtype=torch.float64, device=drawn.device).scatter_(1, drawn.long(), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_visible", [1, 40, 196])
def test_a_draw_is_ascending_unique_int32_and_in_range(device, dtype, num_visible):
    scores = torch.rand(9, 196, generator=generator()).to(device, dtype)
    drawn = sample_visible(scores, num_visible, generator(1, device))
    assert drawn.shape == (9, num_visible)
    assert drawn.dtype == torch.int32
    assert (drawn[:, 1:] > drawn[:, :-1]).all()
    assert drawn.min() >= 0
    assert drawn.max() < 196


@pytest.mark.parametrize("patches", [1, 2, 65, 257, 300])
def test_rows_longer_than_a_block_and_of_odd_lengths(device, patches):
    scores = torch.rand(3, patches, generator=generator()).to(device)
    for num_visible in {1, (patches + 1) // 2, patches}:
        drawn = sample_visible(scores, num_visible, generator(1, device))
        assert drawn.shape == (3, num_visible)
        assert (drawn[:, 1:] > drawn[:, :-1]).all()
        assert drawn.min() >= 0
        assert drawn.max() < patches


def test_the_generator_decides_the_draw(device):
    scores = torch.rand(6, 30, generator=generator()).to(device)

    def draw(seed: int) -> Tensor:
        return sample_visible(scores, 7, generator(seed, device))

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    same = generator(5, device)
    assert not torch.equal(sample_visible(scores, 7, same), sample_visible(scores, 7, same))
    torch.manual_seed(3)
    default = sample_visible(scores, 7)
    torch.manual_seed(3)
    assert torch.equal(sample_visible(scores, 7), default)


def test_layout_and_gradient_mode_do_not_change_the_draw(device, spread):
    scores = torch.rand(5, 30, generator=generator()).to(device)
    expected = sample_visible(scores, 7, generator(5, device))
    for given in (spread(scores), scores.T.contiguous().T, scores.clone().requires_grad_()):
        drawn = sample_visible(given, 7, generator(5, device))
        assert torch.equal(drawn, expected)
        assert not drawn.requires_grad


def test_rows_are_drawn_independently(device):
    drawn = sample_visible(torch.ones(60, 30, device=device), 7, generator(0, device))
    assert len(torch.unique(drawn, dim=0)) > 57


if triton is not None:

    @triton.jit
    def random_numbers(seed_ptr, out_ptr, patches, BLOCK: tl.constexpr):
        """Philox for key seed + row and counter patch."""
        row = tl.program_id(0).to(tl.int64)
        patch = tl.arange(0, BLOCK)
        tl.store(out_ptr + row * patches + patch, tl.randint(tl.load(seed_ptr) + row, patch), mask=patch < patches)


def race(scores: Tensor, num_visible: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The draw from the kernel's random numbers by sorting in float64, and the rows that rounding does not decide."""
    bits = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    patches = scores.shape[1]
    random_numbers[(len(scores),)](seed, bits, patches, BLOCK=triton.next_power_of_2(patches))
    uniform = ((bits.long() & 0xFFFFFFFF) >> 9).double() + 0.5
    waits = -(uniform * 2**-23).log()
    speeds = torch.where(scores > 0, scores.double().log() - waits.log(), -1e6 - waits)
    ordered, ids = speeds.sort(dim=1, descending=True)
    if num_visible == patches:
        return ids.sort(dim=1).values.int(), torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    last, next_one = ordered[:, num_visible - 1], ordered[:, num_visible]
    return ids[:, :num_visible].sort(dim=1).values.int(), last - next_one > 3e-5


@pytest.mark.parametrize(("rows", "patches", "num_visible"), [(30, 196, 40), (3, 300, 299), (4, 65, 1), (2, 7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_draw_is_the_race_of_its_philox_numbers(device, needs_kernels, rows, patches, num_visible, dtype):
    scores = torch.rand(rows, patches, generator=generator(2)).to(device, dtype)
    scores[:, ::5] = 0
    scores[:, 3::11] = -1
    for key in (0, 2**32 - 3, 2**62 - 1):  # the row is added across the key's halves
        seed = torch.tensor([key], device=device)
        expected, decided = race(scores, num_visible, seed)
        assert decided.double().mean() > 0.9
        assert torch.equal(module._draw(scores, seed, None, num_visible)[decided], expected[decided])
        if INTERPRETED and rows > 4:
            break


def test_a_random_number_of_all_ones_comes_first_not_last(device, needs_kernels):
    """Philox of key 810476 and counter 2 has 24 high bits of ones, which with a half added are 1 in float32."""
    seed = torch.tensor([810476], device=device)
    bits = torch.empty(1, 4, dtype=torch.int32, device=device)
    random_numbers[(1,)](seed, bits, 4, BLOCK=4)
    assert bits[0, 2] >> 8 == -1
    assert module._draw(torch.ones(1, 4, device=device), seed, None, 1) == 2


def test_a_random_number_of_0_still_comes_before_a_score_of_0(device, needs_kernels):
    """Philox of key 3595702 and counter 1 has 23 high bits of zeros: without the half added, its wait is infinite."""
    seed = torch.tensor([3595702], device=device)
    bits = torch.empty(1, 4, dtype=torch.int32, device=device)
    random_numbers[(1,)](seed, bits, 4, BLOCK=4)
    assert (bits[0, 1].item() & 0xFFFFFFFF) >> 9 == 0
    scores = torch.tensor([[0.0, 1e-38, 0.0, 0.0]], device=device)
    assert module._draw(scores, seed, None, 1) == 1


def test_seeds_have_62_bits(device, needs_kernels, monkeypatch):
    seeds = []
    monkeypatch.setattr(module._draw, "launch", lambda plan, scores, seed, counts, n: seeds.append(int(seed)))
    for key in range(300):
        sample_visible(torch.ones(1, 4, device=device), 2, generator(key, device))
    assert len(set(seeds)) == 300
    assert 2**61 < max(seeds) < 2**62
    assert len({seed >> 32 for seed in seeds}) > 290
    assert len({seed & 0xFF for seed in seeds}) > 100


@pytest.mark.parametrize("bit", [0, 8, 31, 32, 40, 61])
def test_every_bit_of_the_seed_counts(device, needs_kernels, bit):
    scores = torch.ones(4, 64, device=device)
    one, other = (
        module._draw(scores, torch.tensor([key], device=device), None, 20) for key in (10**6, 10**6 ^ 1 << bit)
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize("num_visible", [1, 3, 6])
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_ties_take_exactly_as_many_as_fit(device, needs_kernels, monkeypatch, num_visible, score):
    """All keys alike: the first ids are drawn, and nothing is written into the next row."""
    if not INTERPRETED:
        pytest.skip("ties cannot be arranged on a GPU")
    monkeypatch.setattr(tl, "log", lambda x: x * 0 + (1 + 2**-23))  # then the last bit of a key of score 0 is 1
    launch_it = launch.Plan.launch

    def launch_with_room_behind(plan: launch.Plan, tensors: tuple, outputs: tuple[Tensor]) -> None:
        (drawn,) = outputs
        room = torch.full((drawn.numel() + 64,), 77, dtype=torch.int32, device=device)
        launch_it(plan, tensors, (room,))
        assert (room[drawn.numel() :] == 77).all()
        drawn.copy_(room[: drawn.numel()].view_as(drawn))

    monkeypatch.setattr(launch.Plan, "launch", launch_with_room_behind)
    scores = torch.full((3, 9), score, device=device)
    drawn = module._draw(scores, torch.tensor([1], device=device), None, num_visible)
    assert torch.equal(drawn, torch.arange(num_visible, dtype=torch.int32).expand(3, -1))
    counts = torch.tensor([num_visible, 1, num_visible - 1], device=device)
    drawn = module._draw(scores, torch.tensor([1], device=device), counts, num_visible)
    assert (drawn >= 0).sum(1).tolist() == counts.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_near_the_largest_number_have_the_same_distribution(device, dtype):
    """score / wait would be infinite for most scores, and the first infinite one would be drawn."""
    rows = 4000 if not INTERPRETED else 800
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=dtype)
    scores = (weights / 0.4 * torch.finfo(dtype).max).to(device).expand(rows, -1)
    included = indicators(sample_visible(scores, 1, generator(0, device)).cpu(), 4).mean(0)
    error = (included - weights.double()) / (weights.double() * (1 - weights.double()) / rows).sqrt()
    assert error.abs().max() < 4
    assert error.square().sum() < 20


def test_infinite_and_subnormal_scores(device):
    scores = torch.tensor([[float("inf"), 0.0, 1e-42, 0.0, 1.0]], device=device).expand(60, -1)
    assert (sample_visible(scores, 3, generator(0, device)) == torch.tensor([0, 2, 4], device=device)).all()
    assert (sample_visible(scores, 1, generator(0, device)) == 0).all()
    assert (sample_visible(scores[:, 2:], 1, generator(0, device)) == 2).all()  # never the subnormal score

    two = torch.tensor([[float("inf"), float("inf"), 1.0]], device=device).expand(40, -1)
    drawn = sample_visible(two, 1, generator(0, device))
    assert 5 < (drawn == 0).sum() < 35
    assert (drawn < 2).all()


@pytest.mark.parametrize("unit", [2.0**-149, 1e-40, 2.0**-126, 1e-3, 5e37])
def test_the_distribution_holds_at_any_size_of_the_scores(device, unit):
    """1 : 2 : 5, from the smallest float32 on, beside a score of 0 that is never drawn."""
    rows = 3000
    scores = torch.tensor([1.0, 0.0, 2.0, 5.0], dtype=torch.float64).mul(unit).float().to(device).expand(rows, -1)
    included = indicators(sample_visible(scores, 1, generator(2, device)).cpu(), 4).mean(0)
    wanted = torch.tensor([1.0, 0.0, 2.0, 5.0], dtype=torch.float64) / 8
    assert included[1] == 0
    assert ((included - wanted).abs() <= 4 * (wanted * (1 - wanted) / rows).sqrt()).all()


def test_counts_from_none_to_all(device):
    scores = torch.rand(4, 12, generator=generator()).to(device)
    counts = torch.tensor([0, 12, 1, 11], device=device)
    drawn = sample_visible(scores, 12, generator(1, device), counts=counts)
    assert (drawn >= 0).sum(1).tolist() == counts.tolist()
    assert drawn[1].tolist() == list(range(12))
    assert (drawn[0] == -1).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_row_may_draw_its_own_count(device, dtype):
    scores = torch.rand(6, 20, generator=generator()).to(device)
    scores[:, 3] = 0
    counts = torch.tensor([0, 1, 5, 9, 9, 3], dtype=dtype, device=device)
    drawn = sample_visible(scores, 9, generator(1, device), counts=counts)
    assert drawn.shape == (6, 9)
    for row, count in zip(drawn.tolist(), counts.tolist(), strict=True):
        assert row[count:] == [-1] * (9 - count)
        assert row[:count] == sorted(set(row[:count]) - {-1, 3})
    full = torch.full((6,), 9, device=device)
    expected = sample_visible(scores, 9, generator(1, device))
    assert torch.equal(sample_visible(scores, 9, generator(1, device), counts=full), expected)


def test_a_count_changes_how_many_are_drawn_not_which_come_first(device):
    scores = torch.rand(8, 30, generator=generator()).to(device)
    counts = torch.arange(1, 9, device=device)
    few = sample_visible(scores, 8, generator(4, device), counts=counts)
    for row in range(8):
        alone = sample_visible(scores, int(counts[row]), generator(4, device))[row]
        assert torch.equal(few[row, : counts[row]], alone)


@pytest.mark.parametrize(
    ("counts", "error", "words"),
    [
        (torch.tensor([1, 3]), ValueError, ["counts[1] = 3", "num_visible = 2"]),
        (torch.tensor([-1, 2]), ValueError, ["counts[0] = -1"]),
        (torch.tensor([1]), ValueError, ["counts has shape [1]", "[2]"]),
        (torch.tensor([1.0, 1.0]), TypeError, ["counts has dtype torch.float32"]),
    ],
)
def test_bad_counts_are_named(counts, error, words):
    with pytest.raises(error) as caught:
        sample_visible(torch.rand(2, 4), 2, counts=counts)
    for word in words:
        assert word in str(caught.value)


def test_too_long_rows_run_the_reference(device, monkeypatch, fresh_plans):
    monkeypatch.setattr(module, "LONGEST", 8)
    monkeypatch.setattr(module._draw, "launch", None)
    assert sample_visible(torch.ones(2, 9, device=device), 4).shape == (2, 4)


def test_classes_of_a_long_row_follow_multinomial(device):
    """1024 patches with only eight different scores: ten rows are as significant as thousands of short ones."""
    patches, num_visible = 1024, 300
    members = torch.arange(patches) % len(UNEVEN)
    scores = torch.tensor(UNEVEN)[members]
    sizes = torch.nn.functional.one_hot(members, len(UNEVEN)).double()
    theirs = torch.multinomial(scores.expand(4000, -1), num_visible, generator=generator(2))
    theirs = indicators(theirs, patches) @ sizes
    rows = 10
    ours = sample_visible(scores.expand(rows, -1).contiguous().to(device), num_visible, generator(1, device))
    ours = indicators(ours.cpu(), patches) @ sizes
    difference = (ours.mean(0) - theirs.mean(0))[:-1]  # the last is what the others leave
    covariance = torch.cov(theirs.T)[:-1, :-1] * (1 / rows + 1 / len(theirs))
    assert difference @ torch.linalg.solve(covariance, difference) < CRITICAL[len(UNEVEN) - 1]


@pytest.mark.parametrize("num_visible", [2, 5])
def test_inclusion_follows_multinomial(device, num_visible):
    """Hotelling's two-sample test: the inclusions of one row are not independent of each other."""
    rows, patches = 40_000, len(UNEVEN)
    scores = torch.tensor(UNEVEN, device=device).expand(rows, -1).contiguous()
    ours = indicators(sample_visible(scores[: rows // FEWER], num_visible, generator(1, device)), patches)
    theirs = indicators(torch.multinomial(scores, num_visible, generator=generator(2, device)), patches)
    difference = (ours.mean(0) - theirs.mean(0))[:-1]  # the last is what the others leave
    # Both samples have the same covariance; the larger sample estimates it well.
    covariance = torch.cov(theirs.T)[:-1, :-1] * (1 / len(ours) + 1 / len(theirs))
    statistic = difference @ torch.linalg.solve(covariance, difference)
    assert statistic < CRITICAL[patches - 1]


@pytest.mark.parametrize("scale", [1.0, 1e-6, 250.0])
def test_sets_follow_successive_draws_exactly(device, scale):
    """Every set of 3 out of 5, its probability summed over the orders it can be drawn in."""
    weights = (0.5, 0.25, 0.12, 0.08, 0.05)
    probability: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(5), 3):
        product, left = 1.0, 1.0
        for j in order:
            product *= weights[j] / left
            left -= weights[j]
        chosen = tuple(sorted(order))
        probability[chosen] = probability.get(chosen, 0.0) + product
    assert sum(probability.values()) == pytest.approx(1)

    rows = 40_000 // FEWER
    scores = scale * torch.tensor(weights, device=device)
    drawn = sample_visible(scores.expand(rows, -1), 3, generator(3, device)).cpu()
    counts = dict.fromkeys(probability, 0)
    for chosen, count in zip(*torch.unique(drawn, dim=0, return_counts=True), strict=True):
        counts[tuple(chosen.tolist())] += int(count)
    if rows * min(probability.values()) > 1:  # otherwise the chi-square distribution does not apply
        statistic = sum((counts[s] - rows * p) ** 2 / (rows * p) for s, p in probability.items())
        assert statistic < CRITICAL[len(probability) - 1]

    included = indicators(drawn, 5).mean(0)
    for j in range(5):
        expected = sum(p for s, p in probability.items() if j in s)
        assert abs(included[j] - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5


def test_zero_scores_come_after_all_positive_ones_and_evenly(device):
    rows, patches, positive = 20_000 // FEWER, 16, [1, 6, 7, 12]
    scores = torch.zeros(rows, patches, device=device)
    scores[:, positive] = torch.tensor([1.0, 1e-30, 5.0, 1e-3], device=device)
    few = sample_visible(scores[:1000], 3, generator(0, device))
    assert torch.isin(few, torch.tensor(positive, device=device)).all()
    exact = sample_visible(scores[:1000], 4, generator(0, device))
    assert (exact == torch.tensor(positive, device=device)).all()
    included = indicators(sample_visible(scores, 9, generator(0, device)), patches)
    assert (included[:, positive] == 1).all()
    others = included[:, [j for j in range(patches) if j not in positive]]
    difference = (others.mean(0) - 5 / 12)[:-1]
    statistic = difference @ torch.linalg.solve(torch.cov(others.T)[:-1, :-1] / rows, difference)
    assert statistic < CRITICAL[11]


def test_negative_scores_count_as_zero(device):
    scores = torch.tensor([[1.0, -1.0, 2.0, -5.0]], device=device).expand(50, -1)
    drawn = sample_visible(scores, 2, generator(0, device))
    assert (drawn == torch.tensor([0, 2], device=device)).all()


def test_all_patches_visible_is_arange(device):
    scores = torch.rand(4, 12, generator=generator()).to(device)
    scores[0] = 0
    assert (sample_visible(scores, 12, generator(0, device)) == torch.arange(12, device=device)).all()


def test_no_rows(device):
    assert sample_visible(torch.zeros(0, 12, device=device), 3).shape == (0, 3)


def test_a_nan_score_counts_as_zero(device):
    nan = float("nan")
    scores = torch.tensor([[1.0, nan, 2.0, nan]], device=device).expand(50, -1)
    drawn = sample_visible(scores, 2, generator(0, device))
    assert (drawn == torch.tensor([0, 2], device=device)).all()


def test_nan_and_0_are_alike(device):
    scores = torch.tensor([[float("nan"), 0.0]], device=device).expand(40, -1)
    drawn = sample_visible(scores, 1, generator(0, device))
    assert 5 < (drawn == 0).sum() < 35


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"scores": [[0.5, 0.5]]}, TypeError, ["scores is a list"]),
        ({"num_visible": 2.0}, TypeError, ["num_visible = 2.0"]),
        ({"generator": 5}, TypeError, ["generator is a int"]),
        ({"scores": torch.rand(2, 4, device="meta")}, ValueError, ["generator is on cpu", "scores is on meta"]),
    ],
)
def test_invalid_arguments_are_refused(given, error, words):
    given = {"scores": torch.rand(2, 4), "num_visible": 2, "generator": generator(), **given}
    with pytest.raises(error) as caught:
        sample_visible(**given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("scores", "num_visible", "words"),
    [
        (torch.rand(2, 3, 4), 1, ["torch.float32", "[2, 3, 4]", "[rows, patches]"]),
        (torch.rand(4), 1, ["[4]"]),
        (torch.ones(2, 4, dtype=torch.int64), 1, ["torch.int64"]),
        (torch.rand(2, 4), 5, ["num_visible = 5", "4 entries"]),
        (torch.rand(2, 4), 0, ["num_visible = 0", "4 entries"]),
        (torch.rand(2, 4), -1, ["num_visible = -1"]),
    ],
)
def test_errors_name_the_value(scores, num_visible, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the words follow
        sample_visible(scores, num_visible)
    for word in words:
        assert word in str(caught.value)

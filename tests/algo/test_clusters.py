"""Intervals that hold as often as they say, though judgements of one group go together."""

import math
import random
from collections.abc import Sequence

import pytest
import torch

from rlhf_ray.algo.clusters import BLOCKS, jackknife_of, mean_of, share_of, spearman, student_t


def wilson(correct: int, n: int) -> tuple[float, float, float]:
    """Of independent trials: the two shares that lie 1.96 of their own standard deviations from what was seen."""
    p = correct / n

    def end(outer: float) -> float:
        inner = p
        for _ in range(60):  # by halving
            middle = (inner + outer) / 2
            if abs(p - middle) > 1.96 * math.sqrt(middle * (1 - middle) / n):
                outer = middle
            else:
                inner = middle
        return inner

    return p, end(0.0), end(1.0)


def test_quantiles_of_students_t() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 1000: 1.962}
    for freedom, wanted in table.items():
        assert student_t(freedom) == pytest.approx(wanted, rel=4e-3)


def test_a_mean_by_hand() -> None:
    # mean 2; sums of deviations -2 and 2; se^2 = 2/1 * 8 / 16 = 1; t of one degree of freedom
    found = mean_of([1.0, 1.0, 3.0, 3.0], ["a", "a", "b", "b"])
    assert (found.value, found.count, found.groups) == (2.0, 4, 2)
    assert found.high == pytest.approx(2 + 12.706, abs=1e-3)


def test_of_one_group_nothing_is_known() -> None:
    assert mean_of([1.0, 2.0], ["a", "a"]).high == math.inf
    assert (share_of([1, 0], ["a", "a"]).low, share_of([1, 0], ["a", "a"]).high) == (0.0, 1.0)


def test_alone_in_their_groups_it_is_wilsons_with_t() -> None:
    right = [1.0] * 700 + [0.0] * 300
    found = share_of(right, range(1000))
    value, low, high = wilson(700, 1000)
    assert (found.value, found.low, found.high) == (value, pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


def test_the_same_judgement_ten_times_is_no_more_than_one() -> None:
    right = [1.0] * 70 + [0.0] * 30
    once, often = (
        share_of(right, range(100)),
        share_of([x for x in right for _ in range(10)], sorted([*range(100)] * 10)),
    )
    assert (often.low, often.high) == (pytest.approx(once.low, abs=2e-3), pytest.approx(once.high, abs=2e-3))


def test_all_right_is_not_certain() -> None:
    found = share_of([1.0] * 40, [i // 4 for i in range(40)])
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.6 < found.low < 0.75  # ten groups, not forty


@pytest.mark.parametrize(("groups", "size", "alike"), [(20, 14, 0.2), (150, 8, 0.1), (300, 3, 0.5), (200, 1, 0.0)])
def test_they_hold_95_times_of_100(groups: int, size: int, alike: float) -> None:
    """Shares of groups drawn from a beta distribution about 0.7, with a correlation of `alike` within a group."""
    rng = random.Random(f"{groups}/{size}")
    held, naive = 0, 0
    for _ in range(400):
        right, named = [], []
        for group in range(groups):
            p = 0.7
            if alike:
                a = (1 - alike) / alike
                p = rng.betavariate(0.7 * a, 0.3 * a)
            drawn = rng.randint(1, 2 * size - 1)
            right += [float(rng.random() < p) for _ in range(drawn)]
            named += [group] * drawn
        found = share_of(right, named)
        held += found.low <= 0.7 <= found.high
        _, low, high = wilson(int(sum(right)), len(right))
        naive += low <= 0.7 <= high
    assert 0.92 <= held / 400 <= 0.985
    if alike * size > 1:
        assert naive / 400 < 0.85  # what they would have been


def test_so_do_those_of_means() -> None:
    draw, held = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        common = torch.randn(25, generator=draw)
        values = (1 + common[:, None] + torch.randn(25, 6, generator=draw)).flatten()
        found = mean_of(values.tolist(), [i // 6 for i in range(150)])
        held += found.low <= 1 <= found.high
    assert 0.92 <= held / 400 <= 0.985


def test_the_jackknife_of_a_mean_is_the_means_own_interval() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    found = jackknife_of(lambda places: sum(values[p] for p in places) / len(places), range(4))
    plain = mean_of(values, range(4))
    assert found is not None
    assert (found.value, found.low, found.high) == (plain.value, pytest.approx(plain.low), pytest.approx(plain.high))
    assert jackknife_of(lambda places: None, range(4)) is None


def test_of_many_groups_the_jackknife_leaves_out_blocks_and_comes_to_the_same() -> None:
    draw, asked, groups = random.Random(0), 0, 5 * BLOCKS + 7
    named = [group for group in range(groups) for _ in range(draw.randint(1, 3))]
    common = [draw.gauss(0, 1) for _ in range(groups)]
    values = [common[group] + draw.gauss(0, 1) for group in named]

    def mean(places: Sequence[int]) -> float:
        nonlocal asked
        asked += 1
        return sum(values[p] for p in places) / len(places)

    found, plain = jackknife_of(mean, named), mean_of(values, named)
    assert asked == 1 + BLOCKS
    assert found is not None
    assert (found.groups, found.count) == (groups, len(values))
    assert found.high - found.low == pytest.approx(plain.high - plain.low, rel=0.15)
    assert jackknife_of(mean, named) == found  # though blocks are drawn


def test_intervals_from_blocks_hold_95_times_of_100() -> None:
    """A ratio of means over 300 groups of one to five, whose members go together."""
    held, draw = 0, random.Random(2)
    for _ in range(150):
        rows = list[tuple[int, float, float]]()
        for group in range(300):
            common = draw.gauss(3, 1)
            rows += [
                (group, common + draw.gauss(0, 1), 2 * common + draw.gauss(0, 1)) for _ in range(draw.randint(1, 5))
            ]
        named, x, y = zip(*rows, strict=True)
        found = jackknife_of(lambda places, x=x, y=y: sum(y[p] for p in places) / sum(x[p] for p in places), named)
        assert found is not None
        held += found.low <= 2 <= found.high
    assert 0.91 <= held / 150 <= 0.99


def test_it_holds_for_rank_correlations_of_grouped_samples() -> None:
    """Normal pairs with correlation 0.6, whose rank correlation is 6 / pi * asin(0.3)."""
    truth, held, draw = 6 / math.pi * math.asin(0.3), 0, torch.Generator().manual_seed(1)
    groups = [i // 8 for i in range(200)]
    for _ in range(300):
        common = torch.randn(2, 25, generator=draw).repeat_interleave(8, 1)
        own = torch.randn(2, 200, generator=draw)
        x, z = 0.4**0.5 * common + 0.6**0.5 * own
        y = 0.6 * x + 0.8 * z
        one, other = x.tolist(), y.tolist()
        found = jackknife_of(
            lambda places, a=one, b=other: spearman([a[p] for p in places], [b[p] for p in places]), groups
        )
        assert found is not None
        held += found.low <= truth <= found.high
    assert 0.91 <= held / 300 <= 0.985


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3], [10, 20, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1 2.5 2.5 4 and 1 2 3 4: deviations -1.5 0 0 1.5 and -1.5 -.5 .5 1.5
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1], [1, 2]) is None

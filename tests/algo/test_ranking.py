import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algo.ranking import (
    ReliabilityBin,
    bootstrap_mean_ci,
    distinct_n,
    expected_calibration_error,
    reliability_bins,
    slope_of,
)

quick = settings(deadline=None, max_examples=40)
predictions = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30)


@quick
@given(predictions, st.integers(1, 12))
def test_calibration_error_equals_the_textbook_loop(pairs: list[tuple[float, bool]], bins: int) -> None:
    total = 0.0
    for k in range(bins):
        here = [(p, y) for p, y in pairs if min(int(p * bins), bins - 1) == k]
        total += abs(sum(y for _, y in here) - sum(p for p, _ in here)) / len(pairs)
    probs, outcomes = zip(*pairs, strict=True)
    assert expected_calibration_error(probs, outcomes, bins) == pytest.approx(total, abs=1e-9)


def test_reliability_bins_equal_numbers_worked_by_hand() -> None:
    bars = reliability_bins([0.0, 0.1, 0.5, 0.9, 1.0], [0, 1, 1, 1, 0], bins=2)
    assert bars[0] == ReliabilityBin(0.0, 0.5, 2, pytest.approx(0.05), 0.5)
    assert bars[1] == ReliabilityBin(0.5, 1.0, 3, pytest.approx(0.8), pytest.approx(2 / 3))
    error = expected_calibration_error([0.0, 0.1, 0.5, 0.9, 1.0], [0, 1, 1, 1, 0], bins=2)
    assert error == pytest.approx(2 / 5 * 0.45 + 3 / 5 * (0.8 - 2 / 3))


def test_empty_bins_are_left_out_and_tensors_are_taken() -> None:
    bars = reliability_bins(torch.tensor([0.95, 0.05]), torch.tensor([True, False]))
    assert [(bar.low, bar.count, bar.observed) for bar in bars] == [(0.0, 1, 0.0), (0.9, 1, 1.0)]


def test_a_forecaster_who_knows_the_odds_is_calibrated() -> None:
    odds = random.Random(3)
    probs = [odds.random() for _ in range(20_000)]
    outcomes = [odds.random() < p for p in probs]
    assert expected_calibration_error(probs, outcomes) < 0.02
    assert expected_calibration_error([min(1.0, p + 0.2) for p in probs], outcomes) > 0.15


def test_a_probability_outside_0_and_1_is_refused() -> None:
    with pytest.raises(AssertionError, match="outside"):
        reliability_bins([1.2], [1])


def test_the_bootstrap_interval_is_that_of_the_normal_law_on_normal_values() -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 3
    low, high = bootstrap_mean_ci(x, seed=7)
    half = 1.96 * x.std(correction=0).item() / 20
    assert (low, high) == pytest.approx((x.mean().item() - half, x.mean().item() + half), abs=0.03)


def test_the_bootstrap_depends_on_its_seed_alone() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(2))
    first = bootstrap_mean_ci(values, seed=1)
    torch.rand(3)
    assert first == bootstrap_mean_ci(values, seed=1)
    assert first != bootstrap_mean_ci(values, seed=2)
    assert bootstrap_mean_ci([0.25] * 5, seed=1) == (0.25, 0.25)


def test_the_bootstrap_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(5)
    intervals = [bootstrap_mean_ci(torch.rand(40, generator=generator), seed=s, n=300) for s in range(150)]
    assert 0.88 <= sum(low <= 0.5 <= high for low, high in intervals) / 150 <= 0.99


def test_distinct_n_equals_numbers_worked_by_hand() -> None:
    texts = [["a", "b", "a", "b"], ["a", "b"], ["c"]]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 2 / 4  # ab, ba, ab; ab; and none that spans two texts
    assert distinct_n(texts, 5) == 0.0
    assert distinct_n([], 1) == 0.0


@pytest.mark.parametrize(("right", "wrong"), [(300, 100), (20, 5), (50, 0)])
def test_choices_of_one_margin_confirm_the_log_odds_of_their_counts_less_the_error(right: int, wrong: int) -> None:
    """By hand: Firth's correction adds half a choice to each side, and the information is N p (1 - p)."""
    p = (right + 0.5) / (right + wrong + 1)
    slope = math.log(p / (1 - p))
    bound = slope - 1.644854 / math.sqrt((right + wrong) * p * (1 - p))
    margins = [1.0] * right + [-1.0] * wrong
    assert slope_of(margins, range(right + wrong)).confirmed == pytest.approx(bound, rel=1e-5)
    assert slope_of(margins, range(right + wrong)).value == pytest.approx(slope, rel=1e-5)
    assert slope_of([10 * margin for margin in margins], range(right + wrong)).confirmed == pytest.approx(bound / 10)


def test_choices_that_go_together_count_as_their_group_does() -> None:
    right, wrong = [1.0] * 15, [-1.0] * 5
    apart = slope_of(right + wrong, range(20)).confirmed
    together = slope_of(right + wrong, [place // 5 for place in range(20)]).confirmed
    assert together == 0 < apart


def test_groups_that_are_all_alike_confirm_no_more_than_choices_that_are_apart() -> None:
    alike = [3.0, 3.0, 3.0, -3.0] * 25
    assert slope_of(alike, [place // 4 for place in range(100)]).confirmed == slope_of(alike, range(100)).confirmed


@pytest.mark.parametrize("n", [3, 5, 10, 20])
def test_a_handful_of_coins_is_believed_in_one_of_twenty_cases_at_most(n: int) -> None:
    draw = random.Random(n)
    worlds = [[abs(draw.gauss(0, 1)) * draw.choice((-1, 1)) for _ in range(n)] for _ in range(200)]
    assert sum(slope_of(margins, range(n)).confirmed > 0 for margins in worlds) <= 10
    assert slope_of([1.0] * min(n, 5), range(min(n, 5))).confirmed == 0  # all right, as coins are now and then


@pytest.mark.parametrize("seed", range(5))
def test_the_slope_of_coin_tosses_is_next_to_nothing_and_of_true_log_odds_next_to_one(seed: int) -> None:
    draw = random.Random(seed)
    logits = [abs(draw.gauss(0, 2)) for _ in range(4000)]
    coins = [logit * draw.choice((-1, 1)) for logit in logits]
    assert slope_of(coins, range(4000)).confirmed < 0.03
    true = [logit if draw.random() < 1 / (1 + math.exp(-logit)) else -logit for logit in logits]
    assert slope_of(true, range(4000)).confirmed == pytest.approx(1, abs=0.12)
    assert slope_of([3 * logit for logit in true], range(4000)).value == pytest.approx(1 / 3, abs=0.045)


def test_margins_that_say_nothing_or_are_not_there_confirm_nothing() -> None:
    assert slope_of([], []).confirmed == 0
    assert slope_of([0.0, 0.0], [1, 2]).confirmed == 0
    assert slope_of([-1.0, -2.0], [1, 2]).confirmed == 0

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algo.shaping import RunningNorm, end_penalty, overlong_penalty, standardised, token_rewards

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31 - 1)
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)
numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20)


@quick
@given(lengths, seeds, st.floats(0, 1), st.integers(0, 3))
def test_token_rewards_equal_the_textbook_loop(lengths: list[int], seed: int, coef: float, extra: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + extra
    scores = torch.randn(len(lengths), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    kl = torch.randn(len(lengths), width, generator=generator).masked_fill(~mask, torch.nan)
    wanted = torch.zeros(len(lengths), width)
    for row, n in enumerate(lengths):
        for t in range(n):
            wanted[row, t] = -coef * kl[row, t] + (scores[row] if t == n - 1 else 0.0)
    torch.testing.assert_close(token_rewards(scores, kl, mask, coef=coef), wanted)


def test_token_rewards_equal_numbers_worked_by_hand() -> None:
    kl = torch.tensor([[0.5, -1.0, 2.0], [3.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = token_rewards(torch.tensor([1.0, -2.0]), kl, mask, coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 0.8], [-2.3, 0.0, 0.0]]))


def test_a_response_without_a_token_is_refused() -> None:
    with pytest.raises(AssertionError, match="without a token"):
        token_rewards(torch.ones(1), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool), coef=0.1)


def test_the_end_penalty_falls_on_cut_responses_only() -> None:
    scores = end_penalty(torch.tensor([1.0, -1.0, 0.5]), torch.tensor([True, False, False]), 0.75)
    assert scores.tolist() == [1.0, -1.75, -0.25]


@quick
@given(st.lists(numbers, min_size=1, max_size=5))
def test_a_running_norm_equals_one_look_at_everything(batches: list[list[float]]) -> None:
    norm = RunningNorm()
    for batch in batches:
        norm = norm.updated(torch.tensor(batch))
    seen = [x for batch in batches for x in batch]
    assert norm.count == len(seen)
    assert norm.mean == pytest.approx(statistics.fmean(seen), abs=1e-6)
    assert norm.std == pytest.approx(statistics.pstdev(seen), abs=1e-4)


def test_a_running_norm_equals_numbers_worked_by_hand() -> None:
    norm = RunningNorm().updated(torch.tensor([1.0, 3.0])).updated(torch.tensor([5.0, 7.0]))
    assert (norm.count, norm.mean, norm.m2) == (4, 4.0, 20.0)  # std = sqrt 5
    x = torch.tensor([4.0, 4.0 + math.sqrt(5), 1e6, -1e6])
    torch.testing.assert_close(norm.normalise(x, 5.0), torch.tensor([0.0, 1.0, 5.0, -5.0]))
    assert norm.normalise(x, None)[2] > 1e5


def test_a_running_norm_of_equal_numbers_only_centres() -> None:
    norm = RunningNorm().updated(torch.full((8,), 0.1))
    torch.testing.assert_close(norm.normalise(torch.tensor([0.1, 1.1]), None), torch.tensor([0.0, 1.0]))


def test_an_update_leaves_the_old_norm_as_it_was_and_an_empty_one_changes_nothing() -> None:
    norm = RunningNorm(2, 2.0, 2.0)
    assert norm.updated(torch.tensor([9.0])) != norm == RunningNorm(2, 2.0, 2.0)
    assert norm.updated(torch.empty(0)) == norm


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_never_enters_a_running_norm(bad: float) -> None:
    with pytest.raises(AssertionError, match="not finite"):
        RunningNorm().updated(torch.tensor([1.0, bad]))


def test_a_small_spread_is_stretched_no_further_than_to_the_least_that_counts() -> None:
    x = torch.tensor([-0.1, 0.1])
    norm = RunningNorm().updated(x)
    torch.testing.assert_close(norm.normalise(x, None), torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(norm.normalise(x, None, least_std=0.5), torch.tensor([-0.2, 0.2]))


def test_nothing_is_normalised_before_anything_was_seen() -> None:
    with pytest.raises(AssertionError, match="nothing seen"):
        RunningNorm().normalise(torch.ones(1), None)


def test_the_overlong_penalty_grows_over_the_last_tokens_allowed() -> None:
    found = overlong_penalty(torch.tensor([1, 12, 13, 14, 16, 20]), longest=16, buffer=4)
    assert found.tolist() == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]


def test_scores_standardised_by_batch_and_by_group_worked_by_hand() -> None:
    scores, groups = torch.tensor([1.0, 3.0, 10.0, 10.0]), torch.tensor([5, 5, 2, 2])
    assert standardised(scores, groups).tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0])
    wanted = [(x - 6.0) / statistics.pstdev([1, 3, 10, 10]) for x in (1, 3, 10, 10)]
    assert standardised(scores).tolist() == pytest.approx(wanted)
    assert standardised(scores, groups, least_std=2.0).tolist() == pytest.approx([-0.5, 0.5, 0.0, 0.0])

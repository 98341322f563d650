import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algo.groups import centred, grpo, remax, rloo, spread_of
from tests.algo.batches import grouped, parity

Estimator = Callable[[Tensor, Tensor], Tensor]
ALL = [rloo, grpo, centred]


def textbook(name: str, own: float, others: list[float]) -> float:
    """One response's advantage from its return and those of the others of its group."""
    everybody = [own, *others]
    match name:
        case "rloo":
            return own - statistics.fmean(others)
        case "grpo":
            return (own - statistics.fmean(everybody)) / (statistics.stdev(everybody) + 1e-6)
        case "centred":
            return own - statistics.fmean(everybody)
    raise AssertionError(name)


@pytest.mark.parametrize("estimator", ALL)
@parity
@given(grouped())
def test_each_equals_the_textbook_loop(estimator: Estimator, batch: tuple[Tensor, Tensor]) -> None:
    returns, groups = batch
    found = estimator(returns, groups)
    for i, own in enumerate(returns.tolist()):
        others = [returns[j].item() for j in range(len(returns)) if j != i and groups[j] == groups[i]]
        assert found[i].item() == pytest.approx(textbook(estimator.__name__, own, others), abs=1e-6)


@pytest.mark.parametrize("estimator", ALL)
@parity
@given(grouped(), st.floats(-50, 50))
def test_a_constant_added_to_a_group_changes_nothing(
    estimator: Estimator, batch: tuple[Tensor, Tensor], constant: float
) -> None:
    returns, groups = batch
    shifted = returns + constant * (groups == groups[0])
    torch.testing.assert_close(estimator(shifted, groups), estimator(returns, groups), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("estimator", ALL)
def test_a_group_whose_returns_are_equal_teaches_nothing(estimator: Estimator) -> None:
    found = estimator(torch.tensor([0.7, 0.7, 0.7, 1.0, 2.0]), torch.tensor([3, 3, 3, 1, 1]))
    assert found[:3].abs().max() < 1e-6
    assert found[3:].abs().min() > 0.1


def test_numbers_worked_by_hand() -> None:
    returns, groups = torch.tensor([1.0, 2.0, 6.0, 5.0, 3.0]), torch.tensor([0, 0, 0, 1, 1])
    # others' means: 4, 3.5, 1.5; 3, 5
    torch.testing.assert_close(rloo(returns, groups), torch.tensor([-3.0, -1.5, 4.5, 2.0, -2.0]))
    # means 3 and 4
    torch.testing.assert_close(centred(returns, groups), torch.tensor([-2.0, -1.0, 3.0, 1.0, -1.0]))
    # variances with Bessel's correction: (4 + 1 + 9) / 2 = 7 and 2
    wanted = torch.tensor([-2.0, -1.0, 3.0, 1.0, -1.0]) / torch.tensor([7.0, 7.0, 7.0, 2.0, 2.0]).sqrt()
    torch.testing.assert_close(grpo(returns, groups), wanted, atol=1e-5, rtol=1e-5)
    assert spread_of(returns, groups).tolist() == pytest.approx([math.sqrt(14 / 3)] * 3 + [1.0] * 2)


def test_remax_subtracts_what_the_likeliest_response_earned() -> None:
    assert remax(torch.tensor([1.0, 0.25]), torch.tensor([0.5, 0.5])).tolist() == [0.5, -0.25]


def test_leaving_one_out_makes_the_baseline_independent_of_the_response() -> None:
    groups = torch.zeros(3, dtype=torch.long)
    low, high = (rloo(torch.tensor([own, 2.0, 4.0]), groups)[0].item() for own in (0.0, 10.0))
    assert (low, high) == (-3.0, 7.0)  # the same 3 was subtracted

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.algo.disagreement import preference_disagreement


def test_two_models_that_are_sure_of_opposite_orders_disagree_most() -> None:
    assert preference_disagreement(torch.tensor([[50.0, -50.0], [-50.0, 50.0]])) == pytest.approx(0.25)


def test_models_that_give_the_same_preferences_do_not_disagree() -> None:
    assert preference_disagreement(torch.tensor([[1.0, 2.0, 0.5], [11.0, 12.0, 10.5]])) == pytest.approx(0, abs=1e-12)


def test_three_answers_by_hand() -> None:
    """log 3 apart: preferred with 3/4. One model: (3/4, 3/4, 1/2), the other (1/4, 1/2, 3/4) of pairs 01, 02, 12."""
    apart = math.log(3)
    scores = torch.tensor([[apart, 0.0, 0.0], [0.0, apart, 0.0]], dtype=torch.float64)
    # pair 01: 3/4 and 1/4, variance 1/16; 02: 3/4 and 1/2, 1/64; 12: 1/2 and 3/4, 1/64
    assert preference_disagreement(scores) == pytest.approx((1 / 16 + 1 / 64 + 1 / 64) / 3)


@given(
    st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=2, max_size=5), st.permutations(range(3))
)
def test_neither_the_order_of_answers_nor_what_a_model_adds_counts(rows: list[list[float]], order: list[int]) -> None:
    scores = torch.tensor(rows, dtype=torch.float64)
    moved = scores[:, order] + torch.arange(len(rows))[:, None]
    assert preference_disagreement(moved) == pytest.approx(preference_disagreement(scores), abs=1e-9)

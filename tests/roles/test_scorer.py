"""A scorer answers with as many finite rewards as exchanges, or with an error."""

import pytest

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.roles.scorer import Scorer
from tests.roles.fakes import LengthScorer, make_exchange


class Says:
    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def score(self, _: object) -> list[float]:
        return self.scores


def test_rewards_come_in_the_order_of_the_exchanges() -> None:
    assert Scorer(LengthScorer()).score([make_exchange("four"), make_exchange("no")]) == [4.0, 2.0]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_not_finite_is_an_error_that_names_the_prompt(score: float) -> None:
    with pytest.raises(InfrastructureError, match=r"scorer-0 .* prompt p7 "):
        Scorer(Says(score), name="scorer-0").score([make_exchange(prompt_id="p7")])


@pytest.mark.parametrize("scores", [[], [1.0, 2.0]])
def test_a_wrong_number_of_rewards_is_an_error(scores: list[float]) -> None:
    with pytest.raises(InfrastructureError, match=f"given 1 exchanges and scored {len(scores)}"):
        Scorer(Says(*scores)).score([make_exchange()])

"""Engine against learner is told for tokens of the same weights; what older weights sampled is told apart."""

import pytest
import torch

from rlhf_ray.roles.mismatch import behaviour_of, fresh_of, mismatch
from rlhf_ray.types import Rollout, Span


def rollout(*logprobs: float, weights_step: int, swaps: tuple[Span, ...] = ()) -> Rollout:
    return Rollout("r", "p", (1,), tuple(range(len(logprobs))), logprobs, weights_step, "stop", swaps)


ROLLOUTS = [
    rollout(-1.0, -2.0, -3.0, weights_step=4),
    rollout(-1.0, -1.0, weights_step=5),
    rollout(-1.0, -1.0, -1.0, weights_step=4, swaps=(Span(1, 5),)),
]
LIKE = torch.zeros(3, 3)
MASK = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])


def test_a_token_is_fresh_where_the_learners_own_weights_sampled_it() -> None:
    assert fresh_of(ROLLOUTS, 5, like=LIKE).tolist() == [[False] * 3, [True, True, False], [False, True, True]]
    assert fresh_of(ROLLOUTS, 4, like=LIKE).tolist() == [[True] * 3, [False] * 3, [True, False, False]]


def test_stale_tokens_are_no_mismatch() -> None:
    own = torch.full((3, 3), -1.0)
    own[1, 0] = -1.5
    behaviour = behaviour_of(ROLLOUTS, like=LIKE)
    unsure = torch.zeros_like(MASK)
    unsure[2, 2] = True
    told = mismatch(behaviour, own, unsure, MASK, fresh_of(ROLLOUTS, 5, like=LIKE))
    assert told["mismatch/max_abs"] == 0.5
    assert told["mismatch/kl"] == pytest.approx(0.5 / 3)
    assert told["mismatch/left_out"] == 1.0
    assert told["stale/max_abs"] == 2.0
    assert told["stale/kl"] == pytest.approx(-3.0 / 4)
    assert told["stale/share"] == 0.5


def test_where_all_are_fresh_or_all_are_stale_nothing_is_said_of_the_others() -> None:
    rows, unsure = [ROLLOUTS[0]], torch.zeros(1, 3, dtype=torch.bool)
    behaviour, mask = behaviour_of(rows, like=LIKE[:1]), MASK[:1]
    own = behaviour + 0.1
    fresh = mismatch(behaviour, own, unsure, mask, fresh_of(rows, 4, like=LIKE[:1]))
    stale = mismatch(behaviour, own, unsure, mask, fresh_of(rows, 5, like=LIKE[:1]))
    assert {name.split("/")[0] for name in fresh} == {"mismatch"}
    assert [name for name in stale if name.startswith("mismatch")] == ["mismatch/left_out"]
    assert stale["stale/share"] == 1.0

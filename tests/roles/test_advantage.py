"""Which formula a config's words choose, and what it is applied to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.config import load_config
from rlhf_ray.roles.advantage import AdvantageEstimator, Responses
from rlhf_ray.types import Rollout

MASK = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
REWARDS = torch.tensor([[-0.1, 1.1], [3.0, 0.0], [0.0, 2.0], [0.5, 3.5]])
GROUPS = torch.tensor([0, 0, 1, 1])


def make_estimator(*overrides: str) -> AdvantageEstimator:
    return AdvantageEstimator(load_config(None, ["rollout.samples=2", "rollout.max_tokens=16", *overrides]))


def responses(**changes: Any) -> Responses:
    plain = {"groups": GROUPS, "lengths": torch.tensor([2, 1, 2, 2]), "finished": torch.ones(4, dtype=torch.bool)}
    return Responses(**{**plain, **changes})


def estimated(*overrides: str, **given: Tensor | None) -> Tensor:
    estimator = make_estimator("ppo.whiten=none", *overrides)
    plain: dict[str, Any] = {"numbers": GROUPS, "values": None, "baseline": None}
    return estimator.estimate(REWARDS, MASK, **{**plain, **given})[0]


def test_responses_to_one_prompt_make_a_group() -> None:
    rollouts = [Rollout(str(i), prompt, (1,), (2,) * n, (0.0,) * n, 0, end) for i, (prompt, n, end) in enumerate(
        [("b", 3, "stop"), ("a", 1, "length"), ("b", 2, "stop")]
    )]  # fmt: skip
    found = Responses.of(rollouts, torch.device("cpu"))
    assert found.groups.tolist() == [0, 1, 0]
    assert found.lengths.tolist() == [3, 1, 2]
    assert found.finished.tolist() == [True, False, True]


def test_each_word_chooses_its_formula() -> None:
    # returns 1, 3 and 2, 4
    wanted = {
        "reinforce": [[1.0, 1.0], [3.0, 0.0], [2.0, 2.0], [4.0, 4.0]],
        "reinforce_pp": [[1.0, 1.1], [3.0, 0.0], [2.0, 2.0], [4.0, 3.5]],
        "rloo": [[-2.0, -2.0], [2.0, 0.0], [-2.0, -2.0], [2.0, 2.0]],
        "dr_grpo": [[-1.0, -1.0], [1.0, 0.0], [-1.0, -1.0], [1.0, 1.0]],
        "reinforce_pp_baseline": [[-1.0, -1.0], [1.0, 0.0], [-1.0, -1.0], [1.0, 1.0]],
    }
    for name, rows in wanted.items():
        torch.testing.assert_close(estimated(f"ppo.advantage={name}"), torch.tensor(rows))
    torch.testing.assert_close(
        estimated("ppo.advantage=grpo"), torch.tensor(wanted["dr_grpo"]) / 2**0.5, rtol=1e-5, atol=1e-5
    )
    to_go = estimated("ppo.advantage=reinforce", "ppo.credit=to_go")
    torch.testing.assert_close(to_go, torch.tensor(wanted["reinforce_pp"]))
    greedy = estimated("ppo.advantage=remax", baseline=torch.ones(4))
    torch.testing.assert_close(greedy, torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0], [3.0, 3.0]]))
    with_critic = estimated("ppo.advantage=gae", "ppo.lam=1", values=torch.ones(4, 2))
    torch.testing.assert_close(with_critic, torch.tensor([[0.0, 0.1], [2.0, 0.0], [1.0, 1.0], [3.0, 2.5]]))


def test_advantages_are_whitened_over_the_batch_or_over_each_prompts_tokens() -> None:
    batch = estimated("ppo.advantage=dr_grpo", "ppo.whiten=batch")
    assert batch[MASK].mean().item() == pytest.approx(0.0, abs=1e-6)
    by_group = estimated("ppo.advantage=reinforce", "ppo.whiten=group")
    for rows in (slice(0, 2), slice(2, 4)):
        inside = by_group[rows][MASK[rows]]
        assert (inside.mean().item(), inside.std(unbiased=False).item()) == pytest.approx((0.0, 1.0), abs=1e-3)


def test_rewards_are_normalised_as_told_and_only_then_clipped_and_penalised() -> None:
    scores = torch.tensor([0.0, 2.0, 10.0, 30.0])
    plain = {"none": [0.0, 2.0, 10.0, 30.0], "group": [-1.0, 1.0, -1.0, 1.0]}
    for norm, wanted in plain.items():
        assert make_estimator(f"ppo.reward_norm={norm}").shape(scores, responses()).tolist() == pytest.approx(wanted)
    batch = make_estimator("ppo.reward_norm=batch").shape(scores, responses())
    assert (batch.mean().item(), batch.std(unbiased=False).item()) == pytest.approx((0.0, 1.0), abs=1e-6)
    clipped = make_estimator("ppo.reward_norm=group", "ppo.reward_clip=0.5").shape(scores, responses())
    assert clipped.tolist() == pytest.approx([-0.5, 0.5, -0.5, 0.5])
    ended = responses(finished=torch.tensor([True, False, True, True]))
    cut = make_estimator("ppo.reward_norm=none", "ppo.missing_end_penalty=3").shape(scores, ended)
    assert cut.tolist() == pytest.approx([0.0, -1.0, 10.0, 30.0])


def test_long_responses_lose_what_the_config_says() -> None:
    long = responses(lengths=torch.tensor([2, 12, 14, 16]))
    settings = ["ppo.reward_norm=none", "ppo.overlong_buffer=4", "ppo.overlong_penalty=2"]
    assert make_estimator(*settings).shape(torch.zeros(4), long).tolist() == pytest.approx([0.0, 0.0, -1.0, -2.0])
    by_token = make_estimator("ppo.reward_norm=none", "ppo.length_penalty=0.5").shape(torch.zeros(4), long)
    assert by_token.tolist() == pytest.approx([-1.0, -6.0, -7.0, -8.0])


def test_a_baseline_is_measured_by_what_the_responses_have_set() -> None:
    estimator = make_estimator("ppo.advantage=remax")
    estimator.shape(torch.tensor([0.0, 2.0, 0.0, 2.0]), responses())  # mean 1, std 1
    assert estimator.shape_baseline(torch.tensor([1.0, 3.0, 1.0, 1.0]), responses()).tolist() == [0.0, 2.0, 0.0, 0.0]
    assert estimator.reward_norm.count == 4


def test_with_value_norm_the_critic_learns_in_units_of_its_own_and_is_read_in_units_of_reward() -> None:
    estimator, mask = make_estimator("ppo.value_norm=true"), torch.ones(1, 4, dtype=torch.bool)
    outputs = torch.zeros(1, 4)
    assert torch.equal(estimator.values_of(outputs), outputs)  # nothing seen yet
    targets, old = estimator.critic_targets(torch.tensor([[10.0, 30.0, 10.0, 30.0]]), outputs, mask)  # mean 20, std 10
    torch.testing.assert_close(targets, torch.tensor([[-1.0, 1.0, -1.0, 1.0]]))
    torch.testing.assert_close(old, torch.full((1, 4), -2.0))  # what was 0 before is 0 still
    torch.testing.assert_close(estimator.values_of(targets), torch.tensor([[10.0, 30.0, 10.0, 30.0]]))
    again = make_estimator("ppo.value_norm=true")
    again.load(estimator.state())
    assert again.value_norm == estimator.value_norm

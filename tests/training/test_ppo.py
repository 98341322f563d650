"""The page: what is called in which order, and what a step asks for."""

from typing import Any

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.training.ppo import PPO, describe, permuted
from tests.training.fakes import Roles, Tokenizer, make_prompts, stale


def make_ppo(roles: Any, *overrides: str) -> PPO:
    config = load_config(
        None,
        ["run.id=t", "rollout.prompts=4", "rollout.samples=2", "rollout.max_tokens=8", "ppo.minibatch=4", *overrides],
    )
    return PPO(roles, prompts=PromptStream(make_prompts(12), seed=0), tokenizer=Tokenizer(), config=config)


def test_a_step_generates_scores_prepares_learns_and_publishes_in_this_order() -> None:
    roles = Roles()
    make_ppo(roles).step(0)
    assert roles.events == ["generate", "score", "prepare", "update", "publish"]


def test_each_rollout_goes_to_the_learner_with_its_own_reward() -> None:
    roles = Roles()
    make_ppo(roles).step(0)
    rollouts, rewards = roles.prepared
    assert rewards == [float(rollout.response_ids[0]) for rollout in rollouts]


def test_a_step_asks_for_every_sample_once_and_a_redone_step_asks_the_same() -> None:
    roles = Roles()
    ppo = make_ppo(roles)
    ppo.step(1 - 1)
    first = roles.requests
    assert len({request.rollout_id for request in first}) == len({request.seed for request in first}) == 8
    roles.weights_step = 0
    ppo.step(0)
    assert roles.requests == first


def test_the_metrics_hold_every_phase_and_what_the_roles_said() -> None:
    metrics = make_ppo(Roles()).step(0).metrics
    wanted = {f"time/{phase}_s" for phase in ("rollout", "score", "prepare", "learn", "sync", "step")}
    wanted |= {
        "objective/kl",
        "loss/policy_avg",
        "sync/verified",
        "rollout/tokens_per_s",
        "episode",
        "rollout/generators",
    }
    assert wanted <= metrics.keys()
    assert metrics["time/step_s"] >= metrics["time/rollout_s"] + metrics["time/learn_s"]
    assert metrics["rollout/staleness_max"] == 0


def test_staleness_is_the_step_less_the_step_that_sampled() -> None:
    roles = Roles()
    rollouts = make_ppo(roles).step(0).rollouts
    assert describe([stale(rollouts[0], 2), rollouts[1]], 1.0, 0)["rollout/staleness_max"] == 2


def test_the_control_permutes_the_same_rewards() -> None:
    rewards = [float(i) for i in range(32)]
    mixed = permuted(rewards, seed=0, step=3)
    assert sorted(mixed) == rewards
    assert sum(a == b for a, b in zip(mixed, rewards, strict=True)) < 8
    assert mixed == permuted(rewards, seed=0, step=3) != permuted(rewards, seed=0, step=4)


def test_with_the_control_on_the_learner_gets_permuted_rewards() -> None:
    roles = Roles()
    make_ppo(roles, "ppo.permute_rewards=true").step(0)
    rollouts, rewards = roles.prepared
    true = [float(rollout.response_ids[0]) for rollout in rollouts]
    assert sorted(rewards) == sorted(true)
    assert rewards == pytest.approx(permuted(true, seed=0, step=0))


def test_remax_also_asks_for_the_likeliest_answer_to_each_prompt_and_hands_it_to_each_rollout() -> None:
    roles = Roles()
    make_ppo(roles, "ppo.advantage=remax").step(0)
    assert roles.events == ["generate", "score", "generate", "score", "prepare", "update", "publish"]
    assert [sampling.temperature for sampling in roles.sampling] == [1.0, 0.0]
    rollouts, greedy = roles.prepared[0], roles.greedy
    assert greedy is not None
    assert [r.prompt_id for r in greedy.rollouts] == [r.prompt_id for r in rollouts]
    assert list(greedy.scores) == [float(r.response_ids[0]) for r in greedy.rollouts]
    assert len(roles.requests) == 4
    assert not {r.id for r in greedy.rollouts} & {r.id for r in rollouts}


def test_dynamic_sampling_asks_on_where_answers_earn_the_same() -> None:
    roles = Roles()
    roles.score = lambda exchanges: [0.0] * len(exchanges)  # type: ignore[method-assign] # nothing teaches
    metrics = make_ppo(roles, "rollout.dynamic_sampling=2").step(0).metrics
    assert roles.events.count("generate") == 3
    assert len(roles.prepared[0]) == 8
    assert metrics["rollout/passed_over"] >= 4

"""Prompts that teach nothing make room for others, and a step keeps its size."""

from collections.abc import Sequence

import pytest

from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.errors import InfrastructureError
from rlhf_ray.training.replacing import Answers, Replacing, joined, spare_prompts
from rlhf_ray.types import Exchange, Prompt, Rollout
from tests.training.fakes import make_prompts


def answers(prompts: Sequence[Prompt]) -> Answers:
    """Two each; to every third prompt both earn the same."""
    rollouts = [Rollout(f"{p.id}/{n}", p.id, (1,), (2,), (0.0,), 0, "stop") for p in prompts for n in range(2)]
    rewards = [0.5 if int(p.id[1:]) % 3 == 0 else float(n) for p in prompts for n in range(2)]
    return Answers(rollouts, [Exchange(p, "x") for p in prompts for _ in range(2)], rewards)


def ids(found: Answers) -> list[str]:
    return [group.rollouts[0].prompt_id for group in found.by_prompt()]


def test_prompts_that_teach_nothing_are_replaced_until_the_step_is_full() -> None:
    prompts = make_prompts(12)
    asked: list[list[str]] = []

    def ask(some: Sequence[Prompt]) -> Answers:
        asked.append([prompt.id for prompt in some])
        return answers(some)

    found, passed_over = Replacing(ask, [prompts[6:8], prompts[8:10], prompts[10:]]).uniform(answers(prompts[:4]))
    assert ids(found) == ["p1", "p2", "p7", "p8"]
    assert asked == [["p6", "p7"], ["p8"]]  # no more than is missing, and none once nothing is
    assert passed_over == 3


def test_what_is_still_missing_is_filled_with_what_was_passed_over_first() -> None:
    prompts = make_prompts(12)
    found, passed_over = Replacing(answers, [[prompts[6], prompts[9]]]).uniform(answers(prompts[:4]))
    assert ids(found) == ["p1", "p2", "p0", "p3"]
    assert passed_over == 2


def test_a_try_that_drew_nothing_new_is_passed_by() -> None:
    prompts = make_prompts(12)
    asked: list[int] = []

    def ask(some: Sequence[Prompt]) -> Answers:
        asked.append(len(some))
        return answers(some)

    found, _ = Replacing(ask, [[], prompts[7:9]]).uniform(answers(prompts[:4]))
    assert ids(found) == ["p1", "p2", "p7", "p8"]
    assert asked == [2]


def test_rollouts_texts_and_rewards_stay_in_one_order() -> None:
    prompts = make_prompts(5)
    whole = joined([answers(prompts[1:3]), answers(prompts[4:])])
    for rollout, exchange in zip(whole.rollouts, whole.exchanges, strict=True):
        assert rollout.prompt_id == exchange.prompt.id
    assert len(whole.rewards) == 6


def test_spares_are_new_to_the_step_and_the_same_for_the_same_step() -> None:
    stream = PromptStream(make_prompts(20), seed=0)
    used = stream.batch(3, 8)

    def spares(step: int) -> list[list[str]]:
        spare = stream.in_another_order()
        return [[p.id for p in some] for some in spare_prompts(spare, used, step=step, tries=3, n=8)]

    found = spares(3)
    assert found == spares(3) != spares(4)
    flat = [name for some in found for name in some]
    assert len(flat) == len(set(flat))
    assert not set(flat) & {prompt.id for prompt in used}


def lacking(prompts: Sequence[Prompt]) -> Answers:
    """The second answer to every third prompt has no reward."""
    whole = answers(prompts)
    rewards = [
        None if i % 2 and int(r.prompt_id[1:]) % 3 == 0 else x
        for i, (r, x) in enumerate(zip(whole.rollouts, whole.rewards, strict=True))
    ]
    return Answers(whole.rollouts, whole.exchanges, rewards)


def test_a_prompt_without_all_its_rewards_is_replaced_by_one_with_them() -> None:
    prompts = make_prompts(12)
    found = Replacing(lacking, [prompts[6:8], prompts[8:10]]).unrewarded(lacking(prompts[:4]), why=str)
    assert ids(found) == ["p1", "p2", "p7", "p8"]
    assert None not in found.rewards


def test_a_step_that_cannot_be_filled_with_rewards_fails_and_says_why() -> None:
    prompts = make_prompts(12)
    replacing = Replacing(lacking, [[prompts[6]], [prompts[9]]])
    with pytest.raises(
        InfrastructureError, match=r"4 prompts and only 2 have all their rewards, 4 have not \(judge/timeouts 3\)"
    ):
        replacing.unrewarded(lacking(prompts[:4]), why=lambda: "judge/timeouts 3")


def test_where_nothing_is_missing_nothing_is_asked() -> None:
    first = answers(make_prompts(4))
    assert Replacing(lambda _: pytest.fail("asked"), []).unrewarded(first, why=str) is first


def test_in_dynamic_sampling_a_prompt_without_a_reward_fills_nothing_up() -> None:
    prompts = make_prompts(12)
    found, passed_over = Replacing(lacking, [[prompts[6]]]).uniform(answers(prompts[:4]))
    assert ids(found) == ["p1", "p2", "p0", "p3"]
    assert passed_over == 1

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.prompts import PromptStream, distinct, rollout_seed
from rlhf_ray.errors import DataError
from rlhf_ray.types import Message, Prompt


def make_prompts(n: int) -> list[Prompt]:
    return [Prompt(f"p{index}", (Message("user", f"Question {index}?"),), f"p{index}") for index in range(n)]


def test_a_batch_depends_only_on_seed_and_step() -> None:
    prompts = make_prompts(50)
    stream = PromptStream(prompts, seed=3)
    forwards = [stream.batch(step, 8) for step in range(20)]
    backwards = [PromptStream(prompts, seed=3).batch(step, 8) for step in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards[0] != PromptStream(prompts, seed=4).batch(0, 8)


def test_an_order_once_published_stays() -> None:
    ids = [prompt.id for prompt in PromptStream(make_prompts(10), seed=0).batch(1, 4)]
    assert ids == ["p9", "p3", "p8", "p6"]
    assert rollout_seed("laptop", 3, "p17", 0) == 1513528653


@given(st.integers(1, 40), st.data())
def test_no_prompt_comes_twice_within_an_epoch_nor_within_a_batch(total: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, total))
    stream = PromptStream(make_prompts(total), seed=0)
    per_epoch = total // n
    for epoch in range(3):
        batches = [stream.batch(epoch * per_epoch + place, n) for place in range(per_epoch)]
        ids = [prompt.id for batch in batches for prompt in batch]
        assert len(ids) == len(set(ids)) == per_epoch * n


def test_every_epoch_has_another_order_and_every_prompt_has_its_turn() -> None:
    stream = PromptStream(make_prompts(10), seed=0)
    epochs = [stream.batch(step, 10) for step in range(2)]
    assert epochs[0] != epochs[1]
    assert {prompt.id for step in range(40) for prompt in stream.batch(step, 6)} == {f"p{n}" for n in range(10)}


def test_more_prompts_a_step_than_there_are_is_an_error_with_the_way_out() -> None:
    with pytest.raises(DataError, match=r"lower rollout\.prompts or give more data"):
        PromptStream(make_prompts(3), seed=0).batch(0, 4)


def test_prompts_of_one_name_are_refused_until_made_distinct() -> None:
    twice = [*make_prompts(3), *make_prompts(2)]
    with pytest.raises(AssertionError, match="distinct ids"):
        PromptStream(twice, seed=0)
    assert distinct(twice) == make_prompts(3)


def test_rollout_seeds_fit_31_bits_and_differ_in_every_part_of_the_identity() -> None:
    identities = [
        (run, step, prompt, sample)
        for run in ("a", "b")
        for step in (1, 11)
        for prompt in ("1", "11")
        for sample in (0, 1)
    ]
    seeds = {rollout_seed(*identity) for identity in identities}
    assert len(seeds) == len(identities)
    assert all(0 <= seed < 2**31 for seed in seeds)

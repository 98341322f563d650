"""Answers and dialogues, asked of a group of generators."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from rlhf_ray.config import Config, load_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.policy import load_tokenizer
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.training.sampling import answers_to, sampling_of
from rlhf_ray.types import Message, Prompt
from tests.models.tiny import make_policy_folder
from tests.roles.fake_ray import FakeRay

PROMPTS = [
    Prompt(f"p{n}", (Message("user", text),), group=f"p{n}") for n, text in enumerate(["my lamp", "my old chair"])
]


class Curious:
    """Asks on until it has heard as many answers as its prompt has words."""

    seeds: ClassVar[list[int]] = []

    def __init__(self, prompt: Prompt, seed: int) -> None:
        self.seeds.append(seed)
        self.says: Sequence[Message] = prompt.messages
        self.patience = len(prompt.messages[0].content.split())

    def observe(self) -> Sequence[Message]:
        return self.says

    def act(self, response: str) -> bool:
        self.patience -= 1
        self.says = (Message("user", "why"),)
        return self.patience > 0

    def reward(self) -> float | None:
        return 0.5


@pytest.fixture
def config() -> Config:
    return load_config(
        None,
        [
            "run.id=r",
            f"rollout.environment={__name__}:Curious",
            "rollout.turns=5",
            "rollout.max_tokens=4",
            "model.context=128",
        ],
    )


def test_each_dialogue_goes_on_for_itself_with_one_generator(fake_ray: FakeRay, config: Config, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_policy_folder(tmp_path / "base", context=128))
    group = GeneratorGroup(fake_ray.ask, wanted=2, deadline_s=60, say=lambda _: None)
    group.fleet.wait_ready()
    Curious.seeds.clear()
    rollouts, exchanges = answers_to(PROMPTS, group, tokenizer=tokenizer, config=config, samples=2, step=3)
    assert [rollout.id for rollout in rollouts] == ["r/3/p0/0", "r/3/p0/1", "r/3/p1/0", "r/3/p1/1"]
    assert [len(rollout.inserted) for rollout in rollouts] == [1, 1, 2, 2]
    assert [exchange.reward for exchange in exchanges] == [0.5] * 4
    assert [len(exchange.prompt.messages) for exchange in exchanges] == [3, 3, 5, 5]
    assert [exchange.prompt.id for exchange in exchanges] == ["p0", "p0", "p1", "p1"]
    assert len(set(Curious.seeds)) == 4
    asked = {
        name: {request.rollout_id for method, args in handle.calls if method == "generate" for request in args[0]}
        for name, handle in fake_ray.handles.items()
    }
    assert asked == {"generator-0": {"r/3/p0/0", "r/3/p1/0"}, "generator-1": {"r/3/p0/1", "r/3/p1/1"}}
    seeds = [seed for handle in fake_ray.handles.values() for call in handle.seeds() for seed in call]
    assert len(seeds) == len(set(seeds)) == 10


def test_a_dialogue_is_the_same_when_it_is_made_again(fake_ray: FakeRay, config: Config, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_policy_folder(tmp_path / "base", context=128))
    group = GeneratorGroup(fake_ray.ask, wanted=1, deadline_s=60, say=lambda _: None)
    group.fleet.wait_ready()
    made = [answers_to(PROMPTS, group, tokenizer=tokenizer, config=config, samples=1, step=3) for _ in range(2)]
    assert made[0] == made[1]


def test_responses_end_at_the_tokens_that_the_config_names(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_policy_folder(tmp_path / "policy"))
    rollout = load_config(None, ["run.id=r", "rollout.stop=[a, z]", "rollout.max_tokens=7"]).rollout
    sampling = sampling_of(rollout, tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(sampling.stop_ids)) == ["a", "z"]
    assert sampling.max_tokens == 7
    several = load_config(None, ["run.id=r", "rollout.stop=[zzyzx]"]).rollout
    with pytest.raises(ConfigError, match=r"rollout.stop: 'zzyzx' is . tokens of this policy"):
        sampling_of(several, tokenizer)


def test_a_dialogue_has_no_other_end_than_the_end_token() -> None:
    with pytest.raises(ConfigError, match=r"leave rollout\.stop out"):
        load_config(None, ["run.id=r", "rollout.environment=a:b", "rollout.stop=[a]"])

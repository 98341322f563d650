"""A dialogue of several turns in tokens: only appended, and learnt from only where the policy spoke."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_ray.config import load_config
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.models.policy import encode_prompt, encode_reply, load_policy, load_tokenizer
from rlhf_ray.rewards.environment import EnvironmentSource
from rlhf_ray.roles.batch import collate_rollouts
from rlhf_ray.roles.environment import Episode, load_environment
from rlhf_ray.roles.learner import Learner
from rlhf_ray.types import Inserted, Message, Prompt, Rollout, Scored, Span
from tests.models.tiny import make_policy_folder

PROMPT = Prompt("p", (Message("user", "my lamp broke"),), group="p")
MORE = Message("user", "and my chair")


class Talkative:
    """Says the same thing again after each answer, three times."""

    def __init__(self, prompt: Prompt, seed: int = 0) -> None:
        self.said: Sequence[Message] = prompt.messages
        self.heard: list[str] = []

    def observe(self) -> Sequence[Message]:
        return self.said

    def act(self, response: str) -> bool:
        self.heard.append(response)
        self.said = (MORE,)
        return len(self.heard) < 3

    def reward(self) -> float | None:
        return float(len(self.heard))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("environment") / "base", context=96)


def answer(
    episode: Episode, ids: Sequence[int], *, step: int = 0, ended: bool = True, swaps: tuple[Span, ...] = ()
) -> Rollout:
    request = episode.request(seed=0)
    logprobs = tuple(-0.1 * n for n in range(1, 1 + len(ids)))
    return Rollout(
        request.rollout_id, "p", request.prompt_ids, tuple(ids), logprobs, step, "stop" if ended else "length", swaps
    )


def test_a_dialogue_grows_by_what_is_said_and_its_rollout_holds_the_policys_own_tokens(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    end = tokenizer.eos_token_id
    episode = Episode("e", PROMPT, Talkative(PROMPT), tokenizer, turns=5, room=8)
    first = answer(episode, [10, 11, end])
    assert list(first.prompt_ids) == encode_prompt(tokenizer, PROMPT)
    assert episode.answered(first)
    second = answer(episode, [12, end], step=0)
    heard = second.prompt_ids[len(first.prompt_ids) + 3 :]
    assert second.prompt_ids[: len(first.prompt_ids) + 3] == (*first.prompt_ids, 10, 11, end)
    assert tokenizer.decode(heard) == "<|user|>and my chair</s><|assistant|>"
    assert episode.answered(second)
    third = answer(episode, [13, 14, end])
    assert not episode.answered(third)  # the environment has had enough
    rollout = episode.rollout()
    assert rollout.prompt_ids == first.prompt_ids
    assert rollout.response_ids == (10, 11, end, 12, end, 13, 14, end)
    assert rollout.logprobs == (*first.logprobs, *second.logprobs, *third.logprobs)
    assert rollout.inserted == (Inserted(3, heard), Inserted(5, heard))
    tokens = collate_rollouts([rollout], pad_id=0)
    assert tokens.ids[0].tolist() == [*third.prompt_ids, 13, 14, end]
    assert tokens.ids[0][tokens.positions[0]].tolist() == list(rollout.response_ids)
    exchange = episode.exchange()
    assert [turn.role for turn in exchange.prompt.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert EnvironmentSource().score([exchange]).rewards == [3.0]


@pytest.mark.parametrize(
    ("turns", "room", "ended"), [(1, 8, True), (5, 8, False), (5, 24, True)], ids=["turns", "cut", "context"]
)
def test_a_dialogue_ends_at_its_last_turn_a_cut_answer_or_a_full_context(
    base: Path, turns: int, room: int, ended: bool
) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.model_max_length = len(encode_prompt(tokenizer, PROMPT)) + 30
    episode = Episode("e", PROMPT, Talkative(PROMPT), tokenizer, turns=turns, room=room)
    last = answer(episode, [10, tokenizer.eos_token_id], ended=ended)
    assert not episode.answered(last)
    assert episode.rollout() == last


def test_weights_that_changed_between_turns_are_told_token_by_token(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    episode = Episode("e", PROMPT, Talkative(PROMPT), tokenizer, turns=5, room=8)
    episode.answered(answer(episode, [10, 11, tokenizer.eos_token_id], step=3))
    episode.answered(answer(episode, [10, 11, tokenizer.eos_token_id], step=3, swaps=(Span(1, 4),)))
    episode.answered(answer(episode, [10, tokenizer.eos_token_id], step=4))
    rollout = episode.rollout()
    assert (rollout.weights_step, rollout.swaps) == (3, (Span(4, 4),))


def test_a_template_that_rewrites_earlier_turns_is_refused(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    said = [*PROMPT.messages, Message("assistant", "sorry")]
    assert tokenizer.decode(encode_reply(tokenizer, said, [MORE])) == "<|user|>and my chair</s><|assistant|>"
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(ModelError, match="one that only appends"):
        encode_reply(tokenizer, said, [MORE])


def test_an_environment_is_named_in_the_config_and_has_to_be_there() -> None:
    assert load_environment(f"{__name__}:Talkative") is Talkative
    with pytest.raises(ConfigError, match=r"rollout\.environment: cannot import"):
        load_environment(f"{__name__}:Nobody")
    for wrong, said in (
        (["rollout.turns=2"], "set rollout.environment"),
        (["rewards.sources.e={kind: environment}"], "set rollout.environment"),
        (["rollout.environment=a:b", "ppo.advantage=remax", "rollout.samples=1"], "leave rollout.environment out"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(None, ["run.id=r", *wrong])


def dialogue(draw: torch.Generator, *, turns: int, id: str = "r") -> Rollout:
    """Random tokens of a dialogue; log-probs are filled in by whoever learns."""

    def some(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, 90, (n,), generator=draw).tolist())

    own = [some(2 + turn) for turn in range(turns)]
    ends = torch.tensor([len(part) for part in own]).cumsum(0).tolist()
    inserted = tuple(Inserted(end, some(3)) for end in ends[:-1])
    response = tuple(token for part in own for token in part)
    return Rollout(id, id, some(5), response, (0.0,) * len(response), 0, "stop", inserted=inserted)


def test_log_probs_of_a_dialogue_are_those_of_its_own_tokens_in_the_whole_sequence(base: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    rollouts = [dialogue(draw, turns=turns, id=f"r{turns}") for turns in (3, 1, 2)]
    config = load_config(
        None, ["run.id=t", "rollout.prompts=3", "ppo.minibatch=3", "model.context=64", "rollout.max_tokens=16"]
    )
    learner = Learner.from_folder(base, config)
    tokens = collate_rollouts(rollouts, pad_id=learner.pad_id)
    own = learner.networks.all_own(tokens).logprobs
    policy = load_policy(base)
    for row, rollout in enumerate(rollouts):
        ids, places = list(rollout.prompt_ids), []
        heard = {one.before: one.ids for one in rollout.inserted}
        for number, token in enumerate(rollout.response_ids):
            ids += heard.get(number, ())
            places.append(len(ids))
            ids.append(token)
        with torch.no_grad():
            logprobs = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(logprobs[place - 1, ids[place]]) for place in places]
        assert own[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)


def test_what_the_environment_said_is_read_and_never_learnt(base: Path) -> None:
    """Other words of the environment change what is said after them, and no token of its own has a loss."""
    draw = torch.Generator().manual_seed(1)
    one = dialogue(draw, turns=2)
    config = load_config(
        None, ["run.id=t", "rollout.prompts=2", "ppo.minibatch=2", "model.context=64", "rollout.max_tokens=16"]
    )
    learner = Learner.from_folder(base, config)
    rollouts = [one, replace(one, id="s")]
    tokens = collate_rollouts(rollouts, pad_id=learner.pad_id)
    own = learner.networks.all_own(tokens).logprobs[0]
    rollouts = [replace(rollout, logprobs=tuple(own[: len(one.response_ids)].tolist())) for rollout in rollouts]
    batch = learner.prepare(Scored(rollouts, [1.0, -1.0]))
    assert batch.tokens.mask.sum(1).tolist() == [len(one.response_ids)] * 2
    assert batch.advantages.shape == batch.tokens.response_ids.shape
    assert batch.metrics["mismatch/max_abs"] < 1e-5
    other = replace(one, inserted=(Inserted(one.inserted[0].before, (7, 7, 7)),))
    changed = learner.networks.all_own(collate_rollouts([other], pad_id=learner.pad_id)).logprobs[0]
    before = one.inserted[0].before
    assert changed[:before].tolist() == pytest.approx(own[:before].tolist(), abs=1e-6)
    assert (changed[before : len(one.response_ids)] - own[before : len(one.response_ids)]).abs().max() > 1e-4

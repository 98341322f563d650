"""Sources are summed by weight; what one of them cannot give is no reward, never a number."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.errors import ConfigError, InfrastructureError
from rlhf_ray.models.files import MEMBERS
from rlhf_ray.models.reward import new_reward_model
from rlhf_ray.models.sureness import Considered
from rlhf_ray.rewards.combined import CombinedRewards, Weighted, make_sources, read_keys
from rlhf_ray.rewards.function import FunctionSource, load_function
from rlhf_ray.rewards.judge import JudgeSource
from rlhf_ray.rewards.model import ModelSource
from rlhf_ray.rewards.remote import RemoteSource
from rlhf_ray.rewards.source import Given, as_reward
from rlhf_ray.types import Exchange
from tests.models.tiny import make_policy_folder
from tests.roles.fakes import LengthScorer, make_exchange

EXCHANGES = [make_exchange("four"), make_exchange("no")]


class Says:
    def __init__(self, *rewards: float | None, counts: Counter[str] | None = None) -> None:
        self.rewards, self.counts = rewards, counts or Counter()

    def score(self, _: Sequence[Exchange]) -> Given:
        return Given(list(self.rewards), counts=self.counts)


class Member:
    def __init__(
        self, *scores: float, spreads: Sequence[float] = (), strange: Sequence[bool] = (), mean: float = 0.0
    ) -> None:
        self.considered = Considered(list(scores), list(spreads), list(strange), mean)

    def consider(self, _: Sequence[Exchange]) -> Considered:
        return self.considered


def test_rewards_are_summed_by_weight_and_kept_by_source() -> None:
    rewards = CombinedRewards({"a": Weighted(Says(1.0, -2.0), 0.5), "b": Weighted(Says(3.0, 4.0), -1.0)})
    scores = rewards.score(EXCHANGES)
    assert scores.rewards == [-2.5, -5.0]
    assert scores.by_source == {"a": [1.0, -2.0], "b": [3.0, 4.0]}


def test_without_a_reward_from_each_source_there_is_none() -> None:
    missing = Says(None, 0.0, counts=Counter(timeouts=2))
    scores = CombinedRewards({"a": Weighted(missing), "b": Weighted(Says(1.0, 1.0))}).score(EXCHANGES)
    assert scores.rewards == [None, 1.0]
    assert scores.counts == {"a/timeouts": 2}


def test_a_source_with_the_wrong_number_of_rewards_is_a_mistake() -> None:
    with pytest.raises(InfrastructureError, match="a was given 2 exchanges and scored 1"):
        CombinedRewards({"a": Weighted(Says(1.0))}).score(EXCHANGES)


def test_nothing_gives_nothing() -> None:
    assert CombinedRewards({"a": Weighted(ModelSource([LengthScorer()]))}).score([]).rewards == []


# A reward model, and an ensemble.


def test_rewards_of_a_model_come_in_the_order_of_the_exchanges() -> None:
    assert ModelSource([LengthScorer()]).score(EXCHANGES) == Given([4.0, 2.0], [], [])


def test_an_ensemble_gives_its_mean_less_its_variance_by_hand() -> None:
    given = ModelSource([Member(1.0, 5.0), Member(3.0, 5.0)], uncertainty=0.25).score(EXCHANGES)
    assert given.rewards == [2.0 - 0.25 * 1.0, 5.0]
    assert given.spreads == [1.0, 0.0]


def test_what_members_say_of_everything_alike_is_no_doubt() -> None:
    given = ModelSource([Member(11.0, 15.0, mean=10.0), Member(3.0, 5.0)], uncertainty=0.25).score(EXCHANGES)
    assert given == Given([7.0 - 0.25 * 1.0, 10.0], [1.0, 0.0], [])


def test_a_single_model_is_as_unsure_as_its_heads() -> None:
    member = Member(1.0, 2.0, spreads=[2.0, 0.0], strange=[False, True])
    given = ModelSource([member], uncertainty=0.25).score(EXCHANGES)
    assert given == Given([0.0, 2.0], [2.0, 0.0], [False, True])
    assert CombinedRewards({"own": Weighted(ModelSource([member]))}).score(EXCHANGES).strange == {"own": [False, True]}


def test_what_one_member_finds_strange_is_strange() -> None:
    members = [Member(1.0, 1.0, strange=[False, True]), Member(1.0, 1.0), Member(1.0, 1.0, strange=[True, True])]
    assert ModelSource(members).score(EXCHANGES).strange == [True, True]


def test_a_penalty_for_what_nobody_knows_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no heads"):
        ModelSource([Member(1.0, 2.0)], uncertainty=0.1).score(EXCHANGES)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_model_that_gives_no_number_is_broken_and_the_prompt_named(score: float) -> None:
    with pytest.raises(InfrastructureError, match=r"prompt p7 (nan|-?inf); a reward is a finite number"):
        ModelSource([Member(score)]).score([make_exchange(prompt_id="p7")])


@pytest.mark.parametrize("scores", [[], [1.0, 2.0]])
def test_a_reward_model_that_gives_the_wrong_number_of_scores_is_broken(scores: list[float]) -> None:
    with pytest.raises(InfrastructureError, match=f"given 1 exchanges and scored {len(scores)}"):
        ModelSource([Member(*scores)]).score([make_exchange()])


# A function.


def ending_in_a_period(prompts: list, completions: list, **_: object) -> list[float]:
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float(completion[0]["content"].endswith(".")) for completion in completions]


async def later(completions: list, **_: object) -> list[float]:
    return [1.0 for _ in completions]


def test_a_function_is_called_as_trl_calls_its_own() -> None:
    source = load_function(f"{__name__}:ending_in_a_period")
    assert source.score([make_exchange("Yes."), make_exchange("No")]).rewards == [1.0, 0.0]
    assert load_function(f"{__name__}:later").score(EXCHANGES).rewards == [1.0, 1.0]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "3", True, 10**400])
def test_what_is_no_number_is_no_reward(value: object) -> None:
    given = FunctionSource(lambda **_: [value, 1]).score(EXCHANGES)
    assert given.rewards == [None, 1.0]
    assert as_reward(value) is None


def test_too_few_or_too_many_values_are_no_rewards_at_all() -> None:
    for values in ([1.0], [1.0, 2.0, 3.0]):
        given = FunctionSource(lambda values=values, **_: values).score(EXCHANGES)
        assert given.rewards == [None, None]
        assert given.counts == {"malformed": 1}


def test_what_a_function_raises_is_the_runs_error() -> None:
    def broken(**_: object) -> list[float]:
        raise ZeroDivisionError("by whom it may concern")

    with pytest.raises(ZeroDivisionError, match="concern"):
        FunctionSource(broken).score(EXCHANGES)


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("no.such.module:f", "cannot import no.such.module:f"),
        (f"{__name__}:nothing", "cannot import .*nothing"),
    ],
)
def test_a_function_that_is_not_there_is_the_users_mistake(of: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_function(of)


# From the config.


def test_each_kind_is_made_from_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    config = load_config(
        None,
        [
            "run.id=r",
            f"rewards.sources.short={{kind: function, of: '{__name__}:ending_in_a_period', weight: 0.5}}",
            "rewards.sources.judge={kind: judge, url: 'http://127.0.0.1:1/v1/', model: m, key_env: JUDGE_KEY}",
            "rewards.sources.remote={kind: remote, url: 'http://127.0.0.1:1/get_reward'}",
        ],
    )
    made = make_sources(config.rewards, Path("nowhere"), read_keys(config.rewards)).sources
    assert {name: type(weighted.source) for name, weighted in made.items()} == {
        "short": FunctionSource,
        "judge": JudgeSource,
        "remote": RemoteSource,
    }
    assert made["short"].weight == 0.5
    assert made["judge"].source.service.url == "http://127.0.0.1:1/v1/chat/completions"  # type: ignore[attr-defined]
    assert not config.needs_reward_model


def test_the_folder_of_an_ensemble_is_all_of_its_members(tmp_path: Path) -> None:
    for seed, folder in enumerate((tmp_path / "two", tmp_path / "two" / MEMBERS / "1")):
        new_reward_model(make_policy_folder(tmp_path / f"base-{seed}"), "decoder", seed=seed).save(folder)
    config = load_config(None, [f"rewards.sources.mine={{kind: model, paths: [{tmp_path / 'two'}], uncertainty: 1}}"])
    for own, sources in ((Path("nowhere"), config.rewards), (tmp_path / "two", load_config(None, []).rewards)):
        [made] = make_sources(sources, own, {}).sources.values()
        assert len(made.source.members) == 2  # type: ignore[attr-defined]


def test_by_default_it_is_the_runs_own_reward_model() -> None:
    config = load_config(None, ["run.id=r"])
    assert config.needs_reward_model
    assert config.rewards.own_model_alone


def test_what_the_default_source_is_need_not_be_said_again() -> None:
    config = load_config(None, ["run.id=r", "rewards.sources.reward_model.uncertainty=1.5"])
    [source] = config.rewards.sources.values()
    assert (source.kind, source.uncertainty) == ("model", 1.5)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"rewards\.sources\.mine"):
        load_config(None, ["run.id=r", "rewards.sources.mine={weight: 2}"])


def test_a_key_that_is_not_set_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = load_config(
        None, ["run.id=r", "rewards.sources.j={kind: judge, url: 'http://h/v1', model: m, key_env: NO_SUCH_KEY}"]
    )
    with pytest.raises(ConfigError, match=r"rewards\.sources\.j: the environment variable NO_SUCH_KEY is not set"):
        read_keys(config.rewards)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{kind: remote, url: 'ftp://h/x'}", "an http or https address"),
        ("{kind: remote, url: 'http://169.254.169.254/latest'}", "link-local"),
        ("{kind: remote, url: 'http://me:secret@h/x'}", "set key_env"),
        ("{kind: remote, url: 'http://h/x', patience_s: 400}", r"has to end before resources\.call_deadline_s=300"),
        ("{kind: judge, url: 'http://h/v1', model: m, marks: [5, 5]}", "a higher best one"),
        ("{kind: function, of: 'no colon'}", "pattern"),
        ("{kind: mind_reader}", "mind_reader"),
    ],
)
def test_what_cannot_give_rewards_is_refused_with_the_way_out(source: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, ["run.id=r", f"rewards.sources.x={source}"])

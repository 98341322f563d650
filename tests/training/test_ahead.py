"""Steps sampled ahead of the learner: in order, whole, no staler than allowed, whatever dies and however slow it is."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.errors import ConfigError, InfrastructureError
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.training import ahead
from rlhf_ray.training.ahead import Ahead
from rlhf_ray.types import Exchange, GenerationRequest, Message, Prompt, Rollout, Sampling, Scores
from tests.roles.fake_ray import FakeRay
from tests.roles.fakes import FakeLearner, Recorder

SAMPLES = 2
PROMPT = Prompt("p", (Message("user", "hello"),), group="p")


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine step a turn, so that weights come in mid-rollout."""
    monkeypatch.setattr(ahead, "TURN_S", 0)


def make_group(fake_ray: FakeRay, *, wanted: int = 3, minimum: int | None = 1) -> tuple[GeneratorGroup, WeightsHandoff]:
    group = GeneratorGroup(
        fake_ray.ask, wanted=wanted, minimum=minimum, deadline_s=60, start_deadline_s=300, say=lambda _: None
    )
    group.fleet.wait_ready()
    handoff = WeightsHandoff(Recorder(FakeLearner(-1.0)), group, vocabulary=100, context=256)
    group.refit = handoff.publish
    handoff.publish(0)
    return group, handoff


def requests_of(step: int, *, longest: int = 9) -> list[GenerationRequest]:
    """Of four prompts; their rollouts are as long as they are, and one token more."""
    draw = Random(step)
    return [
        GenerationRequest(f"run/{step}/p{step}.{i}/{k}", f"p{step}.{i}", (5,) * draw.randint(1, longest), seed=k)
        for i in range(4)
        for k in range(SAMPLES)
    ]


class Single:
    """`Asked`: an answer each, whose text is its id."""

    def __init__(self, requests: list[GenerationRequest]) -> None:
        self.requests = requests

    def follow(self, rollout: Rollout) -> GenerationRequest | None:
        return None

    def whole(self, rollout: Rollout) -> tuple[Rollout, Exchange]:
        return rollout, Exchange(PROMPT, rollout.id)


class Thrice(Single):
    """`Asked`: three turns each; the last one's rollout counts."""

    def __init__(self, requests: list[GenerationRequest]) -> None:
        super().__init__(requests)
        self.turns = {request.rollout_id: [request] for request in requests}
        self.ended: dict[str, list[Rollout]] = {id: [] for id in self.turns}

    def follow(self, rollout: Rollout) -> GenerationRequest | None:
        turns, _ = self.turns[rollout.id], self.ended[rollout.id].append(rollout)
        if len(turns) == 3:
            return None
        turns.append(replace(turns[0], prompt_ids=(*rollout.prompt_ids, *rollout.response_ids)))
        return turns[-1]


def ask(step: int, *, longest: int = 9) -> Single:
    return Single(requests_of(step, longest=longest))


def score(exchanges: Sequence[Exchange]) -> Scores:
    rewards: list[float | None] = [float(sum(map(ord, exchange.response))) for exchange in exchanges]
    return Scores(rewards, {"sum": rewards}, {}, {})


def run(
    fake_ray: FakeRay,
    *,
    steps: int,
    staleness: int,
    longest: int = 9,
    asking: Callable[..., Single] | None = None,
    work: Callable[[int], None] = lambda _: None,
    disturb: Callable[[int, GeneratorGroup], None] = lambda *_: None,
) -> Iterator[tuple[int, list[Rollout], list[float | None]]]:
    group, handoff = make_group(fake_ray)
    learner: Any = handoff.learner
    sampler = Ahead(
        group,
        asking or partial(ask, longest=longest),
        score,
        sampling=Sampling(max_tokens=longest + 1),
        steps=staleness,
        last=steps - 1,
    )  # fmt: skip
    with closing(sampler):
        for step in range(steps):
            disturb(step, group)
            answers, _, _ = sampler.answers(step)
            yield step, answers.rollouts, answers.rewards

            def learn(step: int = step) -> None:
                work(step)
                learner.learner.weights_step = step + 1
                learner.learner.logprob = -float(step + 2)

            sampler.meanwhile(step, learn)
            handoff.publish(step + 1)


def check(step: int, rollouts: list[Rollout], rewards: list[float | None], staleness: int) -> int:
    """Every rollout once, in order, with its own reward, and tokens of the steps that they are said to be of."""
    assert [rollout.id for rollout in rollouts] == [request.rollout_id for request in requests_of(step)]
    assert rewards == [float(sum(map(ord, rollout.id))) for rollout in rollouts]
    for rollout in rollouts:
        spans = [(0, rollout.weights_step), *((swap.start, swap.weights_step) for swap in rollout.swaps)]
        for i, logprob in enumerate(rollout.logprobs):
            assert logprob == -1.0 - [weights for start, weights in spans if start <= i][-1]
    behind = max(step - rollout.weights_step for rollout in rollouts)
    assert 0 <= behind <= staleness
    return behind


@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_over_200_steps_none_is_staler_than_allowed_and_some_are_stale(fake_ray: FakeRay, staleness: int) -> None:
    seen = [check(*made, staleness) for made in run(fake_ray, steps=200, staleness=staleness)]
    assert len(seen) == 200
    assert max(seen) == staleness


@pytest.mark.parametrize(("generators", "turn_s"), [(1, 0.1), (16, 0.1), (64, 0.4)])
def test_many_generators_take_longer_turns(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch, generators: int, turn_s: float
) -> None:
    monkeypatch.setattr(ahead, "TURN_S", 0.1)
    group, _ = make_group(fake_ray, wanted=generators)
    with closing(Ahead(group, ask, score, sampling=Sampling(), steps=1, last=1)) as sampler:
        assert sampler._session.turn_s == pytest.approx(turn_s)


def test_weights_that_come_in_mid_rollout_go_on_with_it(fake_ray: FakeRay) -> None:
    def calls_so_far() -> int:
        return sum(len(handle.calls) for handle in fake_ray.handles.values())

    def learn_for_some_turns(_: int) -> None:
        wanted, late = calls_so_far() + 4, time.monotonic() + 1
        while calls_so_far() < wanted and time.monotonic() < late:
            time.sleep(0.0001)

    def hurry(*_: object) -> None:
        for handle in fake_ray.handles.values():
            handle.seconds = 0.01

    crossed = 0
    for step, rollouts, rewards in run(
        fake_ray, steps=10, staleness=1, longest=300, work=learn_for_some_turns, disturb=hurry
    ):
        check(step, rollouts, rewards, 1)
        crossed += sum(bool(rollout.swaps) for rollout in rollouts)
    assert crossed


@pytest.mark.parametrize("steps", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_with_slow_and_dying_generators_nothing_waits_for_ever(fake_ray: FakeRay, steps: int) -> None:
    draw, died = Random(0), 0

    def disturb(step: int, group: GeneratorGroup) -> None:
        nonlocal died
        for handle in fake_ray.handles.values():
            handle.seconds = draw.choice([0.01, 1.0, 5.0])
        if draw.random() < 0.2:
            name = draw.choice(sorted(group.fleet.fit))
            fake_ray.handles[name].dies_at = [draw.choice(["generate", "load_weights", "probe", "release"])]
            died += 1
        fake_ray.starts.update({f"generator-{i}.{n}": draw.uniform(0, 30) for i in range(3) for n in range(2, 400)})

    for made in run(
        fake_ray, steps=steps, staleness=2, work=lambda _: time.sleep(draw.choice([0, 0.002])), disturb=disturb
    ):
        check(*made, 2)
    assert died > steps / 10


def test_dialogues_go_on_ahead_too_each_for_itself_and_end_as_one_rollout(fake_ray: FakeRay) -> None:
    asked: dict[int, Thrice] = {}

    def noted(step: int) -> Thrice:
        return asked.setdefault(step, Thrice(requests_of(step)))

    for step, rollouts, _ in run(fake_ray, steps=6, staleness=1, asking=noted):
        assert [rollout.id for rollout in rollouts] == [request.rollout_id for request in requests_of(step)]
        for rollout in rollouts:
            turns = asked[step].ended[rollout.id]
            assert [turn.prompt_ids for turn in turns] == [r.prompt_ids for r in asked[step].turns[rollout.id]]
            assert (len(turns), turns[-1]) == (3, rollout)
            assert all(step - turn.weights_step <= 1 for turn in turns)


def test_what_the_learner_raises_ends_the_step(fake_ray: FakeRay) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise InfrastructureError("learner is gone")

    with pytest.raises(InfrastructureError, match="learner is gone"):
        list(run(fake_ray, steps=5, staleness=1, work=fail))


def test_what_is_asked_of_the_group_meanwhile_is_sampled_beside_it(fake_ray: FakeRay) -> None:
    group, _ = make_group(fake_ray)
    sampler = Ahead(group, ask, score, sampling=Sampling(max_tokens=10), steps=2, last=9)
    with closing(sampler):
        sampler.answers(0)
        sampler.meanwhile(0, lambda: None)
        others = [GenerationRequest(f"look/{i}", f"p{i}", (7, 8), seed=i) for i in range(5)]
        looked = group.generate(others, Sampling(max_tokens=3))
        assert [rollout.response_ids[:2] for rollout in looked] == [(7, 8)] * 5
        for step in (1, 2):
            assert [rollout.id for rollout in sampler.answers(step)[0].rollouts] == [
                request.rollout_id for request in requests_of(step)
            ]
    assert group.generate(requests_of(9)[:1], Sampling())  # without it the group is what it was


def test_no_step_after_the_last_is_asked_for(fake_ray: FakeRay) -> None:
    asked: list[int] = []

    def noted(step: int) -> Single:
        asked.append(step)
        return ask(step)

    group, _ = make_group(fake_ray)
    with closing(Ahead(group, noted, score, sampling=Sampling(), steps=3, last=2)) as sampler:
        for step in (1, 2):
            sampler.answers(step)
            sampler.meanwhile(step, lambda: None)
    assert asked == [1, 2]


def test_the_config_says_what_cannot_be_sampled_ahead_and_corrects_for_it() -> None:
    assert load_config(None, ["run.id=r", "rollout.max_staleness=1"]).ppo.correction == "token"
    assert load_config(None, ["run.id=r", "rollout.max_staleness=1", "ppo.correction=none"]).ppo.correction == "none"
    assert load_config(None, ["run.id=r"]).ppo.correction == "none"
    for clash in ("deterministic=true", "resources.engine_sleep=true"):
        with pytest.raises(ConfigError, match=r"rollout\.max_staleness=1 samples while the learner learns"):
            load_config(None, ["run.id=r", "rollout.max_staleness=1", "resources.generator_gpus=1", clash])

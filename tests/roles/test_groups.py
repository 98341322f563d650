"""Groups share work out and put the answers together in order, whoever dies, comes or answers wrongly."""

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.errors import ActorFailed, ActorLost, DeadlineExceeded, InfrastructureError, WeightsMismatch
from rlhf_ray.roles import calls, dispatch, fleet, generators, groups
from rlhf_ray.roles.generator import Turn
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.groups import ScorerGroup
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.types import Exchange, Rollout, Sampling, Scores
from tests.roles.fake_ray import FakeRay
from tests.roles.fakes import EchoEngine, FakeLearner, Recorder, make_exchange, make_request

LATE = Rollout("run/9/p9/0", "p9", (1,), (2,), (-1.0,), 0, "stop")


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    for module in (calls, fleet, groups):
        monkeypatch.setattr(module, "ray", fake)
    for module in (calls, fleet, generators):
        monkeypatch.setattr(module, "time", fake)
    return fake


class Said(list[str]):
    def of(self, word: str) -> list[str]:
        return [line for line in self if word in line]


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def make_group(fake_ray: FakeRay, said: Said) -> Callable[..., GeneratorGroup]:
    def make(wanted: int = 2, minimum: int | None = None, **starts: float | Exception) -> GeneratorGroup:
        fake_ray.starts.update({name.replace("_", "-"): start for name, start in starts.items()})
        group = GeneratorGroup(
            fake_ray.ask, wanted=wanted, minimum=minimum, deadline_s=60, start_deadline_s=300, say=said.append
        )
        group.fleet.wait_ready()
        return group

    return make


def some_requests(n: int) -> list[Any]:
    return [make_request(i) for i in range(n)]


def ids(rollouts: list[Rollout]) -> list[str]:
    return [rollout.id for rollout in rollouts]


def hand_off(group: GeneratorGroup, logprob: float = -2.0, step: int = 1) -> tuple[WeightsHandoff, Recorder]:
    """A learner at a step, whose hand-off newcomers go through."""
    learner = Recorder(FakeLearner(logprob, weights_step=step))
    handoff = WeightsHandoff(learner, group, vocabulary=100, context=256)
    group.refit = handoff.publish
    return handoff, learner


def test_rollouts_come_in_the_order_of_their_requests(make_group: Any) -> None:
    requests = some_requests(7)
    assert ids(make_group().generate(requests, Sampling())) == [request.rollout_id for request in requests]


def test_a_batch_is_shared_out_the_same_way_every_time_and_in_waves(
    make_group: Any, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "WAVE", 2)
    make_group().generate(some_requests(5), Sampling())
    assert [handle.seeds() for handle in fake_ray.handles.values()] == [[[0, 2], [4]], [[1, 3]]]


def test_no_requests_give_no_rollouts(make_group: Any) -> None:
    assert make_group().generate([], Sampling()) == []


def test_a_missing_rollout_stops_the_step_and_is_named(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(1)
    fake_ray.handles["generator-0"].role.generate = lambda *_, **__: Turn([], 1)
    with pytest.raises(
        InfrastructureError, match="for 2 rollouts, got 0, 1 are under way: 1 missing, the first of run/0/p0/0"
    ):
        group.generate(some_requests(2), Sampling())


def test_a_rollout_too_many_stops_the_step(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(1)
    role = fake_ray.handles["generator-0"].role
    honest = role.generate
    role.generate = lambda *args, **kwargs: Turn(honest(*args, **kwargs).rollouts * 2, 0)
    with pytest.raises(InfrastructureError, match="gave run/0/p0/0, which it was not asked for, or gave it twice"):
        group.generate(some_requests(1), Sampling())


def test_a_rollout_that_nobody_asked_for_stops_the_step(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(1)
    fake_ray.handles["generator-0"].role.generate = lambda *_, **__: Turn([LATE], 0)
    with pytest.raises(InfrastructureError, match="gave run/9/p9/0, which it was not asked for"):
        group.generate(some_requests(1), Sampling())


def test_after_a_release_a_generator_with_another_step_is_refused(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group()
    group.release(0)
    fake_ray.handles["generator-0"].role.weights_step = 1
    with pytest.raises(InfrastructureError, match="step 0 is wanted"):
        group.generate(some_requests(1), Sampling())


def test_rollouts_of_another_step_than_was_released_are_refused_though_the_generator_gave_them(
    make_group: Any, fake_ray: FakeRay
) -> None:
    group = make_group(1)
    group.release(0)
    role = fake_ray.handles["generator-0"].role
    honest = role.generate
    role.engine.stamp(3)
    role.generate = lambda requests, **_: honest(requests)
    with pytest.raises(InfrastructureError, match=r"sampled run/0/p0/0 at weights steps \[3\], step 0 is wanted"):
        group.generate(some_requests(1), Sampling())


# A generator dies.


def test_with_a_fixed_map_the_successor_of_a_dead_generator_gets_the_same_share_whole(
    make_group: Any, fake_ray: FakeRay, said: Said
) -> None:
    group = make_group(2, generator_1=5.0)
    fake_ray.starts["generator-1.2"] = 40.0
    fake_ray.handles["generator-1"].dies_at = ["generate"]
    requests = some_requests(6)
    assert ids(group.generate(requests, Sampling())) == [request.rollout_id for request in requests]
    seeds = {name: handle.seeds() for name, handle in fake_ray.handles.items()}
    assert seeds == {"generator-0": [[0, 2, 4]], "generator-1": [[1, 3, 5]], "generator-1.2": [[1, 3, 5]]}
    assert group.census()["rollout/retried"] == 3
    assert said.of("lost") == [
        "lost generator-1 on node-of-generator-1: The actor died unexpectedly before finishing this task; "
        "asked for generator-1.2 instead"
    ]


def test_elastic_the_others_do_what_a_dead_generator_left_and_it_is_not_waited_for(
    make_group: Any, fake_ray: FakeRay
) -> None:
    group = make_group(2, 1)
    fake_ray.starts["generator-1.2"] = 1000.0
    fake_ray.handles["generator-1"].dies_at = ["generate"]
    group.fleet.look()
    requests = some_requests(8)
    assert ids(group.generate(requests, Sampling())) == [request.rollout_id for request in requests]
    done = [seed for share in fake_ray.handles["generator-0"].seeds() for seed in share]
    assert sorted(done) == list(range(8))
    assert fake_ray.now < 10
    assert group.census() == {
        "rollout/generators": 1, "rollout/share_max": 1, "rollout/retried": 2, "rollout/joined": 1,
        "rollout/lost_generators": 1,
    }  # fmt: skip


def test_one_that_hangs_is_dropped_at_its_deadline_and_ended_and_what_it_says_later_reaches_no_one(
    make_group: Any, fake_ray: FakeRay
) -> None:
    group = make_group(2, 1)
    group.fleet.look()
    fake_ray.handles["generator-0"].hangs_at = {"generate"}
    requests = some_requests(4)
    assert ids(group.generate(requests, Sampling())) == [request.rollout_id for request in requests]
    assert fake_ray.killed == ["generator-0"]
    assert 60 <= fake_ray.now < 70
    assert "generator-0" not in group.fleet.fit


def test_a_share_that_kills_whoever_takes_it_stops_the_step_with_the_first_death(
    make_group: Any, fake_ray: FakeRay
) -> None:
    group = make_group(1)
    deadly = fake_ray.ask

    def ask(name: str) -> Any:
        handle = deadly(name)
        handle.dies_at = ["generate"]
        return handle

    fake_ray.handles["generator-0"].dies_at = ["generate"]
    group.fleet._ask = ask
    with pytest.raises(ActorLost, match="generating 2 rollouts"):
        group.generate(some_requests(2), Sampling())
    assert fake_ray.killed == [f"generator-0{n}" for n in ("", ".2", ".3")]


def test_one_that_raises_is_no_death_and_stops_the_step(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(2, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise ActorFailed("a mistake of ours")

    fake_ray.handles["generator-0"].role.generate = refuse
    with pytest.raises(ActorFailed, match="a mistake of ours"):
        group.generate(some_requests(2), Sampling())
    assert fake_ray.killed == []


def test_without_a_successor_in_time_the_step_stops_with_the_first_death(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(2)
    fake_ray.handles["generator-1"].dies_at = ["generate"]
    fake_ray.starts["generator-1.2"] = 10_000.0
    with pytest.raises(ActorLost, match="generator-1 on node-of-generator-1") as stopped:
        group.generate(some_requests(2), Sampling())
    assert stopped.value.exit_code == 5
    assert 300 <= fake_ray.now < 310


def test_once_the_group_is_closed_nothing_is_waited_for(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(1)
    group.close()
    with pytest.raises(ActorLost):
        group.generate(some_requests(1), Sampling())
    assert list(fake_ray.handles) == ["generator-0"]


# A generator comes.


def test_a_run_starts_with_the_minimum_and_asks_for_all(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(3, 1, generator_0=4.0, generator_1=500.0, generator_2=1e6)
    assert fake_ray.now == 4
    assert list(group.actors) == ["generator-0", "generator-1", "generator-2"]
    assert list(group.nodes) == ["generator-0"]


def test_a_newcomer_is_refitted_and_verified_before_it_gets_work_of_the_same_batch(
    make_group: Any, fake_ray: FakeRay, said: Said
) -> None:
    group = make_group(2, 1, generator_1=2.5)
    handoff, learner = hand_off(group)
    handoff.publish(1)
    learner.events.clear()
    fake_ray.now = 0.0
    rollouts = group.generate(some_requests(16), Sampling())
    assert learner.events == ["push"]
    newcomer = fake_ray.handles["generator-1"]
    methods = [method for method, _ in newcomer.calls]
    assert methods[:4] == ["whereabouts", "load_weights", "probe", "release"]
    assert set(methods[4:]) == {"generate"}
    assert {(rollout.weights_step, rollout.logprobs[0]) for rollout in rollouts} == {(1, -2.0)}
    assert said.of("joined") == ["generator-1 joined on node-of-generator-1: 2 of 2 generators"]
    assert group.census()["rollout/joined"] == 1


def test_a_newcomer_that_kept_other_weights_stops_the_run_before_it_samples(make_group: Any, fake_ray: FakeRay) -> None:
    class Stale(EchoEngine):
        def take_over(self, logprob: float) -> None:
            pass

    group = make_group(2, 1, generator_1=2.5)
    hand_off(group)[0].publish(1)
    fake_ray.now = 0.0
    fake_ray.handles["generator-1"].role.engine = Stale()
    with pytest.raises(WeightsMismatch, match="generator-1"):
        group.generate(some_requests(16), Sampling())
    assert fake_ray.handles["generator-1"].seeds() == []


def test_without_a_hand_off_of_its_own_a_newcomer_waits_for_the_next_one_to_all(
    make_group: Any, fake_ray: FakeRay
) -> None:
    group = make_group(2, 1, generator_1=2.5)
    handoff, learner = hand_off(group)
    handoff.publish(1)
    group.refit = None
    fake_ray.now = 0.0
    group.generate(some_requests(16), Sampling())
    assert fake_ray.handles["generator-1"].seeds() == []
    learner.learner.weights_step = 2
    handoff.publish(2)
    group.generate(some_requests(16), Sampling())
    assert fake_ray.handles["generator-1"].seeds()
    assert group.census()["rollout/joined"] == 1


def test_one_that_came_between_two_batches_takes_part_in_the_hand_over_to_all(
    make_group: Any, fake_ray: FakeRay
) -> None:
    group = make_group(2, 1, generator_1=2.5)
    handoff, learner = hand_off(group)
    fake_ray.now = 3.0
    handoff.publish(1)
    assert set(group.fleet.fit) == {"generator-0", "generator-1"}
    assert learner.events == ["push"]


def test_one_that_dies_under_the_hand_off_is_left_out_and_the_others_are_released(
    make_group: Any, fake_ray: FakeRay
) -> None:
    for method in ("load_weights", "probe", "release"):
        group = make_group(3, 2)
        group.fleet.look()
        lost, *others = sorted(group.nodes)
        fake_ray.handles[lost].dies_at = [method]
        hand_off(group)[0].publish(1)
        assert set(group.fleet.fit) == set(others), method


def test_where_all_die_the_batch_goes_on_with_their_verified_successors(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(2, 1)
    group.fleet.look()
    hand_off(group)[0].publish(1)
    for handle in list(fake_ray.handles.values()):
        handle.dies_at = ["generate"]
    rollouts = group.generate(some_requests(8), Sampling())
    assert {(rollout.weights_step, rollout.logprobs[0]) for rollout in rollouts} == {(1, -2.0)}
    assert group.census()["rollout/lost_generators"] == 2


# One cannot start.


def test_what_the_first_ones_raise_stops_the_start_at_once(make_group: Any, fake_ray: FakeRay) -> None:
    with pytest.raises(ActorFailed, match="no such model"):
        make_group(2, 2, generator_0=9.0, generator_1=ActorFailed("no such model"))
    assert fake_ray.now == 0


def test_a_slot_whose_starts_fail_three_times_stays_empty_and_the_others_go_on(
    make_group: Any, fake_ray: FakeRay, said: Said
) -> None:
    group = make_group(2, 1, generator_1=1.0)
    fake_ray.starts |= {f"generator-1{n}": ActorFailed("bad node") for n in ("", ".2", ".3")}
    fake_ray.now = 2.0
    group.fleet.look()
    assert len(said.of("lost generator-1")) == 3
    assert "3 starts in a row failed, so no other" in said[-1]
    assert ids(group.generate(some_requests(4), Sampling()))


def test_a_minimum_that_can_no_longer_be_reached_is_not_waited_for(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(3)
    for name in ("generator-1", "generator-2"):
        fake_ray.handles[name].dies_at = ["generate"]
    fake_ray.starts |= {f"generator-1.{n}": ActorFailed("bad node") for n in (2, 3, 4)} | {"generator-2.2": 10_000.0}
    with pytest.raises(ActorLost, match="generator-1 on"):
        group.generate(some_requests(3), Sampling())
    assert fake_ray.now < 10


def test_too_few_at_the_start_deadline_says_how_many_and_who_is_missing(make_group: Any) -> None:
    with pytest.raises(DeadlineExceeded, match=r"1 of at least 2 generators are ready after 300 s, generator-1 not"):
        make_group(2, generator_1=1e6)


# Somebody asks for another number.


def test_fewer_generators_end_the_last_ones_and_more_are_verified_before_they_sample(
    make_group: Any, fake_ray: FakeRay, said: Said
) -> None:
    group = make_group(2, 1)
    group.fleet.look()
    handoff, learner = hand_off(group)
    handoff.publish(1)
    group.scale(1)
    assert fake_ray.killed == ["generator-1"]
    assert len(group.generate(some_requests(6), Sampling())) == 6
    assert fake_ray.handles["generator-1"].seeds() == []
    learner.events.clear()
    group.scale(3)
    group.scale(3)
    group.fleet.look()
    rollouts = group.generate(some_requests(12), Sampling())
    assert {(rollout.weights_step, rollout.logprobs[0]) for rollout in rollouts} == {(1, -2.0)}
    assert learner.events == ["push"]
    newcomers = [fake_ray.handles[name] for name in ("generator-1.2", "generator-2")]
    assert all(handle.seeds() for handle in newcomers)
    assert [line.split(":")[0] for line in said.of("wanted")] == [
        "generator-1 was let go", "asked for generator-1.2", "asked for generator-2",
    ]  # fmt: skip
    assert group.census()["rollout/lost_generators"] == 0


def test_engines_that_slept_hold_no_weights_until_the_next_hand_over(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(2)
    handoff, learner = hand_off(group)
    handoff.publish(1)
    with group.asleep():
        assert [handle.calls[-1][0] for handle in fake_ray.handles.values()] == ["sleep", "sleep"]
    with pytest.raises(InfrastructureError, match="must not sample"):
        group.generate(some_requests(2), Sampling())
    group = make_group(2)
    handoff, learner = hand_off(group)
    handoff.publish(1)
    with group.asleep():
        learner.learner.weights_step = 2
    handoff.publish(2)
    assert {rollout.logprobs[0] for rollout in group.generate(some_requests(4), Sampling())} == {-2.0}


# Sampling goes on in turns, while requests and weights come.


def test_a_request_goes_to_the_generator_with_the_fewest_outstanding_tokens(make_group: Any, fake_ray: FakeRay) -> None:
    group = make_group(2, 1)
    group.fleet.look()
    lengths = [100, 1, 1, 1, 1, 1, 1, 1]
    requests = [make_request(i, prompt_ids=(7,) * n) for i, n in enumerate(lengths)]
    group.generate(requests, Sampling(max_tokens=8))
    first = [handle.seeds()[0] for handle in fake_ray.handles.values()]
    assert first == [[0, 3], [1, 2]]  # two each at first; while there was a choice the less loaded one got them


def test_rollouts_come_as_they_end_and_requests_may_be_added_meanwhile(make_group: Any) -> None:
    group = make_group(1)
    with group.session(turn_s=0) as session:
        session.ask([make_request(0, prompt_ids=(5, 6, 7)), make_request(1, prompt_ids=(5,))], Sampling())
        assert ids(session.take()) == ["run/0/p1/0"]
        session.ask([make_request(2, prompt_ids=(5,))], Sampling())
        assert sorted(ids(session.take())) == ["run/0/p0/0", "run/0/p2/0"]
        assert session.take() == []
    assert ids(group.generate(some_requests(2), Sampling())) == ["run/0/p0/0", "run/0/p1/0"]


def test_weights_handed_over_between_two_turns_are_stamped_on_the_tokens_that_they_sampled(make_group: Any) -> None:
    group = make_group(1)
    handoff, learner = hand_off(group)
    handoff.publish(1)
    with group.session(turn_s=0, max_staleness=1) as session:
        session.ask([make_request(0, prompt_ids=(5, 6, 7, 8, 9)), make_request(1, prompt_ids=(5,))], Sampling())
        (short,) = session.take()
        learner.learner.weights_step, learner.learner.logprob = 2, -3.0
        handoff.publish(2)
        (long,) = session.take()
    assert (short.weights_step, short.swaps) == (1, ())
    assert (long.weights_step, long.last_step) == (1, 2)
    assert set(long.logprobs[: long.swaps[0].start]) == {-2.0}
    assert set(long.logprobs[long.swaps[0].start :]) == {-3.0}


@pytest.mark.parametrize("method", ["load_weights", "probe", "release"])
def test_what_one_was_at_that_dies_under_a_hand_over_in_between_is_done_by_another(
    make_group: Any, fake_ray: FakeRay, method: str
) -> None:
    group = make_group(2, 1)
    group.fleet.look()
    handoff, learner = hand_off(group)
    handoff.publish(1)
    fake_ray.starts |= {"generator-0.2": 1e6}
    requests = [make_request(i, prompt_ids=(5,) * (2 + i)) for i in range(8)]
    with group.session(turn_s=0, max_staleness=1) as session:
        session.ask(requests, Sampling())
        ended = session.take()
        learner.learner.weights_step = 2
        fake_ray.handles["generator-0"].dies_at = [method]
        handoff.publish(2)
        while more := session.take():
            ended += more
    assert sorted(ids(ended)) == sorted(request.rollout_id for request in requests)
    assert group.census()["rollout/retried"] > 0


def test_a_rollout_that_began_too_many_weights_steps_ago_is_refused(make_group: Any) -> None:
    group = make_group(1)
    handoff, learner = hand_off(group)
    handoff.publish(1)
    with group.session(turn_s=0) as session:
        session.ask([make_request(0, prompt_ids=(5, 6, 7, 8, 9)), make_request(1, prompt_ids=(5,))], Sampling())
        session.take()
        learner.learner.weights_step = 2
        handoff.publish(2)
        with pytest.raises(InfrastructureError, match=r"at weights steps \[1, 2\], step 2 is wanted"):
            session.take()


def test_one_that_takes_its_turns_and_ends_nothing_is_dropped_and_its_work_done_by_others(
    make_group: Any, fake_ray: FakeRay, said: Said
) -> None:
    group = make_group(2, 1)
    group.fleet.look()
    fake_ray.handles["generator-0"].role.engine.step = list
    with group.session(turn_s=0) as session:
        session.ask(some_requests(4), Sampling())
        ended = [rollout for _ in range(4) for rollout in session.take()]
    assert sorted(ids(ended)) == [f"run/0/p{i}/0" for i in range(4)]
    assert fake_ray.killed == ["generator-0"]
    assert 60 <= fake_ray.now < 80
    assert "still generating without ending anything when the deadline of 60 s passed" in said.of("lost")[0]


class ScorerHandle:
    """A scorer's handle whose calls are answered on the spot; it has no reward for an empty answer."""

    class score:
        @staticmethod
        def remote(exchanges: list[Exchange]) -> Scores:
            rewards = [float(len(exchange.response)) or None for exchange in exchanges]
            return Scores(rewards, {"length": rewards}, {"length": [0.5] * len(rewards)}, {"length/retries": 1})


@pytest.fixture
def make_scorers() -> Callable[[int], ScorerGroup]:
    def make(scorers: int) -> ScorerGroup:
        group = ScorerGroup({f"scorer-{i}": ScorerHandle() for i in range(scorers)}, deadline_s=1)
        group._gather = lambda answers, _: dict(answers)  # type: ignore[method-assign]
        return group

    return make


@pytest.mark.parametrize("scorers", [1, 2, 3, 9])
def test_scores_come_in_the_order_of_the_exchanges(scorers: int, make_scorers: Any) -> None:
    exchanges = [make_exchange("a" * n) for n in (5, 3, 9, 1, 4)]
    group = make_scorers(scorers)
    assert group.score(exchanges) == [5.0, 3.0, 9.0, 1.0, 4.0]
    asked = group.ask(exchanges)
    assert asked.by_source == {"length": asked.rewards}
    assert len(asked.spreads["length"]) == 5
    assert asked.counts == {"length/retries": min(scorers, 5)}


def test_nothing_to_score_gives_nothing(make_scorers: Any) -> None:
    assert make_scorers(2).score([]) == []


def test_where_a_reward_is_missing_whoever_needs_all_is_told_which_source_lacks_it(make_scorers: Any) -> None:
    exchanges = [make_exchange(text) for text in ("aa", "", "a")]
    assert make_scorers(2).ask(exchanges).rewards == [2.0, None, 1.0]
    with pytest.raises(
        InfrastructureError, match=r"1 of 3 answers have no reward \(length lacks 1, length/retries 2\)"
    ):
        make_scorers(2).score(exchanges)

"""Generators in real processes that are killed and stopped while they sample; the engines only echo."""

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from threading import Timer

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.roles.generator import Sampled
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.placement import Placement
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.types import Sampling
from tests.on_ray.conftest import SMALL
from tests.roles.fakes import EchoEngine, FakeLearner, make_request

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]
REQUESTS = [make_request(i) for i in range(24)]


class SlowEcho(EchoEngine):
    def step(self) -> list[tuple[str, Sampled]]:
        slow = [id for id in self.waiting if not id.startswith("probe/")]
        time.sleep(0.025 * len(slow))  # four tokens each: 0.1 s a rollout
        return super().step()


@pytest.fixture
def start(placement: Placement) -> Iterator[Callable[..., tuple[GeneratorGroup, list[str]]]]:
    """Two generators that hold the learner's weights of step 1, on the shared Ray."""
    own: list[Placement] = []

    def make(*overrides: str) -> tuple[GeneratorGroup, list[str]]:
        said: list[str] = []
        config = load_config(None, [*SMALL, "rollout.generators=2", *overrides])
        own.append(Placement(config, started=True))
        generators = own[0].start_generators(None, make_engine=SlowEcho, say=said.append)
        learner = own[0].start_learner(partial(FakeLearner, -2.0, weights_step=1))
        own[0].wait_ready()
        wait_for(lambda: generators.fleet.look() or len(generators.nodes) >= 2)
        handoff = WeightsHandoff(learner, generators, vocabulary=100, context=256)
        generators.refit = handoff.publish
        handoff.publish(1)
        generators.census()
        said.clear()
        return generators, said

    yield make
    own[0].stop_actors()


def send(group: GeneratorGroup, name: str, what: signal.Signals, *, after_s: float) -> None:
    """A signal to a generator's process while the group is at work."""
    pid = re.search(r"pid (\d+)", group.nodes[name])
    assert pid is not None
    Timer(after_s, os.kill, (int(pid[1]), what)).start()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 250
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def check_all(group: GeneratorGroup) -> None:
    """Every rollout once, in order, of the released step and its weights."""
    rollouts = group.generate(REQUESTS, Sampling())
    assert [rollout.id for rollout in rollouts] == [request.rollout_id for request in REQUESTS]
    assert {(rollout.weights_step, rollout.logprobs[0]) for rollout in rollouts} == {(1, -2.0)}


def test_a_generator_killed_in_the_middle_of_a_batch_costs_no_rollout_and_is_replaced(start: Callable) -> None:
    group, said = start("rollout.min_generators=1")
    send(group, "generator-1", signal.SIGKILL, after_s=0.3)
    check_all(group)
    census = group.census()
    assert (census["rollout/lost_generators"], census["rollout/retried"]) == (1, 6)
    assert said[0].startswith("lost generator-1 on ")
    assert re.search("worker process has died|is unavailable", said[0])  # whichever Ray knows first
    wait_for(lambda: check_all(group) or "generator-1.2" in group.fleet.fit)
    assert said[1].startswith("generator-1.2 joined on ")


def test_with_a_fixed_map_a_batch_waits_for_the_successor(start: Callable) -> None:
    group, said = start()
    send(group, "generator-0", signal.SIGKILL, after_s=0.3)
    check_all(group)
    assert group.census()["rollout/retried"] == 12
    assert set(group.fleet.fit) == {"generator-0.2", "generator-1"}
    assert [line.split()[0] for line in said] == ["lost", "generator-0.2"]


def test_generators_may_be_given_up_and_asked_for_by_hand(start: Callable) -> None:
    group, said = start("rollout.min_generators=1")
    group.scale(1)
    check_all(group)
    assert set(group.actors) == {"generator-0"}
    group.scale(2)
    wait_for(lambda: check_all(group) or "generator-1.2" in group.fleet.fit)
    assert said[0] == "generator-1 was let go: 1 generators are wanted"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_of_50_kills_none_loses_doubles_or_stales_a_rollout(start: Callable) -> None:
    group, said = start("rollout.min_generators=1", "rollout.generators=3")
    draw, killed, retried = random.Random(0), 0, 0
    while killed < 50:
        victim = draw.choice(sorted(group.fleet.fit))
        send(group, victim, signal.SIGKILL, after_s=draw.uniform(0.0, 0.8))
        check_all(group)
        wait_for(lambda victim=victim: group.fleet.look() or victim not in group.actors or not check_all(group))
        killed += victim not in group.actors
        retried += group.census()["rollout/retried"]
    assert retried > 50
    assert len([line for line in said if line.startswith("lost ")]) == killed


def test_one_that_stops_answering_is_dropped_at_the_deadline_and_ended(start: Callable) -> None:
    group, said = start("rollout.min_generators=1", "resources.call_deadline_s=5")
    send(group, "generator-1", signal.SIGSTOP, after_s=0.3)
    check_all(group)
    assert "generating 6 rollouts when the deadline of 5 s passed" in said[0]
    assert "generator-1" not in group.actors

"""Roles in their own processes: started side by side, told apart by name, nothing of them left behind."""

import os
import subprocess
import sys
import time
from functools import partial

import pytest
import ray

from rlhf_ray.errors import ActorFailed, DataError, DeadlineExceeded, InfrastructureError
from rlhf_ray.roles.placement import Placement
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.types import Sampling
from tests.on_ray import remote
from tests.roles.fakes import EchoEngine, FakeLearner, length_rewards, make_exchange, make_request

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_roles_start_take_weights_through_the_object_store_and_work(placement: Placement) -> None:
    generators = placement.start_generators(None, make_engine=EchoEngine)
    learner = placement.start_learner(partial(FakeLearner, -2.0, weights_step=1))
    scorers = placement.start_scorers(None, load=length_rewards)
    placement.wait_ready()
    assert all("pid" in node for group in (generators, learner, scorers) for node in group.nodes.values())
    with pytest.raises(InfrastructureError, match=r"generator-0 .* must not sample"):
        generators.generate([make_request()], Sampling())
    metrics = WeightsHandoff(learner, generators, vocabulary=100, context=256).publish(1)
    assert metrics["sync/probe_max_abs"] == 0.0
    (rollout,) = generators.generate([make_request()], Sampling())
    assert (rollout.weights_step, rollout.logprobs[0]) == (1, -2.0)
    assert scorers.score([make_exchange("four")]) == [4.0]
    placement.stop_actors()

    def ask_on() -> None:
        for _ in range(100):  # an actor that was killed may still answer what reaches it before that
            generators.generate([make_request()], Sampling())
            time.sleep(0.1)

    with pytest.raises(ActorFailed, match=r"generator-0 on .* failed while it was generating 1 rollouts"):
        ask_on()


def test_an_actor_that_cannot_start_says_why(placement: Placement) -> None:
    scorers = placement.start_scorers(None, load=remote.lose_the_disk)
    with pytest.raises(ActorFailed, match=r"(?s)scorer-0 failed while it was starting:.*the model's disk is gone"):
        placement.wait_ready()
    placement.stop(scorers)


def test_a_role_has_the_threads_that_the_config_gives(placement: Placement) -> None:
    found = placement.run_task(remote.environment, doing="looking", deadline_s=100)
    assert found == {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}


def test_the_ranks_of_a_task_make_one_group_and_the_first_ones_word_counts(placement: Placement) -> None:
    seen: list[str] = []
    result = placement.run_task(remote.sum_over_ranks, 10, ranks=2, doing="adding", deadline_s=200, on_line=seen.append)
    assert result == ("rank 0 of 2", 10 + 11)
    assert sorted(seen) == ["rank 0 of 2", "rank 1 of 2"]
    assert not placement.run_task(remote.was_a_rank, doing="looking", deadline_s=100)  # none does anything after it


def test_a_rank_that_fails_ends_the_others_and_is_the_one_that_is_heard(placement: Placement) -> None:
    with pytest.raises(DataError, match="rank 1 has no rows"):
        placement.run_task(remote.fail_on_the_second, ranks=2, doing="adding", deadline_s=200)


def test_a_task_prints_to_the_driver_while_it_runs(placement: Placement, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[float] = []
    result = placement.run_task(
        remote.fit, 3, doing="fitting", deadline_s=100, on_line=lambda _: seen.append(time.monotonic())
    )
    assert result == "flat"
    assert len(seen) == 3
    assert seen[2] - seen[0] > 0.5
    placement.run_task(remote.fit, 1, doing="fitting", deadline_s=100)
    assert capsys.readouterr().out == "step 0\n"


def test_a_task_fails_in_its_own_words(placement: Placement) -> None:
    with pytest.raises(DataError, match="row 7"):
        placement.run_task(remote.reject, doing="fitting", deadline_s=100)
    with pytest.raises(ActorFailed, match=r"(?s)^crash failed while it was fitting:.*in crash.*KeyError: 'lamp'"):
        placement.run_task(remote.crash, doing="fitting", deadline_s=100)


def test_a_task_that_is_late_is_killed(placement: Placement) -> None:
    with pytest.raises(DeadlineExceeded, match=r"^fit was still fitting when the deadline of 3 s passed"):
        placement.run_task(remote.fit, 1000, doing="fitting", deadline_s=3)


JOIN = """
from rlhf_ray.config import load_config
from rlhf_ray.errors import InfrastructureError
from rlhf_ray.roles.placement import start_ray
for address in ("127.0.0.1:1", "{address}"):
    try:
        with start_ray(load_config(None, ["resources.address=" + address])) as placement:
            print("joined,", placement.started)
    except InfrastructureError as error:
        print(error)
"""


def test_a_second_driver_is_told_where_no_ray_answers_and_joins_one_that_does(placement: Placement) -> None:
    script = JOIN.format(address=ray.get_runtime_context().gcs_address)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=250)
    refused, joined = run.stdout.splitlines()
    assert refused.startswith("cannot join the Ray cluster at 127.0.0.1:1: ")
    assert joined == "joined, False"
    assert ray.get(ray.put(1)) == 1

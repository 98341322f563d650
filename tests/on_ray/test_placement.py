"""Roles in their own processes: whole batches in order, errors with names, nothing left behind."""

import os
import subprocess
import sys
import time
from functools import partial

import pytest
import ray

from rlhf_ray.config import load_config
from rlhf_ray.errors import ActorFailed, ConfigError, DataError, DeadlineExceeded, InfrastructureError
from rlhf_ray.roles.groups import GeneratorGroup, ScorerGroup
from rlhf_ray.roles.placement import Placement, start_ray
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.types import Rollout, Sampling
from tests.roles.fakes import EchoEngine, FakeLearner, LengthScorer, make_exchange, make_request

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def generators(placement: Placement) -> GeneratorGroup:
    group = placement.start_generators(None, weights_step=0, make_engine=EchoEngine)
    placement.wait_ready()
    return group


def test_rollouts_come_in_the_order_of_their_requests_from_all_generators(generators: GeneratorGroup) -> None:
    requests = [make_request(i) for i in range(7)]
    rollouts = generators.generate(requests, Sampling())
    assert [rollout.id for rollout in rollouts] == [request.rollout_id for request in requests]
    assert generators.generate([], Sampling()) == []
    assert len(set(generators.nodes.values())) == 2


class Forgetful(EchoEngine):
    def generate(self, prompts, sampling, seeds):  # type: ignore[no-untyped-def]
        return super().generate(prompts, sampling, seeds)[:-1]


def test_an_engine_that_loses_a_rollout_stops_the_step(placement: Placement) -> None:
    group = placement.start_generators(None, weights_step=0, make_engine=Forgetful)
    with pytest.raises(InfrastructureError, match=r"generator-\d was given 1 prompts and answered 0"):
        group.generate([make_request(0), make_request(1)], Sampling())


def test_rollouts_that_are_not_those_asked_for_stop_the_step(generators: GeneratorGroup) -> None:
    other = Rollout("run/9/p9/0", "p9", (1,), (2,), (-1.0,), 0, "stop")
    generators._gather = lambda calls, doing: {name: [other] for name in calls}  # type: ignore[method-assign]
    with pytest.raises(InfrastructureError, match="2 missing, first run/0/p0/0"):
        generators.generate([make_request(0), make_request(1)], Sampling())


def test_scores_come_in_the_order_of_the_exchanges(placement: Placement) -> None:
    names = {name: ray.remote(_Scorer).options(num_cpus=0).remote() for name in ("scorer-0", "scorer-1")}
    answers = ["a" * n for n in (5, 3, 9, 1, 4)]
    assert ScorerGroup(names, deadline_s=60).score([make_exchange(a) for a in answers]) == [5.0, 3.0, 9.0, 1.0, 4.0]


class _Scorer(LengthScorer):
    pass


def test_weights_reach_every_generator_through_the_object_store(placement: Placement) -> None:
    generators = placement.start_generators(None, make_engine=EchoEngine)
    learner = placement.start_learner(partial(FakeLearner, -2.0, weights_step=1))
    placement.wait_ready()
    with pytest.raises(InfrastructureError, match="must not sample"):
        generators.generate([make_request()], Sampling())
    metrics = WeightsHandoff(learner, generators, vocabulary=100, context=256).publish(1)
    assert metrics["sync/probe_max_abs"] == 0.0
    rollouts = generators.generate([make_request(0), make_request(1)], Sampling())
    assert {(rollout.weights_step, rollout.logprobs[0]) for rollout in rollouts} == {(1, -2.0)}


def broken_engine() -> EchoEngine:
    raise OSError("the model's disk is gone")


def test_an_actor_that_cannot_start_says_why(placement: Placement) -> None:
    placement.start_generators(None, make_engine=broken_engine)
    with pytest.raises(ActorFailed, match=r"(?s)generator-\d failed while it was starting:.*the model's disk is gone"):
        placement.wait_ready()


def threads() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}


def test_a_role_has_the_threads_that_the_config_gives(placement: Placement) -> None:
    found = placement.run_task(threads, doing="looking", deadline_s=60)
    assert found == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def fit(steps: int) -> str:
    for step in range(steps):
        print(f"step {step}")
        time.sleep(0.5)
    return "flat"


def test_a_task_prints_to_the_driver_while_it_runs(placement: Placement, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[float] = []
    result = placement.run_task(fit, 3, doing="fitting", deadline_s=60, on_line=lambda _: seen.append(time.monotonic()))
    assert result == "flat"
    assert len(seen) == 3
    assert seen[2] - seen[0] > 0.5
    placement.run_task(fit, 1, doing="fitting", deadline_s=60)
    assert capsys.readouterr().out == "step 0\n"


def reject() -> None:
    raise DataError("row 7 is empty")


def crash() -> None:
    raise KeyError("lamp")


def test_a_task_fails_in_its_own_words(placement: Placement) -> None:
    with pytest.raises(DataError, match="row 7"):
        placement.run_task(reject, doing="fitting", deadline_s=60)
    with pytest.raises(ActorFailed, match=r"(?s)^crash failed while it was fitting:.*in crash.*KeyError: 'lamp'"):
        placement.run_task(crash, doing="fitting", deadline_s=60)


def test_a_task_that_is_late_is_killed(placement: Placement) -> None:
    with pytest.raises(DeadlineExceeded, match=r"^fit was still fitting when the deadline of 3 s passed"):
        placement.run_task(fit, 1000, doing="fitting", deadline_s=3)


def test_more_gpus_than_there_are_is_a_line_with_a_way_out() -> None:
    script = """
from rlhf_ray.config import load_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.placement import start_ray
try:
    start_ray(load_config(None, ["resources.learner_gpus=64"]))
except ConfigError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert run.stdout.startswith("resources.*_gpus ask for 64 GPUs and this machine has ")
    assert run.stdout.count("\n") == 1


def test_an_address_where_no_ray_listens_is_told_soon() -> None:
    script = """
from rlhf_ray.config import load_config
from rlhf_ray.roles.placement import start_ray
start_ray(load_config(None, ["resources.address=127.0.0.1:1"]))
"""
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert "InfrastructureError: cannot join the Ray cluster at resources.address=127.0.0.1:1" in run.stderr
    assert time.monotonic() - start < 60


def test_a_second_driver_joins_by_address_and_leaves_the_cluster_running(placement: Placement) -> None:
    address = ray.get_runtime_context().gcs_address
    script = f"""
from rlhf_ray.config import load_config
from rlhf_ray.roles.placement import start_ray
from tests.roles.fakes import *
from rlhf_ray.types import Sampling
with start_ray(load_config(None, ["resources.address={address}"])) as placement:
    group = placement.start_generators(None, weights_step=0, make_engine=EchoEngine)
    placement.wait_ready()
    print(len(group.generate([make_request()], Sampling())))
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert run.stdout == "1\n", run.stderr
    assert ray.get(ray.put(1)) == 1

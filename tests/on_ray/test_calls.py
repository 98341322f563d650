"""Remote calls end within their deadline, and what went wrong in another process is told in its own words."""

import os
import signal
import time
from typing import Any

import pytest
import ray

from rlhf_ray.errors import ActorFailed, DataError, DeadlineExceeded, Diverged
from rlhf_ray.roles.calls import gather
from rlhf_ray.roles.placement import Placement
from tests.on_ray.remote import Worker

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def workers(placement: Placement) -> list[Any]:
    return start_workers(2)


def start_workers(n: int) -> list[Any]:
    actors = [ray.remote(Worker).options(num_cpus=0).remote() for _ in range(n)]
    ray.get([actor.pid.remote() for actor in actors], timeout=100)
    return actors


def test_answers_come_back_by_name(workers: Any) -> None:
    calls = {name: worker.sleep.remote(0) for name, worker in zip("ab", workers, strict=True)}
    assert gather(calls, deadline_s=30, doing="sleeping") == {"a": "slept", "b": "slept"}


def test_the_first_failure_wins_at_once_with_name_node_and_traceback(workers: Any) -> None:
    slow, broken = workers
    calls = {"slow": slow.sleep.remote(6), "broken": broken.lose_the_lamp.remote()}
    start = time.monotonic()
    with pytest.raises(ActorFailed) as caught:
        gather(calls, deadline_s=60, doing="looking", nodes={"broken": "shelf (10.0.0.7)"})
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert message.startswith("broken on shelf (10.0.0.7) failed while it was looking:")
    assert "in lose_the_lamp" in message
    assert "KeyError: 'lamp'" in message
    assert "\x1b" not in message


@pytest.mark.parametrize(("method", "error"), [("diverge", Diverged), ("reject", DataError)])
def test_our_own_errors_cross_processes_as_themselves(workers: Any, method: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"30 nats|row 7"):
        gather({"a": getattr(workers[0], method).remote()}, deadline_s=30, doing="failing")


def test_a_late_actor_is_named_with_its_node_and_what_it_was_doing(workers: Any) -> None:
    calls = {"prompt": workers[0].sleep.remote(0), "late": workers[1].sleep.remote(6)}
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"^late on attic was still sleeping when the deadline of 1.5 s passed"):
        gather(calls, deadline_s=1.5, doing="sleeping", nodes={"late": "attic"})
    assert time.monotonic() - start < 5


def test_calls_that_have_not_begun_are_called_off_when_one_fails(workers: Any) -> None:
    queue, broken = workers
    ray.get(broken.pid.remote(), timeout=60)  # it may still be at what another test left it with
    running, queued = queue.sleep.remote(3), queue.sleep.remote(0)
    with pytest.raises(ActorFailed):
        gather({"queue": queued, "broken": broken.lose_the_lamp.remote()}, deadline_s=30, doing="looking")
    assert ray.get(running, timeout=30) == "slept"
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(queued, timeout=30)


def test_the_death_of_a_process_is_a_failure_that_says_what_ray_knows(placement: Placement) -> None:
    (worker,) = start_workers(1)
    pid = ray.get(worker.pid.remote(), timeout=30)
    call = worker.sleep.remote(60)
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorFailed, match=r"(?s)^doomed on cellar failed while it was sleeping:.*died unexpectedly"):
        gather({"doomed": call}, deadline_s=60, doing="sleeping", nodes={"doomed": "cellar"})

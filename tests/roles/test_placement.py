"""What Ray is told, and what is refused before it starts."""

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.placement import Placement, start_ray, threads_for
from rlhf_ray.roles.seats import SEATS


def test_more_gpus_than_there_are_is_refused_before_ray_starts() -> None:
    with pytest.raises(ConfigError, match=r"ask for 64 GPUs .* set them to 0 to run on CPU"):
        start_ray(load_config(None, ["resources.learner_gpus=64"]))


@pytest.mark.parametrize(
    ("override", "threads"),
    [("rollout.max_staleness=0", 8), ("rollout.max_staleness=1", 4), ("resources.threads=3", 3)],
)
def test_roles_have_all_cores_in_turn_half_where_they_overlap_and_else_what_is_said(
    override: str, threads: int
) -> None:
    assert threads_for(load_config(None, [override]), 8) == dict.fromkeys(("generator", "scorer", "learner"), threads)


def test_each_role_gets_its_own_gpus_and_the_threads_of_the_config() -> None:
    config = load_config(None, ["resources.threads=3", "resources.generator_gpus=2", "resources.learner_gpus=0.5"])
    placement = Placement(config, started=True)
    assert [placement.options(role)["num_gpus"] for role in ("generator", "learner", "scorer")] == [2, 0.5, 0]
    environment = placement.options("learner")["runtime_env"]["env_vars"]
    assert environment["OMP_NUM_THREADS"] == "3"
    assert int(environment["GOMP_SPINCOUNT"]) <= 5000  # waiting threads soon leave the cores to others


def test_a_dead_role_is_not_started_again_behind_the_runs_back() -> None:
    placement = Placement(load_config(), started=True)
    assert placement.options("generator")["max_restarts"] == 0
    assert placement.options("learner", actor=False)["max_retries"] == 0


def test_a_pinned_role_asks_for_a_seat_of_its_own_name_and_others_for_none() -> None:
    pinned = Placement(load_config(None, ["resources.pin_roles=true", "resources.threads=1"]), started=True)
    free = Placement(load_config(None, ["resources.threads=1"]), started=True)
    assert [pinned.options(role)["resources"] for role in SEATS] == [{name: 1.0} for name in SEATS.values()]
    assert [free.options(role)["resources"] for role in SEATS] == [{}, {}, {}]

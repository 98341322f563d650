"""One local Ray for all tests that need one."""

from collections.abc import Iterator

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.roles.placement import Placement, start_ray

SMALL = [
    "run.id=test", "seed=3", "rollout.generators=1", "resources.call_deadline_s=120", "resources.threads=1",
    "resources.kv_cache_mib=64", "model.vocabulary=512", "model.hidden=64", "model.heads=2", "model.layers=2",
    "model.intermediate=128", "model.context=256", "rollout.max_tokens=48",
]  # fmt: skip


@pytest.fixture(scope="session")
def shared_placement() -> Iterator[Placement]:
    with start_ray(load_config(None, SMALL)) as placement:
        yield placement


@pytest.fixture(scope="module")
def placement(shared_placement: Placement) -> Iterator[Placement]:
    """The shared Ray; what actors a module leaves are ended."""
    yield shared_placement
    shared_placement.stop_actors()

"""One local Ray for all tests that need one."""

from collections.abc import Iterator

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.roles.placement import Placement, start_ray

OVERRIDES = ["run.id=test", "resources.call_deadline_s=60", "resources.threads=1", "rollout.generators=2"]


@pytest.fixture(scope="session")
def shared_placement() -> Iterator[Placement]:
    with start_ray(load_config(None, OVERRIDES)) as placement:
        yield placement


@pytest.fixture
def placement(shared_placement: Placement) -> Iterator[Placement]:
    """The shared Ray, without actors; those that a test leaves are ended."""
    yield shared_placement
    shared_placement.stop_actors()

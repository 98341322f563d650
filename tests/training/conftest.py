"""What several tests of the loops need."""

import pytest

from rlhf_ray.roles import calls, fleet, generators
from tests.roles.fake_ray import FakeRay


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Ray and its clock, put in their place for a group of generators."""
    fake = FakeRay()
    for module in (calls, fleet):
        monkeypatch.setattr(module, "ray", fake)
    for module in (calls, fleet, generators):
        monkeypatch.setattr(module, "time", fake)
    return fake

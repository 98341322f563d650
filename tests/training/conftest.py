"""What several tests of the loops need."""

from pathlib import Path

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.roles import calls, fleet, generators
from rlhf_ray.training.run_folder import RunFolder
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


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of another run, up to its reward model."""
    folder = RunFolder.open(load_config(None, [f"run.root={tmp_path}", "run.id=old"]))
    for name in ("base_policy", "reward_model"):
        (folder.path / name).mkdir()
        (folder.path / name / "weights").write_text(name)
    folder.write_json("feedback.json", {"snapshot": "s"})
    folder.close()
    return folder.path

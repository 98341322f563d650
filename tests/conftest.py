"""What every test may ask for. Markers are declared in pyproject.toml, and undeclared ones are errors."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Tiny tensors: a second thread costs more than it brings. Before torch is imported, or it is not heard.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in a test may fetch a model.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with data that people made; a test that needs it is skipped, and says so, where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the project: not tried on data that people made")
    return folder

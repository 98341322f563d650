from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.feedback.places import KINDS, place


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    with place(request.param, tmp_path) as url:
        yield url

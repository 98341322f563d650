"""The end of the demo, without Ray: what a person is told, and how a signal ends it. With Ray: tests/on_serve."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import Interrupted
from rlhf_ray.serving import visit as visiting
from rlhf_ray.training.stopping import Stopping
from tests.serving.runs import SERVABLE, make_run


@pytest.mark.parametrize(("asked", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_service_starts_ends_the_visit_with_its_own_code_and_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: signal.Signals, code: int
) -> None:
    @contextmanager
    def stopped(*_: Any, **__: Any) -> Iterator[Stopping]:
        stopping = Stopping()
        stopping.asked = asked
        yield stopping

    monkeypatch.setattr(visiting, "serving", stopped)
    said: list[str] = []
    with pytest.raises(Interrupted) as ended:
        visiting.visit(make_run(tmp_path, **SERVABLE), say=said.append)
    assert ended.value.exit_code == code
    assert said == ["reward model 1: published", "policy 1: served"]


def test_what_a_person_may_look_at_lies_in_the_run_folder(tmp_path: Path) -> None:
    told = visiting.where_to_look(tmp_path)
    assert str(tmp_path / "report.html") in told
    assert f"rlhf serve {tmp_path}" in told

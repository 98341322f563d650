"""The end of the demo: a run is served, asked by OpenAI's client and rated, and nothing goes on running."""

from pathlib import Path

import pytest
import ray

from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.models.registry import Registry
from rlhf_ray.serving.visit import VISITOR, visit
from tests.serving.runs import SERVABLE, make_run

pytestmark = [pytest.mark.serve, pytest.mark.timeout(280)]


def test_a_visit_asks_rates_and_leaves_its_traces_in_the_run_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path, **SERVABLE)
    said: list[str] = []
    visit(run, say=said.append)
    assert not ray.is_initialized()
    with FeedbackStore(str(run / "service" / "feedback.db"), read_only=True) as store:
        (kept,) = store.page().items
    assert kept.annotator == VISITOR
    assert kept.rating is not None
    assert f"rated:    {kept.rating.value:.0f} of 5, kept as {kept.id}" in said
    asked = next(line for line in said if line.startswith("asked:"))
    assert kept.prompt.messages[-1].content in asked
    assert any(line.startswith("answered:") and line.endswith("(policy version 1)") for line in said)
    promoted = Registry(run / "service" / "registry").promoted("policy")
    assert promoted is not None
    assert promoted.number == 1
    assert str(run / "report.html") in said[-1]
    visit(run, say=lambda line: None)  # again: the same version, another rating
    with FeedbackStore(str(run / "service" / "feedback.db"), read_only=True) as store:
        assert store.count() == 2

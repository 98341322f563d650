"""Five thousand requests that no client would send, made up from the service's own OpenAPI or broken: no row kept."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.serving.records import Records
from tests.feedback.places import KINDS, place
from tests.serving.apps import make_app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MADE_UP, BROKEN = 4_000, 1_000


class Service:
    """The door with its routes over a real store, asked without a socket."""

    def __init__(self, database: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.records = Records(database)
        self.app = make_app(records=self.records)
        self.reader = FeedbackStore(database, read_only=True)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app),
            base_url="http://127.0.0.1",
            headers={"Authorization": "Bearer key"},
        )

    def send(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self.loop.run_until_complete(self.http.request(method, path, **request))

    def rows(self) -> tuple[int, int]:
        done = self.loop.run_until_complete(self.http.get("/v1/tasks/progress")).json()
        return self.reader.count(), done["tasks"]

    def close(self) -> None:
        self.loop.run_until_complete(self.records.close())
        self.reader.close()
        self.loop.close()


@pytest.fixture(params=KINDS)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with place(request.param, tmp_path) as url:
        service = Service(url)
        yield service
        service.close()


def test_what_the_schema_forbids_is_refused_and_leaves_no_row(service: Service) -> None:
    schema = schemathesis.openapi.from_dict(service.app.openapi())
    statuses: Counter[int] = Counter()

    @hypothesis.seed(0)
    @settings(
        max_examples=MADE_UP,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @given(case=schema.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def send(case: Case) -> None:
        before = service.rows()
        request = case.as_transport_kwargs(base_url="http://127.0.0.1", headers={"Authorization": "Bearer key"})
        request.pop("cookies", None)
        answer = service.send(request.pop("method"), request.pop("url"), **_for_httpx(request))
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (case.method, case.path, answer.text)
        if answer.status_code >= 400:
            assert service.rows() == before, (case.method, case.path, answer.text)

    send()
    assert sum(statuses.values()) >= MADE_UP * 0.9
    assert sum(count for status, count in statuses.items() if status >= 400) > MADE_UP / 2


def _for_httpx(request: dict[str, Any]) -> dict[str, Any]:
    known = {"headers", "params", "json", "files"}
    taken = {name: value for name, value in request.items() if name in known and value is not None}
    if request.get("data") is not None:
        taken["content" if isinstance(request["data"], str | bytes) else "data"] = request["data"]
    return taken


GOOD = [
    ("POST", "/v1/feedback", {"prompt": "Hi", "completions": ["a", "b"], "ranking": [1, 2]}),
    ("POST", "/v1/tasks", {"tasks": [{"prompt": "Hi", "completions": ["a", "b"]}]}),
    ("POST", "/v1/exclusions", {"annotators": ["boss"], "reason": "x"}),
    ("POST", "/v1/snapshots", {"name": "s"}),
    ("PUT", "/v1/tasks/guidelines", {"text": "x"}),
]


def test_bodies_broken_byte_by_byte_are_refused_and_leave_no_row(service: Service) -> None:
    statuses: Counter[int] = Counter()

    @hypothesis.seed(0)
    @settings(max_examples=BROKEN, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(route=st.sampled_from(GOOD), seed=st.integers(0, 1 << 30))
    def send(route: tuple[str, str, Any], seed: int) -> None:
        method, path, body = route
        broken = _broken(json.dumps(body).encode(), random.Random(seed))
        before = service.rows()
        answer = service.send(method, path, content=broken, headers={"content-type": "application/json"})
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (path, answer.text)
        if answer.status_code >= 400:
            assert service.rows() == before, (path, answer.text)

    send()
    assert sum(count for status, count in statuses.items() if status >= 400) > BROKEN / 2


def _broken(body: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, dropped, doubled, or the end cut off."""
    mutable = bytearray(body)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(mutable) or 1)
        kind = draw.randrange(4)
        if not mutable:
            break
        if kind == 0:
            mutable[at] = draw.randrange(256)
        elif kind == 1:
            del mutable[at]
        elif kind == 2:
            mutable[at:at] = mutable[at : at + draw.randint(1, 20)]
        else:
            del mutable[at + 1 :]
    return bytes(mutable)

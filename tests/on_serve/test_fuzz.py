"""A thousand requests made up from the service's own OpenAPI: nothing breaks, nothing bad is kept."""

from collections import Counter
from collections.abc import Iterator

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode

from rlhf_ray.models.registry import Registry
from rlhf_ray.serving.settings import LimitSettings, PolicySettings
from rlhf_ray.serving.start import promote_first, publish_run
from tests.on_serve.running import Running, running
from tests.serving.runs import SERVABLE, make_run

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(900)]

CASES_A_MODE = 500


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("service")
    registry = Registry(root / "registry")
    promote_first(registry, publish_run(make_run(root, **SERVABLE), registry, by="test"), by="test")
    policy = PolicySettings(kv_cache_mib=64, max_tokens=32, deadline_s=60)
    with running(root, registry, policy=policy, limits=LimitSettings(requests_per_minute=1_000_000)) as service:
        yield service
    registry.close()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_breaks_the_service_and_none_that_is_refused_leaves_a_row(
    service: Running, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    statuses: Counter[int] = Counter()

    @hypothesis.seed(0)
    @settings(
        max_examples=CASES_A_MODE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @given(case=schema.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        before = service.rows()
        answer = case.call(headers=service.headers, timeout=60)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (case.method, case.path, answer.text)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]
            assert service.rows() == before, (case.method, case.path, answer.text)

    send()
    print(mode.value, dict(statuses))
    assert statuses.total() >= CASES_A_MODE
    ready = httpx.get(f"{service.url}/readyz", headers=service.headers, timeout=30)
    assert ready.status_code == 200, ready.text
    body = {"model": "policy", "messages": [{"role": "user", "content": "my lamp arrived broken"}], "max_tokens": 4}
    asked = httpx.post(f"{service.url}/v1/chat/completions", json=body, headers=service.headers, timeout=60)
    assert asked.status_code == 200, asked.text

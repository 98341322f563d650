"""Every route that the whole service has, for no key, a bad key, a wrong role and a right one."""

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from rlhf_ray.serving.auth import ROLES
from rlhf_ray.serving.backends import Readiness
from rlhf_ray.serving.door import OPEN, create_door
from rlhf_ray.serving.errors import CODES
from rlhf_ray.serving.settings import LimitSettings, ServiceConfig
from tests.serving.asgi import KnownKeys, ask, error_of

ANYBODY = {"app", "annotator", "trainer", "admin"}
LABELLING = {"annotator", "trainer", "admin"}
WHO_MAY = {
    ("GET", "/v1/models"): ANYBODY,
    ("GET", "/v1/models/{id}"): ANYBODY,
    ("POST", "/v1/chat/completions"): {"app", "admin"},
    ("POST", "/v1/completions"): {"app", "admin"},
    ("POST", "/v1/rewards"): {"app", "trainer", "admin"},
    ("POST", "/get_reward"): {"app", "trainer", "admin"},
    ("POST", "/v1/feedback"): {"annotator", "trainer", "admin"},
    ("GET", "/v1/feedback"): {"trainer", "admin"},
    ("GET", "/v1/feedback/{feedback_id}"): {"trainer", "admin"},
    ("DELETE", "/v1/completions"): {"admin"},
    ("DELETE", "/v1/completions/{completion_id}"): {"admin"},
    ("POST", "/v1/tasks/next"): LABELLING,
    ("POST", "/v1/tasks/{task_id}/answer"): LABELLING,
    ("POST", "/v1/tasks/{task_id}/skip"): LABELLING,
    ("POST", "/v1/tasks/{task_id}/undo"): LABELLING,
    ("GET", "/v1/tasks/history"): LABELLING,
    ("GET", "/v1/tasks/progress"): LABELLING,
    ("GET", "/v1/tasks/guidelines"): LABELLING,
    ("PUT", "/v1/tasks/guidelines"): {"trainer", "admin"},
    ("POST", "/v1/tasks"): {"trainer", "admin"},
    ("GET", "/v1/annotators"): {"trainer", "admin"},
    ("POST", "/v1/exclusions"): {"admin"},
    ("POST", "/v1/erasures"): {"admin"},
    ("GET", "/v1/snapshots"): {"trainer", "admin"},
    ("POST", "/v1/snapshots"): {"trainer", "admin"},
    ("GET", "/v1/keys"): {"admin"},
    ("POST", "/v1/keys"): {"admin"},
    ("DELETE", "/v1/keys/{name}"): {"admin"},
}


class Nothing:
    """A part that has nothing and does nothing."""

    def __getattr__(self, name: str) -> Any:
        async def method(*_: Any, **__: Any) -> Any:
            return Readiness(True, "") if name == "ready" else [] if name == "models" else None

        return method


def whole_door() -> FastAPI:
    part: Any = Nothing()
    parts = {"policy": part, "reward": part, "records": part, "versions": part}
    return create_door(ServiceConfig(), **parts, keys=KnownKeys(), desk=part)


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of all that is behind the gates, converters left out."""
    return [
        (method, re.sub(r":\w+}", "}", route.path))
        for route in app.routes
        if isinstance(route, APIRoute) and route.path not in OPEN
        for method in route.methods
    ]


def test_the_table_of_who_may_names_each_route_there_is() -> None:
    assert sorted(routes(whole_door())) == sorted(WHO_MAY)


@pytest.mark.parametrize(("method", "path"), WHO_MAY)
def test_no_key_a_bad_key_a_wrong_role_and_a_right_one(method: str, path: str) -> None:
    door, who = whole_door(), WHO_MAY[method, path]
    path = re.sub(r"{\w+}", "x", path)
    for key in (None, "bad-key"):
        answer = ask(door, method, path, key=key, json={})
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    for name in ROLES:
        # an empty body is nobody's request: whoever may is refused for it, or finds nothing
        answer = ask(door, method, path, key=f"{name}-key", json={})
        if name in who:
            assert answer.status_code not in (401, 403), answer.text
        else:
            assert (answer.status_code, error_of(answer)["code"]) == (403, "wrong_role")


def test_no_control_route_is_there() -> None:
    door = whole_door()
    for path in (
        "/invocations",
        "/pooling",
        "/classify",
        "/tokenize",
        "/detokenize",
        "/pause",
        "/resume",
        "/update_weights",
        "/init_weight_transfer_engine",
        "/collective_rpc",
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/load",
        "/metrics",
        "/v1/load_lora_adapter",
    ):
        for method in ("GET", "POST"):
            assert ask(door, method, path, json={}).status_code == 404, path


def test_the_document_lists_the_routes_and_a_key_for_each() -> None:
    document = ask(whole_door(), "GET", "/openapi.json", key=None).json()
    listed = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    assert listed == {*WHO_MAY, ("GET", "/healthz"), ("GET", "/readyz")}
    for method, path in WHO_MAY:
        assert document["paths"][path][method.lower()]["security"] == [{"key": []}]


def test_each_route_and_each_limit_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
    assert not [path for path in {*(path for _, path in WHO_MAY), "/healthz", "/readyz"} if path not in text]
    assert not [name for name in LimitSettings.model_fields if f"limits.{name}" not in text]
    assert not [name for name in ROLES if f"| {name} |" not in text]
    assert not [status for status in CODES if status not in (409, 422) and str(status) not in text]

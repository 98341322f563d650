"""Whatever is asked, the door answers in one shape, and lets nobody in who was not meant."""

import json
import logging
from collections import Counter
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray import __version__
from rlhf_ray.serving.auth import ROLES, Caller, Gate, role
from rlhf_ray.serving.backends import Readiness
from rlhf_ray.serving.door import OPEN, ungated
from rlhf_ray.serving.errors import ApiError
from tests.serving.asgi import SECRET, KnownKeys, Part, ask, error_of, make_door

WHO_MAY = {
    ("POST", "/v1/notes"): {"app", "admin"},
    ("POST", "/v1/feedback"): {"annotator", "admin"},
    ("GET", "/v1/feedback"): {"trainer", "admin"},
}


@pytest.mark.parametrize(("method", "path"), WHO_MAY)
def test_each_route_for_no_key_a_bad_key_and_each_role(method: str, path: str) -> None:
    door = make_door()
    body: dict[str, Any] = {} if method == "GET" else {"json": {}}
    for key in (None, "bad-key"):
        answer = ask(door, method, path, key=key, **body)
        assert (answer.status_code, error_of(answer)["type"]) == (401, "authentication_error")
    for name in ROLES:
        answer = ask(door, method, path, key=f"{name}-key", **body)
        assert answer.status_code == (200 if name in WHO_MAY[method, path] else 403), name
        if answer.status_code == 403:
            assert error_of(answer)["code"] == "wrong_role"


def test_who_may_is_said_in_a_refusal() -> None:
    said = error_of(ask(make_door(), "POST", "/v1/notes", key="trainer-key", json={}))["message"]
    assert said == "a key with role trainer may not do this: app or admin may"


def test_a_route_that_names_no_role_is_not_served() -> None:
    careless = APIRouter()

    @careless.get("/v1/everything")
    async def everything() -> str:
        return "all of it"

    with pytest.raises(AssertionError, match="/v1/everything names no role"):
        make_door(routers=[careless])


def test_a_role_may_be_asked_for_by_a_whole_router_or_deeper_down() -> None:
    def through(caller: Annotated[Caller, Depends(role("trainer"))]) -> Caller:
        return caller

    for kind in ({"dependencies": [Depends(role("trainer"))]}, {"dependencies": [Depends(through)]}):
        routes = APIRouter(**kind)

        @routes.get("/v1/rows")
        async def rows() -> list[str]:
            return []

        door = make_door(routers=[routes])
        assert [ask(door, "GET", "/v1/rows", key=f"{who}-key").status_code for who in ("trainer", "app")] == [200, 403]


def test_what_is_mounted_beside_the_routes_is_not_served_either() -> None:
    app = FastAPI(openapi_url=None)
    app.mount("/static", lambda *_: None)
    assert ungated(app) == ["/static"]


def test_only_health_and_documents_are_open() -> None:
    door = make_door()
    open_paths = [route.path for route in door.routes if getattr(route, "path", None) in OPEN]  # type: ignore[attr-defined]
    assert sorted(open_paths) == sorted(OPEN)
    assert all(ask(door, "GET", path, key=None).status_code == 200 for path in OPEN)


def test_the_page_with_scripts_from_elsewhere_stays_on_this_machine() -> None:
    assert ask(make_door(host="0.0.0.0"), "GET", "/docs").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", {}, 404, "not_found"),
        ("POST", "/nowhere", {"json": {}}, 404, "not_found"),
        ("DELETE", "/v1/notes", {}, 405, "method_not_allowed"),
        ("GET", "/v1/notes", {}, 405, "method_not_allowed"),
        ("POST", "/healthz", {"json": {}}, 405, "method_not_allowed"),
        ("POST", "/v1/notes", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, None),
        ("POST", "/v1/notes", {"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "invalid_json"),
        ("POST", "/v1/notes", {}, 400, "invalid_value"),
        ("POST", "/v1/notes", {"json": []}, 400, "invalid_value"),
        ("POST", "/v1/notes", {"json": {"stars": 9}}, 400, "invalid_value"),
        ("POST", "/v1/notes", {"json": {"txt": "x"}}, 400, "unknown_field"),
        ("GET", "/v1/refused", {}, 503, "unavailable"),
        ("GET", "/v1/broken", {}, 500, "internal_error"),
        ("TRACE", "/v1/notes", {}, 405, "method_not_allowed"),
        ("HEAD", "/v1/notes", {}, 405, None),
    ],
)
def test_every_refusal_has_the_envelope(
    method: str, path: str, body: dict[str, Any], status: int, code: str | None
) -> None:
    answer = ask(make_door(), method, path, **body)
    assert answer.status_code == status
    assert answer.headers["x-request-id"].startswith("req-")
    if method != "HEAD":
        assert error_of(answer)["code"] == code or code is None


def test_a_405_says_what_is_allowed() -> None:
    assert ask(make_door(), "DELETE", "/v1/notes").headers["Allow"] == "POST"


def test_a_503_says_when_to_come_back() -> None:
    assert ask(make_door(), "GET", "/v1/refused").headers["Retry-After"] == "2"


def test_an_unknown_field_is_named_and_what_was_said_is_not_repeated() -> None:
    error = error_of(ask(make_door(), "POST", "/v1/notes", json={"chat_template": "canary-secret"}))
    assert (error["param"], error["message"]) == ("chat_template", "unknown field 'chat_template': leave it out")
    for wrong in ({"text": {"a": "canary-secret"}}, {"stars": "canary-secret"}, {"text": ["canary-secret"]}):
        answer = ask(make_door(), "POST", "/v1/notes", json=wrong)
        assert answer.status_code == 400
        assert "canary" not in answer.text
        assert error_of(answer)["param"] == next(iter(wrong))


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb", "\u0000", "€"])
def test_a_field_with_an_impossible_name_can_be_refused(name: str) -> None:
    content = json.dumps({name: 1}).encode()
    answer = ask(make_door(), "POST", "/v1/notes", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert error_of(answer)["code"] in ("unknown_field", "invalid_value")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "true", '"4"x'])
def test_impossible_numbers_are_refused(number: str) -> None:
    content = f'{{"stars": {number}}}'.encode()
    answer = ask(make_door(), "POST", "/v1/notes", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 or (number == "true" and answer.status_code == 200)
    if answer.status_code == 400:
        error_of(answer)


def test_what_nobody_foresaw_is_a_counted_500_that_tells_and_logs_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    counts: Counter[str] = Counter()
    door = make_door(count=lambda name: counts.update([name]))
    with caplog.at_level(logging.DEBUG):
        answer = ask(door, "GET", "/v1/broken")
    id_ = answer.headers["x-request-id"]
    assert id_ in error_of(answer)["message"]
    assert "RuntimeError" in caplog.text
    assert id_ in caplog.text
    assert "in broken" in caplog.text  # where it was raised
    assert SECRET not in caplog.text + answer.text
    assert counts == {"unforeseen_errors": 1, "http_500": 1}


def test_an_answer_that_breaks_off_is_cut_and_not_ended() -> None:
    counts: Counter[str] = Counter()
    with pytest.raises(Exception, match=r"^req-") as broken:
        ask(make_door(count=lambda name: counts.update([name])), "GET", "/v1/half")
    assert "canary" not in str(broken.value)
    assert broken.value.__suppress_context__
    assert counts == {"unforeseen_errors": 1}


def test_refusals_are_counted_by_status() -> None:
    counts: Counter[str] = Counter()
    door = make_door(count=lambda name: counts.update([name]), limits={"requests_per_minute": 1})
    for _ in range(3):
        ask(door, "POST", "/v1/notes", json={})
    ask(door, "POST", "/v1/notes", key=None, json={})
    assert counts == {"http_429": 2, "http_401": 1}


def test_the_process_is_well_without_its_parts_but_not_ready() -> None:
    door = make_door(parts={"records": Part(Readiness(True, "0 waiting")), "versions": Part(Readiness(False, "none"))})
    assert ask(door, "GET", "/healthz", key=None).json() == {"status": "ok"}
    answer = ask(door, "GET", "/readyz", key=None)
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "parts": {"records": "0 waiting", "versions": "none"}}


def test_ready_is_what_each_part_that_there_is_says() -> None:
    door = make_door(parts={"records": Part(Readiness(True, "0 waiting")), "versions": None})
    answer = ask(door, "GET", "/readyz", key=None)
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "parts": {"records": "0 waiting"}})


def test_a_part_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.serving.door.READY_WITHIN_S", 0.05)
    door = make_door(parts={"slow": Part(None), "gone": Part(ApiError(503, "its replica is gone"))})
    answer = ask(door, "GET", "/readyz", key=None)
    assert answer.status_code == 503
    assert answer.json()["parts"] == {"slow": "no answer within 0.05 s", "gone": "its replica is gone"}


def test_the_document_has_a_version_the_key_and_the_one_error_shape() -> None:
    document = ask(make_door(), "GET", "/openapi.json", key=None).json()
    assert document["info"]["version"] == __version__
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["components"]["schemas"]["ErrorEnvelope"]["example"]["error"]["param"] == "chat_template"
    operation = document["paths"]["/v1/notes"]["post"]
    assert operation["security"] == [{"key": []}]
    assert set(operation["responses"]) == {"200", "4XX", "5XX"}
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_no_page_can_read_an_answer_as_something_else() -> None:
    answer = ask(make_door(), "GET", "/healthz")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers


def test_gates_let_administrators_through_everywhere() -> None:
    assert role("app") == Gate(frozenset({"app", "admin"}))
    with pytest.raises(AssertionError):
        role("root")  # type: ignore[arg-type]


WIDE_OPEN = make_door(keys=KnownKeys({}))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=50), JSON.map(lambda value: json.dumps(value).encode())))
def test_no_body_breaks_the_door(body: bytes) -> None:
    answer = ask(WIDE_OPEN, "POST", "/v1/notes", key=None, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        error_of(answer)

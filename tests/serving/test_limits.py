"""What a request passes before a route sees it."""

import asyncio
import json
import random
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from rlhf_ray.serving.auth import Caller
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.limits import Pace, check_json
from rlhf_ray.serving.settings import LimitSettings
from tests.serving.asgi import KnownKeys, ask, error_of, make_door, raw


def status(messages: list[Message]) -> int:
    return int(messages[0]["status"])


def code(messages: list[Message]) -> str:
    return str(json.loads(messages[1]["body"])["error"]["code"])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "me.org"])
def test_its_own_names_are_answered_to(host: str) -> None:
    assert ask(make_door(hosts=("me.org",)), "GET", "/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.org", "evil.org:8000", "me@127.0.0.1", "127.0.0.1/x", "127.0.0.1.evil.org", ""])
def test_another_host_is_refused_even_where_no_key_is_needed(host: str) -> None:
    answer = ask(make_door(), "GET", "/healthz", headers={"Host": host})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "unknown_host")


@pytest.mark.parametrize("host", ["127.0.0.1/healthz?", "127.0.0.1/docs#", "127.0.0.1:80/openapi.json"])
def test_a_host_that_pretends_to_be_an_open_path_opens_nothing(host: str) -> None:
    answer = ask(make_door(), "GET", "/v1/feedback", key=None, headers={"Host": host})
    assert answer.status_code in (400, 401)


def test_two_hosts_or_none_are_refused() -> None:
    for headers in ([(b"host", b"127.0.0.1")] * 2, []):
        assert status(asyncio.run(raw(make_door(), [b""], method="GET", path="/healthz", headers=headers))) == 400


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic admin-key", "admin-key", "Bearer admin-key app-key"]
)
def test_what_is_no_bearer_key_is_nobody(given: str) -> None:
    answer = ask(make_door(), "GET", "/v1/feedback", key=None, headers={"Authorization": given})
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_two_keys_are_nobody() -> None:
    headers = [(b"host", b"127.0.0.1"), *[(b"authorization", b"Bearer admin-key")] * 2]
    assert status(asyncio.run(raw(make_door(), [b""], method="GET", path="/v1/feedback", headers=headers))) == 401


def test_without_keys_this_machine_is_the_administrator_and_no_other() -> None:
    door = make_door(keys=KnownKeys({}))
    assert ask(door, "GET", "/v1/feedback", key=None).status_code == 200
    assert ask(door, "GET", "/v1/feedback", key=None, client="::1").status_code == 200
    for elsewhere in ("10.0.0.7", "unix", ""):
        assert ask(door, "GET", "/v1/feedback", key=None, client=elsewhere).status_code == 401


def test_the_body_of_somebody_unknown_is_not_read() -> None:
    asked = []

    async def receive() -> Message:
        asked.append(1)
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def go() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/notes", "headers": [(b"host", b"localhost")]}
        await make_door()({**scope, "client": ("127.0.0.1", 1)}, receive, send)
        return sent

    assert (status(asyncio.run(go())), asked) == (401, [])


@pytest.mark.parametrize(("path", "cap"), [("/v1/notes", 3000), ("/v1/feedback", 1000)])
def test_a_body_above_its_cap_is_refused_however_it_comes(path: str, cap: int) -> None:
    door = make_door(limits={"body_bytes": 3000, "feedback_bytes": 1000})
    fits = json.dumps({"text": "x" * (cap - 12)}).encode()
    assert len(fits) == cap
    assert status(asyncio.run(raw(door, [fits], path=path))) == 200
    assert status(asyncio.run(raw(door, [fits[:500], fits[500:]], path=path))) == 200
    assert status(asyncio.run(raw(door, [fits, b" "], path=path))) == 413
    told = ask(door, "POST", path, content=fits + b" ", headers={"Content-Type": "application/json"})
    assert (told.status_code, error_of(told)["code"]) == (413, "body_too_large")


def test_an_endless_body_is_cut_off_and_not_kept() -> None:
    door = make_door(limits={"body_bytes": 1 << 20})
    pieces = [b" " * 65536] * 2000
    asyncio.run(raw(door, [b"{}"]))
    tracemalloc.start()
    assert status(asyncio.run(raw(door, pieces))) == 413
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_length_that_lies_is_not_believed() -> None:
    headers = [(b"host", b"localhost"), (b"authorization", b"Bearer admin-key"), (b"content-type", b"application/json")]
    door = make_door(limits={"body_bytes": 100})
    lied = asyncio.run(raw(door, [b" " * 101], headers=[*headers, (b"content-length", b"2")]))
    assert status(lied) == 413
    for odd in (b"-1", b"x", b"9" * 400):
        assert status(asyncio.run(raw(door, [b"{}"], headers=[*headers, (b"content-length", odd)]))) in (200, 413)


def test_a_body_that_does_not_arrive_in_time_is_a_408() -> None:
    door = make_door(limits={"body_deadline_s": 0.05})
    messages = asyncio.run(raw(door, [b"{", 5.0, b"}"]))
    assert (status(messages), code(messages)) == (408, "request_timeout")


def test_a_caller_who_leaves_gets_no_answer() -> None:
    assert asyncio.run(raw(make_door(), [b"{", None])) == []


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_page_of_somebody_else_could_send_is_a_415(kind: str) -> None:
    answer = ask(make_door(), "POST", "/v1/notes", content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == 415
    ask(make_door(), "POST", "/v1/notes", content=b"{}", headers={"Content-Type": "application/json; charset=utf-8"})


@pytest.mark.parametrize("charset", ["latin-1", "utf-16", "utf-8; x=y"])
def test_other_charsets_are_a_415(charset: str) -> None:
    with pytest.raises(ApiError) as refused:
        check_json(f"application/json; charset={charset}", b"{}", 8)
    assert refused.value.status == 415


@pytest.mark.parametrize(
    "body", ['{"text": "é"}'.encode("latin-1"), '{"text": "é"}'.encode("utf-16"), b"{}\0", b"\xff"]
)
def test_what_is_not_utf_8_is_a_400(body: bytes) -> None:
    answer = ask(make_door(), "POST", "/v1/notes", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")


def nested(depth: int, inner: str = "1") -> bytes:
    return ("[" * depth + inner + "]" * depth).encode()


def test_depth_is_counted_outside_of_strings() -> None:
    check_json("application/json", nested(32), 32)
    check_json("application/json", json.dumps({"text": '\\" [[[[ {{{{ \\\\'}).encode(), 1)
    for deep in (nested(33), nested(33, r'"]]]]\"]]"'), b'{"a":' * 33, b"[" * 500_000):
        with pytest.raises(ApiError, match="nested more than 32 deep"):
            check_json("application/json", deep, 32)


Json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('[]{}"\\a'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('[]{}"\\a'), inner),
)


def depth_of(value: Any) -> int:
    if isinstance(value, list | dict):
        return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)
    return 0


@settings(deadline=None)  # a busy machine is not a failure
@given(Json)
def test_depth_is_that_of_the_parsed_value(value: Any) -> None:
    depth = depth_of(value)
    check_json("application/json", json.dumps(value).encode(), depth)
    if depth:
        with pytest.raises(ApiError):
            check_json("application/json", json.dumps(value).encode(), depth - 1)


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 500_000, b'"' * 1_000_000, b"\\" * 1_000_000, b'"\\' * 500_000])
def test_no_body_makes_the_count_slow(body: bytes) -> None:
    started = time.process_time()
    check_json("application/json", body, 32)
    assert time.process_time() - started < 2


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def paced(clock: Clock, **limits: int) -> tuple[Pace, list[asyncio.Event]]:
    """A pace around an app that answers at once, or waits for the event that a test put there."""
    events: list[asyncio.Event] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if events:
            await events[-1].wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return Pace(app, LimitSettings(**limits), clock), events


async def one(pace: Pace, id_: str = "a") -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await pace({"type": "http", "caller": Caller(id_, id_, "app")}, lambda: None, send)  # type: ignore[arg-type, return-value]
    return sent


def retry_after(messages: list[Message]) -> int:
    return int(dict(messages[0]["headers"])[b"retry-after"])


def test_the_window_moves_and_says_when_to_come_back() -> None:
    clock = Clock()
    pace, _ = paced(clock, requests_per_minute=3)
    for second in (0, 10, 20):
        clock.now = 1000.0 + second
        assert status(asyncio.run(one(pace))) == 200
    refused = asyncio.run(one(pace))
    assert (status(refused), code(refused), retry_after(refused)) == (429, "rate_limit_exceeded", 40)
    assert status(asyncio.run(one(pace, "b"))) == 200
    clock.now = 1059.9
    assert status(asyncio.run(one(pace))) == 429
    clock.now = 1060.0
    assert [status(asyncio.run(one(pace))) for _ in range(2)] == [200, 429]


def test_in_no_minute_does_a_key_get_more_than_its_due() -> None:
    clock, rng = Clock(), random.Random(0)
    pace, _ = paced(clock, requests_per_minute=5)
    served = []
    for _ in range(600):
        clock.now += rng.expovariate(0.5)
        if status(asyncio.run(one(pace))) == 200:
            served.append(clock.now)
    assert max(sum(start <= at < start + 60 for at in served) for start in served) == 5


def test_only_so_many_at_a_time_and_a_place_is_free_again_after_the_last_byte() -> None:
    async def go() -> None:
        pace, events = paced(Clock(), concurrent=2)
        events.append(asyncio.Event())
        running = [asyncio.create_task(one(pace)) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await one(pace)
        assert (status(refused), code(refused), retry_after(refused)) == (429, "too_many_at_once", 1)
        running[0].cancel()  # a caller who leaves gives the place back, too
        await asyncio.sleep(0)
        events[-1].set()
        assert status(await one(pace)) == 200
        await running[1]
        assert pace.under_way == {"a": 0}

    asyncio.run(go())


def test_a_place_is_given_back_when_the_route_breaks() -> None:
    door = make_door(limits={"concurrent": 1})
    assert [ask(door, "GET", "/v1/broken").status_code for _ in range(3)] == [500, 500, 500]


def test_a_refused_request_is_counted_by_neither() -> None:
    clock = Clock()
    pace, _ = paced(clock, requests_per_minute=1)
    assert status(asyncio.run(one(pace))) == 200
    for _ in range(5):
        assert status(asyncio.run(one(pace))) == 429
    clock.now += 60
    assert status(asyncio.run(one(pace))) == 200

"""The client: says what is meant, tries again where that helps, once written is once kept."""

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from rlhf_ray.client import (
    Added,
    AsyncClient,
    Client,
    KeyReused,
    NotAllowed,
    NotFound,
    Progress,
    Refused,
    TaskTaken,
    Unavailable,
)
from rlhf_ray.client import sending as client_module
from rlhf_ray.errors import InfrastructureError, InputError
from rlhf_ray.serving.records import Records
from tests.feedback.test_requests import make_completion
from tests.serving.apps import make_app
from tests.serving.test_reward import make_replica


class Script:
    """Answers requests from a list, an exception being raised; notes what was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def body(self, index: int = 0) -> Any:
        return json.loads(self.asked[index].content)


def added(*ids: str, **headers: str) -> httpx.Response:
    return httpx.Response(201, json={"object": "feedback", "id": ids[0], "ids": ids}, headers=headers)


def refusal(status: int, message: str = "not so", *, code: str | None = None, **headers: str) -> httpx.Response:
    error = {"message": message, "type": "invalid_request_error", "param": "rating", "code": code}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json={"error": error}, headers=names)


def make_client(script: Script, **changes: Any) -> Client:
    return Client("http://service/", "rlhf_key", http=httpx.Client(transport=httpx.MockTransport(script)), **changes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits that were made; none of them takes time."""
    waits: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", waits.append)
    monkeypatch.setattr(client_module.time, "monotonic", lambda: sum(waits))
    return waits


@pytest.mark.parametrize(
    ("say", "body"),
    [
        (lambda client: client.rate("c1", 4), {"completion_id": "c1", "rating": 4}),
        (
            lambda client: client.rate("c1", 2.5, index=1, comment="meh", aspect="tone"),
            {"completion_id": "c1", "rating": 2.5, "index": 1, "comment": "meh", "aspect": "tone"},
        ),
        (lambda client: client.thumb("c1", False), {"completion_id": "c1", "thumb": False}),
        (lambda client: client.comment("c1", "Good."), {"completion_id": "c1", "comment": "Good."}),
        (lambda client: client.rank([2, 1], completion_id="c1"), {"completion_id": "c1", "ranking": [2, 1]}),
        (
            lambda client: client.rank([1, 2], prompt="Hi", completions=["a", "b"]),
            {"prompt": "Hi", "completions": ["a", "b"], "ranking": [1, 2]},
        ),
    ],
)
def test_each_judgement_is_sent_as_the_service_words_it(say: Callable[[Client], Added], body: dict[str, Any]) -> None:
    script = Script(added("f1"))
    assert say(make_client(script)) == Added(("f1",), replayed=False)
    assert script.body() == body
    assert script.asked[0].headers["authorization"] == "Bearer rlhf_key"
    assert str(script.asked[0].url) == "http://service/v1/feedback"


def test_a_lost_answer_is_asked_for_again_under_the_same_key(clock: list[float]) -> None:
    lost = httpx.ReadError("connection reset")
    script = Script(
        lost,
        refusal(503),
        refusal(409, code="idempotency_key_in_flight"),
        added("f1", **{"Idempotency-Replayed": "true"}),
    )
    assert make_client(script).rate("c1", 4) == Added(("f1",), replayed=True)
    keys = {request.headers["idempotency-key"] for request in script.asked}
    assert (len(script.asked), len(keys)) == (4, 1)
    assert len(clock) == 3


def test_each_call_has_a_key_of_its_own_unless_one_is_given() -> None:
    script = Script(added("f1"))
    client = make_client(script)
    for _ in range(2):
        client.rate("c1", 4)
    client.rate("c1", 4, idempotency_key="mine")
    keys = [request.headers["idempotency-key"] for request in script.asked]
    assert (len(set(keys)), keys[2]) == (3, "mine")


def test_waits_grow_differ_and_obey_the_service(clock: list[float]) -> None:
    script = Script(*[refusal(503)] * 3, refusal(429, retry_after="5"), added("f1"))
    make_client(script).rate("c1", 4)
    assert 0.1 <= clock[0] <= 0.2 <= clock[1] <= 0.4 <= clock[2] <= 0.8
    assert clock[3] == 5


def test_the_deadline_ends_it_with_the_services_words(clock: list[float]) -> None:
    script = Script(refusal(503, "the feedback store has too much to do"))
    with pytest.raises(Unavailable, match=r"503, the feedback store has too much to do .*tries in 20 s") as error:
        make_client(script, deadline_s=20).rate("c1", 4)
    assert isinstance(error.value, InfrastructureError)
    assert sum(clock) <= 20
    assert len(script.asked) > 3


def test_a_service_that_is_not_there_is_said_so(clock: list[float]) -> None:
    with pytest.raises(Unavailable, match="ConnectError: refused"):
        make_client(Script(httpx.ConnectError("refused"))).rewards(["a"], prompt="Hi")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Refused),
        (401, NotAllowed),
        (403, NotAllowed),
        (404, NotFound),
        (409, Refused),
        (413, Refused),
        (422, KeyReused),
    ],
)
def test_a_refusal_is_final_typed_and_in_the_services_words(status: int, kind: type[Refused]) -> None:
    script = Script(refusal(status, "a rating lies between 1 and 5", code="x"))
    with pytest.raises(kind, match=r"^a rating lies between 1 and 5$") as error:
        make_client(script).rate("c1", 9)
    assert (error.value.status, error.value.param, error.value.code) == (status, "rating", "x")
    assert isinstance(error.value, InputError)
    assert len(script.asked) == 1


def test_a_bug_of_the_service_is_not_tried_again() -> None:
    script = Script(refusal(500, "the score is no number"))
    with pytest.raises(Unavailable, match="500, the score is no number"):
        make_client(script).rewards(["a"], prompt="Hi")
    assert len(script.asked) == 1


def test_an_answer_that_is_not_the_services_is_said_so() -> None:
    with pytest.raises(Refused, match="is this an rlhf-ray service"):
        make_client(Script(httpx.Response(404, text="<html>"))).rate("c1", 4)


class Bridge(httpx.BaseTransport):
    """Calls an async app, which runs in a thread of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, app: FastAPI) -> None:
        self._loop = loop
        self._transport = httpx.ASGITransport(app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def answer() -> httpx.Response:
            content = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
            got = await self._transport.handle_async_request(content)
            return httpx.Response(got.status_code, headers=got.headers, content=await got.aread())

        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(10)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Client]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    records = Records(tmp_path / "feedback.db", retention_days=36_500)

    def run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(10)

    run(records.keep_completion(make_completion()))
    bridge = Bridge(loop, make_app(records=records, reward=make_replica()))
    yield Client("http://127.0.0.1", "key", http=httpx.Client(transport=bridge))
    run(records.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_the_client_and_the_service_understand_each_other(service: Client) -> None:
    rated = service.rate("chatcmpl-1", 4, index=0, comment="Kind.")
    service.thumb("chatcmpl-1", up=True, index=1)
    service.comment("chatcmpl-1", "Both fine.")
    service.rank([1, 2], completion_id="chatcmpl-1")
    service.rank(
        [2, 1], messages=[{"role": "user", "content": "Hi"}], completions=["a", {"text": "b"}], annotator="ann-9"
    )
    again = service.rate("chatcmpl-1", 5, index=0, idempotency_key="k")
    assert service.rate("chatcmpl-1", 5, index=0, idempotency_key="k") == Added(again.ids, replayed=True)
    everything = list(service.feedback(page=2))
    assert [item.kind for item in everything] == [
        "rating",
        "comment",
        "rating",
        "comment",
        "ranking",
        "ranking",
        "rating",
    ]
    assert [item.id for item in everything[:2]] == list(rated.ids)
    assert [item.annotator for item in service.feedback(annotator="ann-9")] == ["ann-9"]
    assert len(list(service.feedback(kind="rating"))) == 3


def test_the_services_refusals_arrive_typed(service: Client) -> None:
    with pytest.raises(NotFound, match="no completion is kept under this id"):
        service.rate("chatcmpl-9", 4)
    with pytest.raises(Refused, match="less than or equal to 5"):
        service.rate("chatcmpl-1", 7, index=0)
    service.rate("chatcmpl-1", 5, index=0, idempotency_key="k")
    with pytest.raises(KeyReused, match="another request"):
        service.rate("chatcmpl-1", 4, index=0, idempotency_key="k")


def test_rewards_come_with_their_model(service: Client) -> None:
    given = service.rewards(["longer", "short"], prompt="Hi")
    assert given.rewards[0] > given.rewards[1]
    assert (given.model, given.version) == ("reward-model", 2)


TASKS = [
    {"id": "t1", "prompt": "Hi", "completions": ["Hello.", {"text": "No.", "sampler": "ppo"}], "overlap": 2},
    {"id": "t2", "prompt": "Bye", "completions": ["Bye."], "aspects": ["tone"]},
]


def test_a_labelling_session(service: Client) -> None:
    assert service.add_tasks(TASKS).new == 2
    assert service.add_tasks(TASKS).new == 0
    assert service.guidelines() == ""
    first = service.next_task()
    assert first is not None
    held = service.next_task()
    assert held is not None
    assert (held.id, held.answers) == (first.id, first.answers)
    said: dict[str, Any] = {"ranking": [1, 2]} if len(first.answers) == 2 else {"ratings": {"tone": 3}}
    ids = service.answer_task(first.id, **said)
    assert service.answer_task(first.id, **said) == ids
    with pytest.raises(TaskTaken, match="you have answered this task"):
        service.answer_task(first.id, comment="Something else.")
    again = service.undo_task(first.id)
    assert (again.id, again.answers) == (first.id, first.answers)
    service.skip_task(first.id, "not for me")
    second = service.next_task()
    assert second is not None
    service.answer_task(second.id, comment="Fine.")
    assert service.next_task() is None
    assert service.progress() == Progress(answered=1, skipped=1, left=0, tasks=2, complete=service.progress().complete)
    assert [(past.task.id, past.state) for past in service.history()] == [
        (second.id, "answered"),
        (first.id, "skipped"),
    ]
    frozen = service.freeze("now")
    assert (frozen.rows, service.snapshots()) == (1, (frozen,))
    assert service.exclude(annotators=["boss"], reason="test") == 2


def test_the_async_client_says_and_hears_the_same(tmp_path: Path) -> None:
    async def use() -> None:
        records = Records(tmp_path / "feedback.db", retention_days=36_500)
        await records.keep_completion(make_completion())
        transport = httpx.ASGITransport(make_app(records=records))
        async with AsyncClient("http://127.0.0.1", "key", http=httpx.AsyncClient(transport=transport)) as client:
            rated = await client.rate("chatcmpl-1", 4, index=0)
            kept = await client.rate("chatcmpl-1", 4, index=0, idempotency_key="k")
            assert await client.rate("chatcmpl-1", 4, index=0, idempotency_key="k") == Added(kept.ids, replayed=True)
            assert [item.id async for item in client.feedback(page=1)] == [rated.id, *kept.ids]
            await client.add_tasks(TASKS)
            met = []
            while task := await client.next_task():
                met.append(task.id)
                await client.answer_task(task.id, comment="Fine.")
            assert sorted(met) == ["t1", "t2"]
            assert [past.task.id async for past in client.history()] == met[::-1]
            with pytest.raises(NotFound):
                await client.undo_task("t9")
        await records.close()

    asyncio.run(use())


def test_the_async_client_tries_again_as_the_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(client_module.asyncio, "sleep", sleep)
    script = Script(refusal(503), httpx.ConnectError("refused"), added("f1"))

    async def use() -> Added:
        http = httpx.AsyncClient(transport=httpx.MockTransport(script))
        async with AsyncClient("http://service", http=http) as client:
            return await client.rate("c1", 4)

    assert asyncio.run(use()).id == "f1"
    assert len(waits) == 2
    keys = {request.headers["Idempotency-Key"] for request in script.asked}
    assert (len(script.asked), len(keys)) == (3, 1)


def test_both_clients_have_the_same_calls_with_the_same_arguments() -> None:
    def calls(client: type) -> dict[str, list[str]]:
        public = inspect.getmembers(client, callable)
        return {name: list(inspect.signature(call).parameters) for name, call in public if not name.startswith("_")}

    assert calls(Client) == calls(AsyncClient)
    assert str(inspect.signature(Client.skip_task)) == "(self, /, task_id: str, reason: str) -> NoneType"
    assert list(inspect.signature(Client("http://x").skip_task).parameters) == ["task_id", "reason"]
    assert Client.rate.__doc__ == AsyncClient.rate.__doc__

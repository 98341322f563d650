import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.feedback.schema import Feedback
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.serving.auth import Caller
from rlhf_ray.serving.records import Records
from tests.feedback.test_requests import make_completion
from tests.feedback.test_store import make_feedback
from tests.serving.apps import ADMIN, ANNOTATOR, Requests, make_app

BROUGHT = {"prompt": "My lamp broke.", "completions": ["Sorry!"]}
SEVERAL = {"messages": [{"role": "user", "content": "My lamp broke."}], "completions": ["No.", "Sorry!", "Which?"]}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


def serve(database: Path, use: Callable[[Requests], Awaitable[Any]], *, caller: Caller = ADMIN) -> Any:
    """What `use` makes of the routes over a store in which one completion is kept."""

    async def run() -> Any:
        records = Records(database, retention_days=36_500)
        try:
            await records.keep_completion(make_completion())
            await records.keep_completion(make_completion("cmpl-2", messages=None, prompt="Once", answers=("upon",)))
            return await use(Requests(make_app(caller, records=records)))
        finally:
            await records.close()

    return asyncio.run(run())


def rows(database: Path) -> list[Feedback]:
    with FeedbackStore(database, read_only=True) as store:
        return list(store.iter())


def post(database: Path, body: Any, *, caller: Caller = ANNOTATOR, **headers: str) -> Any:
    return serve(database, lambda http: http.post("/v1/feedback", body, **headers), caller=caller)


def test_a_rating_of_a_kept_completion_is_stored_with_where_it_came_from(database: Path) -> None:
    answer = post(database, {"completion_id": "chatcmpl-1", "index": 1, "rating": 4})
    assert answer.status_code == 201
    (row,) = rows(database)
    assert answer.json() == {"object": "feedback", "id": row.id, "ids": [row.id]}
    assert (row.kind, row.rating and row.rating.value, row.annotator) == ("rating", 4, "ann-1")
    assert [turn.content for turn in row.messages] == ["Where is my lamp?"]
    assert row.answers[0].model_dump() == {
        "text": "Who knows?",
        "sampler": "policy",
        "sampling": {"temperature": 0.7},
        "policy_version": 3,
        "completion_id": "chatcmpl-1",
    }


def test_a_kept_plain_completion_is_judged_without_an_index(database: Path) -> None:
    assert post(database, {"completion_id": "cmpl-2", "thumb": 0}).status_code == 201
    (row,) = rows(database)
    assert (row.messages[0].content, row.answers[0].text) == ("Once", "upon")
    assert row.rating
    assert (row.rating.value, row.rating.scale) == (0, "thumb")


def test_answers_can_be_brought_along_as_texts_or_with_their_origin(database: Path) -> None:
    origin = {"text": "No.", "sampler": "gpt", "sampling": {"seed": 1}, "policy_version": 7}
    body = {"prompt": "Hi", "completions": ["Yes.", origin], "ranking": [2, 1], "display_order": [1, 0]}
    assert post(database, body).status_code == 201
    (row,) = rows(database)
    assert row.ranking
    assert (row.ranking.ranks, row.display_order) == ((2, 1), (1, 0))
    assert row.answers[0].sampler == "external"
    assert row.answers[1].model_dump(exclude_none=True) == origin


def test_several_judgements_in_one_request_are_kept_together(database: Path) -> None:
    body = SEVERAL | {"ranking": [3, 1, 2], "comment": "The first is rude.", "rating": 2.5, "index": 0, "thumb": False}
    answer = post(database, body)
    kept = rows(database)
    assert [row.kind for row in kept] == ["rating", "rating", "ranking", "comment"]
    assert answer.json()["ids"] == [row.id for row in kept]
    assert [len(row.answers) for row in kept] == [1, 1, 3, 1]
    assert len({(row.prompt_id, row.group) for row in kept}) == 1


def test_a_comment_without_an_index_is_about_all_answers(database: Path) -> None:
    post(database, SEVERAL | {"comment": "All too short."})
    assert len(rows(database)[0].answers) == 3


def test_dialogues_that_the_user_began_alike_are_of_one_group(database: Path) -> None:
    first = SEVERAL["messages"]
    longer = [*first, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}]
    system = {"role": "system", "content": "Be kind."}
    dialogues = [first, longer, [system, *first], [system, {"role": "user", "content": "Where is my chair?"}]]

    async def use(http: Requests) -> None:
        for turns in dialogues:
            body = {"messages": turns, "completions": ["Yes."], "thumb": 1}
            assert (await http.post("/v1/feedback", body)).status_code == 201

    serve(database, use)
    kept = rows(database)
    assert len({row.prompt_id for row in kept}) == 4
    assert [row.group == kept[0].group for row in kept] == [True, True, True, False]


def test_the_same_request_under_its_key_gets_the_same_answer_and_one_row(database: Path) -> None:
    async def use(http: Requests) -> None:
        body = BROUGHT | {"rating": 4}
        first = await http.post("/v1/feedback", body, idempotency_key="k")
        shuffled = dict(reversed(body.items()))
        again = await http.post("/v1/feedback", shuffled, idempotency_key="k")
        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"
        assert (again.status_code, again.content) == (201, first.content)
        other = await http.post("/v1/feedback", body | {"rating": 5}, idempotency_key="k")
        assert (other.status_code, other.json()["error"]["param"]) == (422, "Idempotency-Key")

    serve(database, use)
    assert len(rows(database)) == 1


def test_a_request_is_answered_as_before_even_when_its_completion_is_gone(database: Path) -> None:
    async def use(http: Requests) -> None:
        body = {"completion_id": "chatcmpl-1", "index": 0, "thumb": 1}
        first = await http.post("/v1/feedback", body, idempotency_key="k")
        assert (await http.delete("/v1/completions/chatcmpl-1")).json()["removed"] == 1
        again = await http.post("/v1/feedback", body, idempotency_key="k")
        assert (again.status_code, again.content) == (201, first.content)
        assert (await http.post("/v1/feedback", body, idempotency_key="l")).status_code == 404

    serve(database, use)
    assert len(rows(database)) == 1


def test_a_hundred_requests_of_one_key_at_once_are_one_row(database: Path) -> None:
    async def use(http: Requests) -> list[int]:
        body = BROUGHT | {"rating": 4}
        answers = await asyncio.gather(*(http.post("/v1/feedback", body, idempotency_key="k") for _ in range(100)))
        return [answer.status_code for answer in answers]

    statuses = serve(database, use)
    assert set(statuses) <= {201, 409}
    assert len(rows(database)) == 1


def test_an_unknown_completion_is_not_found(database: Path) -> None:
    answer = post(database, {"completion_id": "chatcmpl-9", "rating": 4})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_completion"


@pytest.mark.parametrize(("caller", "status"), [(ANNOTATOR, 403), (Caller("key-3", "t", "trainer"), 201), (ADMIN, 201)])
def test_only_trainers_and_administrators_name_another_annotator(database: Path, caller: Caller, status: int) -> None:
    assert post(database, BROUGHT | {"rating": 4, "annotator": "ann-7"}, caller=caller).status_code == status
    assert [row.annotator for row in rows(database)] == ["ann-7"] * (status == 201)


@pytest.mark.parametrize(("role", "status"), [("app", 403), ("annotator", 403), ("trainer", 200), ("admin", 200)])
def test_only_trainers_and_administrators_read(database: Path, role: Any, status: int) -> None:
    for path in ("/v1/feedback", "/v1/feedback/a"):
        answer = serve(database, lambda http, path=path: http.get(path), caller=Caller("key-2", "someone", role))
        assert answer.status_code == (404 if status == 200 and path.endswith("a") else status)


@pytest.mark.parametrize("role", ["app", "annotator", "trainer"])
def test_only_administrators_purge_and_applications_do_not_judge(database: Path, role: Any) -> None:
    async def use(http: Requests) -> None:
        assert (await http.delete("/v1/completions/chatcmpl-1")).status_code == 403
        assert (await http.delete("/v1/completions", caller="key-1")).status_code == 403
        judged = await http.post("/v1/feedback", BROUGHT | {"rating": 4})
        assert judged.status_code == (403 if role == "app" else 201)

    serve(database, use, caller=Caller("key-2", "someone", role))


def test_pages_lead_through_all_feedback(database: Path) -> None:
    with FeedbackStore(database) as store:
        store.add([make_feedback(id=f"f{index}") for index in range(5)])

    async def use(http: Requests) -> list[str]:
        seen, cursor, more = [], "0", True
        while more:
            page = (await http.get("/v1/feedback", cursor=cursor, limit=2)).json()
            seen += [item["id"] for item in page["data"]]
            cursor, more = page["next_cursor"], page["has_more"]
        assert (await http.get("/v1/feedback", cursor=cursor)).json()["data"] == []
        assert len((await http.get("/v1/feedback", kind="ranking")).json()["data"]) == 0
        one = await http.get("/v1/feedback/f3")
        assert one.json()["id"] == "f3"
        return seen

    assert serve(database, use) == ["f0", "f1", "f2", "f3", "f4"]


def test_kept_answers_are_forgotten_by_caller_and_age(database: Path) -> None:
    async def use(http: Requests) -> None:
        assert (await http.delete("/v1/completions")).status_code == 400
        early = {"before": "2026-01-01T00:00:00Z"}
        assert (await http.delete("/v1/completions", **early)).json()["removed"] == 0
        assert (await http.delete("/v1/completions", caller="key-1")).json()["removed"] == 2

    serve(database, use)


BAD = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"\xff\xfe{}",
    b'{"prompt": "a", "completions": ["b"], "rating": NaN}',
    b'{"prompt": "a", "completions": ["b"], "rating": Infinity}',
    b'{"prompt": "a", "completions": ["b"], "rating": 1e999}',
    b'{"prompt": "a", "completions": ["b"], "rating": 1e308}',
    b'{"prompt": "a", "completions": ["b"], "rating": ' + b"9" * 400 + b"}",
    b'{"prompt": "a", "completions": ["b"], "rating": ' + b"9" * 5_000 + b"}",
    b'{"prompt": "\\ud800", "completions": ["b"], "rating": 4}',
    b'{"prompt": "a", "completions": ["\\udfff"], "rating": 4}',
    b'{"prompt": "a", "completions": ["b"], "comment": "\\ud800"}',
    b'{"prompt": "a", "completions": ["b"], "rating": 4, "\\ud800": 1}',
    b'{"prompt": "a", "completions": [{"text": "b", "sampling": {"t": NaN}}], "rating": 4}',
    b'{"prompt": "a", "completions": [{"text": "b", "sampling": {"t": "\\ud800"}}], "rating": 4}',
    b'{"a":' * 200 + b"1" + b"}" * 200,
    b"[" * 100_000,
    BROUGHT,
    {"rating": 4},
    {"prompt": "a", "rating": 4},
    {"completions": ["a"], "rating": 4},
    BROUGHT | {"rating": 4, "messages": SEVERAL["messages"]},
    BROUGHT | {"rating": 4, "completion_id": "chatcmpl-1"},
    BROUGHT | {"rating": 0},
    BROUGHT | {"rating": "4"},
    BROUGHT | {"rating": True},
    BROUGHT | {"rating": 4, "stars": 4},
    BROUGHT | {"thumb": 2},
    BROUGHT | {"thumb": 0.5},
    BROUGHT | {"comment": ""},
    BROUGHT | {"comment": " \n"},
    BROUGHT | {"comment": "x" * 8_001},
    BROUGHT | {"ranking": [1]},
    BROUGHT | {"rating": 4, "index": 1},
    BROUGHT | {"rating": 4, "index": -1},
    BROUGHT | {"rating": 4, "prompt": " "},
    BROUGHT | {"rating": 4, "completions": []},
    BROUGHT | {"rating": 4, "completions": [""]},
    BROUGHT | {"rating": 4, "completions": ["x"] * 17},
    BROUGHT | {"rating": 4, "completions": [{"text": "x", "policy_version": -1}]},
    BROUGHT | {"rating": 4, "annotator": ""},
    SEVERAL | {"rating": 4},
    SEVERAL | {"ranking": [1, 2]},
    SEVERAL | {"ranking": [1, 2, 4]},
    SEVERAL | {"ranking": [1, 2, 3], "display_order": [0, 0, 1]},
    SEVERAL | {"rating": 4, "index": 0, "messages": [{"role": "assistant", "content": "Hi"}]},
    SEVERAL | {"rating": 4, "index": 0, "messages": [{"role": "root", "content": "Hi"}]},
    {"completion_id": "chatcmpl-1", "rating": 4},
    {"completion_id": "chatcmpl-1", "index": 2, "rating": 4},
    {"completion_id": "chatcmpl-1", "ranking": [1, 2, 3]},
    {"completion_id": "", "rating": 4},
]


@pytest.mark.parametrize("body", BAD, ids=lambda body: str(body)[:60])
def test_a_bad_request_is_refused_with_a_reason_and_leaves_no_row(database: Path, body: Any) -> None:
    answer = post(database, body, caller=ADMIN)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert rows(database) == []


def test_a_refusal_names_numbers_but_not_peoples_words(database: Path) -> None:
    answer = post(database, BROUGHT | {"rating": 7, "comment": "canary-4711", "completions": ["canary-4712"] * 2})
    assert answer.status_code == 400
    assert "canary" not in answer.text


def test_a_body_that_does_not_say_it_is_json_is_refused(database: Path) -> None:
    for kind in ("text/plain", "multipart/form-data", ""):
        answer = post(database, BROUGHT | {"rating": 4}, content_type=kind)
        assert answer.status_code == 415
    assert rows(database) == []


def test_a_body_beyond_the_cap_is_refused(database: Path) -> None:
    assert post(database, BROUGHT | {"comment": "x" * (300 << 10)}).status_code == 413
    assert rows(database) == []


def test_a_key_that_no_header_can_carry_sensibly_is_refused(database: Path) -> None:
    assert post(database, BROUGHT | {"rating": 4}, idempotency_key="x" * 201).status_code == 400
    assert rows(database) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = ["completion_id", "index", "prompt", "messages", "completions", "rating", "thumb", "ranking", "comment", "x"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(fields), json_values, min_size=1, max_size=3))
def test_whatever_comes_is_kept_whole_or_refused(
    fuzzed: tuple[Any, Requests, Records], changes: dict[str, Any]
) -> None:
    loop, http, records = fuzzed

    async def use() -> None:
        before = (await records.page(0, 10_000)).cursor
        answer = await http.post("/v1/feedback", json.dumps(BROUGHT | {"rating": 4} | changes).encode())
        added = (await records.page(before, 10_000)).items
        assert answer.status_code == 201 or 400 <= answer.status_code < 500
        assert [item.id for item in added] == (answer.json()["ids"] if answer.status_code == 201 else [])

    loop.run_until_complete(use())


@pytest.fixture
def fuzzed(database: Path) -> Any:
    loop = asyncio.new_event_loop()
    records = Records(database)
    yield loop, Requests(make_app(records=records)), records
    loop.run_until_complete(records.close())
    loop.close()


def test_every_route_and_field_is_documented(database: Path) -> None:
    async def use(http: Requests) -> dict[str, Any]:
        described: dict[str, Any] = (await http.get("/openapi.json")).json()
        return described

    described = serve(database, use)
    words = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
    routes = [
        f"{method.upper()} {path}"
        for path, methods in described["paths"].items()
        for method, route in methods.items()
        if "feedback" in route["tags"]
    ]
    assert len(routes) == 5
    assert not [route for route in routes if f"`{route}`" not in words]
    fields = described["components"]["schemas"]["FeedbackRequest"]["properties"]
    assert not [name for name, field in fields.items() if f"`{name}`" not in words or not field["description"]]

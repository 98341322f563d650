"""The labelling queue over HTTP: blind, leased, and the same however often it is sent."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.feedback.quality import quality_of
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.serving.auth import Caller
from rlhf_ray.serving.records import Records
from tests.feedback.test_requests import make_completion
from tests.serving.apps import ADMIN, ANNOTATOR, Requests, make_app

OTHER = Caller("key-2", "ann-2", "annotator")
SECRET, VERSION = "ppo-secret-name", 909_090_909
NEW = {
    "id": "t1",
    "messages": [{"role": "user", "content": "My lamp broke."}],
    "completions": [{"text": "No.", "sampler": SECRET, "policy_version": VERSION}, "Sorry!", "Which?"],
    "overlap": 2,
}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


People = Callable[[Caller], Requests]


def serve(database: Path, use: Callable[[People], Awaitable[Any]]) -> Any:
    """What `use` makes of the routes, asked as different people."""

    async def run() -> Any:
        records = Records(database, retention_days=36_500)
        try:
            await records.keep_completion(make_completion())
            return await use(lambda caller: Requests(make_app(caller, records=records)))
        finally:
            await records.close()

    return asyncio.run(run())


def rows(database: Path) -> list[Any]:
    with FeedbackStore(database, read_only=True) as store:
        return list(store.iter())


async def ok(answer: Awaitable[Any], status: int = 200) -> Any:
    got = await answer
    assert got.status_code == status, got.text
    return got.json()


def test_what_an_annotator_is_sent_names_no_sampler_and_no_version(database: Path) -> None:
    async def use(people: People) -> None:
        boss, ann = people(ADMIN), people(ANNOTATOR)
        await ok(
            boss.post("/v1/tasks", {"tasks": [NEW | {"gold": {"ranks": [3, 1, 2]}, "priority": 0.123456789}]}), 201
        )
        seen = [await ann.post("/v1/tasks/next", {})]
        shown = seen[0].json()["task"]
        assert set(shown) == {"object", "id", "messages", "answers", "asks", "aspects", "until"}
        assert [set(answer) for answer in shown["answers"]] == [{"text"}] * 3
        assert sorted(answer["text"] for answer in shown["answers"]) == ["No.", "Sorry!", "Which?"]
        assert shown["asks"] == ["ranking"]
        seen.append(await ann.post("/v1/tasks/t1/answer", {"ranking": [1, 2, 3]}))
        seen.append(await ann.post("/v1/tasks/t1/undo", {}))
        seen.append(await ann.post("/v1/tasks/t1/skip", {"reason": "x"}))
        seen.append(await ann.get("/v1/tasks/history"))
        seen.append(await ann.get("/v1/tasks/progress"))
        for answer in seen:
            assert answer.is_success, answer.text
            told = answer.text + str(answer.headers)
            assert not any(
                word in told for word in (SECRET, str(VERSION), "policy", "external", "gold", "0.12345", "priority")
            )

    serve(database, use)


def test_places_are_counted_as_shown_and_kept_as_stored(database: Path) -> None:
    async def use(people: People) -> list[str]:
        await ok(people(ADMIN).post("/v1/tasks", {"tasks": [NEW]}), 201)
        ann = people(ANNOTATOR)
        shown = (await ok(ann.post("/v1/tasks/next", {})))["task"]
        texts = [answer["text"] for answer in shown["answers"]]
        body = {
            "ranking": [{"No.": 3, "Sorry!": 1, "Which?": 2}[text] for text in texts],
            "index": texts.index("No."),
            "ratings": {"tone": 2, "truth": 5},
            "thumb": 0,
            "comment": "Rude.",
        }
        answer = await ok(ann.post("/v1/tasks/t1/answer", body), 201)
        assert await ok(ann.post("/v1/tasks/t1/answer", body), 201) == answer
        assert (await ann.post("/v1/tasks/t1/answer", body | {"thumb": 1})).status_code == 409
        ids: list[str] = answer["ids"]
        return ids, texts  # type: ignore[return-value]

    ids, texts = serve(database, use)
    kept = rows(database)
    assert [row.id for row in kept] == ids
    assert [row.kind for row in kept] == ["rating", "rating", "rating", "ranking", "comment"]
    ranking = kept[3]
    assert [answer.text for answer in ranking.answers] == ["No.", "Sorry!", "Which?"]
    assert ranking.ranking.ranks == (3, 1, 2)
    assert [ranking.answers[index].text for index in ranking.display_order] == texts
    assert {row.answers[0].text for row in kept if row.kind != "ranking"} == {"No."}
    assert {row.rating.aspect: row.rating.value for row in kept if row.rating} == {"tone": 2, "truth": 5, "overall": 0}
    assert kept[0].answers[0].sampler == SECRET
    assert {row.annotator for row in kept} == {"ann-1"}
    assert all(0 <= row.seconds < 60 for row in kept)


def test_none_of_them_will_do(database: Path) -> None:
    async def use(people: People) -> None:
        await ok(people(ADMIN).post("/v1/tasks", {"tasks": [NEW]}), 201)
        ann = people(ANNOTATOR)
        await ann.post("/v1/tasks/next", {})
        await ok(ann.post("/v1/tasks/t1/answer", {"all_bad": True}), 201)
        both = {"prompt": "Hi", "completions": ["a", "b"], "ranking": [2, 1], "all_bad": True}
        await ok(ann.post("/v1/feedback", both), 201)
        one = await ann.post("/v1/feedback", {"prompt": "Hi", "completions": ["a"], "all_bad": True})
        assert (one.status_code, "one answer cannot be ranked" in one.text) == (400, True)

    serve(database, use)
    assert [(row.ranking.ranks, row.ranking.all_bad) for row in rows(database)] == [((1, 1, 1), True), ((2, 1), True)]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/tasks/t1/answer", {}, 400, "nothing is said"),
        ("/v1/tasks/t1/answer", {"rating": 4}, 400, "say which of the 3 answers is meant"),
        ("/v1/tasks/t1/answer", {"rating": 4, "index": 3}, 400, "there are 3 answers"),
        ("/v1/tasks/t1/answer", {"ranking": [1, 2]}, 400, "2 ranks for 3 answers"),
        ("/v1/tasks/t1/answer", {"ranking": [1, 3, 3]}, 400, "leave places out"),
        ("/v1/tasks/t1/answer", {"rating": 4, "index": 0, "ratings": {"overall": 3}}, 400, "overall is rated twice"),
        ("/v1/tasks/t1/answer", {"sampler": "x"}, 400, "sampler"),
        ("/v1/tasks/t9/answer", {"all_bad": True}, 404, "no task of this id was shown to you"),
        ("/v1/tasks/t1/skip", {}, 400, "reason"),
        ("/v1/tasks", {"tasks": [NEW]}, 403, "may not do this"),
        ("/v1/tasks/guidelines", {"text": "x"}, 405, ""),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    database: Path, path: str, body: Any, status: int, said: str
) -> None:
    async def use(people: People) -> None:
        await ok(people(ADMIN).post("/v1/tasks", {"tasks": [NEW]}), 201)
        ann = people(ANNOTATOR)
        await ann.post("/v1/tasks/next", {})
        answer = await ann.post(path, body)
        assert answer.status_code == status, answer.text
        assert said in answer.text

    serve(database, use)
    assert rows(database) == []


def test_tasks_are_added_from_kept_completions_all_or_none(database: Path) -> None:
    async def use(people: People) -> None:
        boss = people(ADMIN)
        kept = {"completion_id": "chatcmpl-1", "asks": ["ranking", "comment"]}
        gone = await boss.post("/v1/tasks", {"tasks": [kept, {"completion_id": "no"}]})
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_completion")
        assert (await ok(boss.get("/v1/tasks/progress")))["tasks"] == 0
        bad = await boss.post("/v1/tasks", {"tasks": [kept, NEW | {"gold": {"ranks": [1]}}]})
        assert (bad.status_code, "1 ranks" in bad.text) == (400, True)
        added = await ok(boss.post("/v1/tasks", {"tasks": [kept, NEW]}), 201)
        assert (len(added["ids"]), added["new"]) == (2, 2)
        assert (await ok(boss.post("/v1/tasks", {"tasks": [NEW]}), 201))["new"] == 0

    serve(database, use)


def test_guidelines_are_shown_as_they_were_written(database: Path) -> None:
    async def use(people: People) -> None:
        boss, ann = people(ADMIN), people(ANNOTATOR)
        assert await ok(ann.get("/v1/tasks/guidelines")) == {"text": ""}
        text = {"text": "<b>Prefer</b> what is true."}
        assert (await ann.put("/v1/tasks/guidelines", text)).status_code == 403
        await ok(boss.put("/v1/tasks/guidelines", text))
        assert await ok(ann.get("/v1/tasks/guidelines")) == text

    serve(database, use)


def test_two_people_label_fifty_things_and_agree_as_computed_by_hand(database: Path) -> None:
    """ann always prefers the even number, bea too, but for every fifth: 40 of 50 alike.

    Of 100 choices, ann says 'first text' 50 times of 50, bea 40 of 50: D_o = 10/50; with 90 and 10 marks of the two
    values, D_e = 2 x 90 x 10 / (100 x 99) = 0.1818; alpha = 1 - 0.2 / 0.1818 = -0.1.
    """
    new = [
        {
            "id": f"t{n}",
            "prompt": f"Question {n}?",
            "completions": [{"text": f"A{n}", "sampler": "base"}, {"text": f"B{n}", "sampler": SECRET}],
            "overlap": 2,
        }
        for n in range(50)
    ]

    async def label(http: Requests, wrong_at_fifth: bool) -> list[str]:
        met = []
        while (got := await ok(http.post("/v1/tasks/next", {})))["task"]:
            shown = got["task"]
            assert SECRET not in str(got)
            texts = [answer["text"] for answer in shown["answers"]]
            number = int(shown["id"][1:])
            best = "B" if wrong_at_fifth and number % 5 == 0 else "A"
            await ok(
                http.post(f"/v1/tasks/{shown['id']}/answer", {"ranking": [1 if t[0] == best else 2 for t in texts]}),
                201,
            )
            met.append(shown["id"])
        return met

    async def use(people: People) -> None:
        await ok(people(ADMIN).post("/v1/tasks", {"tasks": new}), 201)
        first, second = await asyncio.gather(label(people(ANNOTATOR), False), label(people(OTHER), True))
        assert sorted(first) == sorted(second) == sorted(f"t{n}" for n in range(50))
        nothing = await ok(people(Caller("key-3", "ann-3", "annotator")).post("/v1/tasks/next", {}))
        assert nothing["task"] is None
        done = await ok(people(OTHER).get("/v1/tasks/progress"))
        assert (done["answered"], done["left"], done["complete"]) == (50, 0, 50)

    serve(database, use)
    kept = rows(database)
    assert len(kept) == 100
    assert all(row.display_order is not None for row in kept)
    flipped = sum(row.display_order == (1, 0) for row in kept)
    assert 25 < flipped < 75  # five standard deviations
    (choices,) = quality_of(kept).agreement
    # Which of two texts is "first" follows their digests, so the two values are not "A" and "B"; worked out below.
    assert (choices.things, choices.level) == (50, "nominal")
    assert choices.alpha == pytest.approx(alpha_by_hand(kept))


def alpha_by_hand(kept: list[Any]) -> float:
    """1 - D_o / D_e of two coders and no missing marks, from the marks' counts alone."""
    from rlhf_ray.feedback.schema import digest_of

    marks: dict[str, list[bool]] = {}
    for row in kept:
        (better, _) = row.preferences[0]
        lower = min((answer.text for answer in row.answers), key=digest_of)
        marks.setdefault(row.prompt_id, []).append(better.text == lower)
    unlike = sum(a != b for a, b in marks.values())
    assert unlike == 10
    yes = sum(map(sum, marks.values()))
    total = 2 * len(marks)
    expected = 2 * yes * (total - yes) / (total * (total - 1))
    return 1 - (unlike / len(marks)) / expected

"""What administrators do over HTTP: annotators, exclusions, snapshots, keys."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.serving.auth import Caller, KeyStore
from rlhf_ray.serving.door import create_door
from rlhf_ray.serving.records import Records
from rlhf_ray.serving.settings import ServiceConfig
from tests.serving.apps import ADMIN, ANNOTATOR, Requests, make_app

TRAINER = Caller("key-9", "tom", "trainer")
People = Callable[[Caller], Requests]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


def serve(database: Path, use: Callable[[People], Awaitable[None]]) -> None:
    """Three judgements of ann-1 and one of bea's, then `use`."""

    async def run() -> None:
        records = Records(database)
        try:
            boss = Requests(make_app(ADMIN, records=records))
            for number, who in enumerate(["ann-1", "ann-1", "bea", "ann-1"]):
                body = {"prompt": f"Q{number}", "completions": ["a"], "rating": 3, "annotator": who}
                assert (await boss.post("/v1/feedback", body)).status_code == 201
            await use(lambda caller: Requests(make_app(caller, records=records)))
        finally:
            await records.close()

    asyncio.run(run())


def test_a_snapshot_less_an_annotator_and_with_them_again(database: Path) -> None:
    async def use(people: People) -> None:
        boss, trainer = people(ADMIN), people(TRAINER)
        whole = (await trainer.post("/v1/snapshots", {"name": "whole"})).json()
        assert whole == {"object": "snapshot", "id": "whole", "sha256": whole["sha256"], "rows": 4}
        out = await boss.post("/v1/exclusions", {"annotators": ["bea"], "reason": "two seconds each"})
        assert out.json() == {"object": "exclusions", "rows": 1, "annotators": ["bea"], "feedback": []}
        less = (await trainer.post("/v1/snapshots", {"name": "less", "of": "whole"})).json()
        assert less["rows"] == 3
        listed = (await trainer.get("/v1/annotators")).json()["data"]
        assert [(one["name"], one["judgements"], one["excluded"]) for one in listed] == [
            ("ann-1", 3, False),
            ("bea", 1, True),
        ]
        back = await boss.post("/v1/exclusions", {"annotators": ["bea"], "reason": "was on a phone", "back": True})
        assert back.json()["annotators"] == []
        assert (await trainer.post("/v1/snapshots", {"name": "again", "of": "whole"})).json()["sha256"] == whole[
            "sha256"
        ]
        assert [one["id"] for one in (await trainer.get("/v1/snapshots")).json()["data"]] == ["again", "less", "whole"]

    serve(database, use)


def test_one_exclusion_request_is_done_whole_or_not_at_all(database: Path) -> None:
    async def use(people: People) -> None:
        boss = people(ADMIN)
        bad = await boss.post("/v1/exclusions", {"annotators": ["bea"], "feedback": ["nowhere"], "reason": "x"})
        assert (bad.status_code, "holds nothing of feedback 'nowhere'" in bad.text) == (400, True)
        listed = (await boss.get("/v1/annotators")).json()["data"]
        assert not any(one["excluded"] for one in listed)
        assert (await boss.post("/v1/exclusions", {"reason": "x"})).status_code == 400
        unknown = await boss.post("/v1/snapshots", {"of": "nothing"})
        assert (unknown.status_code, "no snapshot 'nothing'" in unknown.text) == (400, True)

    serve(database, use)


@pytest.mark.parametrize(
    ("method", "path", "caller"),
    [
        ("get", "/v1/annotators", ANNOTATOR),
        ("post", "/v1/exclusions", TRAINER),
        ("post", "/v1/exclusions", ANNOTATOR),
        ("get", "/v1/snapshots", ANNOTATOR),
        ("post", "/v1/snapshots", ANNOTATOR),
    ],
)
def test_who_may_not_is_refused(database: Path, method: str, path: str, caller: Caller) -> None:
    async def use(people: People) -> None:
        http = people(caller)
        answer = await (http.get(path) if method == "get" else http.post(path, {"reason": "x"}))
        assert answer.status_code == 403

    serve(database, use)


def test_keys_are_made_listed_and_revoked_by_administrators(tmp_path: Path) -> None:
    desk = KeyStore(tmp_path / "keys.db")
    boss_key = desk.create("boss", "admin")

    async def use() -> None:
        app = create_door(ServiceConfig(), policy=None, reward=None, records=None, versions=None, keys=desk, desk=desk)
        boss = Requests(app, key=boss_key)
        made = (await boss.post("/v1/keys", {"name": "ann-7", "role": "annotator"})).json()
        assert desk.caller(made["key"]) == Caller(made["key"].split("_")[1], "ann-7", "annotator")
        assert (await Requests(app, key=made["key"]).get("/v1/keys")).status_code == 403
        listed: list[Any] = (await boss.get("/v1/keys")).json()["data"]
        assert [(key["name"], key["role"], key["revoked_at"]) for key in listed] == [
            ("boss", "admin", None),
            ("ann-7", "annotator", None),
        ]
        assert made["key"] not in str(listed)
        again = await boss.post("/v1/keys", {"name": "ann-7", "role": "annotator"})
        assert (again.status_code, again.json()["error"]["param"]) == (400, "name")
        assert (await boss.delete("/v1/keys/ann-7")).json()["name"] == "ann-7"
        assert desk.caller(made["key"]) is None
        assert (await boss.delete("/v1/keys/ann-7")).status_code == 404

    asyncio.run(use())
    desk.close()

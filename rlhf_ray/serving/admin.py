"""What administrators do over HTTP.

| route | who | what |
|---|---|---|
| `GET /v1/annotators` | trainer, admin | who has judged how much, how gold tasks came out, who is left out |
| `POST /v1/exclusions` | admin | leave annotators, or pieces of feedback, out of snapshots; or no longer |
| `POST /v1/erasures` | admin | remove an annotator's feedback, or what holds a text, for good |
| `GET /v1/snapshots` | trainer, admin | the frozen sets of feedback |
| `POST /v1/snapshots` | trainer, admin | freeze what is there now, or an earlier snapshot less what is left out since |
| `GET`, `POST /v1/keys`, `DELETE /v1/keys/{name}` | admin | list, make and revoke keys |
"""

import asyncio
from dataclasses import asdict
from datetime import datetime
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path
from pydantic import ConfigDict, Field, StrictBool

from rlhf_ray.errors import InputError
from rlhf_ray.feedback import annotators as counting
from rlhf_ray.feedback.erasure import Erased
from rlhf_ray.feedback.store import FeedbackStore, Snapshot
from rlhf_ray.serving.auth import Caller, Key, KeyDesk, Role, role
from rlhf_ray.serving.backends import RecordsBackend
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.judgements import Closed, Name, Text


class AnnotatorReport(Closed):
    """One annotator."""

    name: str
    judgements: int
    last_at: datetime
    gold_right: int
    """Of the tasks whose answer is known, those that came out right."""
    gold_asked: int
    excluded: bool
    """Left out of snapshots."""


class AnnotatorList(Closed):
    """All who have judged anything, by name."""

    object: Literal["list"] = "list"
    data: tuple[AnnotatorReport, ...]


class ExclusionRequest(Closed):
    """Whose feedback, or which, is left out of snapshots from now on."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"annotators": ["ann-7"], "reason": "answers before the text can be read"}}
    )

    annotators: Annotated[tuple[Name, ...], Field(max_length=1_000)] = ()
    feedback: Annotated[tuple[Name, ...], Field(max_length=1_000)] = ()
    """Ids."""
    back: StrictBool = False
    """True takes it back: they count again."""
    reason: Annotated[str, Field(min_length=1, max_length=1_000)]


class Excluded(Closed):
    """How many rows the request was about, and all that is left out now."""

    object: Literal["exclusions"] = "exclusions"
    rows: int
    annotators: tuple[str, ...]
    feedback: tuple[str, ...]


class ErasureRequest(Closed):
    """What is to be removed for good: all that an annotator judged, or all that holds a text."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"annotator": "ann-7", "reason": "asked for it", "dry_run": True}}
    )

    annotator: Name | None = None
    text: Text | None = None
    """To the letter; kept answers and tasks that hold it go, too."""
    reason: Annotated[str, Field(min_length=1, max_length=1_000)]
    """Kept, without the name or the text."""
    dry_run: StrictBool = False
    """True only counts."""


class Erasure(Closed):
    """What went, or would."""

    object: Literal["erasure"] = "erasure"
    done: bool
    feedback: int
    completions: int
    tasks: int
    steps: int
    """Notes of what was shown to whom."""
    snapshots: tuple[str, ...]
    """That held some of the feedback; they cannot be read any more, what is left of them can be frozen anew."""


class SnapshotRequest(Closed):
    """What to freeze."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "week-12-clean", "of": "week-12"}})

    name: Name | None = None
    """By default it is called after its hash."""
    of: Name | None = None
    """An earlier snapshot, whose rows are taken less those left out; by default all rows."""
    cap: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    """The largest share that one annotator may have; of who judged more, some are drawn."""


class SnapshotReport(Closed):
    """A frozen set of feedback."""

    object: Literal["snapshot"] = "snapshot"
    id: str
    sha256: str
    rows: int


class SnapshotList(Closed):
    """All snapshots, by id."""

    object: Literal["list"] = "list"
    data: tuple[SnapshotReport, ...]


class KeyRequest(Closed):
    """A key to be made."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "ann-7", "role": "annotator"}})

    name: Name
    """Small letters, digits, - _ and ., at most 64; an annotator's feedback carries it."""
    role: Role


class KeyMade(Closed):
    """A new key. It is shown this once: only its hash is kept."""

    object: Literal["key"] = "key"
    name: str
    role: Role
    key: str


class KeyReport(Closed):
    """A key as it is listed: everything but the key."""

    name: str
    role: Role
    prefix: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


class KeyList(Closed):
    """All keys that were ever made, oldest first."""

    object: Literal["list"] = "list"
    data: tuple[KeyReport, ...]


class KeyRevoked(Closed):
    """A key that nobody is answered with any more."""

    object: Literal["key.revoked"] = "key.revoked"
    name: str


def router(*, records: RecordsBackend) -> APIRouter:
    """The routes over the store."""
    routes = APIRouter(tags=["admin"])
    may_read = Depends(role("trainer"))

    @routes.get("/v1/annotators", dependencies=[may_read])
    async def annotators() -> AnnotatorList:
        """Who has judged how much. How far they agree says `rlhf feedback quality`."""
        found: list[counting.Annotator] = await records.ask(counting.annotators)
        return AnnotatorList(data=tuple(AnnotatorReport(**asdict(one)) for one in found))

    @routes.post("/v1/exclusions")
    async def exclude(body: ExclusionRequest, caller: Annotated[Caller, Depends(role())]) -> Excluded:
        """Leave out, or take back. Nothing is removed, and each decision is kept with its reason."""
        if not body.annotators and not body.feedback:
            raise ApiError(400, "say which: give annotators, feedback, or both")
        flag = partial(
            counting.exclude,
            annotators=body.annotators,
            feedback=body.feedback,
            out=not body.back,
            reason=body.reason,
            by=caller.name,
        )
        rows, out = await records.ask(flag)
        return Excluded(rows=rows, annotators=tuple(sorted(out.annotators)), feedback=tuple(sorted(out.feedback)))

    @routes.post("/v1/erasures")
    async def erase(body: ErasureRequest, caller: Annotated[Caller, Depends(role())]) -> Erasure:
        """Remove for good. What is left is a note of how much, why and by whom."""
        chosen = body.model_dump(include={"annotator", "text", "reason", "dry_run"})
        erased: Erased = await records.ask(partial(FeedbackStore.erase, **chosen, by=caller.name))
        return Erasure(done=not body.dry_run, **asdict(erased))

    @routes.get("/v1/snapshots", dependencies=[may_read])
    async def snapshots() -> SnapshotList:
        """What training can name."""
        found: list[Snapshot] = await records.ask(FeedbackStore.snapshots)
        return SnapshotList(data=tuple(map(_snapshot, found)))

    @routes.post("/v1/snapshots", status_code=201, dependencies=[may_read])
    async def freeze(body: SnapshotRequest) -> SnapshotReport:
        """Freeze. The same rows under the same name are the same snapshot."""
        return _snapshot(await records.ask(partial(FeedbackStore.freeze, name=body.name, of=body.of, cap=body.cap)))

    return routes


def key_router(desk: KeyDesk) -> APIRouter:
    """The routes over the keys."""
    routes = APIRouter(tags=["admin"], prefix="/v1/keys", dependencies=[Depends(role())])

    @routes.get("")
    async def keys() -> KeyList:
        """All keys, without what they are."""
        found: list[Key] = await asyncio.to_thread(desk.listed)
        return KeyList(data=tuple(KeyReport(**asdict(key)) for key in found))

    @routes.post("", status_code=201)
    async def make(body: KeyRequest) -> KeyMade:
        """Make a key, and show it this once."""
        try:
            key = await asyncio.to_thread(desk.create, body.name, body.role)
        except InputError as error:
            raise ApiError(400, str(error), param="name") from None
        return KeyMade(name=body.name, role=body.role, key=key)

    @routes.delete("/{name}")
    async def revoke(name: Annotated[str, Path(max_length=200)]) -> KeyRevoked:
        """Shut a key out from the next request on."""
        try:
            await asyncio.to_thread(desk.revoke, name)
        except InputError as error:
            raise ApiError(404, str(error), param="name") from None
        return KeyRevoked(name=name)

    return routes


def _snapshot(snapshot: Snapshot) -> SnapshotReport:
    return SnapshotReport(id=snapshot.id, sha256=snapshot.sha256, rows=snapshot.rows)

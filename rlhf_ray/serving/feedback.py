"""Feedback over HTTP.

| route | who | what |
|---|---|---|
| `POST /v1/feedback` | annotator, trainer, admin | ratings, rankings, comments, thumbs; 201 once on disk |
| `GET /v1/feedback` | trainer, admin | all of it, page by page |
| `GET /v1/feedback/{id}` | trainer, admin | one judgement |
| `DELETE /v1/completions` | admin | forget kept answers of a caller, or older than a moment |
| `DELETE /v1/completions/{id}` | admin | forget one kept answer |
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Response
from pydantic import AwareDatetime, ConfigDict, Field, StrictInt

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback.completions import Completion
from rlhf_ray.feedback.requests import RequestKey, Submission, request_sha256
from rlhf_ray.feedback.schema import MAX_ANSWERS, Feedback, Kind, canonical_json
from rlhf_ray.serving.auth import Caller, role
from rlhf_ray.serving.backends import RecordsBackend
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.judgements import Closed, Judgement, Name, Subject, feedback_of, shown
from rlhf_ray.serving.settings import ServiceConfig

KEY_HEADER = "Idempotency-Key"
MAX_PAGE = 1_000
UNKNOWN_COMPLETION = "no completion is kept under this id: it was never given, has expired, or was not to be kept"


class FeedbackRequest(Subject, Judgement):
    """What somebody thinks of one answer, or of several to one prompt.

    The answers are a kept completion's (`completion_id`), or brought along (`prompt` or `messages`, and `completions`).
    Several judgements in one request are kept together or not at all.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"completion_id": "chatcmpl-8c1f", "rating": 4, "comment": "Kind, but it does not say when."},
                {"prompt": "My lamp arrived broken.", "completions": ["Sorry! A new one is on its way."], "thumb": 1},
                {
                    "messages": [{"role": "user", "content": "My lamp arrived broken."}],
                    "completions": ["No.", "A new one is on its way.", "Which lamp?"],
                    "ranking": [3, 1, 2],
                },
            ]
        }
    )

    display_order: Annotated[tuple[StrictInt, ...], Field(max_length=MAX_ANSWERS)] | None = None
    """The answers' indices in the order in which they were shown."""
    annotator: Name | None = None
    """Who judged; by default the key's name. Only keys with the role trainer or admin may name somebody else."""


class FeedbackAdded(Closed):
    """What was kept; the same again where the request is repeated under its Idempotency-Key."""

    model_config = ConfigDict(json_schema_extra={"example": {"object": "feedback", "id": "5f2e", "ids": ["5f2e"]}})

    object: Literal["feedback"] = "feedback"
    id: str
    """Of the first judgement."""
    ids: tuple[str, ...]
    """One for each judgement, in the order rating, ratings, thumb, ranking, comment."""


class FeedbackPage(Closed):
    """A stretch of all feedback, oldest first."""

    object: Literal["list"] = "list"
    data: tuple[Feedback, ...]
    has_more: bool
    next_cursor: str
    """Ask with it for what follows; also good later, for what has come since."""


class Purged(Closed):
    """How many kept completions were removed."""

    object: Literal["completions.purged"] = "completions.purged"
    removed: int


def router(_settings: ServiceConfig, *, records: RecordsBackend) -> APIRouter:
    """The routes above, over one writer."""
    routes = APIRouter(tags=["feedback"])
    may_write = Depends(role("annotator", "trainer"))
    may_read = Depends(role("trainer"))
    may_purge = Depends(role())

    @routes.post("/v1/feedback", status_code=201, response_model=FeedbackAdded)
    async def add_feedback(
        body: FeedbackRequest,
        caller: Annotated[Caller, may_write],
        idempotency_key: Annotated[str | None, Header(alias=KEY_HEADER, min_length=1, max_length=200)] = None,
    ) -> Response:
        """Keep what somebody thinks. Answers 201 once it is on disk; send it again under the same Idempotency-Key
        as often as needed, it is kept once."""
        completion = await records.completion(body.completion_id) if body.completion_id else None
        if body.completion_id and completion is None:
            # It may have expired since the first time that this was sent.
            receipt = await records.answered(_request_key(body, caller, idempotency_key))
            if receipt is None:
                raise ApiError(404, UNKNOWN_COMPLETION, param="completion_id", code="unknown_completion")
        else:
            items = _judgements(body, completion, annotator=_annotator(body, caller))
            ids = [item.id for item in items]
            answer = canonical_json({"object": "feedback", "id": ids[0], "ids": ids})
            key = _request_key(body, caller, idempotency_key)
            receipt = await records.add_feedback(Submission(items, answer, key))
        headers = {"Idempotency-Replayed": "true"} if receipt.replayed else {}
        return Response(receipt.answer, 201, headers, media_type="application/json")

    @routes.get("/v1/feedback", dependencies=[may_read])
    async def list_feedback(
        cursor: Annotated[str, Query(pattern=r"^[0-9]{1,18}$", description="`next_cursor` of the page before")] = "0",
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
        kind: Annotated[Kind | None, Query()] = None,
        annotator: Annotated[str | None, Query(max_length=200)] = None,
    ) -> FeedbackPage:
        """All feedback in the order in which it came, page by page."""
        page = await records.page(int(cursor), limit, kind=kind, annotator=annotator)
        return FeedbackPage(data=page.items, has_more=page.more, next_cursor=str(page.cursor))

    @routes.get("/v1/feedback/{feedback_id:path}", dependencies=[may_read])
    async def get_feedback(feedback_id: str) -> Feedback:
        """One judgement."""
        item = await records.feedback(feedback_id)
        if item is None:
            raise ApiError(404, "no feedback has this id", param="feedback_id")
        return item

    @routes.delete("/v1/completions", dependencies=[may_purge])
    async def purge_completions(
        caller: Annotated[str | None, Query(max_length=200, description="id of the key that asked")] = None,
        before: Annotated[AwareDatetime | None, Query(description="a moment with its time zone")] = None,
    ) -> Purged:
        """Forget kept answers that fit all that is given. Feedback on them stays."""
        if caller is None and before is None:
            raise ApiError(400, "say which: give caller, before, or both")
        return Purged(removed=await records.purge_completions(caller=caller, before=before))

    @routes.delete("/v1/completions/{completion_id:path}", dependencies=[may_purge])
    async def purge_completion(completion_id: str) -> Purged:
        """Forget one kept answer. Feedback on it stays."""
        return Purged(removed=await records.purge_completions(ids=[completion_id]))

    return routes


def _request_key(body: FeedbackRequest, caller: Caller, key: str | None) -> RequestKey | None:
    if key is None:
        return None
    return RequestKey(caller.id, key, request_sha256(body.model_dump(mode="json", exclude_unset=True)))


def _annotator(body: FeedbackRequest, caller: Caller) -> str:
    if body.annotator is None or body.annotator == caller.name:
        return caller.name
    if caller.role not in ("trainer", "admin"):
        raise ApiError(403, "only a trainer's or an admin's key may speak for another annotator", param="annotator")
    return body.annotator


def _judgements(body: FeedbackRequest, completion: Completion | None, *, annotator: str) -> tuple[Feedback, ...]:
    """One piece of feedback a judgement, as the store keeps them."""
    try:
        origin, answers = shown(body, completion)
        return feedback_of(body, answers, display_order=body.display_order, common=origin | {"annotator": annotator})
    except FeedbackError as error:
        raise ApiError(400, str(error)) from None

"""Feedback over HTTP.

| route | who | what |
|---|---|---|
| `POST /v1/feedback` | annotator, trainer, admin | ratings, rankings, comments, thumbs; 201 once on disk |
| `GET /v1/feedback` | trainer, admin | all of it, page by page |
| `GET /v1/feedback/{id}` | trainer, admin | one judgement |
| `DELETE /v1/completions` | admin | forget kept answers of a caller, or older than a moment |
| `DELETE /v1/completions/{id}` | admin | forget one kept answer |
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, StrictBool, StrictInt, model_validator

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback.completions import Completion
from rlhf_ray.feedback.requests import RequestKey, Submission, request_sha256
from rlhf_ray.feedback.schema import (
    MAX_ANSWERS,
    MAX_COMMENT,
    MAX_TEXT,
    Feedback,
    Kind,
    canonical_json,
    names_of,
    parse_feedback,
)
from rlhf_ray.serving.auth import Caller, role
from rlhf_ray.serving.backends import RecordsBackend
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.settings import ServiceConfig
from rlhf_ray.types import Message, Role

KEY_HEADER = "Idempotency-Key"
MAX_PAGE = 1_000
UNKNOWN_COMPLETION = "no completion is kept under this id: it was never given, has expired, or was not to be kept"

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class Closed(BaseModel):
    """A shape that takes no field that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Turn(Closed):
    """One turn of a dialogue."""

    role: Role
    content: Text


class BroughtAnswer(Closed):
    """An answer that the service did not give, or does not keep any more."""

    text: Text
    sampler: Name = "external"
    """Who or what wrote it; statistics are kept by this name."""
    sampling: dict[str, JsonValue] | None = None
    """Temperature and the like, where they are known."""
    policy_version: Annotated[StrictInt, Field(ge=0)] | None = None


class FeedbackRequest(Closed):
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

    completion_id: Name | None = None
    """The id of a chat completion or completion that this service gave."""
    index: Annotated[StrictInt, Field(ge=0)] | None = None
    """Which of several answers a rating or a thumb is about. A comment without it is about all of them."""
    prompt: Text | None = None
    """What was answered; stands for one turn of the user's."""
    messages: Annotated[tuple[Turn, ...], Field(min_length=1, max_length=1_000)] | None = None
    """The dialogue that was answered, the user's turn last."""
    completions: Annotated[tuple[Text | BroughtAnswer, ...], Field(min_length=1, max_length=MAX_ANSWERS)] | None = None
    """The answers, as texts or with what is known of where they come from."""
    rating: Annotated[float, Field(strict=True, ge=1, le=5, allow_inf_nan=False)] | None = None
    """Of one answer, from 1 to 5."""
    aspect: Name = "overall"
    """What the rating is about."""
    thumb: Literal[0, 1] | StrictBool | None = None
    """Of one answer: 1 or true is up, 0 or false is down."""
    ranking: Annotated[tuple[StrictInt, ...], Field(min_length=2, max_length=MAX_ANSWERS)] | None = None
    """The place of each answer, 1 the best; ties share a place and use up the next: `[1, 2, 2, 4]`."""
    comment: Annotated[str, Field(min_length=1, max_length=MAX_COMMENT)] | None = None
    """In one's own words, about one answer."""
    display_order: Annotated[tuple[StrictInt, ...], Field(max_length=MAX_ANSWERS)] | None = None
    """The answers' indices in the order in which they were shown."""
    annotator: Name | None = None
    """Who judged; by default the key's name. Only keys with the role trainer or admin may name somebody else."""

    @model_validator(mode="after")
    def _says_what_of_what(self) -> "FeedbackRequest":
        if all(value is None for value in (self.rating, self.thumb, self.ranking, self.comment)):
            raise ValueError("nothing is said: give a rating, a thumb, a ranking or a comment")
        brought = (self.prompt, self.messages, self.completions)
        if self.completion_id is not None:
            if any(value is not None for value in brought):
                raise ValueError("completion_id stands for prompt and answers: leave prompt, messages, completions out")
        elif self.completions is None or (self.prompt is None) == (self.messages is None):
            raise ValueError("give a completion_id, or completions with either prompt or messages")
        return self


class FeedbackAdded(Closed):
    """What was kept; the same again where the request is repeated under its Idempotency-Key."""

    model_config = ConfigDict(json_schema_extra={"example": {"object": "feedback", "id": "5f2e", "ids": ["5f2e"]}})

    object: Literal["feedback"] = "feedback"
    id: str
    """Of the first judgement."""
    ids: tuple[str, ...]
    """One for each judgement, in the order rating, thumb, ranking, comment."""


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
        origin, answers = _shown(body, completion)
        all_of_them = {"answers": answers, "display_order": body.display_order}
        rows: list[dict[str, Any]] = []
        if body.rating is not None:
            rating = {"value": body.rating, "aspect": body.aspect}
            rows.append({"answers": _meant(body, answers), "rating": rating})
        if body.thumb is not None:
            rating = {"value": int(body.thumb), "scale": "thumb", "aspect": body.aspect}
            rows.append({"answers": _meant(body, answers), "rating": rating})
        if body.ranking is not None:
            rows.append(all_of_them | {"ranking": {"ranks": body.ranking}})
        if body.comment is not None:
            about = all_of_them if body.index is None else {"answers": _meant(body, answers)}
            rows.append(about | {"comment": {"text": body.comment}})
        return tuple(parse_feedback(origin | {"annotator": annotator} | row) for row in rows)
    except FeedbackError as error:
        raise ApiError(400, str(error)) from None


def _shown(body: FeedbackRequest, completion: Completion | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The prompt with its names, and the answers, as fields of `Feedback`."""
    if completion is not None:
        turns: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in completion.dialogue]
        answers = [completion.answer(index) for index in range(len(completion.answers))]
    else:
        assert body.completions is not None
        turns = [turn.model_dump() for turn in body.messages or (Turn(role="user", content=body.prompt or ""),)]
        answers = [
            (BroughtAnswer(text=answer) if isinstance(answer, str) else answer).model_dump()
            for answer in body.completions
        ]
    prompt_id, group = names_of([Message(turn["role"], turn["content"]) for turn in turns])
    return {"messages": turns, "prompt_id": prompt_id, "group": group}, answers


def _meant(body: FeedbackRequest, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The one answer that a judgement of one answer is about."""
    if body.index is None and len(answers) > 1:
        raise FeedbackError(f"say which of the {len(answers)} answers is meant: give index, from 0")
    if body.index is not None and body.index >= len(answers):
        raise FeedbackError(f"index {body.index}: there are {len(answers)} answers, from 0")
    return [answers[body.index or 0]]

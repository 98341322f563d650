"""The policy over HTTP, as OpenAI's clients ask.

| route | who | what |
|---|---|---|
| `GET /v1/models`, `GET /v1/models/{id}` | everybody with a key | what answers now, with its version |
| `POST /v1/chat/completions` | app, admin | answers to a dialogue |
| `POST /v1/completions` | app, admin | a text, continued |

Every answer says which policy version made it: in the body and, for what does not read bodies, in a header.
An answer is kept before its end is sent, so that feedback can name its id from then on, unless `x-rlhf-store: no`.
"""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Literal
from uuid import uuid4

from fastapi import APIRouter, Depends, Header
from starlette.responses import JSONResponse, Response, StreamingResponse

from rlhf_ray.serving.auth import Caller, role
from rlhf_ray.serving.backends import Delta, ModelInfo, PolicyBackend, RecordsBackend, VersionsBackend
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.openai_answers import DONE, Gathering, sse
from rlhf_ray.serving.openai_schema import (
    MODEL,
    Asked,
    ChatAnswer,
    ChatRequest,
    CompletionRequest,
    ServedModel,
    ServedModels,
    TextAnswer,
)
from rlhf_ray.serving.settings import PolicySettings, ServiceConfig

VERSION_HEADER = "x-policy-version"
App = Annotated[Caller, Depends(role("app"))]
Anybody = Annotated[Caller, Depends(role("app", "annotator", "trainer"))]
Store = Annotated[
    Literal["yes", "no"],
    Header(alias="x-rlhf-store", description="`no`: the answer is not kept, and feedback cannot name its id."),
]


def router(
    settings: ServiceConfig,
    *,
    policy: PolicyBackend,
    records: RecordsBackend | None,
    versions: VersionsBackend | None,
) -> APIRouter:
    """The routes above. Without records nothing is kept."""
    routes = APIRouter(tags=["policy"])
    desk = Desk(settings.policy, policy, records)

    @routes.post("/v1/chat/completions", response_model=ChatAnswer, responses=STREAMS)
    async def chat_completions(body: ChatRequest, caller: App, store: Store = "yes") -> Response:
        """Answer a dialogue."""
        return await desk.answer(body, f"chatcmpl-{uuid4().hex}", caller, keep=store == "yes")

    @routes.post("/v1/completions", response_model=TextAnswer, responses=STREAMS)
    async def completions(body: CompletionRequest, caller: App, store: Store = "yes") -> Response:
        """Continue a text as it is."""
        return await desk.answer(body, f"cmpl-{uuid4().hex}", caller, keep=store == "yes")

    if versions is not None:
        _add_models(routes, versions)
    return routes


STREAMS: dict[int | str, dict[str, object]] = {
    200: {
        "description": "The answer; with `stream: true` server-sent events, of which the last is `data: [DONE]` "
        "or an error.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "headers": {VERSION_HEADER: {"schema": {"type": "integer"}, "description": "The version that made it."}},
    }
}


def _add_models(routes: APIRouter, versions: VersionsBackend) -> None:
    @routes.get("/v1/models")
    async def models(_: Anybody) -> ServedModels:
        """List what answers now."""
        return ServedModels(data=[_served(info) for info in await versions.models()])

    @routes.get("/v1/models/{id}")
    async def model(id: str, _: Anybody) -> ServedModel:
        """Show one of them."""
        for info in await versions.models():
            if info.id == id:
                return _served(info)
        raise _unknown_model()


class Desk:
    """Takes a request to the policy and brings the answer back."""

    def __init__(self, settings: PolicySettings, policy: PolicyBackend, records: RecordsBackend | None) -> None:
        self.settings = settings
        self.policy = policy
        self.records = records

    async def answer(self, body: Asked, id: str, caller: Caller, *, keep: bool) -> Response:
        """The whole answer, or a stream whose first delta is there already: until then a refusal has its status."""
        self._check(body)
        gathering = Gathering(body.call(id), body.model, int(time.time()))
        deltas = self.policy.generate(gathering.call)
        keeper = Keeper(self.records if keep else None, gathering, caller.id, body)
        if not body.stream:
            async for delta in deltas:
                gathering.add(delta)
            await keeper.keep()
            return JSONResponse(gathering.answer().model_dump(), headers=_stamp(gathering.policy_version))
        first = await anext(deltas)
        events = _events(first, deltas, keeper, usage=body.wants_usage)
        headers = {**_stamp(first.policy_version), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    def _check(self, body: Asked) -> None:
        if body.model != MODEL:
            raise _unknown_model()
        if (body.n or 1) > self.settings.max_choices:
            raise ApiError(400, f"n is at most {self.settings.max_choices} here", param="n")
        if (body.limit or 0) > self.settings.max_tokens:
            raise ApiError(400, f"an answer has at most {self.settings.max_tokens} tokens here", param="max_tokens")


class Keeper:
    """Keeps a whole answer, once, before its end is sent."""

    def __init__(self, records: RecordsBackend | None, gathering: Gathering, caller: str, body: Asked) -> None:
        self.records = records
        self.gathering = gathering
        self.caller = caller
        self.body = body

    async def keep(self) -> None:
        """Returns once it is kept; where it cannot be, its id must not be given away."""
        self.gathering.answers()  # refuses what is not whole
        if self.records is not None:
            await self.records.keep_completion(self.gathering.kept(self.caller, self.body.sampling()))


async def _events(first: Delta, deltas: AsyncIterator[Delta], keeper: Keeper, *, usage: bool) -> AsyncIterator[str]:
    gathering = keeper.gathering
    delta: Delta | None = first
    try:
        while delta is not None:
            event = gathering.event(delta, usage=usage)
            gathering.add(delta)
            if gathering.whole:
                await keeper.keep()  # before the event that ends the answer
            yield event
            delta = await anext(deltas, None)
        gathering.answers()
        if usage:
            yield gathering.usage_event()
        yield DONE
    except ApiError as error:
        yield sse(error.body())  # never a silent cut


def _served(info: ModelInfo) -> ServedModel:
    return ServedModel(id=info.id, created=info.created, kind=info.kind, version=info.version, sha256=info.sha256)


def _stamp(version: int | None) -> dict[str, str]:
    return {VERSION_HEADER: str(version)}


def _unknown_model() -> ApiError:
    return ApiError(404, "there is no such model: see /v1/models", param="model", code="model_not_found")

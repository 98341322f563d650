"""The door: one FastAPI app that checks who asks and how much, and hands on to the routes of the parts that are there.

| path       | who        | answers                                                                  |
|------------|------------|--------------------------------------------------------------------------|
| `/healthz` | everybody  | 200 while the process answers                                            |
| `/readyz`  | everybody  | 200 when each part can do its work, else 503                             |
| `/v1/...`  | by role    | the routers of openai.py, reward.py, feedback.py, labelling.py, admin.py |

A route that names no role is not served: `create_door` refuses to build it.
"""

import asyncio
import logging
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_ray import __version__
from rlhf_ray.serving.auth import Gate, KeyDesk, Keys
from rlhf_ray.serving.backends import (
    PolicyBackend,
    Readiness,
    RecordsBackend,
    RewardBackend,
    VersionsBackend,
)
from rlhf_ray.serving.errors import ApiError, ErrorEnvelope
from rlhf_ray.serving.limits import KnownCaller, Pace, SoundBody, TrustedHosts
from rlhf_ray.serving.settings import ServiceConfig

OPEN = {"/healthz", "/readyz", "/openapi.json", "/docs", "/docs/oauth2-redirect"}
"""What needs no key."""
READY_WITHIN_S = 5.0
log = logging.getLogger(__name__)


class Part(Protocol):
    """Something behind the door that can say how it is."""

    async def ready(self) -> Readiness:
        """Whether it can do its work now."""


class Health(BaseModel):
    """Whether a process answers."""

    model_config = ConfigDict(json_schema_extra={"example": {"status": "ok"}})

    status: str


class Ready(BaseModel):
    """Which parts can do their work, and what the others lack."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"ready": True, "parts": {"records": "the store can be written"}}}
    )

    ready: bool
    parts: dict[str, str]


def create_door(
    settings: ServiceConfig,
    *,
    policy: PolicyBackend | None,
    reward: RewardBackend | None,
    records: RecordsBackend | None,
    versions: VersionsBackend | None,
    keys: Keys,
    desk: KeyDesk | None = None,
    count: Callable[[str], None] = lambda name: None,
) -> FastAPI:
    """The app; a part that is None has no routes, and without a `desk` no keys are made over HTTP.

    `count` is told of each refusal and failure by name.
    """
    routers = _routers(settings, policy=policy, reward=reward, records=records, versions=versions, desk=desk)
    parts = {"policy": versions, "reward": reward, "records": records}
    return assemble(settings, routers, keys=keys, parts=parts, count=count)


def assemble(
    settings: ServiceConfig,
    routers: Iterable[APIRouter],
    *,
    keys: Keys,
    parts: Mapping[str, Part | None],
    count: Callable[[str], None] = lambda name: None,
) -> FastAPI:
    """Routers behind the door's checks."""
    app = FastAPI(
        title="rlhf-ray",
        version=__version__,
        description="Answers of a policy, rewards for them, and what people say about them.",
        docs_url="/docs" if settings.on_loopback else None,  # its scripts come from elsewhere
        redoc_url=None,
        responses={status: {"model": ErrorEnvelope, "description": "Refused"} for status in ("4XX", "5XX")},
        separate_input_output_schemas=False,
    )
    for router in (_health_router(parts), *routers):
        app.include_router(router)
    for path in ungated(app):
        raise AssertionError(f"route {path} names no role: give it Depends(role(...))")
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _refused_by_starlette)
    app.add_exception_handler(RequestValidationError, _refused_by_schema)
    # The last added is the outermost.
    app.add_middleware(SoundBody, limits=settings.limits)
    app.add_middleware(Pace, limits=settings.limits)
    app.add_middleware(KnownCaller, keys=keys)
    app.add_middleware(TrustedHosts, hosts=settings.trusted_hosts)
    app.add_middleware(Frame, count=count)
    return app


def ungated(app: FastAPI) -> list[str]:
    """Paths that would be served to anybody without being meant to."""
    return [
        path
        for route in app.routes
        if (path := getattr(route, "path", str(route))) not in OPEN
        and not (isinstance(route, APIRoute) and _has_gate(route.dependant))
    ]


def _has_gate(dependant: Dependant) -> bool:
    return any(isinstance(needed.call, Gate) or _has_gate(needed) for needed in dependant.dependencies)


def _routers(
    settings: ServiceConfig,
    *,
    policy: PolicyBackend | None,
    reward: RewardBackend | None,
    records: RecordsBackend | None,
    versions: VersionsBackend | None,
    desk: KeyDesk | None,
) -> Sequence[APIRouter]:
    routers = []
    if policy is not None:
        from rlhf_ray.serving import openai

        routers.append(openai.router(settings, policy=policy, records=records, versions=versions))
    if reward is not None:
        from rlhf_ray.serving import reward as rewards

        routers.append(rewards.router(settings, reward=reward))
    if records is not None:
        from rlhf_ray.serving import admin, feedback, labelling

        routers.append(feedback.router(settings, records=records))
        routers.append(labelling.router(settings, records=records))
        routers.append(admin.router(records=records))
    if desk is not None:
        from rlhf_ray.serving import admin

        routers.append(admin.key_router(desk))
    return routers


def _health_router(parts: Mapping[str, Part | None]) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz", summary="Whether the service answers")
    async def healthz() -> Health:
        return Health(status="ok")

    @router.get("/readyz", summary="Whether the service can do its work", responses={503: {"model": Ready}})
    async def readyz() -> Response:
        asked = {name: part for name, part in parts.items() if part is not None}
        answers = await asyncio.gather(*(_readiness(part) for part in asked.values()))
        ready = Ready(
            ready=all(answer.ready for answer in answers),
            parts={name: answer.detail for name, answer in zip(asked, answers, strict=True)},
        )
        return JSONResponse(ready.model_dump(), 200 if ready.ready else 503)

    return router


async def _readiness(part: Part) -> Readiness:
    try:
        async with asyncio.timeout(READY_WITHIN_S):
            return await part.ready()
    except TimeoutError:
        return Readiness(False, f"no answer within {READY_WITHIN_S:g} s")
    except ApiError as error:
        return Readiness(False, error.message)


class Frame:
    """The outermost layer: gives each request an id, and turns what nobody foresaw into a counted 500."""

    def __init__(self, app: ASGIApp, count: Callable[[str], None]) -> None:
        self.app = app
        self.count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers each request in the end, if only to say that it failed."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        id_, started = f"req-{uuid.uuid4().hex}", False

        async def framed(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if message["status"] >= 400:
                    self.count(f"http_{message['status']}")
                own = {b"x-request-id": id_.encode(), b"x-content-type-options": b"nosniff"}
                message = {**message, "headers": [*message.get("headers", []), *own.items()]}
            await send(message)

        try:
            await self.app(scope, receive, framed)
        except Exception as error:  # a role's edge: said without the message, which may hold somebody's words
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s in request %s\n%s", type(error).__name__, id_, where)
            self.count("unforeseen_errors")
            if started:
                raise _Broken(id_) from None  # the server cuts the connection, so that half is not taken for whole
            answer = ApiError(500, f"something broke here, not with you; its id is {id_}").response()
            await answer(scope, receive, framed)


class _Broken(RuntimeError):
    """An answer broke off after it had begun."""


async def _refused(_: Request, error: Exception) -> Response:
    return cast(ApiError, error).response()


async def _refused_by_starlette(request: Request, error: Exception) -> Response:
    """404, 405 and what a parser could not read, in our envelope."""
    given = cast(HTTPException, error)
    messages = {
        404: "there is no such path: see /openapi.json",
        405: f"{request.method} is not for this path: see /openapi.json",
        400: "the body cannot be read as JSON",
    }
    return ApiError(given.status_code, messages.get(given.status_code, "refused")).response(given.headers)


async def _refused_by_schema(_: Request, error: Exception) -> Response:
    """The first field at fault, by name; numbers are shown, people's words are not."""
    item = cast(RequestValidationError, error).errors()[0]
    place, *path = item["loc"]
    if item["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON (at byte {path[0]})", code="invalid_json").response()
    field = ".".join(str(part) for part in path) or None
    if item["type"] == "extra_forbidden":
        message, code = f"unknown field '{field}': leave it out", "unknown_field"
    else:
        message, code = item["msg"].removeprefix("Value error, "), "invalid_value"
        message = f"{field or place}: {message}"
    return ApiError(400, message, param=field, code=code).response()

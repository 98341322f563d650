"""The door in the test's own process: routes of one's own behind its checks, asked without a network."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message

from rlhf_ray.serving.auth import Caller, role
from rlhf_ray.serving.backends import Readiness
from rlhf_ray.serving.door import assemble
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.settings import LimitSettings, ServiceConfig

KEYS = {
    f"{name}-key": Caller(f"id-{name}", name, name)  # type: ignore[arg-type]
    for name in ("app", "annotator", "trainer", "admin")
}


SECRET = "-".join(["canary", "secret"])
"""Stands for somebody's words; nowhere in the source as it is, so that a line of a traceback does not hold it."""


class KnownKeys:
    """A fixed set of keys; none of them, and the door stands open to this machine."""

    def __init__(self, keys: dict[str, Caller] | None = None) -> None:
        self.keys = KEYS if keys is None else keys

    def any(self) -> bool:
        return bool(self.keys)

    def caller(self, key: str) -> Caller | None:
        return self.keys.get(key)


class Part:
    """A part whose readiness a test decides."""

    def __init__(self, answer: Readiness | ApiError | None) -> None:
        self.answer = answer

    async def ready(self) -> Readiness:
        if self.answer is None:
            await asyncio.sleep(3600)
        if isinstance(self.answer, ApiError):
            raise self.answer
        assert self.answer is not None
        return self.answer

    async def models(self) -> list[Any]:
        return []


class Note(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str = ""
    stars: Annotated[float, Field(ge=1, le=5)] = 3


def example_router() -> APIRouter:
    """One route for each thing that can go right or wrong behind the door."""
    routes = APIRouter()

    @routes.post("/v1/notes")
    async def note(body: Note, caller: Annotated[Caller, Depends(role("app"))]) -> dict[str, Any]:
        return {"text": body.text, "by": caller.name}

    @routes.post("/v1/feedback")
    async def feedback(body: Note, caller: Annotated[Caller, Depends(role("annotator"))]) -> dict[str, str]:
        return {"by": caller.name}

    @routes.get("/v1/feedback", dependencies=[Depends(role("trainer"))])
    async def read() -> list[str]:
        return []

    @routes.get("/v1/broken", dependencies=[Depends(role("app"))])
    async def broken() -> None:
        raise RuntimeError(SECRET)

    @routes.get("/v1/refused", dependencies=[Depends(role("app"))])
    async def refused() -> None:
        raise ApiError(503, "too much waits", retry_after=2)

    @routes.get("/v1/half", dependencies=[Depends(role("app"))])
    async def half() -> StreamingResponse:
        async def parts() -> Any:
            yield "half"
            raise RuntimeError(SECRET)

        return StreamingResponse(parts())

    return routes


def make_door(
    *,
    keys: KnownKeys | None = None,
    routers: Iterable[APIRouter] | None = None,
    parts: dict[str, Any] | None = None,
    count: Callable[[str], None] = lambda name: None,
    limits: dict[str, Any] | None = None,
    **settings: Any,
) -> ASGIApp:
    return assemble(
        ServiceConfig(limits=LimitSettings(**(limits or {})), **settings),
        [example_router()] if routers is None else routers,
        keys=keys or KnownKeys(),
        parts=parts or {},
        count=count,
    )


def ask(
    door: ASGIApp,
    method: str,
    path: str,
    *,
    key: str | None = "admin-key",
    headers: Any = None,
    client: str = "127.0.0.1",
    **request: Any,
) -> httpx.Response:
    """One request and its answer."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(door, client=(client, 4242))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as opened:
            own = {} if key is None else {"Authorization": f"Bearer {key}"}
            return await opened.request(method, path, headers={**own, **(headers or {})}, **request)

    return asyncio.run(go())


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The envelope's content, of which all four fields have to be there."""
    content = answer.json()
    assert set(content) == {"error"}
    error: dict[str, Any] = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def raw(door: ASGIApp, chunks: Iterable[bytes | float | None], **scope: Any) -> list[Message]:
    """What the door sends for a body in pieces; a number is a pause in seconds, None a caller who leaves."""
    pieces, sent = list(chunks), []

    async def receive() -> Message:
        while pieces:
            piece = pieces.pop(0)
            if piece is None:
                break
            if isinstance(piece, float):
                await asyncio.sleep(piece)
                continue
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"authorization", b"Bearer admin-key"), (b"content-type", b"application/json")]
    base = {"type": "http", "method": "POST", "path": "/v1/notes", "headers": headers, "client": ("127.0.0.1", 1)}
    rest = {"query_string": b"", "http_version": "1.1", "scheme": "http", "raw_path": b"", "server": ("127.0.0.1", 80)}
    await door({**rest, **base, **scope}, receive, send)
    return sent

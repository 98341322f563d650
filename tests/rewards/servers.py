"""Real HTTP servers on loopback that behave as a test says."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Behave = Callable[[int, dict[str, Any]], Response | float | None]
"""From the request's number and body: its answer; or seconds to wait before nothing is said; or None to hang up."""


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An ASGI app under uvicorn, on a port of its own; gives its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)  # who comes before uvicorn looks waits, and is not refused
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(timeout=10)
        listening.close()


@contextmanager
def behaving(behave: Behave) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers every POST as told; gives its address and the bodies that it got."""
    got: list[dict[str, Any]] = []

    async def answer(request: Request) -> Response:
        body = await request.json()
        got.append({**body, "authorization": request.headers.get("authorization"), "path": request.url.path})
        answered = behave(len(got) - 1, body)
        if isinstance(answered, Response):
            return answered
        if answered is not None:
            await asyncio.sleep(answered)
        raise ConnectionResetError  # uvicorn closes the connection or says 500

    with serving(Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])) as address:
        yield address, got


def said(content: Any, status: int = 200, **headers: str) -> Response:
    """JSON."""
    return JSONResponse(content, status, headers)


def raw(content: bytes, status: int = 200) -> Response:
    """Bytes that are called JSON."""
    return Response(content, status, media_type="application/json")

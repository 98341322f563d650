"""A plain app around one router, with the door's way of refusing, and a client that calls it in this process."""

import json
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_ray.serving.auth import Caller
from rlhf_ray.serving.errors import ApiError

ANNOTATOR = Caller("ann-1", "annotator")
ADMIN = Caller("boss", "admin")


class Known:
    """Says who asks, as the door does."""

    def __init__(self, app: ASGIApp, caller: Caller) -> None:
        self.app = app
        self.caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "caller": self.caller}, receive, send)


def make_app(routes: APIRouter, caller: Caller = ADMIN) -> FastAPI:
    app = FastAPI()
    app.include_router(routes)
    app.add_middleware(Known, caller=caller)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def unreadable(_: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, "refused").response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return ApiError(400, "; ".join(item["msg"] for item in error.errors())).response()

    return app


class Requests:
    """Requests to an app, each answered as a whole."""

    def __init__(self, app: FastAPI) -> None:
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self._http.post(path, content=content, headers={"content-type": "application/json"} | names)

    async def get(self, path: str, **params: Any) -> httpx.Response:
        return await self._http.get(path, params=params)

    async def delete(self, path: str, **params: Any) -> httpx.Response:
        return await self._http.delete(path, params=params)

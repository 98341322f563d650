"""What a request passes before any route sees it: host, key, pace, and the size and shape of its body.

Plain ASGI, outermost first: `TrustedHosts`, `KnownCaller`, `Pace`, `SoundBody`. Nobody's body is read before their key
is known, and no decision here rests on a URL that Starlette put together from headers.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable
from ipaddress import ip_address

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_ray.serving.auth import LOCAL, Caller, Keys, unauthenticated
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.settings import LimitSettings

WINDOW_S = 60.0
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE)
_JSON_TYPE = re.compile(r"application/json\s*(;\s*charset\s*=\s*\"?utf-?8\"?\s*)?", re.IGNORECASE)
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
"""Strings, even one that never ends (so that a scan is linear), and brackets outside of them."""
BODY_METHODS = {"POST", "PUT", "PATCH", "DELETE"}


class TrustedHosts:
    """Refuses requests for another host: a page of somebody else's that had its name lead here."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app = app
        self.hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands on what names a host of ours."""
        if scope["type"] == "http":
            given = Headers(scope=scope).getlist("host")
            shaped = _HOST.fullmatch(given[0]) if len(given) == 1 else None
            if shaped is None or shaped[1].strip("[]").lower() not in self.hosts:
                error = ApiError(400, "this service does not answer to that Host", code="unknown_host")
                return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)


class KnownCaller:
    """Makes out who asks, for the routes to judge; refuses unread any body of somebody unknown."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Notes the caller in the scope, None for nobody known."""
        if scope["type"] == "http":
            given = Headers(scope=scope).getlist("authorization")
            scope["caller"] = await run_in_threadpool(self._caller, given, scope.get("client"))
            if scope["caller"] is None and scope["method"] in BODY_METHODS:
                return await unauthenticated().response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _caller(self, given: list[str], client: tuple[str, int] | None) -> Caller | None:
        if not self.keys.any():
            return LOCAL if client is not None and _is_here(client[0]) else None
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        return self.keys.caller(key.strip()) if scheme.lower() == "bearer" else None


class Pace:
    """Holds each key to so many requests a minute, and so many at a time until their last byte is sent."""

    def __init__(self, app: ASGIApp, limits: LimitSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self.limits = limits
        self.clock = clock
        self.windows: dict[str, deque[float]] = {}
        self.under_way: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands on, or answers 429 with the time to wait."""
        caller: Caller | None = scope.get("caller") if scope["type"] == "http" else None
        if caller is None:
            return await self.app(scope, receive, send)
        refusal = self._refusal(caller.id)
        if refusal is not None:
            return await refusal.response()(scope, receive, send)
        self.under_way[caller.id] = self.under_way.get(caller.id, 0) + 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.under_way[caller.id] -= 1

    def _refusal(self, name: str) -> ApiError | None:
        now, window = self.clock(), self.windows.setdefault(name, deque())
        while window and window[0] <= now - WINDOW_S:
            window.popleft()
        if len(window) >= self.limits.requests_per_minute:
            wait = window[0] + WINDOW_S - now
            return ApiError(429, f"more than {self.limits.requests_per_minute} requests a minute", retry_after=wait)
        if self.under_way.get(name, 0) >= self.limits.concurrent:
            message = f"more than {self.limits.concurrent} requests of this key at a time"
            return ApiError(429, message, code="too_many_at_once", retry_after=1)
        window.append(now)
        return None


class SoundBody:
    """Hands on bodies that are JSON in UTF-8, not too large, not too deep, and there within their time."""

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the body whole, then hands it on as one piece."""
        if scope["type"] != "http" or scope["method"] not in BODY_METHODS:
            return await self.app(scope, receive, send)
        try:
            async with asyncio.timeout(self.limits.body_deadline_s):
                body = await self._read(Headers(scope=scope), receive, self._cap(scope["path"]))
        except TimeoutError:
            error = ApiError(408, f"the body took more than {self.limits.body_deadline_s:g} s to arrive")
            return await error.response({"Connection": "close"})(scope, receive, send)
        except ApiError as error:
            return await error.response({"Connection": "close"})(scope, receive, send)
        if body is not None:  # else the caller has gone
            await self.app(scope, _once(body, receive), send)

    def _cap(self, path: str) -> int:
        return self.limits.feedback_bytes if path.startswith("/v1/feedback") else self.limits.body_bytes

    async def _read(self, headers: Headers, receive: Receive, cap: int) -> bytes | None:
        """The whole body; the length is counted, for a header can lie or be absent."""
        told = headers.get("content-length", "0")
        if told.isdecimal() and int(told[:20]) > cap:
            raise _too_large(cap)
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > cap:
                raise _too_large(cap)
            more = message.get("more_body", False)
        if body:
            check_json(headers.get("content-type", ""), bytes(body), self.limits.json_depth)
        return bytes(body)


def check_json(content_type: str, body: bytes, depth: int) -> None:
    """Raises for what no parser of ours should see: another type or encoding, or brackets nested too deep."""
    if not _JSON_TYPE.fullmatch(content_type.strip()):
        raise ApiError(415, "send JSON in UTF-8, with Content-Type: application/json")
    try:
        body.decode()
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8", code="invalid_json") from None
    if b"\0" in body:  # UTF-16 and UTF-32, which a parser would guess
        raise ApiError(400, "the body is not UTF-8", code="invalid_json")
    level = 0
    for token in _TOKENS.finditer(body):
        first = body[token.start()]
        level += (first in b"[{") - (first in b"]}")
        if level > depth:
            raise ApiError(400, f"the body is nested more than {depth} deep", code="too_deep")


def _too_large(cap: int) -> ApiError:
    return ApiError(413, f"the body is larger than {cap} bytes")


def _once(body: bytes, receive: Receive) -> Receive:
    """The body as one message; what comes after it, a caller's leaving, comes from the server."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _is_here(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False

"""The two clients: how a call is sent, and sent again where that helps.

When and what to send next is decided once, in `_Service.tries`, which does not send; a client does what it says and
waits in its own way.
"""

import asyncio
import inspect
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import httpx

from rlhf_ray.client import calls
from rlhf_ray.client.calls import Call, Past
from rlhf_ray.errors import InfrastructureError, InputError
from rlhf_ray.feedback.schema import Feedback, Kind

AGAIN = frozenset({408, 429, 502, 503, 504})
"""Statuses that are worth another try. 409 is one, too, while the first try of a key is under way."""
IN_FLIGHT = "idempotency_key_in_flight"
LONGEST_WAIT_S = 8.0

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Refused(InputError):
    """The service said no, and would again. `str` of it is the service's own words."""

    def __init__(self, message: str, *, status: int, type: str, param: str | None, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        """The field at fault, where one is."""
        self.code = code


class NotAllowed(Refused):
    """The key is missing, unknown, revoked (401), or its role may not do this (403)."""


class NotFound(Refused):
    """No such completion, feedback or task."""


class TaskTaken(Refused):
    """The task was answered otherwise before, or others have it by now (409)."""


class KeyReused(Refused):
    """The idempotency key came with another request before (422)."""


class Unavailable(InfrastructureError):
    """The service did not do it before the deadline; feedback may be sent again under the same idempotency key."""


KINDS: dict[int, type[Refused]] = {401: NotAllowed, 403: NotAllowed, 404: NotFound, 409: TaskTaken, 422: KeyReused}


@dataclass(frozen=True, slots=True)
class _Send:
    timeout_s: float


@dataclass(frozen=True, slots=True)
class _Wait:
    seconds: float


def _sync(make: Callable[P, Call[T]]) -> "Callable[Concatenate[Client, P], T]":
    """A call as a method of `Client`."""

    @wraps(make)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.do(make(*args, **kwargs))

    return _as_method(method)


def _async(make: Callable[P, Call[T]]) -> "Callable[Concatenate[AsyncClient, P], Awaitable[T]]":
    """A call as a method of `AsyncClient`."""

    @wraps(make)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.do(make(*args, **kwargs))

    return _as_method(method)


def _as_method(method: F) -> F:
    """With the signature that `help` shows, which is the call's and has no `self`."""
    signature = inspect.signature(method)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    (returns,) = signature.return_annotation.__args__  # of Call[...]
    shown = signature.replace(parameters=[itself, *signature.parameters.values()], return_annotation=returns)
    method.__signature__ = shown  # type: ignore[attr-defined] # `inspect` looks for it
    return method


class Client:
    """Talks to one service; safe to share between threads. Close it, or use it in a `with`.

    `deadline_s` bounds a call with all its tries, `timeout_s` one try. `http` replaces the connection, in tests.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        deadline_s: float = 30,
        timeout_s: float = 10,
        http: httpx.Client | None = None,
    ) -> None:
        self._service = _Service(base_url.rstrip("/"), key, deadline_s, timeout_s)
        self._http = http or httpx.Client()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    rate = _sync(calls.rate)
    thumb = _sync(calls.thumb)
    comment = _sync(calls.comment)
    rank = _sync(calls.rank)
    send = _sync(calls.send)
    rewards = _sync(calls.rewards)
    next_task = _sync(calls.next_task)
    answer_task = _sync(calls.answer_task)
    skip_task = _sync(calls.skip_task)
    undo_task = _sync(calls.undo_task)
    progress = _sync(calls.progress)
    guidelines = _sync(calls.guidelines)
    add_tasks = _sync(calls.add_tasks)
    exclude = _sync(calls.exclude)
    snapshots = _sync(calls.snapshots)
    freeze = _sync(calls.freeze)

    def feedback(
        self, *, kind: Kind | None = None, annotator: str | None = None, page: int = 100
    ) -> Iterator[Feedback]:
        """All feedback, oldest first, fetched page by page."""
        return self._pages(lambda at: calls.feedback_page(at, kind=kind, annotator=annotator, page=page))

    def history(self) -> Iterator[Past]:
        """What the caller has answered and skipped, newest first, fetched page by page."""
        return self._pages(calls.history_page)

    def do(self, call: Call[T]) -> T:
        """Sends a call, as often as is needed before the deadline."""
        tries = self._service.tries(call)
        step = next(tries)
        while True:
            outcome: httpx.Response | httpx.TransportError | None = None
            if isinstance(step, _Wait):
                time.sleep(step.seconds)
            else:
                try:
                    outcome = self._http.request(**self._service.request(call), timeout=step.timeout_s)
                except httpx.TransportError as error:
                    outcome = error
            try:
                step = tries.send(outcome)
            except StopIteration as end:
                return call.read(end.value)

    def _pages(self, page_at: Callable[[str | None], Call[calls.Page[T]]]) -> Iterator[T]:
        cursor, more = None, True
        while more:
            page = self.do(page_at(cursor))
            yield from page.items
            cursor, more = page.cursor, page.cursor is not None


class AsyncClient:
    """`Client` for programs that run on asyncio: every call is awaited. Close it, or use it in an `async with`."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        deadline_s: float = 30,
        timeout_s: float = 10,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._service = _Service(base_url.rstrip("/"), key, deadline_s, timeout_s)
        self._http = http or httpx.AsyncClient()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    rate = _async(calls.rate)
    thumb = _async(calls.thumb)
    comment = _async(calls.comment)
    rank = _async(calls.rank)
    send = _async(calls.send)
    rewards = _async(calls.rewards)
    next_task = _async(calls.next_task)
    answer_task = _async(calls.answer_task)
    skip_task = _async(calls.skip_task)
    undo_task = _async(calls.undo_task)
    progress = _async(calls.progress)
    guidelines = _async(calls.guidelines)
    add_tasks = _async(calls.add_tasks)
    exclude = _async(calls.exclude)
    snapshots = _async(calls.snapshots)
    freeze = _async(calls.freeze)

    def feedback(
        self, *, kind: Kind | None = None, annotator: str | None = None, page: int = 100
    ) -> AsyncIterator[Feedback]:
        """All feedback, oldest first, fetched page by page."""
        return self._pages(lambda at: calls.feedback_page(at, kind=kind, annotator=annotator, page=page))

    def history(self) -> AsyncIterator[Past]:
        """What the caller has answered and skipped, newest first, fetched page by page."""
        return self._pages(calls.history_page)

    async def do(self, call: Call[T]) -> T:
        """Sends a call, as often as is needed before the deadline."""
        tries = self._service.tries(call)
        step = next(tries)
        while True:
            outcome: httpx.Response | httpx.TransportError | None = None
            if isinstance(step, _Wait):
                await asyncio.sleep(step.seconds)
            else:
                try:
                    outcome = await self._http.request(**self._service.request(call), timeout=step.timeout_s)
                except httpx.TransportError as error:
                    outcome = error
            try:
                step = tries.send(outcome)
            except StopIteration as end:
                return call.read(end.value)

    async def _pages(self, page_at: Callable[[str | None], Call[calls.Page[T]]]) -> AsyncIterator[T]:
        cursor, more = None, True
        while more:
            page = await self.do(page_at(cursor))
            for item in page.items:
                yield item
            cursor, more = page.cursor, page.cursor is not None


@dataclass(frozen=True, slots=True)
class _Service:
    """Where to send, as whom, and for how long."""

    base_url: str
    key: str | None
    deadline_s: float
    timeout_s: float

    def request(self, call: Call[Any]) -> dict[str, Any]:
        """The arguments of httpx's `request`."""
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {
            "method": call.method,
            "url": self.base_url + call.path,
            "headers": {**key, **call.headers},
            "params": dict(call.query),
            "json": call.json,
        }

    def tries(
        self, call: Call[Any]
    ) -> Generator[_Send | _Wait, httpx.Response | httpx.TransportError | None, httpx.Response]:
        """What to do next, told what came of it each time; returns the answer of success.

        `Refused` for what would be refused again, `Unavailable` at the deadline.
        """
        end = time.monotonic() + self.deadline_s
        tries = 0
        while True:
            tries += 1
            wait = random.uniform(0.5, 1) * min(LONGEST_WAIT_S, 0.1 * 2**tries)
            left = end - time.monotonic()
            outcome = yield _Send(max(0.01, min(self.timeout_s, left)))
            assert outcome is not None
            if isinstance(outcome, httpx.TransportError):
                problem = f"{type(outcome).__name__}: {outcome}"
            elif outcome.is_success:
                return outcome
            else:
                problem = _again(outcome)
                wait = max(wait, _asked_to_wait(outcome))
            if time.monotonic() + wait >= end:
                raise Unavailable(f"{self.base_url}{call.path}: {problem} ({tries} tries in {self.deadline_s:g} s)")
            yield _Wait(wait)


def _again(answer: httpx.Response) -> str:
    """What is wrong for the moment; `Refused` where it would be wrong again."""
    try:
        error = answer.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        error, message, code = {}, f"status {answer.status_code} without a reason: is this an rlhf-ray service?", None
    if answer.status_code in AGAIN or code == IN_FLIGHT:
        return f"{answer.status_code}, {message}"
    if answer.status_code >= 500:
        raise Unavailable(f"{answer.status_code}, {message}")
    _refuse(answer.status_code, message, error)


def _refuse(status: int, message: str, error: Mapping[str, Any]) -> NoReturn:
    kind = KINDS.get(status, Refused)
    type_ = str(error.get("type", "invalid_request_error"))
    raise kind(message, status=status, type=type_, param=error.get("param"), code=error.get("code"))


def _asked_to_wait(answer: httpx.Response) -> float:
    try:
        return float(answer.headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0

"""Asking a service over HTTP: deadlines, retries with jitter, and a breaker that leaves a service in trouble alone."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, RetryError, retry_if_exception_type, stop_any, stop_before_delay
from tenacity.stop import stop_base

from rlhf_ray.errors import ConfigError

LONGEST_ANSWER = 4 << 20
"""Bytes of one answer that are read."""
TRIPS_AFTER = 5
"""Failures in a row after which the service is left alone for a while."""
LONGEST_PAUSE_S = 30.0
MALFORMED_TRIES = 3
"""Tries after which an answer that is none will not become one."""
MISCONFIGURED = frozenset({401, 403, 404, 405})
"""Statuses that no retry and no other sample changes: the address or the key is wrong."""
NEVER = frozenset({400, 413, 415, 422})
"""Statuses that say that this request will never do; others may."""

T = TypeVar("T")
Body = Mapping[str, Any]
Read = Callable[[Body, Any], T]
"""From a request and its answer's JSON to what that means; raises `ValueError` where it is not what was asked for."""


class Trouble(Exception):
    """A try that another may follow. `kind` is counted."""

    def __init__(self, kind: str, *, wait_s: float = 0.0) -> None:
        super().__init__(kind)
        self.kind, self.wait_s = kind, wait_s


class Hopeless(Exception):
    """A request that the service will never answer."""


class Breaker:
    """After `TRIPS_AFTER` failures in a row requests go one by one, each after a longer pause, until one succeeds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures = 0
        self._clock = clock
        self._ready_at = 0.0
        self._one_at_a_time = asyncio.Lock()

    @property
    def tripped(self) -> bool:
        """Whether the service is being left alone."""
        return self.failures >= TRIPS_AFTER

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around one request; waits for its turn. `Trouble` inside is a failure, an end without it a success."""
        if not self.tripped:
            async with self._counted():
                yield
            return
        async with self._one_at_a_time:
            if self.tripped:
                await asyncio.sleep(max(0.0, self._ready_at - self._clock()))
            async with self._counted():
                yield

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        try:
            yield
        except Trouble:
            self.failures += 1
            if self.tripped:
                pause = min(LONGEST_PAUSE_S, 0.5 * 2 ** (self.failures - TRIPS_AFTER))
                self._ready_at = self._clock() + pause
            raise
        self.failures = 0


class Service:
    """One address. `ask` is one batch: made anew for each, with the breaker's memory kept between them."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        concurrency: int,
        deadline_s: float,
        patience_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`transport` replaces the network, in tests."""
        self.url = url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._concurrency, self._deadline_s, self._patience_s = concurrency, deadline_s, patience_s
        self._transport = transport
        self._failures = 0

    def ask(self, bodies: Sequence[Body], read: Read[T]) -> tuple[list[T | None], Counter[str]]:
        """What each body is answered, in their order, None where there was no good answer within the patience; and
        what went wrong on the way. `ConfigError` where address or key are wrong.
        """
        return asyncio.run(self._ask(bodies, read))

    async def _ask(self, bodies: Sequence[Body], read: Read[T]) -> tuple[list[T | None], Counter[str]]:
        counts: Counter[str] = Counter()
        breaker = Breaker()
        breaker.failures = self._failures
        free = asyncio.Semaphore(self._concurrency)
        end = time.monotonic() + self._patience_s
        async with httpx.AsyncClient(
            headers=self._headers, follow_redirects=False, timeout=self._deadline_s, transport=self._transport
        ) as http:

            async def one(body: Body) -> T | None:
                async with free:
                    return await self._persist(lambda: self._try(http, body, read), breaker, counts, end)

            tasks = [asyncio.create_task(one(body)) for body in bodies]
            try:
                answers = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        self._failures = breaker.failures
        counts["missing_requests"] += sum(answer is None for answer in answers)
        return answers, +counts

    async def _persist(
        self, request: Callable[[], Awaitable[T]], breaker: Breaker, counts: Counter[str], end: float
    ) -> T | None:
        """The answer to a request, tried until it is there, hopeless, or the time is over."""
        left = end - time.monotonic()
        if left <= 0:
            return None
        retrying = AsyncRetrying(
            stop=stop_any(_MalformedAgain(), stop_before_delay(left)),
            wait=_wait,
            retry=retry_if_exception_type(Trouble),
        )
        try:
            async with asyncio.timeout(left):
                async for attempt in retrying:
                    with attempt:
                        counts["retries"] += attempt.retry_state.attempt_number > 1
                        try:
                            async with breaker.request():
                                return await request()
                        except Trouble as trouble:
                            counts[trouble.kind] += 1
                            raise
        except Hopeless:
            counts["refused"] += 1
        except RetryError:
            pass
        except TimeoutError:
            counts["timeouts"] += 1
        return None

    async def _try(self, http: httpx.AsyncClient, body: Body, read: Read[T]) -> T:
        """One request. Whatever is not a whole good answer in time is `Trouble`, or `Hopeless`."""
        try:
            async with asyncio.timeout(self._deadline_s), http.stream("POST", self.url, json=body) as answer:
                status, content = answer.status_code, await _limited(answer)
        except (TimeoutError, httpx.TimeoutException):
            raise Trouble("timeouts") from None
        except httpx.TransportError:
            raise Trouble("unreachable") from None
        if status in MISCONFIGURED or 300 <= status < 400:
            raise ConfigError(f"{self.url} answers {status}: correct the address, or the key that key_env names")
        if status in NEVER:
            raise Hopeless
        if status != httpx.codes.OK:
            raise Trouble("errors", wait_s=_asked_to_wait(answer))
        try:
            return read(body, json.loads(content))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            raise Trouble("malformed") from None


async def _limited(answer: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in answer.aiter_bytes():
        content += chunk
        if len(content) > LONGEST_ANSWER:
            raise Trouble("malformed")
    return bytes(content)


def _asked_to_wait(answer: httpx.Response) -> float:
    """`Retry-After` in seconds, where the service says it so."""
    try:
        return min(LONGEST_PAUSE_S, max(0.0, float(answer.headers.get("Retry-After", "0"))))
    except ValueError:
        return 0.0


class _MalformedAgain(stop_base):
    def __call__(self, state: RetryCallState) -> bool:
        trouble = state.outcome.exception() if state.outcome else None
        return isinstance(trouble, Trouble) and trouble.kind == "malformed" and state.attempt_number >= MALFORMED_TRIES


def _wait(state: RetryCallState) -> float:
    """Full jitter: anywhere up to a bound that doubles; at least what the service asks for."""
    assert state.outcome is not None
    trouble = state.outcome.exception()
    asked = trouble.wait_s if isinstance(trouble, Trouble) else 0.0
    return asked + random.uniform(0, min(LONGEST_PAUSE_S, 0.25 * 2 ** (state.attempt_number - 1)))

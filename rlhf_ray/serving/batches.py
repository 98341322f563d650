"""Work in batches that make themselves: what arrives while one is being done makes up the next.

Callers wait for each other only as long as one batch takes, and a lone caller does not wait for company. The queue has
a bound, each wait a deadline.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.serving.errors import ApiError

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[list[Item]], Awaitable[Sequence[Result | Exception]]]
log = logging.getLogger(__name__)


def in_thread(work: Callable[[list[Item]], Sequence[Result | Exception]], name: str) -> Work[Item, Result]:
    """Work that would block, one batch after another in a thread of its own."""
    thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def do(items: list[Item]) -> Sequence[Result | Exception]:
        return await asyncio.get_running_loop().run_in_executor(thread, work, items)

    return do


@dataclass(slots=True)
class Waiting(Generic[Item, Result]):
    """An item, its weight, and where its caller waits."""

    item: Item
    weight: int
    result: asyncio.Future[Result]


class Batches(Generic[Item, Result]):
    """`work` gets a list of items and gives one result, or one error, for each, in their order.

    An item that makes `work` raise does not take the others with it: they are tried again one by one. What comes of an
    `InfrastructureError` or an `ApiError` is told to all, for the next try would fare no better. An item whose caller
    has given up before its turn is left out. With `lanes`, so many batches are worked on at a time.
    """

    def __init__(
        self,
        work: Work[Item, Result],
        *,
        name: str,
        most: int,
        limit: int,
        deadline_s: float,
        linger_s: float = 0,
        lanes: int = 1,
    ) -> None:
        self.name = name
        self.failures = 0
        """Batches whose work raised."""
        self._work = work
        self._most = most
        self._limit = limit
        self._deadline_s = deadline_s
        self._linger_s = linger_s
        self._queue: deque[Waiting[Item, Result]] = deque()
        self._queued = 0
        self._lanes = lanes
        self._running: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def queued(self) -> int:
        """The weight of all that waits for its turn."""
        return self._queued

    async def submit(self, item: Item, *, weight: int = 1) -> Result:
        """The item's result. `ApiError` 503, with when to come again: the queue is full, or the deadline passed."""
        if self._closed:
            raise ApiError(503, f"{self.name} is stopping: try again soon", retry_after=1)
        if self._queue and self._queued + weight > self._limit:
            raise ApiError(503, f"{self.name} has too much to do: try again soon", code="overloaded", retry_after=1)
        waiting: Waiting[Item, Result] = Waiting(item, weight, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._queued += weight
        if len(self._running) < self._lanes:
            self._running.add(asyncio.create_task(self._run()))
        try:
            return await asyncio.wait_for(waiting.result, self._deadline_s)
        except TimeoutError:
            message = f"{self.name} did not answer within {self._deadline_s:g} s: try again"
            raise ApiError(503, message, code="deadline_exceeded", retry_after=1) from None

    async def close(self) -> None:
        """Finish what waits, take nothing more."""
        self._closed = True
        while self._running:
            await asyncio.wait(self._running)

    async def _run(self) -> None:
        try:
            while self._queue:
                if self._linger_s and self._queued < self._most:
                    await asyncio.sleep(self._linger_s)
                batch = self._next()
                if batch:
                    _deliver(batch, await self._do([waiting.item for waiting in batch]))
        finally:
            # here and not in a callback: what is submitted in between would find a lane that looks at no queue any more
            self._running.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _next(self) -> list[Waiting[Item, Result]]:
        batch: list[Waiting[Item, Result]] = []
        room = self._most
        while self._queue and (not batch or self._queue[0].weight <= room):
            waiting = self._queue.popleft()
            self._queued -= waiting.weight
            if not waiting.result.done():
                batch.append(waiting)
                room -= waiting.weight
        return batch

    async def _do(self, items: list[Item]) -> Sequence[Result | Exception]:
        try:
            return await self._work(items)
        except (InfrastructureError, ApiError) as error:
            self.failures += 1
            log.error("%s: %s", self.name, error)
            return [error] * len(items)
        except Exception as error:  # the role's edge: counted, told to the caller, and kept from the others
            self.failures += 1
            if len(items) == 1:
                log.error("%s refused an item: %s", self.name, type(error).__name__)
                return [error]
            return [(await self._do([item]))[0] for item in items]


def _deliver(batch: Sequence[Waiting[Item, Result]], outcomes: Sequence[Result | Exception]) -> None:
    assert len(outcomes) == len(batch), f"{len(outcomes)} outcomes for {len(batch)} items"
    for waiting, outcome in zip(batch, outcomes, strict=True):
        if waiting.result.done():
            continue
        if isinstance(outcome, Exception):
            waiting.result.set_exception(outcome)
        else:
            waiting.result.set_result(outcome)

"""The gate before an engine: while it is closed nobody is inside, so what is inside may be changed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rlhf_ray.serving.errors import ApiError

RETRY_AFTER_S = 2.0


class Gate:
    """Counts who is inside. Closing it holds newcomers back and waits until the last one inside has left."""

    def __init__(self) -> None:
        self.inside = 0
        self.shut_because: str | None = None
        self._open = asyncio.Event()
        self._empty = asyncio.Event()
        self._open.set()
        self._empty.set()

    @property
    def is_open(self) -> bool:
        """Whether a newcomer would pass at once."""
        return self._open.is_set()

    @asynccontextmanager
    async def passing(self, wait_s: float) -> AsyncIterator[None]:
        """Inside until the block ends; 503 with Retry-After where it stays closed for `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                while not self._open.is_set():  # it may have closed again before a waiter's turn came
                    self._refuse_if_shut()
                    await self._open.wait()
        except TimeoutError:
            raise ApiError(
                503, "another policy version is being loaded: try again", retry_after=RETRY_AFTER_S
            ) from None
        self._refuse_if_shut()
        self.inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:
                self._empty.set()

    @asynccontextmanager
    async def closed(self, drain_s: float) -> AsyncIterator[None]:
        """Nobody is inside while the block runs; `TimeoutError` where somebody has not left after `drain_s`."""
        assert self._open.is_set(), "one closes it at a time"
        self._open.clear()
        try:
            async with asyncio.timeout(drain_s):
                await self._empty.wait()
            yield
        finally:
            self._open.set()  # where it was shut for good, those who waited are told so now

    def shut(self, reason: str) -> None:
        """Nobody passes any more."""
        self.shut_because = reason

    def _refuse_if_shut(self) -> None:
        if self.shut_because is not None:
            raise ApiError(503, "this replica is being replaced: try again", retry_after=RETRY_AFTER_S)

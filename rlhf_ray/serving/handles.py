"""Deployments behind Ray Serve, with the faces of `backends.py`: deadlines, one more try where it is safe, our errors.

A replica's `ApiError` arrives as itself. What Ray raises where a replica died or a queue is full becomes a 503 that
says when to come again. A call is tried a second time only where nothing was given yet and doing it twice does no harm.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from datetime import datetime
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from rlhf_ray.serving.backends import Delta, GenerateCall, ModelInfo, Readiness, ScoreItem, Scores
from rlhf_ray.serving.batches import Batches
from rlhf_ray.serving.errors import ApiError

GONE = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)
"""What Ray raises where a replica died or is not there yet."""
RETRY_AFTER_S = 5.0
T = TypeVar("T")


class PolicyHandle:
    """Policy replicas; a call goes to the one with the shortest queue of two."""

    def __init__(self, handle: DeploymentHandle, *, deadline_s: float) -> None:
        self._stream = handle.options(stream=True)
        self._deadline_s = deadline_s

    async def generate(self, request: GenerateCall, /) -> AsyncGenerator[Delta, None]:
        """The answers as they grow. A replica that dies before it gave anything is replaced by another."""
        ends_at = asyncio.get_running_loop().time() + self._deadline_s
        given = False
        for last_try in (False, True):
            try:
                async with aclosing(self._deltas(request, ends_at)) as deltas:
                    async for delta in deltas:
                        given = True
                        yield delta
                return
            except ApiError as error:
                if given or last_try or not isinstance(error.__cause__, GONE):
                    raise

    async def _deltas(self, request: GenerateCall, ends_at: float) -> AsyncGenerator[Delta, None]:
        response = self._stream.generate.remote(request)
        answers, whole = aiter(response), False
        try:
            with explained("the policy"):
                while True:
                    # each wait by itself: a stream goes on in another task than the one that began it
                    try:
                        async with asyncio.timeout_at(ends_at):
                            delta = await anext(answers)
                    except StopAsyncIteration:
                        whole = True
                        return
                    yield delta
        finally:
            if not whole:
                response.cancel()  # the caller has left, or waits no longer: the replica stops drawing tokens


class RewardHandle:
    """Reward-model replicas. What arrives while calls are under way goes with the next one, for a call costs more than
    what it carries: with 32 callers the door passes on about twice as many requests.
    """

    def __init__(
        self, handle: DeploymentHandle, *, deadline_s: float, calls: int = 1, batch: int = 64, queue: int = 4_096
    ) -> None:
        """At most `calls` are under way at a time, of about `batch` answers each; `queue` answers may wait."""
        self._handle = handle
        self._deadline_s = deadline_s
        self._batches: Batches[Sequence[ScoreItem], Scores] = Batches(
            self._call, name="the reward model", most=batch, limit=queue, deadline_s=deadline_s, lanes=calls
        )

    async def score(self, items: Sequence[ScoreItem], /) -> Scores:
        """One reward an item."""
        return await self._batches.submit(items, weight=len(items))

    async def ready(self) -> Readiness:
        """Whether a replica can score."""
        readiness: Readiness = await self._answer(self._handle.ready.remote())
        return readiness

    async def _call(self, requests: list[Sequence[ScoreItem]]) -> Sequence[Scores | Exception]:
        outcomes: list[Scores | Exception] = await again(
            lambda: self._answer(self._handle.score_each.remote([list(items) for items in requests]))
        )
        return outcomes

    async def _answer(self, response: Awaitable[Any]) -> Any:
        return await answer(response, "the reward model", self._deadline_s)


class RecordsHandle:
    """The one writer. What it may have written already is not sent again: that is the caller's to decide."""

    def __init__(self, handle: DeploymentHandle, *, deadline_s: float = 15) -> None:
        self._handle = handle
        self._deadline_s = deadline_s

    async def add_feedback(self, submission: Any, /) -> Any:
        """Returns after a durable commit."""
        return await self._answer(self._handle.add_feedback.remote(submission))

    async def answered(self, key: Any, /) -> Any:
        """What a request of this idempotency key was answered with."""
        return await again(lambda: self._answer(self._handle.answered.remote(key)))

    async def keep_completion(self, completion: Any, /) -> None:
        """Keeps a served answer; twice is once, for its id is its own."""
        await again(lambda: self._answer(self._handle.keep_completion.remote(completion)))

    async def completion(self, id: str, /) -> Any:
        """A kept answer, None where there is none."""
        return await again(lambda: self._answer(self._handle.completion.remote(id)))

    async def feedback(self, id: str, /) -> Any:
        """One judgement, None where there is none."""
        return await again(lambda: self._answer(self._handle.feedback.remote(id)))

    async def page(self, cursor: int, limit: int, /, **filters: Any) -> Any:
        """Feedback from a cursor on."""
        return await again(lambda: self._answer(self._handle.page.remote(cursor, limit, **filters)))

    async def purge_completions(
        self, *, ids: list[str] | None = None, caller: str | None = None, before: datetime | None = None
    ) -> int:
        """Removes kept answers; how many."""
        removed: int = await self._answer(self._handle.purge_completions.remote(ids=ids, caller=caller, before=before))
        return removed

    async def ask(self, question: Callable[[Any], T], /) -> T:
        """What a function makes of the store, where the store is."""
        made: T = await self._answer(self._handle.ask.remote(question))
        return made

    async def ready(self) -> Readiness:
        """Whether the store can be written."""
        readiness: Readiness = await self._answer(self._handle.ready.remote())
        return readiness

    async def _answer(self, response: Awaitable[Any]) -> Any:
        return await answer(response, "the feedback store", self._deadline_s)


class VersionsHandle:
    """The one that knows the versions: for the door `models` and `ready`, for replicas the rest."""

    def __init__(self, handle: DeploymentHandle, *, deadline_s: float = 5) -> None:
        self._handle = handle
        self._deadline_s = deadline_s

    async def models(self) -> list[ModelInfo]:
        """The versions that answer now."""
        models: list[ModelInfo] = await again(lambda: self._answer(self._handle.models.remote()))
        return models

    async def ready(self) -> Readiness:
        """Whether replicas hold the version that they should."""
        readiness: Readiness = await self._answer(self._handle.ready.remote())
        return readiness

    async def first(self) -> Any:
        """The version that a replica loads when it starts."""
        return await self._answer(self._handle.first.remote())

    async def turn(self, replica: str, holding: int, /) -> Any:
        """The version that a replica shall swap to now, if any."""
        return await self._answer(self._handle.turn.remote(replica, holding))

    async def report(self, replica: str, holding: int, /, *, tried: int, error: str | None) -> None:
        """How a replica's turn ended."""
        await self._answer(self._handle.report.remote(replica, holding, tried=tried, error=error))

    async def _answer(self, response: Awaitable[Any]) -> Any:
        return await answer(response, "the registry", self._deadline_s)


async def answer(response: Awaitable[T], who: str, deadline_s: float) -> T:
    """What a replica answers within the deadline; `who` is named where it does not."""
    with explained(who):
        async with asyncio.timeout(deadline_s):  # wait_for of Python 3.11 may lose a cancellation
            return await response


async def again(call: Callable[[], Awaitable[T]]) -> T:
    """A call that may be made twice, made twice where the first replica was gone."""
    try:
        return await call()
    except ApiError as error:
        if not isinstance(error.__cause__, GONE):
            raise
    return await call()


@contextmanager
def explained(who: str) -> Iterator[None]:
    """Turns what Ray raises into what a caller of the service can act on."""
    try:
        yield
    except BackPressureError as error:
        raise ApiError(503, f"{who} has too much to do: try again soon", code="overloaded", retry_after=2) from error
    except GONE as error:
        raise ApiError(503, f"{who} is being restarted: try again soon", retry_after=RETRY_AFTER_S) from error
    except TimeoutError as error:
        raise ApiError(504, f"{who} did not answer in time: try again, or ask for less") from error
    except RayTaskError as error:
        # Ray's copy of a replica's error has its class and not its fields
        if isinstance(error.cause, ApiError):
            raise error.cause from None
        if isinstance(error.cause, GONE):
            raise ApiError(503, f"{who} is being restarted: try again soon", retry_after=RETRY_AFTER_S) from error.cause
        raise

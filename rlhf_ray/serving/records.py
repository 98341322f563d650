"""The one writer of the feedback store and of kept completions.

What waits while one transaction is on its way to the disk goes into the next one, so that many callers share a wait for
the disk. Nobody is told that a thing is kept before it is: an acknowledgement follows the commit.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from rlhf_ray.errors import InfrastructureError, InputError
from rlhf_ray.feedback.completions import Completion
from rlhf_ray.feedback.databases import Unreadable
from rlhf_ray.feedback.requests import Receipt, RequestKey, Submission
from rlhf_ray.feedback.schema import Feedback, Kind, now
from rlhf_ray.feedback.store import FeedbackStore, Page
from rlhf_ray.feedback.tasks import TaskTaken, UnknownTask
from rlhf_ray.serving.backends import Readiness
from rlhf_ray.serving.batches import Batches, in_thread
from rlhf_ray.serving.errors import ApiError

PURGE_EVERY = timedelta(hours=1)
T = TypeVar("T")


class Records:
    """Opens the store, takes the right to write it, and keeps both until it is closed."""

    def __init__(
        self,
        store: str | Path | FeedbackStore,
        *,
        retention_days: float = 30,
        batch: int = 256,
        queue: int = 1024,
        deadline_s: float = 10,
    ) -> None:
        self._store = store if isinstance(store, FeedbackStore) else FeedbackStore(store)
        self._retention = timedelta(days=retention_days)
        self._purged_at: datetime | None = None
        self._forget_old()
        self._in_flight: set[tuple[str, str]] = set()
        self._writes: Batches[Submission | Completion, Receipt | None] = Batches(
            in_thread(self._commit, "feedback"),
            name="the feedback store",
            most=batch,
            limit=queue,
            deadline_s=deadline_s,
        )

    async def add_feedback(self, submission: Submission, /) -> Receipt:
        """Returns after a durable commit; where the submission's key is known, with what was answered then.

        `ApiError`: 409 while a request of the same key is under way; 422 for a key that came with another request;
        503 where too much waits or the disk does not take it.
        """
        key = submission.key and (submission.key.caller, submission.key.key)
        if key in self._in_flight:
            message = "a request with this Idempotency-Key is under way: wait for its answer"
            raise ApiError(409, message, param="Idempotency-Key", code="idempotency_key_in_flight", retry_after=1)
        if key:
            self._in_flight.add(key)
        try:
            receipt = await self._write(submission)
        finally:
            # Where the caller left before the commit, the next request of this key waits behind it in the queue.
            if key:
                self._in_flight.discard(key)
        assert receipt is not None
        return receipt

    async def answered(self, key: RequestKey | None, /) -> Receipt | None:
        """What a request of this key was answered with, None where it is new; `ApiError` 422 as for `add_feedback`."""
        outcome = await self.ask(partial(FeedbackStore.answered, key=key)) if key else None
        if isinstance(outcome, Exception):
            raise _key_reused(outcome)
        return outcome

    async def keep_completion(self, completion: Completion, /) -> None:
        """Returns once the answer can be named by feedback, whatever happens to this process."""
        await self._write(completion)

    async def completion(self, id: str, /) -> Completion | None:
        """The kept completion of that id, None where it never was or is gone."""
        return await self.ask(partial(FeedbackStore.completion, id_=id))

    async def feedback(self, id: str, /) -> Feedback | None:
        """The feedback of that id, None where there is none."""
        return await self.ask(partial(FeedbackStore.get, id_=id))

    async def page(
        self, cursor: int = 0, limit: int = 100, /, *, kind: Kind | None = None, annotator: str | None = None
    ) -> Page:
        """Feedback in the order in which it was added, from a cursor on."""
        return await self.ask(partial(FeedbackStore.page, after=cursor, limit=limit, kind=kind, annotator=annotator))

    async def purge_completions(
        self, *, ids: list[str] | None = None, caller: str | None = None, before: datetime | None = None
    ) -> int:
        """Remove kept completions that fit all that is given; how many went."""
        return await self.ask(partial(FeedbackStore.purge_completions, ids=ids, caller=caller, before=before))

    async def ask(self, question: Callable[[FeedbackStore], T], /) -> T:
        """What a function makes of the store; what it wrote is durable on return.

        `ApiError`: 404, 409 or 400 for what the store refuses, 503 where the disk does not take it.
        """
        try:
            return await asyncio.to_thread(question, self._store)
        except UnknownTask as error:
            raise ApiError(404, str(error), code="unknown_task") from None
        except TaskTaken as error:
            raise ApiError(409, str(error), code="task_taken") from None
        except Unreadable as error:
            raise _unavailable(error) from None
        except InputError as error:
            raise ApiError(400, str(error)) from None
        except InfrastructureError as error:
            raise _unavailable(error) from None

    async def ready(self) -> Readiness:
        """Whether feedback can be written."""
        if self._store.broken:
            return Readiness(False, "the disk failed: the store has to be opened anew")
        return Readiness(True, f"{self._writes.queued} waiting, {self._writes.failures} failed writes")

    async def check_health(self) -> None:
        """Serve calls it every few seconds. Forgets what is older than it may be; raises where the disk has failed."""
        await asyncio.to_thread(self._forget_old)
        if self._store.broken:
            raise InfrastructureError("the feedback store's disk failed: start the writer anew")

    async def close(self) -> None:
        """Write what waits, then let go of the store."""
        await self._writes.close()
        await asyncio.to_thread(self._store.close)

    async def _write(self, entry: Submission | Completion) -> Receipt | None:
        try:
            return await self._writes.submit(entry)
        except InputError as error:
            raise ApiError(400, str(error)) from None
        except InfrastructureError as error:
            raise _unavailable(error) from None

    def _commit(self, entries: Sequence[Submission | Completion]) -> list[Receipt | Exception | None]:
        submissions = [entry for entry in entries if isinstance(entry, Submission)]
        receipts = iter(self._store.commit(submissions, [entry for entry in entries if isinstance(entry, Completion)]))
        return [_told(next(receipts)) if isinstance(entry, Submission) else None for entry in entries]

    def _forget_old(self) -> None:
        moment = now()
        if not self._store.broken and (self._purged_at is None or moment - self._purged_at >= PURGE_EVERY):
            self._store.purge_completions(before=moment - self._retention)
            self._purged_at = moment


def _unavailable(error: Exception) -> ApiError:
    return ApiError(503, str(error), code="storage_unavailable", retry_after=5)


def _told(outcome: Receipt | Exception) -> Receipt | Exception:
    return _key_reused(outcome) if isinstance(outcome, Exception) else outcome


def _key_reused(error: Exception) -> ApiError:
    return ApiError(422, str(error), param="Idempotency-Key", code="idempotency_key_reused")

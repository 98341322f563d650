import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import FeedbackError, InfrastructureError
from rlhf_ray.feedback.databases import Unreadable
from rlhf_ray.feedback.requests import Receipt, Submission
from rlhf_ray.feedback.schema import now
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.feedback.tasks import TaskTaken, UnknownTask
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.records import Records
from tests.feedback.test_requests import make_completion, make_submission
from tests.feedback.test_store import make_feedback


class CountingStore(FeedbackStore):
    """Counts transactions, and fails where it is told to."""

    commits = 0
    failure: Exception | None = None

    def commit(self, submissions: Any, kept: Any = ()) -> Any:
        self.commits += 1
        if self.failure:
            raise self.failure
        return super().commit(submissions, kept)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "feedback.db")


def with_records(store: FeedbackStore, use: Callable[[Records], Awaitable[Any]], **changes: Any) -> Any:
    async def run() -> Any:
        records = Records(store, **changes)
        try:
            return await use(records)
        finally:
            await records.close()

    return asyncio.run(run())


async def add_all(records: Records, submissions: list[Submission]) -> list[Any]:
    return await asyncio.gather(*map(records.add_feedback, submissions), return_exceptions=True)


def test_many_callers_share_a_transaction_and_each_gets_its_own_receipt(store: CountingStore) -> None:
    submissions = [make_submission(f"k{index}") for index in range(100)]
    receipts = with_records(store, lambda records: add_all(records, submissions))
    assert receipts == [Receipt(submission.answer) for submission in submissions]
    assert store.commits <= 3
    with FeedbackStore(store.name, read_only=True) as reader:
        assert reader.count() == 100


def test_an_acknowledged_row_is_seen_by_another_connection_at_once(store: CountingStore) -> None:
    async def use(records: Records) -> int:
        await records.add_feedback(make_submission())
        with FeedbackStore(store.name, read_only=True) as reader:
            return reader.count()

    assert with_records(store, use) == 1


def test_a_hundred_requests_of_one_key_are_one_row_and_the_others_are_under_way(store: CountingStore) -> None:
    outcomes = with_records(store, lambda records: add_all(records, [make_submission("k") for _ in range(100)]))
    receipts = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
    refusals = {(error.status, error.code) for error in outcomes if isinstance(error, ApiError)}
    assert len(receipts) == 1
    assert refusals == {(409, "idempotency_key_in_flight")}


def test_a_key_is_free_again_after_its_request_and_remembers_it(store: CountingStore) -> None:
    async def use(records: Records) -> None:
        first = await records.add_feedback(make_submission("k"))
        assert await records.add_feedback(make_submission("k")) == Receipt(first.answer, replayed=True)
        with pytest.raises(ApiError, match="another request") as reused:
            await records.add_feedback(make_submission("k", body="another"))
        assert (reused.value.status, reused.value.param) == (422, "Idempotency-Key")
        assert (await records.page()).items[1:] == ()

    with_records(store, use)


def test_what_a_key_was_answered_with_can_be_asked(store: CountingStore) -> None:
    async def use(records: Records) -> None:
        submission = make_submission("k")
        assert await records.answered(submission.key) is None
        assert await records.answered(None) is None
        await records.add_feedback(submission)
        assert await records.answered(submission.key) == Receipt(submission.answer, replayed=True)
        with pytest.raises(ApiError, match="another request"):
            await records.answered(make_submission("k", body="another").key)

    with_records(store, use)


def test_a_poisoned_submission_is_refused_and_the_others_go_in(store: CountingStore) -> None:
    twice = make_feedback()
    poison = Submission((twice, twice), "{}")
    outcomes = with_records(
        store, lambda records: add_all(records, [make_submission("a"), poison, make_submission("b")])
    )
    assert [type(outcome) for outcome in outcomes] == [Receipt, type(outcomes[1]), Receipt]
    assert isinstance(outcomes[1], Exception)
    with FeedbackStore(store.name, read_only=True) as reader:
        assert reader.count() == 2


def test_a_write_that_the_disk_refuses_is_no_acknowledgement(store: CountingStore) -> None:
    async def use(records: Records) -> None:
        store.failure = InfrastructureError("nothing was written: disk full")
        with pytest.raises(ApiError, match="disk full") as refusal:
            await records.add_feedback(make_submission("k"))
        assert (refusal.value.status, refusal.value.retry_after) == (503, 5)
        store.failure = None  # there is room again
        assert not (await records.add_feedback(make_submission("k"))).replayed

    with_records(store, use)


def test_after_a_failed_disk_the_writer_asks_to_be_replaced(store: CountingStore) -> None:
    async def use(records: Records) -> None:
        assert (await records.ready()).ready
        await records.check_health()
        store._database.broken = True
        assert not (await records.ready()).ready
        with pytest.raises(InfrastructureError, match="start the writer anew"):
            await records.check_health()
        with pytest.raises(ApiError, match="after a disk error"):
            await records.add_feedback(make_submission())

    with_records(store, use)


def test_completions_are_kept_found_and_purged(store: CountingStore) -> None:
    async def use(records: Records) -> None:
        kept = make_completion(created_at=now())
        await records.keep_completion(kept)
        assert await records.completion(kept.id) == kept
        assert await records.purge_completions(caller="key-1") == 1
        assert await records.completion(kept.id) is None

    with_records(store, use)


def test_completions_older_than_the_retention_go_at_the_start_and_hourly(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = now()
    store.commit([], [make_completion("old", created_at=moment - timedelta(days=2))])

    async def use(records: Records) -> None:
        assert await records.completion("old") is None
        await records.keep_completion(make_completion("new", created_at=moment))
        for hours, there in ((23, True), (25, False)):
            monkeypatch.setattr("rlhf_ray.serving.records.now", lambda: moment + timedelta(hours=hours))  # noqa: B023
            await records.check_health()
            assert (await records.completion("new") is not None) == there

    with_records(store, use, retention_days=1)


def test_what_the_store_refuses_is_the_callers_and_a_damaged_store_is_not(store: CountingStore) -> None:
    def refuse(error: Exception) -> Callable[[FeedbackStore], None]:
        def question(_: FeedbackStore) -> None:
            raise error

        return question

    async def use(records: Records) -> None:
        for error, status in (
            (FeedbackError("no"), 400),
            (UnknownTask("no"), 404),
            (TaskTaken("no"), 409),
            (Unreadable("no"), 503),
            (InfrastructureError("no"), 503),
        ):
            with pytest.raises(ApiError, match="no") as refusal:
                await records.ask(refuse(error))
            assert refusal.value.status == status

    with_records(store, use)

"""One request is written once, whatever happens between: keys, replays, group commits, completions, old files."""

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from rlhf_ray.errors import FeedbackError, InfrastructureError
from rlhf_ray.feedback.completions import Completion
from rlhf_ray.feedback.migrations import HEAD
from rlhf_ray.feedback.requests import KeyReused, Receipt, RequestKey, Submission, request_sha256
from rlhf_ray.feedback.schema import Rating, parse_feedback
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.types import Message
from tests.feedback.places import refuses
from tests.feedback.test_store import make_feedback, make_ranking

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def make_submission(key: str | None = None, *, caller: str = "key-1", body: Any = "body", items: int = 1) -> Submission:
    rows = tuple(make_feedback() for _ in range(items))
    name = RequestKey(caller, key, request_sha256(body)) if key else None
    return Submission(rows, answer=f'{{"id": "{rows[0].id}"}}', key=name)


def make_completion(id_: str = "chatcmpl-1", **changes: Any) -> Completion:
    fields: dict[str, Any] = {
        "id": id_,
        "created_at": NOON,
        "model": "policy",
        "policy_version": 3,
        "messages": (Message("user", "Where is my lamp?"),),
        "answers": ("On its way.", "Who knows?"),
        "sampling": {"temperature": 0.7},
        "caller": "key-1",
    }
    return Completion(**(fields | changes))


@pytest.fixture
def store(url: str) -> Iterator[FeedbackStore]:
    with FeedbackStore(url) as opened:
        yield opened


@pytest.fixture
def file_store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore(tmp_path / "feedback.db") as opened:
        yield opened


def test_many_requests_are_committed_together_in_order(store: FeedbackStore) -> None:
    submissions = [make_submission(f"k{index}", items=1 + index % 3) for index in range(50)]
    receipts = store.commit(submissions)
    assert receipts == [Receipt(submission.answer) for submission in submissions]
    assert list(store.iter()) == [item for submission in submissions for item in submission.items]


def test_the_same_request_under_its_key_is_answered_as_before_and_not_written_again(store: FeedbackStore) -> None:
    first, again = make_submission("k"), make_submission("k")
    assert store.commit([first]) == [Receipt(first.answer)]
    assert store.commit([again]) == [Receipt(first.answer, replayed=True)]
    assert list(store.iter()) == list(first.items)


def test_the_same_key_twice_in_one_batch_is_one_row(store: FeedbackStore) -> None:
    first, again, other = make_submission("k"), make_submission("k"), make_submission("k", body="another")
    receipts = store.commit([first, again, other])
    assert receipts[:2] == [Receipt(first.answer), Receipt(first.answer, replayed=True)]
    assert isinstance(receipts[2], KeyReused)
    assert store.count() == 1


def test_another_request_under_a_known_key_is_refused_and_the_others_of_its_batch_go_in(store: FeedbackStore) -> None:
    store.commit([make_submission("k")])
    refused, fine = store.commit([make_submission("k", body="another"), make_submission("l")])
    assert isinstance(refused, KeyReused)
    assert isinstance(fine, Receipt)
    assert store.count() == 2


def test_a_key_belongs_to_its_caller(store: FeedbackStore) -> None:
    store.commit([make_submission("k"), make_submission("k", caller="key-2", body="another")])
    assert store.count() == 2


def test_keys_are_known_after_reopening(tmp_path: Path) -> None:
    first = make_submission("k")
    for expected in (Receipt(first.answer), Receipt(first.answer, replayed=True)):
        with FeedbackStore(tmp_path / "feedback.db") as store:
            assert store.commit([first]) == [expected]


def test_a_key_stands_exactly_where_its_rows_do(store: FeedbackStore) -> None:
    taken = make_submission("k")
    with pytest.raises(Exception, match=r"append-only|UNIQUE|unique"):
        store.commit([make_submission("l"), Submission((*taken.items, *taken.items), "{}", taken.key)])
    assert store.count() == 0
    assert store.commit([taken]) == [Receipt(taken.answer)]


def test_what_a_request_means_and_not_how_it_is_written_is_compared() -> None:
    assert request_sha256({"a": 1, "b": [2]}) == request_sha256({"b": [2], "a": 1})
    assert request_sha256({"a": 1}) != request_sha256({"a": 2})


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.sampled_from("12")), max_size=12), st.data()
)
def test_however_requests_are_batched_each_key_has_the_rows_of_its_first_one(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[str, str, str]], data: st.DataObject
) -> None:
    submissions = [make_submission(key, caller=caller, body=body) for key, caller, body in calls]
    firsts: dict[tuple[str, str], tuple[str, Submission]] = {}
    for (key, caller, body), submission in zip(calls, submissions, strict=True):
        firsts.setdefault((key, caller), (body, submission))
    with FeedbackStore(tmp_path_factory.mktemp("s") / "feedback.db") as store:
        receipts = []
        rest = submissions
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            receipts += store.commit(rest[:size])
            rest = rest[size:]
        assert [item.id for item in store.iter()] == [first.items[0].id for _, first in firsts.values()]
    for (key, caller, body), receipt in zip(calls, receipts, strict=True):
        first_body, first = firsts[key, caller]
        assert receipt.answer == first.answer if body == first_body else isinstance(receipt, KeyReused)


def test_pages_go_through_everything_once_even_while_more_comes(store: FeedbackStore) -> None:
    store.add([make_feedback(id=f"f{index}") for index in range(5)])
    first = store.page(limit=2)
    store.add([make_feedback(id="late")])
    seen, cursor, more = [item.id for item in first.items], first.cursor, first.more
    while more:
        page = store.page(after=cursor, limit=2)
        seen, cursor, more = [*seen, *(item.id for item in page.items)], page.cursor, page.more
    assert seen == ["f0", "f1", "f2", "f3", "f4", "late"]
    assert store.page(after=cursor).items == ()
    assert store.page(after=cursor).cursor == cursor


def test_pages_can_be_of_one_kind_or_annotator(store: FeedbackStore) -> None:
    store.add([make_feedback(id="a"), make_ranking(id="b", annotator="ann-2")])
    assert [item.id for item in store.page(kind="ranking").items] == ["b"]
    assert [item.id for item in store.page(annotator="ann-1").items] == ["a"]


def test_one_piece_of_feedback_is_found_by_its_id(store: FeedbackStore) -> None:
    item = make_feedback(id="a")
    store.add([item])
    assert store.get("a") == item
    assert store.get("b") is None


def test_a_completion_is_kept_once_and_found_by_its_id(store: FeedbackStore) -> None:
    kept = make_completion()
    store.commit([], [kept, make_completion(answers=("Something else.",))])
    assert store.completion("chatcmpl-1") == kept
    assert store.completion("chatcmpl-2") is None


def test_a_choice_of_a_completion_is_an_answer_with_its_origin() -> None:
    answer = make_completion().answer(1)
    feedback = make_feedback(answers=(answer,), rating=Rating(value=2))
    assert feedback.answers[0].completion_id == "chatcmpl-1"
    assert (feedback.answers[0].policy_version, feedback.answers[0].sampler) == (3, "policy")
    with pytest.raises(FeedbackError, match="choice 2 of completion 'chatcmpl-1': there are 2"):
        make_completion().answer(2)


def test_a_plain_prompt_counts_as_the_users_turn() -> None:
    completion = make_completion(messages=None, prompt="Once upon a time")
    assert completion.dialogue == (Message("user", "Once upon a time"),)


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ({"ids": ["a", "b"]}, ["c"]),
        ({"caller": "key-2"}, ["a"]),
        ({"before": NOON}, ["a", "b"]),
        ({"caller": "key-2", "before": NOON}, ["a", "b"]),
        ({"ids": []}, ["a", "b", "c"]),
    ],
)
def test_completions_are_purged_by_id_caller_and_age(
    store: FeedbackStore, what: dict[str, Any], left: list[str]
) -> None:
    old = NOON - timedelta(seconds=1)
    store.commit(
        [],
        [
            make_completion("a"),
            make_completion("b", caller="key-2"),
            make_completion("c", caller="key-2", created_at=old),
        ],
    )
    assert store.purge_completions(**what) == 3 - len(left)
    assert [id_ for id_ in "abc" if store.completion(id_)] == left


def test_a_purge_without_a_condition_removes_nothing(store: FeedbackStore) -> None:
    store.commit([], [make_completion()])
    with pytest.raises(FeedbackError, match="name ids, a caller or a time"):
        store.purge_completions()
    assert store.completion("chatcmpl-1")


def test_purged_text_is_wiped_from_the_files(file_store: FeedbackStore) -> None:
    store = file_store
    store.commit([], [make_completion(answers=("canary-4711 " * 900,)), make_completion("b")])
    files = [Path(store.name), Path(f"{store.name}-wal")]
    assert any(b"canary-4711" in file.read_bytes() for file in files)
    store.purge_completions(ids=["chatcmpl-1"])
    assert not any(b"canary-4711" in file.read_bytes() for file in files)
    assert store.completion("b")


def test_feedback_outlives_the_completion_it_names(store: FeedbackStore) -> None:
    kept = make_completion()
    store.commit([], [kept])
    store.add([make_feedback(answers=(kept.answer(0),))])
    store.purge_completions(caller="key-1")
    assert [item.answers[0].text for item in store.iter()] == ["On its way."]


def test_a_store_of_the_first_version_opens_is_brought_up_to_date_and_keeps_its_snapshots(tmp_path: Path) -> None:
    database = tmp_path / "feedback.db"
    with sqlite3.connect(database) as connection:
        connection.executescript((Path(__file__).parent / "store_v1.sql").read_text(encoding="utf-8"))
    with FeedbackStore(database, read_only=True) as reader:
        assert reader.count() == 3
    with FeedbackStore(database) as store:
        store.commit([make_submission("k")], [make_completion()])
        assert store.count() == 4
        assert [item.id for item in store.read("first")] == ["r1", "r2", "r3"]
    with FeedbackStore(database), sqlite3.connect(database) as connection:
        (version,) = connection.execute("SELECT max(version) FROM schema_version").fetchone()
        assert version == 4  # an rlhf-ray of before refuses it
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(HEAD,)]


def test_keys_cannot_be_forgotten_or_changed(store: FeedbackStore) -> None:
    store.commit([make_submission("k")])
    refuses(store, "DELETE FROM request_keys")


def fail_to_sync() -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    raise OperationalError("COMMIT", {}, error)


def test_after_a_disk_error_nothing_more_is_acknowledged(file_store: FeedbackStore) -> None:
    store = file_store
    store.add([make_feedback(id="a")])
    with pytest.raises(InfrastructureError, match="nothing was written"), store.writing():
        fail_to_sync()
    with pytest.raises(InfrastructureError, match="takes nothing after a disk error"):
        store.commit([make_submission("k")])
    assert store.count() == 1


def test_the_origin_of_an_answer_is_read_back() -> None:
    feedback = make_feedback(answers=(make_completion().answer(0),))
    assert parse_feedback(feedback.model_dump_json()) == feedback

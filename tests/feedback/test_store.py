import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import ConfigError, DataError, FeedbackError, InfrastructureError
from rlhf_ray.feedback.schema import Answer, Comment, Feedback, Ranking, Rating
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.types import Message


def make_feedback(prompt_id: str = "p1", **changes: Any) -> Feedback:
    fields: dict[str, Any] = {
        "messages": (Message("user", f"Question {prompt_id}?"),),
        "prompt_id": prompt_id,
        "group": prompt_id,
        "answers": (Answer(text="Yes.", sampler="base-policy", sampling={"temperature": 1.0}),),
        "rating": Rating(value=4),
        "annotator": "ann-1",
    }
    return Feedback(**(fields | changes))


def make_ranking(prompt_id: str = "p1", *, answers: int = 4, **changes: Any) -> Feedback:
    texts = [Answer(text=f"Answer {index}.", sampler="base-policy") for index in range(answers)]
    ranking = Ranking(ranks=tuple(range(1, answers + 1)))
    return make_feedback(prompt_id, answers=tuple(texts), rating=None, ranking=ranking, **changes)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


def test_what_was_added_is_there_after_reopening_in_order(database: Path) -> None:
    items = [make_feedback("p1"), make_ranking("p2", display_order=(3, 1, 0, 2)), make_feedback("p3")]
    with FeedbackStore(f"sqlite:///{database}") as store:
        assert store.add(items) == [item.id for item in items]
    for again in (database, str(database)):
        with FeedbackStore(again) as store:
            assert store.count() == 3
            assert list(store.iter()) == items


def test_feedback_can_be_asked_for_by_kind_annotator_and_prompt(database: Path) -> None:
    rating, ranking = make_feedback("p1"), make_ranking("p2", annotator="ann-2")
    with FeedbackStore(database) as store:
        store.add([rating, ranking])
        assert list(store.iter(kind="ranking")) == [ranking]
        assert list(store.iter(annotator="ann-1")) == [rating]
        assert list(store.iter(prompt_id="p2", annotator="ann-1")) == []


def test_iteration_crosses_pages_and_stops_where_the_store_ended_when_it_began(database: Path) -> None:
    with FeedbackStore(database) as store:
        store.add([make_feedback(f"p{index % 3}") for index in range(2_500)])
        rows = store.iter()
        next(rows)
        store.add([make_feedback("late")])
        assert sum(1 for _ in rows) == 2_499
        assert sum(1 for _ in store.iter(prompt_id="p0")) == 834


def test_six_thousand_rows_are_added_in_seconds(database: Path) -> None:
    items = [make_ranking(f"p{index}") for index in range(6_000)]
    with FeedbackStore(database) as store:
        start = time.perf_counter()
        store.add(items)
        assert time.perf_counter() - start < 10
        assert store.count() == 6_000


def test_a_batch_is_written_whole_or_not_at_all(database: Path) -> None:
    with FeedbackStore(database) as store:
        store.add([make_feedback(id="a")])
        with pytest.raises(FeedbackError, match="'a' is taken by another judgement"):
            store.add([make_feedback(id="b"), make_feedback(id="a", rating=Rating(value=1))])
        assert store.count() == 1


def test_sending_the_same_judgement_again_adds_nothing_even_later(database: Path) -> None:
    with FeedbackStore(database) as store:
        first, again = make_feedback(id="a"), make_feedback(id="a")
        assert first.created_at != again.created_at
        assert store.add([first]) == ["a"]
        assert store.add([again, again]) == ["a", "a"]
        assert list(store.iter()) == [first]


def test_two_judgements_under_one_id_in_a_batch_are_refused(database: Path) -> None:
    with FeedbackStore(database) as store:
        with pytest.raises(FeedbackError, match="taken by another judgement"):
            store.add([make_feedback(id="a"), make_feedback(id="a", annotator="ann-2")])
        assert store.count() == 0


def test_a_full_disk_is_said_so_and_leaves_the_store_as_it_was(database: Path) -> None:
    with FeedbackStore(database) as store:
        store.add([make_feedback(id="a")])
        with store._database._engine.connect() as connection:  # the pool hands the same connection out again
            connection.exec_driver_sql("PRAGMA max_page_count = 20")
        with pytest.raises(InfrastructureError, match=r"nothing was written .*full"):
            store.add([make_ranking(f"p{index}") for index in range(2_000)])
        assert [item.id for item in store.iter()] == ["a"]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE feedback SET body = '{}'",
        "DELETE FROM feedback",
        "INSERT OR REPLACE INTO feedback SELECT seq, id, kind, prompt_id, annotator, '{}' FROM feedback",
        "INSERT OR REPLACE INTO feedback SELECT seq + 9, id, kind, prompt_id, annotator, '{}' FROM feedback",
        "UPDATE snapshots SET sha256 = 'x'",
        "DELETE FROM snapshots",
        "INSERT OR REPLACE INTO snapshots SELECT id, 'x', rows FROM snapshots",
        "DELETE FROM snapshot_rows",
        "UPDATE snapshot_rows SET seq = 7",
    ],
)
def test_no_connection_can_change_or_remove_rows(database: Path, statement: str) -> None:
    with FeedbackStore(database) as store:
        store.add([make_feedback()])
        store.freeze()
    with sqlite3.connect(database) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)


def test_commits_reach_the_disk_before_add_returns(database: Path) -> None:
    with FeedbackStore(database) as store, store._database._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() >= 1_000


def test_a_second_writer_is_refused_by_name_until_the_first_closes(database: Path) -> None:
    with FeedbackStore(database), pytest.raises(InfrastructureError, match=f"process {os.getpid()} on"):
        FeedbackStore(database)
    FeedbackStore(database).close()


def test_readers_see_committed_rows_beside_the_writer_and_cannot_write(database: Path) -> None:
    with FeedbackStore(database) as writer, FeedbackStore(database, read_only=True) as reader:
        writer.add([make_feedback()])
        assert reader.count() == 1
        with pytest.raises(AssertionError, match="read_only"):
            reader.add([make_feedback()])


def test_rows_acknowledged_before_kill_9_are_there_and_the_store_can_be_written_again(database: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from rlhf_ray.feedback.schema import Answer, Feedback, Rating
        from rlhf_ray.feedback.store import FeedbackStore
        from rlhf_ray.types import Message
        store = FeedbackStore(f"sqlite:///{sys.argv[1]}")
        while True:
            answer = Answer(text="a", sampler="s")
            item = Feedback(messages=(Message("user", "q"),), prompt_id="p", group="p", annotator="x",
                            answers=(answer,), rating=Rating(value=3))
            print(store.add([item])[0], flush=True)
    """)
    writer = subprocess.Popen([sys.executable, "-c", script, str(database)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = [writer.stdout.readline().strip() for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    acknowledged += writer.stdout.read().split("\n")[:-1]  # a torn last line was not acknowledged
    writer.wait(timeout=30)
    with FeedbackStore(database) as store:
        stored = [item.id for item in store.iter()]
        store.add([make_feedback()])
    assert stored[: len(acknowledged)] == acknowledged
    assert len(stored) - len(acknowledged) <= 1


def test_a_snapshot_stays_as_it_was_while_the_store_grows(database: Path) -> None:
    items = [make_feedback("p1"), make_ranking("p2")]
    with FeedbackStore(database) as store:
        store.add(items)
        snapshot = store.freeze("first")
        store.add([make_feedback("p3")])
        assert list(store.read("first")) == items
        assert snapshot.rows == 2
        assert [known.id for known in store.snapshots()] == ["first"]


def test_who_is_in_a_snapshot_is_told_without_its_rows(database: Path) -> None:
    with FeedbackStore(database) as store:
        ids = store.add([make_feedback("p1"), make_feedback("p2")])
        snapshot = store.freeze()
        store.add([make_feedback("p3")])
        assert store.members(snapshot.id) == set(ids)
        assert store.members("another") == set()


def test_a_snapshot_is_named_by_its_hash_and_freezing_twice_gives_the_same(database: Path) -> None:
    with FeedbackStore(database) as store:
        store.add([make_feedback()])
        snapshot = store.freeze()
        assert snapshot.id == f"s-{snapshot.sha256[:12]}"
        assert store.freeze() == snapshot
        store.add([make_feedback()])
        assert store.freeze().sha256 != snapshot.sha256


def test_a_snapshot_hash_is_over_canonical_json_and_not_the_file(tmp_path: Path) -> None:
    items = [make_feedback("p1"), make_ranking("p2")]
    hashes = []
    for name in ("a.db", "b.db"):
        with FeedbackStore(tmp_path / name) as store:
            store.add(items)
            hashes.append(store.freeze(name[0]).sha256)
    assert hashes[0] == hashes[1]


def test_a_snapshot_name_cannot_be_given_to_other_rows(database: Path) -> None:
    with FeedbackStore(database) as store:
        store.add([make_feedback()])
        store.freeze("run-1")
        store.add([make_feedback()])
        with pytest.raises(DataError, match=r"'run-1' exists with 1 rows, there would now be 2"):
            store.freeze("run-1")


@pytest.mark.parametrize("name", ["", "../up", "Big", "x" * 65])
def test_a_snapshot_name_is_a_plain_word(database: Path, name: str) -> None:
    with FeedbackStore(database) as store:
        store.add([make_feedback()])
        with pytest.raises(DataError, match="snapshot name"):
            store.freeze(name)


def test_an_empty_store_cannot_be_frozen_and_an_unknown_snapshot_not_read(database: Path) -> None:
    with FeedbackStore(database) as store:
        with pytest.raises(DataError, match="has nothing to freeze"):
            store.freeze()
        store.add([make_feedback()])
        store.freeze("here")
        with pytest.raises(DataError, match=r"no snapshot 'gone' .* there are: here"):
            store.read("gone")


@pytest.mark.parametrize(
    "tampering",
    [
        "DROP TRIGGER feedback_no_update; UPDATE feedback SET body = replace(body, '4.0', '5.0')",
        "DROP TRIGGER snapshot_rows_no_delete; DELETE FROM snapshot_rows WHERE seq = 1",
        "INSERT INTO snapshot_rows VALUES ('run', 3)",
    ],
)
def test_a_snapshot_whose_rows_were_tampered_with_is_not_handed_out(database: Path, tampering: str) -> None:
    with FeedbackStore(database) as store:
        store.add([make_feedback("p1"), make_feedback("p2")])
        store.freeze("run")
        store.add([make_feedback("p3")])
    connection = sqlite3.connect(database)
    connection.executescript(tampering)
    connection.close()
    with FeedbackStore(database) as store, pytest.raises(DataError, match="changed after it was frozen"):
        store.read("run")


def test_statistics_count_answers_by_sampler_and_judgements_by_annotator(database: Path) -> None:
    comment = make_feedback("p3", rating=None, comment=Comment(text="Too long."), annotator="ann-2")
    thumb = make_feedback("p4", rating=Rating(value=0, scale="thumb"))
    with FeedbackStore(database) as store:
        store.add([make_feedback(), make_feedback(rating=Rating(value=1)), make_ranking("p2"), comment, thumb])
        stats = store.stats()
    assert (stats.rows, stats.by_kind) == (5, {"rating": 3, "ranking": 1, "comment": 1})
    assert [(tally.name, tally.n, tally.mean) for tally in stats.by_sampler] == [("base-policy", 8, 2.5)]
    assert [(tally.name, tally.n, tally.mean) for tally in stats.by_annotator] == [
        ("ann-1", 4, 2.5),
        ("ann-2", 1, None),
    ]


@pytest.mark.parametrize("url", ["sqlite:feedback.db", "sqlite://", "sqlite:///:memory:", "mysql://host/db", ""])
def test_a_url_that_names_no_sqlite_file_is_refused_with_the_way_out(url: str) -> None:
    with pytest.raises(ConfigError, match=r"sqlite:///folder/name\.db"):
        FeedbackStore(url)


def test_a_store_that_is_not_there_cannot_be_read_and_is_not_made(database: Path) -> None:
    with pytest.raises(DataError, match="no feedback store at"):
        FeedbackStore(database, read_only=True)
    assert list(database.parent.iterdir()) == []


def test_a_missing_folder_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        FeedbackStore(tmp_path / "typo" / "feedback.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [bytes(range(256)) * 40, b"not a database, but long enough to be read as one" * 9])
def test_a_file_that_is_no_database_is_refused_untouched(database: Path, content: bytes) -> None:
    database.write_bytes(content)
    with pytest.raises(DataError, match="cannot be opened as a feedback store"):
        FeedbackStore(database)
    assert database.read_bytes() == content
    assert list(database.parent.iterdir()) == [database]


@pytest.mark.parametrize("table", ["invoices (id)", "schema_version (v)"])
def test_a_database_of_something_else_is_refused_untouched(database: Path, table: str) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute(f"CREATE TABLE {table}")
    before = database.read_bytes()
    with pytest.raises(DataError, match="a database of something else"):
        FeedbackStore(database)
    assert database.read_bytes() == before


def test_a_store_of_a_newer_version_is_refused(database: Path) -> None:
    FeedbackStore(database).close()
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    for read_only in (True, False):
        with pytest.raises(DataError, match=r"newer rlhf-ray \(revision 9999"):
            FeedbackStore(database, read_only=read_only)


def test_a_damaged_store_says_so_in_one_line(database: Path) -> None:
    with FeedbackStore(database) as store:
        store.add([make_ranking(f"p{index}") for index in range(500)])
    damaged = bytearray(database.read_bytes())
    damaged[20 * 4096 : -4096] = os.urandom(len(damaged) - 21 * 4096)
    database.write_bytes(damaged)
    with (
        pytest.raises(DataError, match=r"cannot be read|cannot be opened .* restore it from a copy"),
        FeedbackStore(database, read_only=True) as store,
    ):
        list(store.iter())

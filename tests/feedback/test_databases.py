"""What is different in PostgreSQL: any number of writers, and a server that may not be there."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from rlhf_ray.errors import ConfigError, DataError, InfrastructureError
from rlhf_ray.feedback import tables, tasks
from rlhf_ray.feedback.requests import KeyReused, Receipt
from rlhf_ray.feedback.schema import Answer
from rlhf_ray.feedback.store import FeedbackStore
from tests.feedback.places import place, refuses
from tests.feedback.test_requests import make_completion, make_submission
from tests.feedback.test_store import make_feedback, make_ranking
from tests.feedback.test_tasks import answer, show, task


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    with place("postgres", tmp_path) as url:
        yield url


def test_the_migrations_make_the_tables_that_queries_name(url: str) -> None:
    with FeedbackStore(url) as store, store.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []


def test_a_store_is_the_same_after_opening_it_again(url: str) -> None:
    items = [make_feedback("p1"), make_ranking("p2"), make_feedback("p3 \U0001f600 'quoted' \\ \x7f")]
    with FeedbackStore(url) as store:
        store.add(items)
        frozen = store.freeze("run")
        store.commit([make_submission("k")], [make_completion()])
    with FeedbackStore(url) as store:
        assert list(store.iter())[:3] == items
        assert list(store.read("run")) == items
        assert store.freeze("run", of="run") == frozen
        assert store.completion("chatcmpl-1") == make_completion()
    with FeedbackStore(url, read_only=True) as store:
        assert store.count() == 4


def test_nothing_is_there_of_a_transaction_that_failed(url: str) -> None:
    with FeedbackStore(url) as store:
        store.add([make_feedback("p1")])
        with pytest.raises(ZeroDivisionError):
            break_off(store)
        assert tasks.guide(store) is None
        assert store.count() == 1


def break_off(store: FeedbackStore) -> None:
    with store.writing() as connection:
        connection.execute(text("INSERT INTO guidelines (text, by, created_at) VALUES ('x', 'y', 'z')"))
        1 / 0  # noqa: B018


def test_rows_of_every_table_that_keeps_them_can_only_be_added(url: str) -> None:
    with FeedbackStore(url) as store:
        store.add([make_feedback("p1")])
        store.freeze("run")
        for statement in ("DELETE FROM feedback", "UPDATE snapshots SET rows = 9", "DELETE FROM snapshot_rows"):
            refuses(store, statement)
        if store.name.startswith("postgresql"):
            with pytest.raises(Exception, match="append-only"), store.writing() as connection:
                connection.execute(text("TRUNCATE feedback CASCADE"))


def test_many_writers_lose_nothing_and_number_rows_as_they_become_visible(postgres: str) -> None:
    """Four writers of 50 rows each, and a reader that pages behind them and never looks back."""
    seen: list[str] = []
    done = threading.Event()

    def write(name: str) -> None:
        with FeedbackStore(postgres) as store:
            for number in range(50):
                store.add([make_feedback(f"{name}-{number}")])

    def follow() -> None:
        cursor = 0
        with FeedbackStore(postgres, read_only=True) as store:
            while True:
                last = done.is_set()
                page = store.page(after=cursor, limit=7)
                seen.extend(item.prompt_id for item in page.items)
                cursor = page.cursor
                if last and not page.more:
                    return

    FeedbackStore(postgres).close()
    reader = threading.Thread(target=follow)
    writers = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join(60)
    done.set()
    reader.join(60)
    assert sorted(seen) == sorted(f"{name}-{number}" for name in "abcd" for number in range(50))


def test_one_key_sent_to_many_writers_at_once_is_one_row(postgres: str) -> None:
    outcomes: list[Receipt | KeyReused] = []
    start = threading.Barrier(8)

    def send() -> None:
        with FeedbackStore(postgres) as store:
            start.wait(30)
            outcomes.extend(store.commit([make_submission("k")]))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Counter(outcome.replayed for outcome in outcomes if isinstance(outcome, Receipt)) == {False: 1, True: 7}
    with FeedbackStore(postgres, read_only=True) as store:
        assert store.count() == 1


def test_annotators_at_different_writers_do_not_share_a_place(postgres: str) -> None:
    with FeedbackStore(postgres) as store:
        tasks.add_tasks(store, [task(f"t{n}") for n in range(12)])
    met: list[str] = []

    def work(name: str) -> None:
        with FeedbackStore(postgres) as store:
            while held := show(store, name):
                answer(store, held, name)
                met.append(held.task.id)

    people = [threading.Thread(target=work, args=(f"ann-{n}",)) for n in range(3)]
    for one in people:
        one.start()
    for one in people:
        one.join(60)
    assert sorted(met) == sorted(f"t{n}" for n in range(12))


def test_a_name_with_a_nul_is_refused_and_nothing_kept(postgres: str) -> None:
    with FeedbackStore(postgres) as store:
        with pytest.raises(DataError, match="holds the character NUL"):
            store.add([make_feedback("p1"), make_feedback("p2", annotator="a\0b")])
        with pytest.raises(DataError, match="holds the character NUL"):
            store.page(annotator="a\0b")
        store.add([make_feedback("p1", answers=(Answer(text="with \0 in it", sampler="x"),))])
        assert [item.answers[0].text for item in store.iter()] == ["with \0 in it"]


def test_a_database_of_something_else_or_newer_is_refused_untouched(postgres: str) -> None:
    with FeedbackStore(postgres) as store, store.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DataError, match=r"newer rlhf-ray \(revision 9999"):
        FeedbackStore(postgres)
    with pytest.raises(DataError, match=r"newer rlhf-ray"):
        FeedbackStore(postgres, read_only=True)


def test_an_empty_database_cannot_be_read_and_is_left_empty(postgres: str) -> None:
    with pytest.raises(DataError, match="no feedback store in postgresql://"):
        FeedbackStore(postgres, read_only=True)
    with FeedbackStore(postgres) as store:
        assert store.count() == 0


def test_a_server_that_is_not_there_is_an_error_of_the_infrastructure_without_the_password() -> None:
    with pytest.raises(InfrastructureError, match="cannot be reached") as caught:
        FeedbackStore("postgresql://ann:secret-word@127.0.0.1:9/feedback")
    assert "secret-word" not in str(caught.value)
    assert "postgresql://ann:***@127.0.0.1:9/feedback" in str(caught.value)


@pytest.mark.parametrize("bad", ["postgresql://", "postgresql://host", "postgres://host:port/x"])
def test_a_url_without_a_database_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="postgresql://user"):
        FeedbackStore(bad)


def test_a_server_that_goes_away_is_an_error_and_coming_back_is_enough(postgres: str) -> None:
    with FeedbackStore(postgres) as store:
        store.add([make_feedback("p1")])
        with FeedbackStore(postgres) as other, other.writing() as connection:
            mine = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM ({mine}) AS others"))
        store.add([make_feedback("p2")])  # the pool finds out before it hands a connection out
        assert store.count() == 2
        with pytest.raises(InfrastructureError, match="nothing was written"), store.writing() as connection:
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        assert store.add([make_feedback("p3")])

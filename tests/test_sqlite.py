"""A file that several processes read and write."""

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text, insert, select

from rlhf_ray.errors import ConfigError, DataError, InfrastructureError
from rlhf_ray.sqlite import Database, append_only, copy_database, file_of, open_engine

metadata = MetaData()
kept = Table("kept", metadata, Column("id", Integer, primary_key=True), Column("word", Text, nullable=False))
append_only(kept)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(tmp_path / "x.db", metadata, what="words")
    with database.writing() as connection:
        connection.execute(insert(kept).values(id=1, word="first"))
    return database


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE kept SET word = 'other'",
        "DELETE FROM kept",
        "INSERT OR REPLACE INTO kept VALUES (1, 'other')",
    ],
)
def test_a_row_is_changed_by_no_program(database: Database, change: str) -> None:
    with sqlite3.connect(database.path) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(change)
    with database.reading() as reading:
        assert [tuple(row) for row in reading.execute(select(kept))] == [(1, "first")]


def test_rows_whose_number_the_database_gives_go_in(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(insert(kept), [{"word": "second"}, {"word": "third"}])
    with database.reading() as reading:
        assert [row.id for row in reading.execute(select(kept))] == [1, 2, 3]


def test_commits_are_durable_and_what_is_purged_is_overwritten(database: Database) -> None:
    with open_engine(database.path).connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("synchronous", "journal_mode", "secure_delete", "foreign_keys")
        }
    assert pragmas == {"synchronous": 2, "journal_mode": "wal", "secure_delete": 1, "foreign_keys": 1}


def test_a_copy_has_what_is_in_the_log_and_replaces_what_a_killed_one_left(database: Database, tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_bytes(b"half a file")
    copy_database(database.path, tmp_path / "copy.db")  # the database is open: nothing was folded into its file yet
    with sqlite3.connect(tmp_path / "copy.db") as copied:
        assert copied.execute("SELECT word FROM kept").fetchall() == [("first",)]


def test_what_is_no_database_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"no database" * 99)
    with pytest.raises(DataError, match=r"x\.db cannot be copied"):
        copy_database(tmp_path / "x.db", tmp_path / "copy.db")


def test_who_only_reads_cannot_write(database: Database) -> None:
    with open_engine(database.path, read_only=True).connect() as connection, pytest.raises(Exception, match="readonly"):
        connection.execute(insert(kept).values(word="second"))


def test_a_writer_that_cannot_get_in_is_an_infrastructure_error(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ray.sqlite.BUSY_TIMEOUT_MS", 20)
    other = Database(database.path, metadata, what="words")
    with database.writing(), pytest.raises(InfrastructureError, match="nothing was written"), other.writing():
        pass


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        Database(tmp_path / "no" / "x.db", metadata, what="words")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "postgresql://ann:s3cret@host/db", ""])
def test_what_names_no_file_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"sqlite:///folder/name\.db") as refusal:
        file_of(url, what="words")
    assert "s3cret" not in str(refusal.value)

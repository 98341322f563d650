"""Stores in both kinds of database: a SQLite file, and one of its own in a PostgreSQL server, where there is one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import IntegrityError

from rlhf_ray.feedback.store import FeedbackStore

SERVER = "RLHF_TEST_POSTGRES"
KINDS = ("sqlite", "postgres")


@contextmanager
def place(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'feedback.db'}"
        return
    server = os.environ.get(SERVER)
    if not server:
        pytest.skip(f"no PostgreSQL server: `.ci/postgres start FOLDER` prints a URL for {SERVER}")
    name = f"test_{secrets.token_hex(6)}"
    admin = create_engine(make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    try:
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        admin.dispose()


def refuses(store: FeedbackStore, statement: str) -> None:
    """Any program's statement, and nothing is changed by it."""
    with pytest.raises(IntegrityError, match="append-only"), store.writing() as connection:
        connection.execute(text(statement))


def holds(store: FeedbackStore, words: bytes) -> bool:
    """Whether words are anywhere in a store's files; of a server's files nobody knows."""
    path = Path(store.name)
    files = [path, path.with_name(f"{path.name}-wal")]
    return any(words in file.read_bytes() for file in files if file.is_file())

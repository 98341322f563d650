"""The tables behind the store, how a database file is opened, and the lock that lets one process write.

SQLite in WAL mode with `synchronous=FULL`: a commit that returned survives a power cut. Readers never wait.
The one writer is enforced by `flock` on `<database>.lock`, held while a store is open for writing: the kernel
gives it back when the process ends, however it ends. WAL needs a local disk, and so does the lock.
"""

import fcntl
import os
import socket
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError

from rlhf_ray.errors import ConfigError, DataError, InfrastructureError

SCHEMA_VERSION = 2
"""1: feedback and snapshots. 2: completions, request keys, and `completion_id` in feedback. Opening for writing brings
an older file up to date, in one transaction; a newer one is refused."""
BUSY_TIMEOUT_MS = 10_000

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

feedback = Table(
    "feedback",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("prompt_id", Text, nullable=False),
    Column("annotator", Text, nullable=False),
    Column("body", Text, nullable=False),
    Index("feedback_by_annotator", "annotator"),
    Index("feedback_by_prompt", "prompt_id"),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", Text, primary_key=True),
    Column("sha256", Text, nullable=False),
    Column("rows", Integer, nullable=False),
)

snapshot_rows = Table(
    "snapshot_rows",
    metadata,
    Column("snapshot_id", Text, ForeignKey("snapshots.id"), primary_key=True),
    Column("seq", Integer, ForeignKey("feedback.seq"), primary_key=True),
    sqlite_with_rowid=False,
)

completions = Table(
    "completions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("caller", Text, nullable=False),
    Column("created_at", Text, nullable=False),
    Column("body", Text, nullable=False),
    Index("completions_by_caller", "caller"),
    Index("completions_by_time", "created_at"),
)
"""Served answers; unlike feedback they are removed again, by age or on request."""

request_keys = Table(
    "request_keys",
    metadata,
    Column("caller", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_sha256", Text, nullable=False),
    Column("answer", Text, nullable=False),
    sqlite_with_rowid=False,
)
"""What was answered to which request, written with the rows that the request brought. Never forgotten."""


def _append_only(table: Table) -> None:
    """Triggers that refuse change. INSERT OR REPLACE would get round the one on DELETE, hence the one on INSERT."""
    for verb in ("UPDATE", "DELETE"):
        body = f"BEGIN SELECT RAISE(ABORT, '{table.name} is append-only'); END"
        _on_create(table, f"CREATE TRIGGER {table.name}_no_{verb.lower()} BEFORE {verb} ON {table.name} {body}")
    keys = " AND ".join(f"{column.name} = NEW.{column.name}" for column in table.primary_key.columns)
    also = " OR id = NEW.id" if "id" in table.c else ""
    _on_create(
        table,
        f"CREATE TRIGGER {table.name}_no_replace BEFORE INSERT ON {table.name} "
        f"WHEN EXISTS (SELECT 1 FROM {table.name} WHERE ({keys}){also}) "
        f"BEGIN SELECT RAISE(ABORT, '{table.name} is append-only'); END",
    )


def _on_create(table: Table, statement: str) -> None:
    def run(_table: Table, connection: Connection, **_: object) -> None:
        connection.exec_driver_sql(statement)

    event.listen(table, "after_create", run)


for _table in (feedback, snapshots, snapshot_rows, request_keys):
    _append_only(_table)


def database_path(url: str | Path) -> Path:
    """The file that a URL or a path names; `ConfigError` where it is not one."""
    if isinstance(url, Path):
        return url
    if url and ":" not in url:
        return Path(url)
    hint = "give a file as sqlite:///folder/feedback.db"
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(f"'{url}' is not a database URL: {hint}") from None
    if parsed.get_backend_name() != "sqlite":
        raise ConfigError(f"feedback is stored in SQLite, not in {parsed.get_backend_name()}: {hint}")
    if parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"'{url}' would keep feedback in memory only: {hint}")
    return Path(str(parsed.database))


def recognise(path: Path) -> int | None:
    """The schema version of the store in a file, None where the file is new or empty. Changes nothing in it."""
    if not path.exists():
        if not path.parent.is_dir():
            raise DataError(f"no folder {path.parent} for the feedback store: make it, or name another place")
        return None
    if not path.is_file():
        raise DataError(f"{path} is not a file: name one for the feedback store")
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)
        try:
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            version = _version(connection) if "schema_version" in names else None
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} cannot be opened as a feedback store ({error}): name another file") from None
    if names and version is None:
        raise DataError(f"{path} is a database of something else: name another file for the feedback store")
    if version is not None and version > SCHEMA_VERSION:
        raise DataError(
            f"{path} was written by a newer rlhf-ray (schema {version}, this one reads {SCHEMA_VERSION}): upgrade"
        )
    return version


def _version(connection: sqlite3.Connection) -> int | None:
    try:
        (version,) = connection.execute("SELECT max(version) FROM schema_version").fetchone()
    except sqlite3.OperationalError:  # somebody else's table of that name
        return None
    return int(version) if version is not None else None


def open_engine(path: Path, *, read_only: bool) -> Engine:
    """An engine whose every connection is durable; a transaction that writes asks for it with `writes=True`."""
    engine = create_engine(URL.create("sqlite", database=str(path)))

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # BEGIN is ours to say, below
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")  # what is purged is overwritten, not just unlinked
        if read_only:
            connection.execute("PRAGMA query_only = ON")
            return
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise DataError(f"{path} cannot use SQLite's WAL mode (got '{mode}'): put it on a local disk")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        # IMMEDIATE: a reader that turns writer halfway could be refused after its work.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


class WriterLock:
    """The right to write to one store, for as long as this object is not released."""

    def __init__(self, database: Path) -> None:
        path = database.with_name(database.name + ".lock")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DataError(f"cannot write beside {database} ({error.strerror}): name another place") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "another process"
            os.close(self._file)
            raise InfrastructureError(
                f"feedback store {database} is being written by {holder}: wait for it, or open the store read_only"
            ) from None
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Let another process write. The file stays: removing it would let two hold the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

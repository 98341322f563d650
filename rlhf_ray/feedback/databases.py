"""Where feedback lies: a SQLite file that one process writes, or a PostgreSQL database that any number write.

Both promise the store the same. A transaction that writes is alone from its first statement to its end (SQLite's BEGIN
IMMEDIATE, an advisory lock), so that rows are numbered in the order in which they become visible, and what was read in
it still holds when it is committed. A commit that returned is on the disk. One that reads sees one state throughout.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError, ProgrammingError
from sqlalchemy.exc import DataError as UnstorableError

from rlhf_ray.errors import ConfigError, DataError, InfrastructureError
from rlhf_ray.feedback import migrations, tables
from rlhf_ray.feedback.lock import WriterLock
from rlhf_ray.sqlite import erasing as erasing_sqlite
from rlhf_ray.sqlite import file_of, open_engine

LOCK = 7_745_433_211
"""Of PostgreSQL's advisory locks, the one that a writing transaction holds."""
NO_NUL = "a name or a reason holds the character NUL, which PostgreSQL cannot keep: leave it out"
WAIT_S = 10
"""For other writers, and for a connection."""


class Unreadable(DataError):
    """A store that was opened gives nothing back: it is damaged, or somebody changed it."""


class Database(Protocol):
    """An open database, its tables there and of this version unless it is read only."""

    name: str
    """For messages; never with a password."""
    broken: bool
    """The disk failed during a write: nothing is acknowledged any more, until it is opened anew."""

    def close(self) -> None:
        """Let go of it."""

    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction, as a context manager, that sees one state."""

    def writing(self) -> AbstractContextManager[Connection]:
        """A transaction, as a context manager, that writes alone, durable once it is left without an error."""

    def wipe(self) -> None:
        """After rows were removed: their bytes, too."""

    def erasing(self, connection: Connection) -> AbstractContextManager[None]:
        """Within a writing transaction, a context manager in which append-only tables let rows be removed."""


def open_database(url: str | Path, *, read_only: bool) -> Database:
    """By a file's path, `sqlite:///folder/feedback.db`, or `postgresql://user@host/name`."""
    if is_postgres(url):
        return Postgres(str(url), read_only=read_only)
    return SqliteFile(file_of(url, what="feedback"), read_only=read_only)


def is_postgres(url: str | Path) -> bool:
    """Whether a URL names a PostgreSQL database."""
    return not isinstance(url, Path) and url.partition(":")[0].partition("+")[0] in ("postgresql", "postgres")


class SqliteFile:
    """One file. The one writer is held by a lock beside it, which needs a local disk; any number read."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        self.name = str(path)
        self.broken = False
        is_there = _has_file(path)
        if read_only and not is_there:
            raise DataError(f"no feedback store at {path}: check the path, or write feedback first")
        if is_there:
            _recognise(path)
        self._read_only = read_only
        self._lock = None if read_only else WriterLock(path)
        self._engine = open_engine(path, read_only=read_only)
        if not read_only:
            try:
                with self.writing() as connection:
                    migrations.upgrade(connection)
                _sync_folder(path.parent)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Let go of the file and of the right to write to it."""
        self._engine.dispose()
        if self._lock:
            self._lock.release()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the file."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except DatabaseError as error:
            raise Unreadable(f"feedback store {self.name} cannot be read: {error.orig}") from None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes."""
        assert not self._read_only, "this store was opened read_only"
        if self.broken:
            raise InfrastructureError(f"feedback store {self.name} takes nothing after a disk error: open it anew")
        try:
            with self._engine.execution_options(writes=True).begin() as connection:
                yield connection
        except OperationalError as error:
            # After a failed fsync the next one may succeed without having written: a new process has to look.
            code = getattr(error.orig, "sqlite_errorcode", 0)
            self.broken = code & 0xFF == sqlite3.SQLITE_IOERR
            raise _not_written(self.name, error) from None

    def wipe(self) -> None:
        """SQLite's log still holds the old pages until it is folded in."""
        with self.reading() as connection:
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.exec_driver_sql("BEGIN")

    def erasing(self, connection: Connection) -> AbstractContextManager[None]:
        """Without the triggers that keep rows."""
        return erasing_sqlite(connection)


class Postgres:
    """A database of its own. Writers wait for each other, none is refused."""

    def __init__(self, url: str, *, read_only: bool) -> None:
        place = _postgres_url(url)
        self.name = place.set(drivername="postgresql").render_as_string(hide_password=True)
        self.broken = False  # the server keeps its own word after a failed write
        self._read_only = read_only
        self._engine = _postgres_engine(place)
        try:
            with self.reading() as connection:
                version = self._version(connection)
            if version is None and read_only:
                raise DataError(f"no feedback store in {self.name}: check the URL, or write feedback first")
            if not read_only:
                with self.writing() as connection:
                    migrations.upgrade(connection)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the connections."""
        self._engine.dispose()

    def _version(self, connection: Connection) -> str | None:
        try:
            return migrations.version_of(connection)
        except DataError as error:
            raise DataError(f"{self.name} {error}") from None

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database."""
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        try:
            with self._engine.connect().execution_options(**options) as connection:
                yield connection
        except OperationalError as error:
            raise InfrastructureError(f"feedback store {self.name} cannot be reached: {_first_line(error)}") from None
        except ProgrammingError as error:
            raise Unreadable(f"feedback store {self.name} cannot be read: {_first_line(error)}") from None
        except UnstorableError:
            raise DataError(NO_NUL) from None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes."""
        assert not self._read_only, "this store was opened read_only"
        try:
            with self._engine.begin() as connection:
                connection.execute(text(f"SET LOCAL lock_timeout = '{WAIT_S}s'"))
                connection.execute(text("SET LOCAL synchronous_commit = on"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
                yield connection
        except OperationalError as error:
            raise _not_written(self.name, error) from None
        except UnstorableError:
            raise DataError(NO_NUL) from None

    def wipe(self) -> None:
        """The room of rows that are gone is given back; what the server's log and copies still hold is its keeper's."""
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in tables.metadata.sorted_tables:
                connection.execute(text(f"VACUUM {table.name}"))

    @contextmanager
    def erasing(self, connection: Connection) -> Iterator[None]:
        """Without the triggers that keep rows; nobody else writes meanwhile."""
        for table in tables.metadata.sorted_tables:
            connection.execute(text(f"ALTER TABLE {table.name} DISABLE TRIGGER USER"))
        yield
        for table in tables.metadata.sorted_tables:
            connection.execute(text(f"ALTER TABLE {table.name} ENABLE TRIGGER USER"))


def _not_written(name: str, error: OperationalError) -> InfrastructureError:
    return InfrastructureError(
        f"nothing was written to feedback store {name}: {_first_line(error)}; mend that and repeat the command"
    )


def _first_line(error: DatabaseError) -> str:
    return str(error.orig).strip().partition("\n")[0]


def _postgres_url(url: str) -> URL:
    try:
        place = make_url(url)
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        raise ConfigError("feedback: give a database as postgresql://user:password@host:5432/name") from None
    if not place.database:
        raise ConfigError("feedback: the URL names no database: postgresql://user:password@host:5432/NAME")
    return place.set(drivername="postgresql+psycopg")


def _postgres_engine(place: URL) -> Engine:
    try:
        return create_engine(place, pool_pre_ping=True, hide_parameters=True, connect_args={"connect_timeout": WAIT_S})
    except ModuleNotFoundError:
        raise ConfigError("feedback in PostgreSQL needs its driver: pip install 'rlhf-ray[postgres]'") from None


def _has_file(path: Path) -> bool:
    if not path.exists():
        if not path.parent.is_dir():
            raise DataError(f"no folder {path.parent} for the feedback store: make it, or name another place")
        return False
    if not path.is_file():
        raise DataError(f"{path} is not a file: name one for the feedback store")
    return path.stat().st_size > 0


def _recognise(path: Path) -> None:
    """`DataError` for a file of something else, or of a newer version, before anything in it is changed."""
    engine = create_engine(
        URL.create("sqlite", database=f"file:{quote(str(path.absolute()))}", query={"mode": "ro", "uri": "true"})
    )
    try:
        with engine.connect() as connection:
            migrations.version_of(connection)
    except DatabaseError as error:
        raise DataError(
            f"{path} cannot be opened as a feedback store ({error.orig}): name another file, or restore it from a copy"
        ) from None
    except DataError as error:
        raise DataError(f"{path} {error}") from None
    finally:
        engine.dispose()


def _sync_folder(folder: Path) -> None:
    """SQLite syncs its own files; that the new file has a name is the folder's to remember."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""How a SQLite file is opened that several processes read and write: durable, patient, append-only where asked.

WAL with `synchronous=FULL`: a commit that returned survives a power cut, and readers never wait. A transaction that
writes says so at its start (`BEGIN IMMEDIATE`), so that none is refused halfway. WAL needs a local disk.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, MetaData, Table, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from rlhf_ray.errors import ConfigError, DataError, InfrastructureError

BUSY_TIMEOUT_MS = 10_000


def file_of(url: str | Path, *, what: str) -> Path:
    """The file that `sqlite:///folder/x.db`, or a path, names; `ConfigError` where it is none."""
    if isinstance(url, Path):
        return url
    if url and ":" not in url:
        return Path(url)
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(f"{what}: give a file as sqlite:///folder/name.db") from None
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"{what}: only SQLite files are read and written: give one as sqlite:///folder/name.db")
    return Path(str(parsed.database))


class Database:
    """One file with its tables, made where it is not there yet."""

    def __init__(self, path: Path, metadata: MetaData, *, what: str) -> None:
        self.path = path
        self._what = what
        if not path.parent.is_dir():
            raise DataError(f"no folder {path.parent} for the {what}: make it, or name another place")
        self._engine = open_engine(path)
        with self.writing() as connection:
            metadata.create_all(connection)

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the file."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except DatabaseError as error:
            raise DataError(f"{self._what} {self.path} cannot be read ({error.orig}): name another file") from None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes; committed, and on the disk, once it is left without an error."""
        try:
            with self._engine.execution_options(writes=True).begin() as connection:
                yield connection
        except OperationalError as error:
            raise InfrastructureError(
                f"nothing was written to {self._what} {self.path} ({error.orig}): mend that and try again"
            ) from None
        except DatabaseError as error:
            raise DataError(f"{self._what} {self.path} refuses that ({error.orig})") from None


def open_engine(path: Path, *, read_only: bool = False) -> Engine:
    """An engine whose every connection is durable; a transaction that writes asks for it with `writes=True`."""
    # people's words are parameters of statements, and errors end up in logs
    engine = create_engine(URL.create("sqlite", database=str(path)), hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # BEGIN is ours to say, below
        # secure_delete: what is purged is overwritten, not just unlinked
        for pragma in (
            f"busy_timeout = {BUSY_TIMEOUT_MS}",
            "foreign_keys = ON",
            "synchronous = FULL",
            "secure_delete = ON",
        ):
            connection.execute(f"PRAGMA {pragma}")
        if read_only:
            connection.execute("PRAGMA query_only = ON")
            return
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise DataError(f"{path} cannot use SQLite's WAL mode (got '{mode}'): put it on a local disk")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        # IMMEDIATE: a reader that turns writer halfway could be refused after its work
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def copy_database(source: Path, target: Path) -> None:
    """All that is committed, from a file that others may be writing: what is still in its log is not in the file."""
    target.unlink(missing_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as reading,
            closing(sqlite3.connect(target)) as writing,
        ):
            reading.backup(writing)
    except sqlite3.Error as error:
        raise DataError(f"{source} cannot be copied ({error}): mend that, or restore it from a copy") from None


def append_only(table: Table) -> None:
    """A table whose rows are never changed: its triggers are made with it."""
    keys = [column.name for column in table.primary_key.columns]
    for statement in append_only_triggers(table.name, keys, has_id="id" in table.c):
        _on_create(table, statement)


def append_only_triggers(name: str, keys: Sequence[str], *, has_id: bool) -> list[str]:
    """Triggers that refuse any change of a row, by whatever program.

    INSERT OR REPLACE would get round the one on DELETE, hence the one on INSERT.
    """
    refuse = f"BEGIN SELECT RAISE(ABORT, '{name} is append-only'); END"
    same = " AND ".join(f"{key} = NEW.{key}" for key in keys) + (" OR id = NEW.id" if has_id else "")
    return [
        *(f"CREATE TRIGGER {name}_no_{verb.lower()} BEFORE {verb} ON {name} {refuse}" for verb in ("UPDATE", "DELETE")),
        f"CREATE TRIGGER {name}_no_replace BEFORE INSERT ON {name} "
        f"WHEN EXISTS (SELECT 1 FROM {name} WHERE ({same})) {refuse}",
    ]


@contextmanager
def erasing(connection: Connection) -> Iterator[None]:
    """Within a transaction: append-only tables let rows be removed in here, and in no other connection."""
    triggers = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").all()
    for name, _ in triggers:
        connection.exec_driver_sql(f"DROP TRIGGER {name}")
    yield
    for _, statement in triggers:
        connection.exec_driver_sql(statement)


def _on_create(table: Table, statement: str) -> None:
    def run(_table: Table, connection: Connection, **_: object) -> None:
        connection.exec_driver_sql(statement)

    event.listen(table, "after_create", run)

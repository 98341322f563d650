"""The tables behind the store, how its file is recognised, and the lock that lets one process write.

How a file is opened is in `sqlite.py`. The one writer is enforced by `flock` on `<database>.lock`, held while a
store is open for writing: the kernel gives it back when the process ends, however it ends. The lock needs a local disk.
"""

import fcntl
import os
import socket
import sqlite3
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import Column, ForeignKey, Index, Integer, MetaData, Table, Text

from rlhf_ray.errors import DataError, InfrastructureError
from rlhf_ray.sqlite import append_only

SCHEMA_VERSION = 3
"""1: feedback and snapshots. 2: completions, request keys, and `completion_id` in feedback. 3: exclusions; points,
strength and seconds in feedback. Opening for writing brings an older file up to date, in one transaction; a newer one
is refused."""

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

exclusions = Table(
    "exclusions",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("what", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("out", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("by", Text, nullable=False),
    Column("created_at", Text, nullable=False),
)
"""Flags; see `exclusions.py`."""


for _table in (feedback, snapshots, snapshot_rows, request_keys, exclusions):
    append_only(_table)


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

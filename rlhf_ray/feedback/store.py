"""Feedback that survives: an append-only store in one SQLite file, with frozen, hashed snapshots to train from.

`add` returns once its rows are on disk, all of them or none. Rows are never changed or removed: triggers refuse
it from any connection. One process writes (see `tables`), any number reads beside it.
"""

import hashlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, func, insert, inspect, select
from sqlalchemy.exc import DatabaseError, OperationalError

from rlhf_ray.errors import DataError, FeedbackError, InfrastructureError
from rlhf_ray.feedback import completions, exclusions, tables
from rlhf_ray.feedback.completions import Completion
from rlhf_ray.feedback.exclusions import Excluded, What
from rlhf_ray.feedback.requests import KeyReused, Receipt, RequestKey, Submission, known_answers, remember, replay
from rlhf_ray.feedback.schema import Feedback, Kind, canonical_json, parse_feedback, to_json
from rlhf_ray.feedback.summary import StoreStats, summarise
from rlhf_ray.sqlite import file_of, open_engine

PAGE = 1_000
_NOBODY = Excluded(frozenset(), frozenset())
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen set of feedback: what a training run reads and what its report names."""

    id: str
    sha256: str
    """Over the rows' canonical JSON, one a line, in the order in which they were added."""
    rows: int


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of feedback; `cursor` is where the next one begins, `more` whether there is one now."""

    items: tuple[Feedback, ...]
    cursor: int
    more: bool


class FeedbackStore:
    """An open store; `url` is `sqlite:///folder/feedback.db` or a file's path. Close it, or use it in a `with`."""

    def __init__(self, url: str | Path, *, read_only: bool = False) -> None:
        self.path = file_of(url, what="feedback")
        version = tables.recognise(self.path)
        if read_only and version is None:
            raise DataError(f"no feedback store at {self.path}: check the path, or write feedback first")
        self.read_only = read_only
        self._lock = None if read_only else tables.WriterLock(self.path)
        self.broken = False
        """The disk failed during a write: nothing is acknowledged any more, until the store is opened anew."""
        self._engine = open_engine(self.path, read_only=read_only)
        if not read_only:
            self._create()

    def __enter__(self) -> "FeedbackStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file and of the right to write to it."""
        self._engine.dispose()
        if self._lock:
            self._lock.release()

    def add(self, items: Sequence[Feedback]) -> list[str]:
        """Write all of it durably in one transaction, or nothing; the ids, in order.

        An id that is there already with the same judgement is not written again, so that sending twice is safe;
        with another judgement it is refused.
        """
        self.add_all(items)
        return [item.id for item in items]

    def add_all(self, items: Iterable[Feedback]) -> int:
        """The same of any number, which is never held as a whole; how many were not there before."""
        items, new = iter(items), 0
        with self._writing() as connection:
            while batch := list(islice(items, PAGE)):
                new += _add(connection, batch)
        return new

    def commit(self, submissions: Sequence[Submission], kept: Sequence[Completion] = ()) -> list[Receipt | KeyReused]:
        """Write many requests' feedback and completions with one wait for the disk; an outcome a submission, in order.

        All of it is durable on return, or none of it. A submission whose key is known is not written again.
        """
        with self._writing() as connection:
            completions.keep(connection, kept)
            keys = [submission.key for submission in submissions if submission.key]
            known = known_answers(connection, keys)
            outcomes: list[Receipt | KeyReused] = []
            fresh: list[Submission] = []
            for submission in submissions:
                key = submission.key
                if key and (key.caller, key.key) in known:
                    outcomes.append(replay(key, known[key.caller, key.key]))
                    continue
                if key:
                    known[key.caller, key.key] = (key.request_sha256, submission.answer)
                fresh.append(submission)
                outcomes.append(Receipt(submission.answer))
            rows = [_row(item, to_json(item)) for submission in fresh for item in submission.items]
            if rows:
                connection.execute(insert(tables.feedback), rows)
            remember(connection, fresh)
        return outcomes

    def answered(self, key: RequestKey) -> Receipt | KeyReused | None:
        """What a request of this key was answered with, None where the key is new."""
        with self._reading() as connection:
            known = known_answers(connection, [key])
        return replay(key, known[key.caller, key.key]) if known else None

    def get(self, id_: str) -> Feedback | None:
        """The feedback of that id, None where there is none."""
        query = select(tables.feedback.c.body).where(tables.feedback.c.id == id_)
        with self._reading() as connection:
            body = connection.execute(query).scalar()
        return None if body is None else parse_feedback(body)

    def page(self, *, after: int = 0, limit: int = 100, kind: Kind | None = None, annotator: str | None = None) -> Page:
        """Feedback in the order in which it was added, from behind a place; what is added later is behind the page."""
        wanted = {"kind": kind, "annotator": annotator}
        conditions = [tables.feedback.c[column] == value for column, value in wanted.items() if value is not None]
        query = (
            select(tables.feedback.c.seq, tables.feedback.c.body)
            .where(tables.feedback.c.seq > after, *conditions)
            .order_by("seq")
            .limit(limit + 1)
        )
        with self._reading() as connection:
            rows = connection.execute(query).all()
        shown = rows[:limit]
        items = tuple(parse_feedback(row.body) for row in shown)
        return Page(items, cursor=shown[-1].seq if shown else after, more=len(rows) > limit)

    def completion(self, id_: str) -> Completion | None:
        """The kept completion of that id, None where it never was or is gone."""
        with self._reading() as connection:
            return completions.find(connection, id_)

    def purge_completions(
        self, *, ids: Iterable[str] | None = None, caller: str | None = None, before: datetime | None = None
    ) -> int:
        """Remove kept completions that fit all that is given, their text wiped from the file; how many went."""
        with self._writing() as connection:
            gone = completions.purge(connection, ids=ids, caller=caller, before=before)
        if gone:
            with self._reading() as connection:  # the log still holds the old pages until it is folded in
                connection.exec_driver_sql("COMMIT")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
                connection.exec_driver_sql("BEGIN")
        return gone

    def count(self) -> int:
        """How many rows there are."""
        with self._reading() as connection:
            return connection.execute(select(func.count()).select_from(tables.feedback)).scalar_one()

    def iter(
        self, *, kind: Kind | None = None, annotator: str | None = None, prompt_id: str | None = None
    ) -> Iterator[Feedback]:
        """Feedback in the order in which it was added, all that was there when the iteration began."""
        wanted = {"kind": kind, "annotator": annotator, "prompt_id": prompt_id}
        conditions = [tables.feedback.c[column] == value for column, value in wanted.items() if value is not None]
        return (parse_feedback(body) for body in self._pages(conditions))

    def flag(self, what: What, names: Sequence[str], *, out: bool = True, reason: str, by: str) -> int:
        """Leaves annotators, or pieces of feedback by id, out of snapshots from now on, or no longer.

        Returns how many rows that are there it is about; `DataError` where nothing is there of a name.
        """
        column = tables.feedback.c.annotator if what == "annotator" else tables.feedback.c.id
        with self._writing() as connection:
            query = select(column, func.count()).where(column.in_(names)).group_by(column)
            counts = {row[0]: int(row[1]) for row in connection.execute(query)}
            if unknown := [name for name in names if name not in counts]:
                raise DataError(f"feedback store {self.path} holds nothing of {what} '{unknown[0]}': check the name")
            exclusions.flag(connection, what, names, out=out, reason=reason, by=by)
        return sum(counts.values())

    def excluded(self) -> Excluded:
        """What is left out of snapshots now."""
        with self._reading() as connection:
            return exclusions.excluded(connection) if self._knows(tables.exclusions) else _NOBODY

    def freeze(self, name: str | None = None, *, of: str | None = None) -> Snapshot:
        """A snapshot of all rows of now, or of those of another snapshot, less what is excluded.

        The same rows under the same name are the same snapshot. Without a name it is called after its hash.
        """
        if name is not None and not _NAME.fullmatch(name):
            raise DataError(f"snapshot name '{name}': use small letters, digits, - and _, at most 64")
        columns = tables.feedback.c
        query = select(columns.seq, columns.id, columns.annotator, columns.body).order_by(columns.seq)
        if of is not None:
            members = tables.snapshot_rows.c
            query = query.join(tables.snapshot_rows, members.seq == columns.seq).where(members.snapshot_id == of)
        with self._writing() as connection:
            if of is not None:
                _known_snapshot(connection, of, self.path)
            out = exclusions.excluded(connection)
            digest, rows = hashlib.sha256(), list[int]()
            for row in connection.execute(query.execution_options(yield_per=PAGE)):
                if not out.has(row.id, row.annotator):
                    digest.update(f"{row.body}\n".encode())
                    rows.append(row.seq)
            if not rows:
                raise DataError(
                    f"feedback store {self.path} has nothing to freeze: write or import feedback first, or take an "
                    "exclusion back"
                )
            sha256 = digest.hexdigest()
            snapshot = Snapshot(name or f"s-{sha256[:12]}", sha256, len(rows))
            known = _snapshots(connection).get(snapshot.id)
            if known is None:
                connection.execute(
                    insert(tables.snapshots), {"id": snapshot.id, "sha256": sha256, "rows": snapshot.rows}
                )
                connection.execute(
                    insert(tables.snapshot_rows), [{"snapshot_id": snapshot.id, "seq": seq} for seq in rows]
                )
            elif known != snapshot:
                raise DataError(
                    f"snapshot '{name}' exists with {known.rows} rows, there would now be {snapshot.rows}: "
                    "choose another name, or leave it out"
                )
        return snapshot

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, by id."""
        with self._reading() as connection:
            return sorted(_snapshots(connection).values(), key=lambda snapshot: snapshot.id)

    def read(self, snapshot_id: str) -> Iterator[Feedback]:
        """A snapshot's feedback, its hash checked before the first row is handed out."""
        members = tables.snapshot_rows
        with self._reading() as connection:
            snapshot = _known_snapshot(connection, snapshot_id, self.path)
            query = (
                select(tables.feedback.c.body)
                .join(members, members.c.seq == tables.feedback.c.seq)
                .where(members.c.snapshot_id == snapshot_id)
                .order_by(tables.feedback.c.seq)
            )
            bodies = list(connection.execute(query).scalars())
        digest = _sha256(bodies)
        if digest != snapshot.sha256:
            raise DataError(
                f"snapshot '{snapshot_id}' in {self.path} was changed after it was frozen "
                f"(sha256 {digest[:12]}, frozen as {snapshot.sha256[:12]}): restore the file from a copy"
            )
        return (parse_feedback(body) for body in bodies)

    def stats(self) -> StoreStats:
        """Counts and mean ratings, by kind, by sampler and by annotator."""
        return summarise(self.iter())

    def _create(self) -> None:
        try:
            with self._writing() as connection:
                tables.metadata.create_all(connection)
                version = connection.execute(select(func.max(tables.schema_version.c.version))).scalar()
                if version != tables.SCHEMA_VERSION:
                    connection.execute(insert(tables.schema_version), {"version": tables.SCHEMA_VERSION})
            _sync_folder(self.path.parent)
        except BaseException:
            self.close()
            raise

    def _knows(self, table: Table) -> bool:
        """Whether the file has this table: a store of an earlier version, opened read_only, stays as it is."""
        return inspect(self._engine).has_table(table.name)

    def _pages(self, conditions: list[ColumnElement[bool]]) -> Iterator[str]:
        # A page at a time, so that no transaction stays open while the caller thinks.
        with self._reading() as connection:
            last = connection.execute(select(func.max(tables.feedback.c.seq))).scalar() or 0
        done = 0
        while done < last:
            page = (
                select(tables.feedback.c.seq, tables.feedback.c.body)
                .where(tables.feedback.c.seq.between(done + 1, last), *conditions)
                .order_by("seq")
                .limit(PAGE)
            )
            with self._reading() as connection:
                rows = connection.execute(page).all()
            for row in rows:
                yield row.body
            done = rows[-1].seq if len(rows) == PAGE else last

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except DatabaseError as error:
            raise DataError(f"feedback store {self.path} cannot be read: {error.orig}") from None

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        assert not self.read_only, "this store was opened read_only"
        if self.broken:
            raise InfrastructureError(f"feedback store {self.path} takes nothing after a disk error: open it anew")
        try:
            with self._engine.execution_options(writes=True).begin() as connection:
                yield connection
        except OperationalError as error:
            # After a failed fsync the next one may succeed without having written: a new process has to look.
            code = getattr(error.orig, "sqlite_errorcode", 0)
            self.broken = code & 0xFF == sqlite3.SQLITE_IOERR
            raise InfrastructureError(
                f"nothing was written to feedback store {self.path}: {error.orig}; mend that and repeat the command"
            ) from None


def _add(connection: Connection, items: Sequence[Feedback]) -> int:
    """How many of them were new."""
    bodies: dict[str, tuple[Feedback, str]] = {}
    for item in items:
        body = to_json(item)
        earlier = bodies.setdefault(item.id, (item, body))
        _same_judgement(item.id, earlier[1], body)
    for id_, body in _existing(connection, list(bodies)):
        _same_judgement(id_, body, bodies.pop(id_)[1])
    if bodies:
        connection.execute(insert(tables.feedback), [_row(item, body) for item, body in bodies.values()])
    return len(bodies)


def _row(item: Feedback, body: str) -> dict[str, Any]:
    return {
        "id": item.id,
        "kind": item.kind,
        "prompt_id": item.prompt_id,
        "annotator": item.annotator,
        "body": body,
    }


def _existing(connection: Connection, ids: list[str]) -> Iterator[tuple[str, str]]:
    for start in range(0, len(ids), PAGE // 2):
        some = ids[start : start + PAGE // 2]
        query = select(tables.feedback.c.id, tables.feedback.c.body).where(tables.feedback.c.id.in_(some))
        for row in connection.execute(query).all():
            yield row.id, row.body


def _same_judgement(id_: str, first: str, second: str) -> None:
    if first != second and _without_time(first) != _without_time(second):
        raise FeedbackError(f"feedback id '{id_}' is taken by another judgement: leave the id out, or choose another")


def _without_time(body: str) -> str:
    # Who sends again does so later: the time is not part of what was said.
    return canonical_json(parse_feedback(body).model_dump(exclude={"created_at"}))


def _snapshots(connection: Connection) -> dict[str, Snapshot]:
    return {row.id: Snapshot(row.id, row.sha256, row.rows) for row in connection.execute(select(tables.snapshots))}


def _known_snapshot(connection: Connection, id_: str, path: Path) -> Snapshot:
    known = _snapshots(connection)
    if id_ not in known:
        raise DataError(f"no snapshot '{id_}' in {path}; there are: {', '.join(sorted(known)) or 'none yet'}")
    return known[id_]


def _sha256(bodies: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for body in bodies:
        digest.update(body.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """SQLite syncs its own files; that the new file has a name is the folder's to remember."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

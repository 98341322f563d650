"""Feedback that survives: an append-only store, with frozen, hashed snapshots to train from.

`add` returns once its rows are on disk, all of them or none. Rows are never changed or removed: triggers refuse it from
any connection; `erase` alone is let through. Where the rows lie is in `databases.py`.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, func, insert, inspect, select

from rlhf_ray.errors import DataError, FeedbackError
from rlhf_ray.feedback import completions, erasure, exclusions, tables
from rlhf_ray.feedback.completions import Completion
from rlhf_ray.feedback.databases import open_database
from rlhf_ray.feedback.erasure import Erased
from rlhf_ray.feedback.exclusions import Excluded, What
from rlhf_ray.feedback.influence import beyond
from rlhf_ray.feedback.requests import KeyReused, Receipt, RequestKey, Submission, known_answers, remember, replay
from rlhf_ray.feedback.schema import Feedback, Kind, canonical_json, parse_feedback, to_json
from rlhf_ray.feedback.summary import StoreStats, summarise

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
    """An open store. `url`: a file's path, `sqlite:///folder/feedback.db`, or `postgresql://user@host/name`.

    Close it, or use it in a `with`.
    """

    def __init__(self, url: str | Path, *, read_only: bool = False) -> None:
        self._database = open_database(url, read_only=read_only)
        self.name = self._database.name
        """For messages."""

    @property
    def broken(self) -> bool:
        """The disk failed during a write: nothing is acknowledged any more, until the store is opened anew."""
        return self._database.broken

    def __enter__(self) -> "FeedbackStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the database, and of the right to write to it."""
        self._database.close()

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
        with self.writing() as connection:
            while batch := list(islice(items, PAGE)):
                new += add_rows(connection, batch)
        return new

    def commit(self, submissions: Sequence[Submission], kept: Sequence[Completion] = ()) -> list[Receipt | KeyReused]:
        """Write many requests' feedback and completions with one wait for the disk; an outcome a submission, in order.

        All of it is durable on return, or none of it. A submission whose key is known is not written again.
        """
        with self.writing() as connection:
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
        with self.reading() as connection:
            known = known_answers(connection, [key])
        return replay(key, known[key.caller, key.key]) if known else None

    def get(self, id_: str) -> Feedback | None:
        """The feedback of that id, None where there is none."""
        query = select(tables.feedback.c.body).where(tables.feedback.c.id == id_)
        with self.reading() as connection:
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
        with self.reading() as connection:
            rows = connection.execute(query).all()
        shown = rows[:limit]
        items = tuple(parse_feedback(row.body) for row in shown)
        return Page(items, cursor=shown[-1].seq if shown else after, more=len(rows) > limit)

    def completion(self, id_: str) -> Completion | None:
        """The kept completion of that id, None where it never was or is gone."""
        with self.reading() as connection:
            return completions.find(connection, id_)

    def purge_completions(
        self, *, ids: Iterable[str] | None = None, caller: str | None = None, before: datetime | None = None
    ) -> int:
        """Remove kept completions that fit all that is given, their text wiped from the file; how many went."""
        with self.writing() as connection:
            gone = completions.purge(connection, ids=ids, caller=caller, before=before)
        if gone:
            self._database.wipe()
        return gone

    def erase(
        self,
        *,
        annotator: str | None = None,
        text: str | None = None,
        reason: str,
        by: str,
        dry_run: bool = False,
    ) -> Erased:
        """Removes an annotator's feedback, or all that holds a text, for good; `dry_run` only counts. See `erasure`."""
        with self.writing() as connection:
            found = erasure.find(connection, annotator=annotator, text=text)
            if not dry_run:
                with self._database.erasing(connection):
                    erasure.remove(connection, found, annotator=annotator)
                erasure.note(connection, found, annotator=annotator, reason=reason, by=by)
        if not dry_run:
            self._database.wipe()
        return found.counted()

    def count(self) -> int:
        """How many rows there are."""
        with self.reading() as connection:
            return connection.execute(select(func.count()).select_from(tables.feedback)).scalar_one()

    def iter(
        self, *, kind: Kind | None = None, annotator: str | None = None, prompt_id: str | None = None
    ) -> Iterator[Feedback]:
        """Feedback in the order in which it was added, all that was there when the iteration began."""
        wanted = {"kind": kind, "annotator": annotator, "prompt_id": prompt_id}
        conditions = [tables.feedback.c[column] == value for column, value in wanted.items() if value is not None]
        return (parse_feedback(body) for body in self._pages(conditions))

    def counted(self, *, of_all: bool = False) -> Iterator[Feedback]:
        """Feedback less what is excluded now; with `of_all`, less single judgements only, whoever made them."""
        out = self.excluded()
        if of_all:
            out = Excluded(frozenset(), out.feedback)
        return (item for item in self.iter() if not out.has(item.id, item.annotator))

    def flag(self, what: What, names: Sequence[str], *, out: bool = True, reason: str, by: str) -> int:
        """Leaves annotators, or pieces of feedback by id, out of snapshots from now on, or no longer.

        Returns how many rows that are there it is about; `DataError` where nothing is there of a name.
        """
        with self.writing() as connection:
            return exclusions.flag(connection, what, names, out=out, reason=reason, by=by)

    def excluded(self) -> Excluded:
        """What is left out of snapshots now."""
        if not self.knows(tables.exclusions):
            return _NOBODY
        with self.reading() as connection:
            return exclusions.excluded(connection)

    def freeze(self, name: str | None = None, *, of: str | None = None, cap: float | None = None) -> Snapshot:
        """A snapshot of all rows of now, or of those of another snapshot, less what is excluded.

        With a cap, nobody's judgements are more than that share of it: of who judged more, some are drawn, the same
        ones each time. The same rows under the same name are the same snapshot. Without a name it is called after its
        hash.
        """
        if name is not None and not _NAME.fullmatch(name):
            raise DataError(f"snapshot name '{name}': use small letters, digits, - and _, at most 64")
        columns = tables.feedback.c
        query = select(columns.seq, columns.id, columns.annotator, columns.body).order_by(columns.seq)
        if of is not None:
            members = tables.snapshot_rows.c
            query = query.join(tables.snapshot_rows, members.seq == columns.seq).where(members.snapshot_id == of)
        with self.writing() as connection:
            if of is not None:
                _known_snapshot(connection, of, self.name)
            out = exclusions.excluded(connection)
            digest, rows = hashlib.sha256(), list[int]()
            surplus: frozenset[int] = frozenset()
            if cap is not None:
                names = connection.execute(query.with_only_columns(columns.seq, columns.id, columns.annotator))
                surplus = beyond(cap, [(row.seq, row.annotator) for row in names if not out.has(row.id, row.annotator)])
            for row in connection.execute(query.execution_options(yield_per=PAGE)):
                if not out.has(row.id, row.annotator) and row.seq not in surplus:
                    digest.update(f"{row.body}\n".encode())
                    rows.append(row.seq)
            if not rows:
                raise DataError(
                    f"feedback store {self.name} has nothing to freeze: write or import feedback first, or take an "
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
        with self.reading() as connection:
            return sorted(_snapshots(connection).values(), key=lambda snapshot: snapshot.id)

    def members(self, snapshot_id: str) -> set[str]:
        """The ids of what a snapshot holds and was not erased since; none where there is no such snapshot."""
        members = tables.snapshot_rows.c
        query = (
            select(tables.feedback.c.id)
            .join(tables.snapshot_rows, members.seq == tables.feedback.c.seq)
            .where(members.snapshot_id == snapshot_id)
        )
        with self.reading() as connection:
            return set(connection.execute(query).scalars())

    def read(self, snapshot_id: str) -> Iterator[Feedback]:
        """A snapshot's feedback, its hash checked before the first row is handed out."""
        members = tables.snapshot_rows
        with self.reading() as connection:
            snapshot = _known_snapshot(connection, snapshot_id, self.name)
            query = (
                select(tables.feedback.c.body)
                .join(members, members.c.seq == tables.feedback.c.seq)
                .where(members.c.snapshot_id == snapshot_id)
                .order_by(tables.feedback.c.seq)
            )
            bodies = list(connection.execute(query).scalars())
            lost = erasure.lost(connection, snapshot_id) if self.knows(tables.erasures) else None
        digest = _sha256(bodies)
        if digest != snapshot.sha256:
            if lost:
                raise DataError(
                    f"snapshot '{snapshot_id}' in {self.name} lost rows to an erasure on {lost}: freeze what is left "
                    f"(`rlhf feedback snapshot --of {snapshot_id}`) and read that"
                )
            raise DataError(
                f"snapshot '{snapshot_id}' in {self.name} was changed after it was frozen "
                f"(sha256 {digest[:12]}, frozen as {snapshot.sha256[:12]}): restore the file from a copy"
            )
        return (parse_feedback(body) for body in bodies)

    def stats(self) -> StoreStats:
        """Counts and mean ratings by kind, by sampler and by annotator, of what is not excluded."""
        return summarise(self.counted())

    def knows(self, table: Table) -> bool:
        """Whether the database has this table: a store of an earlier version, opened read_only, stays as it is."""
        with self.reading() as connection:
            return inspect(connection).has_table(table.name)

    def _pages(self, conditions: list[ColumnElement[bool]]) -> Iterator[str]:
        # A page at a time, so that no transaction stays open while the caller thinks.
        with self.reading() as connection:
            last = connection.execute(select(func.max(tables.feedback.c.seq))).scalar() or 0
        done = 0
        while done < last:
            page = (
                select(tables.feedback.c.seq, tables.feedback.c.body)
                .where(tables.feedback.c.seq.between(done + 1, last), *conditions)
                .order_by("seq")
                .limit(PAGE)
            )
            with self.reading() as connection:
                rows = connection.execute(page).all()
            for row in rows:
                yield row.body
            done = rows[-1].seq if len(rows) == PAGE else last

    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction that sees one state of the store."""
        return self._database.reading()

    def writing(self) -> AbstractContextManager[Connection]:
        """A transaction that writes, durable once it is left without an error; no other one writes meanwhile."""
        return self._database.writing()


def add_rows(connection: Connection, items: Sequence[Feedback]) -> int:
    """What `add_all` does with one page, within a transaction; how many of them were new."""
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


def _known_snapshot(connection: Connection, id_: str, name: str) -> Snapshot:
    known = _snapshots(connection)
    if id_ not in known:
        raise DataError(f"no snapshot '{id_}' in {name}; there are: {', '.join(sorted(known)) or 'none yet'}")
    return known[id_]


def _sha256(bodies: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for body in bodies:
        digest.update(body.encode())
        digest.update(b"\n")
    return digest.hexdigest()

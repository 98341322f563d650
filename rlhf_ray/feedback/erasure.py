"""Erasure: an annotator's feedback, or all that holds a text, removed for good, and which snapshots had held it.

The one exception to rows being never removed, for people who have a right to it. What is left is a note without the
name or the words: how many rows went, why, by whose decision, and from which snapshots. Such a snapshot is not read any
more; what is left of it can be frozen anew. Models that learnt from it still know: each one's lineage names its
snapshot.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, delete, insert, select

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback import tables
from rlhf_ray.feedback.schema import iso, now

LEAST_TEXT = 4
"""Characters of a text that is looked for: fewer would be in everything."""
AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Erased:
    """What went, or would."""

    feedback: int
    """Judgements."""
    completions: int
    """Kept answers."""
    tasks: int
    """Things to be judged."""
    steps: int
    """Notes of what was shown to whom, answered and skipped."""
    snapshots: tuple[str, ...]
    """That held some of the feedback."""


@dataclass(frozen=True, slots=True)
class Found:
    """Which rows an erasure is about."""

    feedback: list[int]
    completions: list[str]
    tasks: list[str]
    steps: list[int]
    snapshots: tuple[str, ...]

    def counted(self) -> Erased:
        """How many of each."""
        return Erased(
            len(self.feedback), len(self.completions), len(self.tasks), len(self.steps), snapshots=self.snapshots
        )


def find(connection: Connection, *, annotator: str | None, text: str | None) -> Found:
    """What is of an annotator, or holds a text anywhere."""
    if annotator is not None and text is None:
        return _of_annotator(connection, annotator)
    if text is not None and annotator is None:
        return _holding(connection, text)
    raise FeedbackError("say what to erase: an annotator's feedback, or what holds a text")


def remove(connection: Connection, found: Found, *, annotator: str | None) -> None:
    """Removes what was found, where tables let it."""
    for table, column, names in (
        (tables.snapshot_rows, "seq", found.feedback),
        (tables.feedback, "seq", found.feedback),
        (tables.completions, "id", found.completions),
        (tables.task_events, "seq", found.steps),
        (tables.tasks, "id", found.tasks),
    ):
        for some in _batches(names):
            connection.execute(delete(table).where(table.c[column].in_(some)))
    if annotator is not None:
        flags = tables.exclusions.c
        connection.execute(delete(tables.exclusions).where(flags.what == "annotator", flags.name == annotator))


def note(connection: Connection, found: Found, *, annotator: str | None, reason: str, by: str) -> None:
    """What stays of it."""
    row = {
        "what": "text" if annotator is None else "annotator",
        "rows": len(found.feedback),
        "snapshots": json.dumps(found.snapshots),
        "reason": reason,
        "by": by,
        "created_at": iso(now()),
    }
    connection.execute(insert(tables.erasures), row)


def lost(connection: Connection, snapshot: str) -> str | None:
    """The day on which a snapshot last lost rows to an erasure, None where it never did."""
    days = [
        row.created_at[:10]
        for row in connection.execute(select(tables.erasures).order_by(tables.erasures.c.seq))
        if snapshot in json.loads(row.snapshots)
    ]
    return days[-1] if days else None


def _of_annotator(connection: Connection, name: str) -> Found:
    rows, steps = tables.feedback.c, tables.task_events.c
    feedback = list(connection.execute(select(rows.seq).where(rows.annotator == name)).scalars())
    noted = list(connection.execute(select(steps.seq).where(steps.annotator == name)).scalars())
    return Found(feedback, [], [], noted, _snapshots(connection, feedback))


def _holding(connection: Connection, text: str) -> Found:
    if len(text.strip()) < LEAST_TEXT:
        raise FeedbackError(f"a text of fewer than {LEAST_TEXT} characters is in too much: give a longer one")
    feedback = [row.seq for row in _rows(connection, tables.feedback, "seq") if _has(row.body, text)]
    completions = [row.id for row in _rows(connection, tables.completions, "id") if _has(row.body, text)]
    tasks = [row.id for row in _rows(connection, tables.tasks, "id") if _has(row.body, text)]
    gone = set(tasks)
    steps = [
        row.seq
        for row in _rows(connection, tables.task_events, "seq", "task_id")
        if row.task_id in gone or _has(row.body, text)
    ]
    return Found(feedback, completions, tasks, steps, _snapshots(connection, feedback))


def _rows(connection: Connection, table: Table, *columns: str) -> Iterable[Any]:
    query = select(*(table.c[name] for name in columns), table.c.body).execution_options(yield_per=1_000)
    return connection.execute(query)


def _has(body: str, text: str) -> bool:
    return any(text in part for part in _texts(json.loads(body)))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _snapshots(connection: Connection, rows: list[int]) -> tuple[str, ...]:
    members = tables.snapshot_rows.c
    found: set[str] = set()
    for some in _batches(rows):
        found.update(connection.execute(select(members.snapshot_id).where(members.seq.in_(some)).distinct()).scalars())
    return tuple(sorted(found))


def _batches(names: Sequence[Any]) -> Iterator[Any]:
    return (names[start : start + AT_ONCE] for start in range(0, len(names), AT_ONCE))

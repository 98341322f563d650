"""Whose feedback is left out of snapshots, or which piece of it: flags, set and taken back, never a row removed.

Each flag is a row of its own with who set it, when and why; of several for one name the last one holds. So the same
snapshot can be frozen again without somebody's rows, and later with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import Connection, func, insert, select

from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import now
from rlhf_ray.feedback.tables import exclusions, feedback

What = Literal["annotator", "feedback"]


@dataclass(frozen=True, slots=True)
class Flag:
    """One decision on an annotator, by name, or on a piece of feedback, by id."""

    what: What
    name: str
    out: bool
    """False takes an earlier flag back."""
    reason: str
    by: str
    """Who decided."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Excluded:
    """What is left out now."""

    annotators: frozenset[str]
    feedback: frozenset[str]
    """Ids."""

    def has(self, id_: str, annotator: str) -> bool:
        """Whether this piece of feedback is."""
        return annotator in self.annotators or id_ in self.feedback


def flag(connection: Connection, what: What, names: Sequence[str], *, out: bool, reason: str, by: str) -> int:
    """Sets, or takes back; how many rows it is about. `DataError` where nothing is there of a name."""
    column = feedback.c.annotator if what == "annotator" else feedback.c.id
    query = select(column, func.count()).where(column.in_(names)).group_by(column)
    counts = {row[0]: int(row[1]) for row in connection.execute(query)}
    if unknown := [name for name in names if name not in counts]:
        raise DataError(f"the feedback store holds nothing of {what} '{unknown[0]}': check the name")
    moment = now().isoformat(timespec="microseconds")
    connection.execute(
        insert(exclusions),
        [
            {"what": what, "name": name, "out": int(out), "reason": reason, "by": by, "created_at": moment}
            for name in names
        ],
    )
    return sum(counts.values())


def flags(connection: Connection) -> list[Flag]:
    """All that were ever set, oldest first."""
    return [
        Flag(row.what, row.name, bool(row.out), row.reason, row.by, datetime.fromisoformat(row.created_at))
        for row in connection.execute(select(exclusions).order_by(exclusions.c.seq))
    ]


def excluded(connection: Connection) -> Excluded:
    """By the last flag of each name."""
    last = {(found.what, found.name): found.out for found in flags(connection)}
    names = {what: frozenset(name for (kind, name), out in last.items() if out and kind == what) for what, _ in last}
    return Excluded(names.get("annotator", frozenset()), names.get("feedback", frozenset()))

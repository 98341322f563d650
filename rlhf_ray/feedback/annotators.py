"""Who has judged how much, and who is left out: what can be counted without comparing what was said."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select

from rlhf_ray.feedback import exclusions, tables
from rlhf_ray.feedback.exclusions import Excluded, What
from rlhf_ray.feedback.schema import parse_feedback
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.feedback.tasks import gold_marks


@dataclass(frozen=True, slots=True)
class Annotator:
    """One annotator."""

    name: str
    judgements: int
    last_at: datetime
    """Of the last judgement."""
    gold_right: int
    """Of the tasks whose answer is known, those that came out right."""
    gold_asked: int
    excluded: bool


def annotators(store: FeedbackStore) -> list[Annotator]:
    """All who have judged anything, by name."""
    marks = gold_marks(store)
    rows = tables.feedback.c
    counts = select(rows.annotator, func.count().label("judgements"), func.max(rows.seq).label("last"))
    last = counts.group_by(rows.annotator).subquery()
    query = select(last.c.annotator, last.c.judgements, rows.body).join(tables.feedback, rows.seq == last.c.last)
    with store.reading() as connection:
        out = exclusions.excluded(connection).annotators
        found = connection.execute(query.order_by(last.c.annotator)).all()
    return [
        Annotator(
            row.annotator,
            row.judgements,
            parse_feedback(row.body).created_at,
            *marks.get(row.annotator, (0, 0)),
            excluded=row.annotator in out,
        )
        for row in found
    ]


def exclude(
    store: FeedbackStore,
    *,
    annotators: Sequence[str] = (),
    feedback: Sequence[str] = (),
    out: bool,
    reason: str,
    by: str,
) -> tuple[int, Excluded]:
    """Flags both, or neither; how many rows it is about, and all that is left out after it."""
    wanted: dict[What, Sequence[str]] = {"annotator": annotators, "feedback": feedback}
    with store.writing() as connection:
        rows = sum(
            exclusions.flag(connection, what, names, out=out, reason=reason, by=by)
            for what, names in wanted.items()
            if names
        )
        return rows, exclusions.excluded(connection)

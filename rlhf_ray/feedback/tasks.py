"""The labelling queue: what people are asked, by whom it is being looked at, and what became of it.

A task is shown to `overlap` people. Who is shown one holds it until a moment; not answered by then, it is offered to
others. Nothing is changed: each step of an annotator with a task is a row of its own, and the last one holds.

        next          answer                    undo
    -  ------> shown --------> answered, skipped ------> undone, and shown again
                 |  until
                 +-------> offered to others

An annotator never learns who gave the answers: what is shown has their texts alone, in an order that is drawn anew for
each annotator and kept. `answer`, `skip` and `undo` may be sent again: the second time changes nothing.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StrictInt, ValidationError, model_validator
from sqlalchemy import Connection, Row, Select, and_, func, insert, or_, select

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback import exclusions
from rlhf_ray.feedback.schema import (
    MAX_ANSWERS,
    Answer,
    Feedback,
    Id,
    Label,
    NextBy,
    Number,
    Record,
    canonical_json,
    check_dialogue,
    check_ranks,
    explain,
    iso,
    new_id,
    now,
)
from rlhf_ray.feedback.store import PAGE, FeedbackStore, add_rows
from rlhf_ray.feedback.tables import feedback, guidelines, task_events, tasks
from rlhf_ray.types import Message

State = Literal["shown", "answered", "skipped", "undone"]
MAX_OVERLAP = 100
MAX_GUIDELINES = 100_000
UNDONE = "undone by who said it"
_draw = random.SystemRandom()  # an order that could be computed would tell who gave which answer


class UnknownTask(FeedbackError):
    """There is no such task, or it was not shown to who names it."""


class TaskTaken(FeedbackError):
    """The step does not fit what became of the task: answered already, or others have it now."""


class Gold(Record):
    """What is right, where that is known: annotators are measured by it, and are not told."""

    ranks: tuple[StrictInt, ...] | None = None
    """The place of each answer; who tells apart what this does has to do so in the same way."""
    at_least: Number | None = None
    """The least overall rating, of a task of one answer."""
    at_most: Number | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Gold":
        if (self.ranks is None) == (self.at_least is None and self.at_most is None):
            raise ValueError("gold is either ranks, or at_least and at_most")
        if self.ranks is not None:
            check_ranks(self.ranks)
        return self


class Task(Record):
    """A prompt and 1 to 16 answers that people are to judge."""

    id: Id = Field(default_factory=new_id)
    messages: tuple[Message, ...]
    prompt_id: Label
    group: Label
    answers: tuple[Answer, ...]
    asks: tuple[Literal["ranking", "rating", "thumb", "comment"], ...] = ()
    """What a form shows; by default a ranking of several answers, a rating of one."""
    aspects: Annotated[tuple[Label, ...], Field(max_length=20)] = ("overall",)
    """What ratings are about."""
    overlap: Annotated[StrictInt, Field(ge=1, le=MAX_OVERLAP)] = 1
    """How many people are asked."""
    priority: Number | None = None
    """How much reward models disagree about its answers; the most is asked first, by `disagreement`."""
    gold: Gold | None = None

    @model_validator(mode="after")
    def _can_be_asked(self) -> "Task":
        if not 1 <= len(self.answers) <= MAX_ANSWERS:
            raise ValueError(f"{len(self.answers)} answers: give 1 to {MAX_ANSWERS}")
        if self.gold and (len(self.answers) == 1) != (self.gold.ranks is None):
            raise ValueError("gold of one answer is a range of ratings, of several their ranks")
        if self.gold and self.gold.ranks and len(self.gold.ranks) != len(self.answers):
            raise ValueError(f"{len(self.gold.ranks)} gold ranks for {len(self.answers)} answers: give one an answer")
        if "ranking" in self.asks and len(self.answers) == 1:
            raise ValueError("one answer cannot be ranked: ask for a rating, a thumb or a comment")
        check_dialogue(self.messages)
        return self

    @property
    def policy_version(self) -> int | None:
        """The newest that gave one of the answers."""
        return max(
            (answer.policy_version for answer in self.answers if answer.policy_version is not None), default=None
        )

    @property
    def wanted(self) -> tuple[str, ...]:
        """What is asked for."""
        return self.asks or ("ranking" if len(self.answers) > 1 else "rating",)


@dataclass(frozen=True, slots=True)
class Held:
    """A task as one annotator has it."""

    task: Task
    state: State
    order: tuple[int, ...]
    """Indices into the task's answers, in the order in which they are shown."""
    since: datetime
    """When it was first shown."""
    until: datetime | None
    """While it is shown: until when nobody else is offered its place."""
    feedback: tuple[str, ...] = ()
    """Ids of what was said."""
    reason: str | None = None
    """Why it was skipped."""
    sha256: str | None = None
    """Of the request that it was answered with."""
    cursor: int = 0
    """Its place in the annotator's history."""

    @property
    def seconds(self) -> float:
        """How long it has been shown."""
        return max(0.0, (now() - self.since).total_seconds())

    @property
    def shown(self) -> tuple[str, ...]:
        """The answers' texts as they are shown."""
        return tuple(self.task.answers[index].text for index in self.order)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an annotator is, and everybody."""

    answered: int
    skipped: int
    left: int
    """Tasks that this annotator could be shown now."""
    tasks: int
    complete: int
    """Of all tasks, those that as many people as wanted have answered."""


def add_tasks(store: FeedbackStore, new: Iterable[Task]) -> int:
    """All of them or none, how many were new; what is asked already is not added again, and keeps its priority."""
    new, added = iter(new), 0
    with store.writing() as connection:
        while batch := list(islice(new, PAGE)):
            known = _known_tasks(connection, [task.id for task in batch])
            fresh: list[Task] = []
            for task in batch:
                if known.setdefault(task.id, task) is task:
                    fresh.append(task)
                elif _question(known[task.id]) != _question(task):
                    raise FeedbackError(f"task id '{task.id}' is taken by another task: leave the id out")
            if fresh:
                connection.execute(insert(tasks), [_row(task) for task in fresh])
            added += len(fresh)
    return added


def next_task(store: FeedbackStore, annotator: str, *, by: NextBy, lease: timedelta) -> Held | None:
    """What this annotator is to look at: the task held, for longer, or the next one; None where none is left."""
    moment = now()
    with store.writing() as connection:
        held = _holding(connection, annotator, moment)
        if held is None:
            found = connection.execute(_open_to(annotator, moment, by=by).limit(1)).first()
            if found is None:
                return None
            last = _last(connection, found.id, annotator)
            held = _again(last, since=moment) if last else _drawn(found.body, since=moment)
        return _show(connection, held, annotator, until=moment + lease)


def held_task(store: FeedbackStore, id_: str, annotator: str) -> Held:
    """A task that was shown to this annotator, with the order of its answers; `UnknownTask` for any other."""
    with store.reading() as connection:
        return _known(connection, id_, annotator)


def answer_task(
    store: FeedbackStore, id_: str, annotator: str, items: Sequence[Feedback], *, said: JsonValue
) -> tuple[str, ...]:
    """Keeps what somebody says of a task that they were shown; the ids of it.

    `said` is the request: the same one again gets the same ids and adds nothing. `TaskTaken` for another one, or where
    the time is over and others have the task.
    """
    sha256 = hashlib.sha256(canonical_json(said).encode()).hexdigest()
    moment = now()
    with store.writing() as connection:
        held = _known(connection, id_, annotator)
        if held.state == "answered" and held.sha256 == sha256:
            return held.feedback
        _still_theirs(connection, held, annotator, moment)
        add_rows(connection, items)
        ids = tuple(item.id for item in items)
        _note(connection, held, annotator, "answered", feedback=ids, sha256=sha256)
    return ids


def skip_task(store: FeedbackStore, id_: str, annotator: str, *, reason: str) -> None:
    """Notes that somebody does not want to judge a task; it is not offered to them again."""
    with store.writing() as connection:
        held = _known(connection, id_, annotator)
        if held.state != "skipped":
            _still_theirs(connection, held, annotator, now())
            _note(connection, held, annotator, "skipped", reason=reason)


def undo_task(store: FeedbackStore, id_: str, annotator: str, *, lease: timedelta) -> Held:
    """Takes back an answer or a skip, and shows the task again. What was said is flagged, and left out of snapshots."""
    moment = now()
    with store.writing() as connection:
        held = _known(connection, id_, annotator)
        if held.state in ("answered", "skipped"):
            _has_room(connection, held.task, annotator, moment)  # nobody waits for who has skipped
            said = select(feedback.c.id).where(feedback.c.id.in_(held.feedback))  # some may have been erased since
            if there := list(connection.execute(said).scalars()):
                exclusions.flag(connection, "feedback", there, out=True, reason=UNDONE, by=annotator)
            _note(connection, held, annotator, "undone", feedback=held.feedback)
            held = _again(held, since=moment)
        elif held.state == "shown":
            _still_theirs(connection, held, annotator, moment)
        return _show(connection, held, annotator, until=moment + lease)


def history(store: FeedbackStore, annotator: str, *, before: int | None = None, limit: int = 50) -> list[Held]:
    """What this annotator has answered and skipped, the newest first, from before a place."""
    query = (
        _events()
        .where(
            task_events.c.seq.in_(_latest().where(task_events.c.annotator == annotator)),
            task_events.c.state.in_(("answered", "skipped")),
        )
        .order_by(task_events.c.seq.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(task_events.c.seq < before)
    with store.reading() as connection:
        return [_held(row) for row in connection.execute(query)]


def progress(store: FeedbackStore, annotator: str) -> Progress:
    """How far this annotator is, and all."""
    mine = (
        select(task_events.c.state, func.count())
        .where(task_events.c.seq.in_(_latest().where(task_events.c.annotator == annotator)))
        .group_by(task_events.c.state)
    )
    answered = _count(task_events.c.state == "answered")
    open_ = _open_to(annotator, now(), by="random").order_by(None).subquery()
    complete = select(func.count()).select_from(tasks).join(answered, answered.c.task_id == tasks.c.id)
    with store.reading() as connection:
        own = {row[0]: int(row[1]) for row in connection.execute(mine)}
        return Progress(
            answered=own.get("answered", 0),
            skipped=own.get("skipped", 0),
            left=connection.execute(select(func.count()).select_from(open_)).scalar_one(),
            tasks=connection.execute(select(func.count()).select_from(tasks)).scalar_one(),
            complete=connection.execute(complete.where(answered.c.people >= tasks.c.overlap)).scalar_one(),
        )


def gold_marks(store: FeedbackStore) -> dict[str, tuple[int, int]]:
    """Of each annotator: how many tasks whose answer is known came out right, and how many were answered."""
    marks: dict[str, tuple[int, int]] = {}
    if not store.knows(task_events):
        return marks
    query = _events().where(task_events.c.seq.in_(_latest()), task_events.c.state == "answered")
    with store.reading() as connection:
        for row in connection.execute(query.where(tasks.c.body.contains('"gold":{')).order_by(task_events.c.seq)):
            held = _held(row)
            if held.task.gold is None:  # the words stand somewhere else in it
                continue
            said = [store.get(id_) for id_ in held.feedback]
            right = [_is_right(held.task.gold, item) for item in said if item is not None]
            counted = [verdict for verdict in right if verdict is not None]
            if counted:
                good, asked = marks.get(row.annotator, (0, 0))
                marks[row.annotator] = (good + all(counted), asked + 1)
    return marks


def guide(store: FeedbackStore) -> str | None:
    """What annotators are asked to go by, None where nobody said."""
    with store.reading() as connection:
        text: str | None = connection.execute(
            select(guidelines.c.text).order_by(guidelines.c.seq.desc()).limit(1)
        ).scalar()
    return text


def set_guide(store: FeedbackStore, text: str, *, by: str) -> None:
    """From now on annotators are asked to go by this; what they were asked before stays on record."""
    with store.writing() as connection:
        connection.execute(insert(guidelines), {"text": text, "by": by, "created_at": iso(now())})


def parse_task(fields: dict[str, Any]) -> Task:
    """A task from a mapping; `FeedbackError` with the field at fault in one line."""
    try:
        return Task.model_validate(fields)
    except ValidationError as error:
        raise FeedbackError(f"task is refused: {explain(error)}") from None


def _row(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "overlap": task.overlap,
        "policy_version": task.policy_version,
        "priority": task.priority,
        "shuffle": _draw.random(),
        "body": canonical_json(task.model_dump(mode="json", exclude_none=True)),
    }


def _known_tasks(connection: Connection, ids: Sequence[str]) -> dict[str, Task]:
    query = select(tasks.c.id, tasks.c.body).where(tasks.c.id.in_(ids))
    return {row.id: Task.model_validate_json(row.body) for row in connection.execute(query)}


def _question(task: Task) -> Task:
    """What is asked, whenever it is."""
    return task.model_copy(update={"priority": None})


def _latest() -> Select[tuple[int]]:
    """The last row of each task and annotator."""
    return select(func.max(task_events.c.seq)).group_by(task_events.c.task_id, task_events.c.annotator)


def _events() -> Select[Any]:
    return select(task_events, tasks.c.body.label("task")).join(tasks, tasks.c.id == task_events.c.task_id)


def _count(*conditions: Any) -> Any:
    """How many people stand so with each task, as a table of `task_id` and `people`."""
    return (
        select(task_events.c.task_id, func.count().label("people"))
        .where(task_events.c.seq.in_(_latest()), *conditions)
        .group_by(task_events.c.task_id)
        .subquery()
    )


def _has_place(moment: datetime) -> Any:
    return or_(
        task_events.c.state == "answered",
        and_(task_events.c.state == "shown", task_events.c.until > iso(moment)),
    )


def _open_to(annotator: str, moment: datetime, *, by: NextBy) -> Select[Any]:
    """Tasks with a place left that this annotator has not answered or skipped, the next one first."""
    taken = _count(_has_place(moment), task_events.c.annotator != annotator)
    done = select(task_events.c.task_id).where(
        task_events.c.seq.in_(_latest().where(task_events.c.annotator == annotator)),
        task_events.c.state.in_(("answered", "skipped")),
    )
    first = {
        "random": [],
        "newest": [tasks.c.policy_version.desc().nulls_last()],
        "disagreement": [tasks.c.priority.desc().nulls_last()],
    }[by]
    return (
        select(tasks.c.id, tasks.c.body)
        .outerjoin(taken, taken.c.task_id == tasks.c.id)
        .where(func.coalesce(taken.c.people, 0) < tasks.c.overlap, tasks.c.id.not_in(done))
        .order_by(*first, tasks.c.shuffle, tasks.c.seq)
    )


def _holding(connection: Connection, annotator: str, moment: datetime) -> Held | None:
    """The task that this annotator looks at now."""
    query = _events().where(
        task_events.c.seq.in_(_latest().where(task_events.c.annotator == annotator)),
        task_events.c.state == "shown",
        task_events.c.until > iso(moment),
    )
    row = connection.execute(query.order_by(task_events.c.seq).limit(1)).first()
    return _held(row) if row else None


def _last(connection: Connection, id_: str, annotator: str) -> Held | None:
    query = _events().where(task_events.c.task_id == id_, task_events.c.annotator == annotator)
    row = connection.execute(query.order_by(task_events.c.seq.desc()).limit(1)).first()
    return _held(row) if row else None


def _known(connection: Connection, id_: str, annotator: str) -> Held:
    held = _last(connection, id_, annotator)
    if held is None:
        raise UnknownTask("no task of this id was shown to you: ask for the next one")
    return held


def _still_theirs(connection: Connection, held: Held, annotator: str, moment: datetime) -> None:
    """`TaskTaken` unless the annotator may judge this task now."""
    if held.state in ("answered", "skipped"):
        raise TaskTaken(f"you have {held.state} this task: undo that first")
    if held.until is None or held.until <= moment:
        _has_room(connection, held.task, annotator, moment)


def _has_room(connection: Connection, task: Task, annotator: str, moment: datetime) -> None:
    """`TaskTaken` where as many others as are wanted have the task."""
    taken = _count(_has_place(moment), task_events.c.annotator != annotator)
    others = connection.execute(select(taken.c.people).where(taken.c.task_id == task.id)).scalar() or 0
    if others >= task.overlap:
        raise TaskTaken("others have this task now: ask for the next one")


class _Body(Record):
    """What an event's row says besides its columns."""

    order: tuple[int, ...]
    since: datetime
    feedback: tuple[str, ...] = ()
    sha256: str | None = None
    reason: str | None = None


def _held(row: Row[Any]) -> Held:
    body = _Body.model_validate_json(row.body)
    return Held(
        task=Task.model_validate_json(row.task),
        state=row.state,
        order=body.order,
        since=body.since,
        until=datetime.fromisoformat(row.until) if row.until else None,
        feedback=body.feedback,
        reason=body.reason,
        sha256=body.sha256,
        cursor=row.seq,
    )


def _drawn(body: str, *, since: datetime) -> Held:
    """A task that nobody has shown to this annotator before."""
    task = Task.model_validate_json(body)
    order = list(range(len(task.answers)))
    _draw.shuffle(order)
    return Held(task, "shown", tuple(order), since=since, until=None)


def _again(held: Held, *, since: datetime) -> Held:
    return Held(held.task, "shown", held.order, since=since, until=None)


def _show(connection: Connection, held: Held, annotator: str, *, until: datetime) -> Held:
    shown = Held(held.task, "shown", held.order, since=held.since, until=until)
    _note(connection, shown, annotator, "shown", until=until)
    return shown


def _note(
    connection: Connection,
    held: Held,
    annotator: str,
    state: State,
    *,
    until: datetime | None = None,
    **more: Any,
) -> None:
    body = _Body(order=held.order, since=held.since, **more)
    row = {
        "task_id": held.task.id,
        "annotator": annotator,
        "state": state,
        "until": iso(until) if until else None,
        "body": canonical_json(body.model_dump(mode="json", exclude_none=True)),
    }
    connection.execute(insert(task_events), row)


def _is_right(gold: Gold, item: Feedback) -> bool | None:
    """Whether a judgement agrees with what is known; None for one that says nothing about it."""
    if item.ranking and gold.ranks is not None:
        pairs = zip(item.ranking.ranks, gold.ranks, strict=True)
        placed = list(pairs)
        return all(
            (mine < other_mine) == (right < other_right)
            for mine, right in placed
            for other_mine, other_right in placed
            if right != other_right
        )
    if item.rating and gold.ranks is None and item.rating.aspect == "overall" and item.rating.scale == "stars":
        low, high = gold.at_least, gold.at_most
        return (low is None or item.rating.value >= low) and (high is None or item.rating.value <= high)
    return None

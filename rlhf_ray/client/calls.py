"""What can be asked of a service: for each route a function that makes the request, and reads what comes back.

Nothing is sent here: `sending.py` makes each of these a method of both clients.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar
from uuid import uuid4

import httpx

from rlhf_ray.feedback.schema import Feedback, Kind, parse_feedback

T = TypeVar("T")
Turns = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, safe to be sent again, and what its answer means."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    json: Any = None
    query: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Added:
    """Feedback that is on the service's disk."""

    ids: tuple[str, ...]
    """One a judgement."""
    replayed: bool
    """It was there before: an earlier try had arrived."""

    @property
    def id(self) -> str:
        """Of the first judgement."""
        return self.ids[0]


@dataclass(frozen=True, slots=True)
class Rewards:
    """A reward for each answer, and which reward model gave them."""

    rewards: tuple[float, ...]
    model: str
    version: int
    spreads: tuple[float, ...] | None = None
    """How unsure it is of each; None where it cannot say."""
    out_of_distribution: tuple[bool, ...] | None = None
    """Whether each answer is unlike all that it has learnt from; None where it cannot say."""


@dataclass(frozen=True, slots=True)
class LabelTask:
    """Something to judge. Places and `index` of the judgement are those of `answers` here."""

    id: str
    messages: tuple[dict[str, str], ...]
    answers: tuple[str, ...]
    asks: tuple[str, ...]
    """`ranking`, `rating`, `thumb`, `comment`."""
    aspects: tuple[str, ...]
    """What ratings are about."""
    until: datetime | None
    """Held until then."""


@dataclass(frozen=True, slots=True)
class TasksAdded:
    """The tasks' ids, and how many were not there before."""

    ids: tuple[str, ...]
    new: int


@dataclass(frozen=True, slots=True)
class Past:
    """What became of a task: `answered` with ids of feedback, or `skipped` with a reason."""

    task: LabelTask
    state: str
    feedback: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the caller is (answered, skipped, left) and everybody (complete of all tasks)."""

    answered: int
    skipped: int
    left: int
    tasks: int
    complete: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen set of feedback."""

    id: str
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A stretch of a list; `cursor` is where the next one begins, None at the end."""

    items: tuple[T, ...]
    cursor: str | None


def rate(completion_id: str, rating: float, *, index: int | None = None, **more: Any) -> Call[Added]:
    """Give a kept answer 1 to 5. `more`: `aspect`, `ratings`, `comment`, `annotator`, `idempotency_key`."""
    return send(completion_id=completion_id, rating=rating, index=index, **more)


def thumb(completion_id: str, up: bool, *, index: int | None = None, **more: Any) -> Call[Added]:
    """Give a kept answer a thumb up or down."""
    return send(completion_id=completion_id, thumb=up, index=index, **more)


def comment(completion_id: str, text: str, *, index: int | None = None, **more: Any) -> Call[Added]:
    """Say something about a kept answer, or about all of its choices."""
    return send(completion_id=completion_id, comment=text, index=index, **more)


def rank(
    ranking: Sequence[int],
    *,
    completion_id: str | None = None,
    prompt: str | None = None,
    messages: Turns | None = None,
    completions: Sequence[str | Mapping[str, Any]] | None = None,
    **more: Any,
) -> Call[Added]:
    """Put answers in order: `ranking[i]` is the place of answer i, 1 the best, ties share one.

    The answers are those of a kept completion, or are brought along with their prompt.
    """
    return send(
        completion_id=completion_id, prompt=prompt, messages=messages, completions=completions, ranking=ranking, **more
    )


def send(*, idempotency_key: str | None = None, **fields: Any) -> Call[Added]:
    """Send one request of feedback as docs/http-api.md words it; returns once it is on the service's disk."""

    def read(answer: httpx.Response) -> Added:
        return Added(tuple(answer.json()["ids"]), answer.headers.get("Idempotency-Replayed") == "true")

    headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
    return Call("POST", "/v1/feedback", read, json=_given(fields), headers=headers)


def feedback_page(
    cursor: str | None, *, kind: Kind | None = None, annotator: str | None = None, page: int = 100
) -> Call[Page[Feedback]]:
    """A stretch of all feedback, oldest first."""

    def read(answer: httpx.Response) -> Page[Feedback]:
        found = answer.json()
        return Page(tuple(map(parse_feedback, found["data"])), found["next_cursor"] if found["has_more"] else None)

    query = {"kind": kind, "annotator": annotator, "limit": page, "cursor": cursor}
    return Call("GET", "/v1/feedback", read, query=_given(query))


def rewards(completions: Sequence[str], *, prompt: str | None = None, messages: Turns | None = None) -> Call[Rewards]:
    """A reward for each answer to one prompt; only differences between them mean something."""

    def read(answer: httpx.Response) -> Rewards:
        found = answer.json()
        spreads, strange = found.get("spreads"), found.get("out_of_distribution")
        return Rewards(
            tuple(found["rewards"]),
            found["model"],
            found["version"],
            None if spreads is None else tuple(spreads),
            None if strange is None else tuple(strange),
        )

    fields = {"prompt": prompt, "messages": messages, "completions": completions}
    return Call("POST", "/v1/rewards", read, json=_given(fields))


def next_task() -> Call[LabelTask | None]:
    """The next thing to judge, held for a while; None where nothing is left. Asked again, it is the same one."""

    def read(answer: httpx.Response) -> LabelTask | None:
        found = answer.json()["task"]
        return None if found is None else _task(found)

    return Call("POST", "/v1/tasks/next", read)


def answer_task(task_id: str, **judgement: Any) -> Call[tuple[str, ...]]:
    """Judge a task: `rating`, `ratings`, `thumb`, `ranking`, `all_bad`, `comment`, and `index`; the feedback's ids.

    Sent again it is kept once. `TaskTaken` where another answer was sent before, or others have the task by now.
    """
    return Call(
        "POST", f"/v1/tasks/{task_id}/answer", lambda answer: tuple(answer.json()["ids"]), json=_given(judgement)
    )


def skip_task(task_id: str, reason: str) -> Call[None]:
    """Leave a task to others, and say why."""
    return Call("POST", f"/v1/tasks/{task_id}/skip", lambda answer: None, json={"reason": reason})


def undo_task(task_id: str) -> Call[LabelTask]:
    """Take back an answer or a skip; the task is shown again."""
    return Call("POST", f"/v1/tasks/{task_id}/undo", lambda answer: _task(answer.json()))


def progress() -> Call[Progress]:
    """How far the caller is with the tasks, and everybody."""
    return Call("GET", "/v1/tasks/progress", lambda answer: Progress(**_less_object(answer.json())))


def guidelines() -> Call[str]:
    """What annotators are asked to go by; empty where nobody said."""
    return Call("GET", "/v1/tasks/guidelines", lambda answer: str(answer.json()["text"]))


def history_page(cursor: str | None, *, page: int = 50) -> Call[Page[Past]]:
    """A stretch of what the caller has answered and skipped, newest first."""

    def read(answer: httpx.Response) -> Page[Past]:
        found = answer.json()
        items = [Past(_task(one["task"]), one["state"], tuple(one["feedback"]), one["reason"]) for one in found["data"]]
        return Page(tuple(items), found["next_cursor"])

    return Call("GET", "/v1/tasks/history", read, query=_given({"cursor": cursor, "limit": page}))


def add_tasks(tasks: Sequence[Mapping[str, Any]]) -> Call[TasksAdded]:
    """Add things to be judged, as docs/http-api.md words them, all or none. Needs a trainer's key."""

    def read(answer: httpx.Response) -> TasksAdded:
        found = answer.json()
        return TasksAdded(tuple(found["ids"]), found["new"])

    named = [{"id": uuid4().hex, **task} for task in tasks]  # so that sending again adds nothing
    return Call("POST", "/v1/tasks", read, json={"tasks": named})


def exclude(
    *, annotators: Sequence[str] = (), feedback: Sequence[str] = (), reason: str, back: bool = False
) -> Call[int]:
    """Leave annotators or pieces of feedback out of snapshots from now on, or no longer; how many rows that is about.

    Needs an administrator's key.
    """
    body = {"annotators": list(annotators), "feedback": list(feedback), "reason": reason, "back": back}
    return Call("POST", "/v1/exclusions", lambda answer: int(answer.json()["rows"]), json=body)


def snapshots() -> Call[tuple[Snapshot, ...]]:
    """The frozen sets of feedback. Needs a trainer's key."""
    return Call("GET", "/v1/snapshots", lambda answer: tuple(map(_snapshot, answer.json()["data"])))


def freeze(name: str | None = None, *, of: str | None = None) -> Call[Snapshot]:
    """Freeze what is there now, or an earlier snapshot less what is left out since. Needs a trainer's key."""
    body = _given({"name": name, "of": of})
    return Call("POST", "/v1/snapshots", lambda answer: _snapshot(answer.json()), json=body)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _less_object(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "object"}


def _snapshot(found: Mapping[str, Any]) -> Snapshot:
    return Snapshot(**_less_object(found))


def _task(found: Mapping[str, Any]) -> LabelTask:
    return LabelTask(
        id=found["id"],
        messages=tuple(found["messages"]),
        answers=tuple(answer["text"] for answer in found["answers"]),
        asks=tuple(found["asks"]),
        aspects=tuple(found["aspects"]),
        until=datetime.fromisoformat(found["until"]) if found["until"] else None,
    )

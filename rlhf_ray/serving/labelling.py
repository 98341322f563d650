"""The labelling queue over HTTP.

| route | who | what |
|---|---|---|
| `POST /v1/tasks/next` | annotator, trainer | the next thing to judge, held for a while |
| `POST /v1/tasks/{id}/answer` | annotator, trainer | what somebody says of it; 201 once on disk |
| `POST /v1/tasks/{id}/skip` | annotator, trainer | not to be judged by this one, and why |
| `POST /v1/tasks/{id}/undo` | annotator, trainer | takes an answer or a skip back |
| `GET /v1/tasks/history`, `/progress` | annotator, trainer | one's own past, and how far one is |
| `GET /v1/tasks/guidelines` | annotator, trainer | what to go by |
| `PUT /v1/tasks/guidelines` | trainer | new ones |
| `POST /v1/tasks` | trainer | more to judge |

What an annotator is sent names no policy and no version, and holds the answers in an order that is drawn for each.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import ConfigDict, Field, StrictInt

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback import tasks
from rlhf_ray.feedback.completions import Completion
from rlhf_ray.feedback.schema import Feedback, Id
from rlhf_ray.feedback.tasks import MAX_GUIDELINES, MAX_OVERLAP, Gold, Held, Task
from rlhf_ray.serving.auth import Caller, role
from rlhf_ray.serving.backends import RecordsBackend
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.feedback import UNKNOWN_COMPLETION
from rlhf_ray.serving.judgements import Closed, Judgement, Name, Subject, Turn, feedback_of, shown
from rlhf_ray.serving.settings import ServiceConfig
from rlhf_ray.types import Exchange, Prompt

MAX_HISTORY = 200
MAX_TASKS = 1_000
TaskId = Annotated[str, Path(min_length=1, max_length=200)]
Reason = Annotated[str, Field(min_length=1, max_length=1_000)]


class UnknownCompletion(FeedbackError):
    """A completion is named that is not kept."""


class Choice(Closed):
    """An answer as it is shown: its text alone."""

    text: str


class ShownTask(Closed):
    """What somebody is to judge. Places and `index` of the judgement are those of `answers` here."""

    object: Literal["task"] = "task"
    id: str
    messages: tuple[Turn, ...]
    answers: tuple[Choice, ...]
    asks: tuple[str, ...]
    """`ranking`, `rating`, `thumb`, `comment`: what is wanted. Anything that fits the answers is taken."""
    aspects: tuple[str, ...]
    """What ratings are about."""
    until: datetime | None
    """Held until then; not answered by then, it is offered to others."""


class ProgressReport(Closed):
    """How far the caller is, and everybody."""

    object: Literal["progress"] = "progress"
    answered: int
    skipped: int
    left: int
    """Tasks that the caller could be shown now."""
    tasks: int
    complete: int
    """Tasks that as many people as wanted have answered."""


class NextTask(Closed):
    """The next task, null where none is left."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "task.next",
                "task": {
                    "object": "task",
                    "id": "t1",
                    "messages": [{"role": "user", "content": "My lamp arrived broken."}],
                    "answers": [{"text": "No."}, {"text": "A new one is coming."}],
                    "asks": ["ranking"],
                    "aspects": ["overall"],
                    "until": "2026-12-01T10:30:00Z",
                },
                "progress": {
                    "object": "progress",
                    "answered": 3,
                    "skipped": 0,
                    "left": 12,
                    "tasks": 15,
                    "complete": 1,
                },
            }
        }
    )

    object: Literal["task.next"] = "task.next"
    task: ShownTask | None
    progress: ProgressReport


class TaskAnswer(Judgement):
    """What somebody says of a task, its answers counted as they were shown."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"ranking": [2, 1, 1], "comment": "The first does not say when."},
                {"ratings": {"helpfulness": 4, "honesty": 5}},
                {"all_bad": True},
            ]
        }
    )


class TaskAnswered(Closed):
    """What was kept; the same again where the same answer is sent again."""

    object: Literal["task.answered"] = "task.answered"
    id: str
    ids: tuple[str, ...]
    """Of the feedback, in the order rating, ratings, thumb, ranking, comment."""


class Skip(Closed):
    """Why somebody does not judge a task."""

    model_config = ConfigDict(json_schema_extra={"example": {"reason": "I do not speak this language"}})

    reason: Reason


class Skipped(Closed):
    """A task that is not offered to the caller again."""

    object: Literal["task.skipped"] = "task.skipped"
    id: str


class Past(Closed):
    """What the caller did with a task."""

    task: ShownTask
    state: Literal["answered", "skipped"]
    feedback: tuple[str, ...]
    reason: str | None


class History(Closed):
    """What the caller has done, newest first."""

    object: Literal["list"] = "list"
    data: tuple[Past, ...]
    has_more: bool
    next_cursor: str | None
    """Ask with it for what was before."""


class Guidelines(Closed):
    """What annotators are asked to go by: text, shown as it is."""

    model_config = ConfigDict(json_schema_extra={"example": {"text": "Prefer the answer that is true."}})

    text: Annotated[str, Field(max_length=MAX_GUIDELINES)]


class NewTask(Subject):
    """Something to be judged."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "prompt": "My lamp arrived broken.",
                "completions": [{"text": "No.", "sampler": "base"}, {"text": "A new one is coming.", "sampler": "ppo"}],
                "overlap": 2,
            }
        }
    )

    id: Id | None = None
    """By which it is known when it is sent again; one is made where none is given. Annotators see it."""
    asks: tuple[Literal["ranking", "rating", "thumb", "comment"], ...] = ()
    """What is wanted; by default a ranking of several answers, a rating of one."""
    aspects: Annotated[tuple[Name, ...], Field(min_length=1, max_length=20)] = ("overall",)
    """What ratings are about."""
    overlap: Annotated[StrictInt, Field(ge=1, le=MAX_OVERLAP)] = 1
    """How many people are asked."""
    priority: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    """What is asked first where the service asks by disagreement: the highest."""
    gold: Gold | None = None
    """What is right, where that is known; annotators are measured by it and are not told."""


class NewTasks(Closed):
    """Tasks that are added together or not at all."""

    tasks: Annotated[tuple[NewTask, ...], Field(min_length=1, max_length=MAX_TASKS)]


class TasksAdded(Closed):
    """The tasks' ids, and how many were not there before."""

    object: Literal["tasks.added"] = "tasks.added"
    ids: tuple[str, ...]
    new: int


def router(settings: ServiceConfig, *, records: RecordsBackend) -> APIRouter:
    """The routes above, over one writer."""
    routes = APIRouter(tags=["labelling"], prefix="/v1/tasks")
    annotator = Annotated[Caller, Depends(role("annotator", "trainer"))]
    may_add = Depends(role("trainer"))
    lease = timedelta(minutes=settings.labelling.lease_minutes)

    @routes.post("/next")
    async def next_task(caller: annotator) -> NextTask:
        """The task that the caller holds, else the next one, held from now on."""
        by = settings.labelling.next
        held: Held | None = await records.ask(partial(tasks.next_task, annotator=caller.name, by=by, lease=lease))
        done: tasks.Progress = await records.ask(partial(tasks.progress, annotator=caller.name))
        return NextTask(task=_shown(held) if held else None, progress=_report(done))

    @routes.post("/{task_id}/answer", status_code=201)
    async def answer_task(task_id: TaskId, body: TaskAnswer, caller: annotator) -> TaskAnswered:
        """Keep what the caller says. Answers 201 once it is on disk; the same again is kept once."""
        held: Held = await records.ask(partial(tasks.held_task, id_=task_id, annotator=caller.name))
        items = _feedback(body, held, caller.name)
        said = body.model_dump(mode="json", exclude_unset=True)
        answer = partial(tasks.answer_task, id_=task_id, annotator=caller.name, items=items, said=said)
        return TaskAnswered(id=task_id, ids=await records.ask(answer))

    @routes.post("/{task_id}/skip")
    async def skip_task(task_id: TaskId, body: Skip, caller: annotator) -> Skipped:
        """Leave a task to others."""
        await records.ask(partial(tasks.skip_task, id_=task_id, annotator=caller.name, reason=body.reason))
        return Skipped(id=task_id)

    @routes.post("/{task_id}/undo")
    async def undo_task(task_id: TaskId, caller: annotator) -> ShownTask:
        """Take back what the caller said of a task, or a skip. What was said is left out of snapshots from now on."""
        undo = partial(tasks.undo_task, id_=task_id, annotator=caller.name, lease=lease)
        return _shown(await records.ask(undo))

    @routes.get("/history")
    async def history(
        caller: annotator,
        cursor: Annotated[str | None, Query(pattern=r"^[0-9]{1,18}$", description="`next_cursor` of before")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_HISTORY)] = 50,
    ) -> History:
        """What the caller has answered and skipped, newest first."""
        before = None if cursor is None else int(cursor)
        past = partial(tasks.history, annotator=caller.name, before=before, limit=limit + 1)
        found: list[Held] = await records.ask(past)
        page, more = found[:limit], len(found) > limit
        return History(data=tuple(map(_past, page)), has_more=more, next_cursor=str(page[-1].cursor) if more else None)

    @routes.get("/progress")
    async def progress(caller: annotator) -> ProgressReport:
        """How far the caller is."""
        return _report(await records.ask(partial(tasks.progress, annotator=caller.name)))

    @routes.get("/guidelines")
    async def guidelines(caller: annotator) -> Guidelines:
        """What annotators are asked to go by; empty where nobody said."""
        return Guidelines(text=await records.ask(tasks.guide) or "")

    @routes.put("/guidelines")
    async def set_guidelines(body: Guidelines, caller: Annotated[Caller, may_add]) -> Guidelines:
        """Ask annotators to go by this from now on."""
        await records.ask(partial(tasks.set_guide, text=body.text, by=caller.name))
        return body

    @routes.post("", status_code=201, dependencies=[may_add])
    async def add_tasks(body: NewTasks) -> TasksAdded:
        """Add to what is judged: all of it, or nothing."""
        named = {wanted.completion_id for wanted in body.tasks if wanted.completion_id}
        kept = {id_: await records.completion(id_) for id_ in named}
        try:
            new = [task_of(wanted, kept.get) for wanted in body.tasks]
        except UnknownCompletion as error:
            raise ApiError(404, str(error), param="tasks.completion_id", code="unknown_completion") from None
        except FeedbackError as error:
            raise ApiError(400, str(error), param="tasks") from None
        added: int = await records.ask(partial(tasks.add_tasks, new=new))
        return TasksAdded(ids=tuple(task.id for task in new), new=added)

    return routes


def task_of(wanted: NewTask, kept: Callable[[str], Completion | None]) -> Task:
    """The task that a request describes; `kept` finds completions. `FeedbackError` where it cannot be one."""
    completion = kept(wanted.completion_id) if wanted.completion_id else None
    if wanted.completion_id and completion is None:
        raise UnknownCompletion(UNKNOWN_COMPLETION)
    about = wanted.model_dump(include={"id", "asks", "aspects", "overlap", "priority", "gold"}, exclude_none=True)
    origin, answers = shown(wanted, completion)
    return tasks.parse_task(origin | about | {"answers": answers})


def exchanges_of(wanted: NewTask) -> list[Exchange]:
    """Each answer that a request brings along with what it answers, to be scored."""
    assert wanted.completion_id is None
    task = task_of(wanted, lambda _: None)
    prompt = Prompt(task.prompt_id, task.messages, task.group)
    return [Exchange(prompt, answer.text) for answer in task.answers]


def _shown(held: Held) -> ShownTask:
    task = held.task
    return ShownTask(
        id=task.id,
        messages=tuple(Turn(role=turn.role, content=turn.content) for turn in task.messages),
        answers=tuple(Choice(text=text) for text in held.shown),
        asks=task.wanted,
        aspects=task.aspects,
        until=held.until,
    )


def _past(held: Held) -> Past:
    assert held.state in ("answered", "skipped")
    return Past(task=_shown(held), state=held.state, feedback=held.feedback, reason=held.reason)


def _report(done: tasks.Progress) -> ProgressReport:
    return ProgressReport(
        answered=done.answered, skipped=done.skipped, left=done.left, tasks=done.tasks, complete=done.complete
    )


def _feedback(body: TaskAnswer, held: Held, annotator: str) -> tuple[Feedback, ...]:
    """What is said of a task, as the store keeps it: about the answers in their own order."""
    task = held.task
    common: dict[str, Any] = {
        "messages": task.messages,
        "prompt_id": task.prompt_id,
        "group": task.group,
        "annotator": annotator,
        "seconds": held.seconds,
    }
    answers = [answer.model_dump() for answer in task.answers]
    try:
        return feedback_of(body.as_stored(held.order), answers, display_order=held.order, common=common)
    except FeedbackError as error:
        raise ApiError(400, str(error)) from None

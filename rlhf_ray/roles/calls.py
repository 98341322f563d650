"""Waiting for remote calls, with a deadline: the one place where a driver waits for another process.

The first failure wins at once and reaches the user with the failing actor's name, node and own traceback. An error
of this project's own classes (`errors.py`) comes back as itself, so that its exit code holds across processes. Where
an actor's death is not the end of the run, `gather` hands it to `on_lost` and `Calls` tells of it like of an answer.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from rlhf_ray.errors import (
    ActorFailed,
    ActorLost,
    DeadlineExceeded,
    InfrastructureError,
    InputError,
    Interrupted,
    RunFailed,
)

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOGS = "/tmp/ray/session_latest/logs on its node"
_SHOWN_LATE = 5
"""Late actors named in a message; with hundreds of them the first few are enough."""


_GONE = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, OutOfMemoryError)
"""What Ray says of a process that is no more, or of an answer that went down with its node."""


class Line(NamedTuple):
    """A line of progress from a streaming task."""

    text: str


class Done(NamedTuple):
    """What a streaming task returns, the last thing that it yields."""

    value: Any


class Outcome(NamedTuple):
    """How an actor's call ended."""

    name: str
    value: Any = None
    error: InfrastructureError | None = None
    """`ActorLost` or `DeadlineExceeded` where the actor may be dead; any other `ActorFailed` where it raised."""


class _Call(NamedTuple):
    name: str
    node: str | None
    doing: str
    deadline_s: float
    end: float


class Calls:
    """Calls under way, at most one an actor, each with its own deadline; told of one by one as they end."""

    def __init__(self) -> None:
        self._waiting: dict[Any, _Call] = {}

    def add(
        self, name: str, ref: ray.ObjectRef, *, doing: str, node: str | None = None, deadline_s: float = math.inf
    ) -> None:
        """Waits for this one too; `doing` completes "<actor> was ..."."""
        self._waiting[ref] = _Call(name, node, doing, deadline_s, time.monotonic() + deadline_s)

    def next(self, *, until: float = math.inf, of: Collection[str] | None = None) -> Outcome | None:
        """The next call that ends or misses its deadline, of all actors or of some; None where none will before the
        clock reaches `until`.
        """
        waiting = {ref: call for ref, call in self._waiting.items() if of is None or call.name in of}
        end = min(until, *(call.end for call in waiting.values()), math.inf)
        assert end < math.inf, "a wait without a deadline"
        ready, _ = ray.wait(list(waiting), timeout=max(0.0, end - time.monotonic())) if waiting else ([], 0)
        if not ready:
            late = [ref for ref, call in waiting.items() if call.end <= end]
            if not late:
                return None
            call = self._waiting.pop(late[0])
            cancel(late[:1])
            nodes = {call.name: call.node} if call.node else {}
            return Outcome(call.name, error=late_error(call.name, nodes, deadline_s=call.deadline_s, doing=call.doing))
        call = self._waiting.pop(ready[0])
        try:
            return Outcome(call.name, _answer(ready[0], call.name, call.node, doing=call.doing))
        except ActorFailed as error:
            return Outcome(call.name, error=error)

    def any(self, names: Collection[str]) -> bool:
        """Whether one of these actors is at something."""
        return any(call.name in names for call in self._waiting.values())

    def forget(self, names: Collection[str]) -> None:
        """Calls off what these actors were asked for; what they still answer is ignored."""
        for ref in [ref for ref, call in self._waiting.items() if call.name in names]:
            del self._waiting[ref]
            cancel([ref])


def gather(
    calls: Mapping[str, ray.ObjectRef],
    *,
    deadline_s: float,
    doing: str,
    nodes: Mapping[str, str] | None = None,
    on_lost: Callable[[str, InfrastructureError], None] | None = None,
) -> dict[str, Any]:
    """Every call's answer by the name of the actor that gave it, or an error within `deadline_s`.

    `doing` completes "<actor> was ..."; `nodes` says where the actors live. Raises `ActorFailed` for the first call
    that fails, `DeadlineExceeded` for those that did not answer; what is still under way is cancelled. With `on_lost`
    actors that are gone or late are handed to it instead, and are missing from the answers.
    """
    nodes = nodes or {}
    end = time.monotonic() + deadline_s
    waiting = {ref: name for name, ref in calls.items()}
    answers: dict[str, Any] = {}
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                if on_lost is None:
                    raise _late(list(waiting.values()), nodes, deadline_s=deadline_s, doing=doing)
                for name in waiting.values():
                    on_lost(name, late_error(name, nodes, deadline_s=deadline_s, doing=doing))
                break
            for ref in ready:
                name = waiting.pop(ref)
                try:
                    answers[name] = _answer(ref, name, nodes.get(name), doing=doing)
                except ActorLost as error:
                    if on_lost is None:
                        raise
                    on_lost(name, error)
    finally:
        cancel(waiting)
    return {name: answers[name] for name in calls if name in answers}


def each(
    tasks: Mapping[str, ray.ObjectRefGenerator],
    *,
    deadline_s: float,
    doing: str,
    nodes: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, ray.ObjectRef]]:
    """References to what streaming calls yield, and whose, as it comes, until all are through within `deadline_s`.

    Where one raises, its last reference is to the error.
    """
    end = time.monotonic() + deadline_s
    waiting = {task: name for name, task in tasks.items()}
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise _late(list(waiting.values()), nodes or {}, deadline_s=deadline_s, doing=doing)
        try:
            yield waiting[ready[0]], next(ready[0])
        except StopIteration:
            del waiting[ready[0]]


def stream(
    tasks: Mapping[str, ray.ObjectRefGenerator], *, deadline_s: float, doing: str, on_line: Callable[[str], None]
) -> Any:
    """What the first of some tasks came to, each of which yields `Line`s and then one `Done`, once all are done.

    Every line goes to `on_line` as it comes. Errors as in `gather`, the first one's; tasks that are late or no longer
    wanted are killed. One that has failed is over, and its process may be at the next task already: killing would hit
    that one.
    """
    done: dict[str, Any] = {}
    over: set[str] = set()
    try:
        for name, ref in each(tasks, deadline_s=deadline_s, doing=doing):
            try:
                item = _answer(ref, name, None, doing=doing)
            except (InputError, RunFailed) as error:
                if not isinstance(error, Interrupted):
                    over.add(name)
                raise
            if isinstance(item, Done):
                done[name] = item.value
                over.add(name)
                if len(done) == len(tasks):
                    return done[next(iter(tasks))]
                continue
            on_line(item.text)
    except BaseException:
        for name, task in tasks.items():
            if name not in over:
                ray.cancel(task, force=True)
        raise
    raise AssertionError(f"{', '.join(tasks)} ended without a result")


def settle(refs: Iterable[ray.ObjectRef], *, deadline_s: float) -> None:
    """Waits for calls whose answers nobody wants any more. What they raise is left: it follows from what was told."""
    for ref in refs:
        with contextlib.suppress(RayError):  # also `GetTimeoutError`
            ray.get(ref, timeout=deadline_s)


def cancel(refs: Iterable[ray.ObjectRef]) -> None:
    """Calls off what has not begun. An actor finishes what it is at; a plain task is interrupted."""
    for ref in refs:
        ray.cancel(ref)


def _answer(ref: ray.ObjectRef, name: str, node: str | None, *, doing: str) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, InputError | RunFailed):
            raise cause from None
        where = f" on {node}" if node else ""
        told = _COLOUR.sub("", str(error))
        if cause is None:  # no traceback: the process is gone, and its last words are in a file
            told += f"\nIts last words, if any, are in {_LOGS}, in the .err file of its pid; the same command resumes."
        raised = isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False)
        lost = isinstance(error, _GONE) and not raised  # what a task raised is an instance of its cause's class, too
        failure = ActorLost if lost else ActorFailed
        raise failure(f"{name}{where} failed while it was {doing}:\n{told}") from None


def late_error(name: str, nodes: Mapping[str, str], *, deadline_s: float, doing: str) -> DeadlineExceeded:
    """What is said of an actor that missed its deadline."""
    return _late([name], nodes, deadline_s=deadline_s, doing=doing)


def _late(names: list[str], nodes: Mapping[str, str], *, deadline_s: float, doing: str) -> DeadlineExceeded:
    shown = [f"{name} on {nodes[name]}" if name in nodes else name for name in names[:_SHOWN_LATE]]
    more = f" and {len(names) - _SHOWN_LATE} more" if len(names) > _SHOWN_LATE else ""
    verb = "was" if len(names) == 1 else "were"
    return DeadlineExceeded(
        f"{', '.join(shown)}{more} {verb} still {doing} when the deadline of {deadline_s:g} s passed; "
        "the same command resumes the run, a longer deadline is set under `resources`"
    )

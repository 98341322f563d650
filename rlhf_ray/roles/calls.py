"""Waiting for remote calls, with a deadline: the one place where a driver waits for another process.

The first failure wins at once and reaches the user with the failing actor's name, node and own traceback. An error
of this project's own classes (`errors.py`) comes back as itself, so that its exit code holds across processes.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from rlhf_ray.errors import ActorFailed, DeadlineExceeded, InputError, RunFailed

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOGS = "/tmp/ray/session_latest/logs on its node"
_SHOWN_LATE = 5
"""Late actors named in a message; with hundreds of them the first few are enough."""


class Line(NamedTuple):
    """A line of progress from a streaming task."""

    text: str


class Done(NamedTuple):
    """What a streaming task returns, the last thing that it yields."""

    value: Any


def gather(
    calls: Mapping[str, ray.ObjectRef], *, deadline_s: float, doing: str, nodes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Every call's answer by the name of the actor that gave it, or an error within `deadline_s`.

    `doing` completes "<actor> was ..."; `nodes` says where the actors live. Raises `ActorFailed` for the first call
    that fails, `DeadlineExceeded` for those that did not answer; what is still under way is cancelled.
    """
    nodes = nodes or {}
    end = time.monotonic() + deadline_s
    waiting = {ref: name for name, ref in calls.items()}
    answers: dict[str, Any] = {}
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise _late(list(waiting.values()), nodes, deadline_s=deadline_s, doing=doing)
            for ref in ready:
                name = waiting.pop(ref)
                answers[name] = _answer(ref, name, nodes.get(name), doing=doing)
    finally:
        cancel(waiting)
    return {name: answers[name] for name in calls}


def stream(
    task: ray.ObjectRefGenerator, *, name: str, deadline_s: float, doing: str, on_line: Callable[[str], None]
) -> Any:
    """What a task that yields `Line`s and then one `Done` came to; every line goes to `on_line` as it comes.

    Errors as in `gather`; a task that is late, failed or no longer wanted is killed.
    """
    end = time.monotonic() + deadline_s
    try:
        while True:
            ready, _ = ray.wait([task], timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise _late([name], {}, deadline_s=deadline_s, doing=doing)
            item = _answer(next(task), name, None, doing=doing)
            if isinstance(item, Done):
                return item.value
            on_line(item.text)
    except BaseException:
        ray.cancel(task, force=True)
        raise


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
            told += f"\nIts last words, if any, are in {_LOGS}, in the .err file of its pid."
        raise ActorFailed(f"{name}{where} failed while it was {doing}:\n{told}") from None


def _late(names: list[str], nodes: Mapping[str, str], *, deadline_s: float, doing: str) -> DeadlineExceeded:
    shown = [f"{name} on {nodes[name]}" if name in nodes else name for name in names[:_SHOWN_LATE]]
    more = f" and {len(names) - _SHOWN_LATE} more" if len(names) > _SHOWN_LATE else ""
    verb = "was" if len(names) == 1 else "were"
    return DeadlineExceeded(
        f"{', '.join(shown)}{more} {verb} still {doing} when the deadline of {deadline_s:g} s passed; "
        "the same command resumes the run, a longer deadline is set under `resources`"
    )

"""When each actor was at what: measured where the work is done, told in the clock of whoever asks."""

import functools
import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from rlhf_ray.roles.calls import gather

KEPT = 4096
"""An actor's last pieces of work; a step makes some ten to hundred."""

_Class = TypeVar("_Class", bound=type)


class Busy(NamedTuple):
    """A piece of an actor's work."""

    what: str
    """The method."""
    start: float
    """Seconds since the epoch."""
    end: float


class Told(NamedTuple):
    """What an actor says of itself."""

    now: float
    """By its own clock."""
    busy: list[Busy]


class Notes:
    """What an actor was at, piece by piece; to inherit from, under `@noting`."""

    @functools.cached_property
    def _notes(self) -> "deque[Busy]":
        return deque(maxlen=KEPT)

    def tell_busy(self) -> Told:
        """All since this was last asked."""
        busy = list(self._notes)
        self._notes.clear()
        return Told(time.time(), busy)


def noting(*methods: str) -> Callable[[_Class], _Class]:
    """Makes a class note when an instance was at one of these methods."""

    def decorate(cls: _Class) -> _Class:
        for name in methods:
            setattr(cls, name, _noted(getattr(cls, name)))
        return cls

    return decorate


def busy_of(actors: Mapping[str, Any], *, deadline_s: float) -> dict[str, list[Busy]]:
    """What each actor was at since it was last asked, by this process' clock.

    Their clocks may differ: an actor's is read half-way between asking and hearing, so it is right to half of that.
    """
    told: dict[str, list[Busy]] = {}
    for name, actor in actors.items():
        asked = time.time()
        said = gather({name: actor.tell_busy.remote()}, deadline_s=deadline_s, doing="telling what it did")[name]
        ahead = said.now - (asked + time.time()) / 2
        told[name] = [Busy(what, start - ahead, end - ahead) for what, start, end in said.busy]
    return told


def _noted(method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isgeneratorfunction(method):

        @functools.wraps(method)
        def streams(self: Notes, *args: Any, **kwargs: Any) -> Iterator[Any]:
            start = time.time()
            try:
                yield from method(self, *args, **kwargs)
            finally:
                self._notes.append(Busy(method.__name__, start, time.time()))

        return streams

    @functools.wraps(method)
    def answers(self: Notes, *args: Any, **kwargs: Any) -> Any:
        start = time.time()
        try:
            return method(self, *args, **kwargs)
        finally:
            self._notes.append(Busy(method.__name__, start, time.time()))

    return answers

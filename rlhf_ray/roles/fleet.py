"""Which generators there are: asked for, ready, lost and asked for again.

A fleet has a fixed number of slots. Each slot's actor is asked for at once, so that an autoscaler sees the whole
demand, and is in one of three states: awaited (Ray has no seat for it yet, or it is starting), ready (it has its
engine), fit (ready, and proved to hold the weights that are wanted). Only the fit may sample. A lost actor's slot
gets a new one under a new name, so that nothing that the old one may still answer is taken for the new one's.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import ray

from rlhf_ray.errors import ActorLost, DeadlineExceeded, InfrastructureError
from rlhf_ray.roles.calls import Calls, Outcome

STARTS = 3
"""Failed starts in a row after which a slot stays empty; the others go on."""

Ask = Callable[[str], Any]
"""Asks Ray for an actor of this name; returns its handle at once."""


class Fleet:
    """The generators' actors by name; `calls` holds what they are at."""

    def __init__(
        self, ask: Ask, *, wanted: int, minimum: int | None, start_deadline_s: float, say: Callable[[str], None]
    ) -> None:
        self.wanted, self.minimum = wanted, wanted if minimum is None else minimum
        self.start_deadline_s = start_deadline_s
        self.calls = Calls()
        self.actors: dict[str, Any] = {}
        """All that were asked for and are not lost."""
        self.slots: dict[str, int] = {}
        self.nodes: dict[str, str] = {}
        """Where each ready one lives."""
        self.fit: set[str] = set()
        self.fit_on_arrival = True
        """Until weights are handed over for the first time, every engine holds those of its model folder."""
        self._joined = self._lost = 0
        self._ask, self._say = ask, say
        self._names: Counter[int] = Counter()
        self._starts: Counter[int] = Counter()
        """Failed ones in a row, by slot."""
        self._complete = False
        """Whether `minimum` was reached once: those that come after that are newcomers."""
        self._cause: InfrastructureError | None = None
        self._short_since: float | None = time.monotonic()
        self._closed = False
        for slot in range(wanted):
            self._fill(slot)

    @property
    def unfit(self) -> list[str]:
        """Ready, but not yet proved to hold the right weights."""
        return [name for name in self.nodes if name not in self.fit]

    def wait_ready(self) -> None:
        """Returns once `minimum` are ready; raises what kept them from it."""
        while len(self.nodes) < self.minimum:
            self.turn()

    def turn(self) -> Outcome | None:
        """Waits for what happens next: an answer or a loss, already dealt with; None where one arrived or could not.

        Raises once the fleet has been short of its minimum for `start_deadline_s`, or can only stay so.
        """
        outcome = self.calls.next(until=self._patience())
        if outcome is None:
            raise self._stopped()
        if outcome.name in self.nodes:
            return self._ended(outcome)
        self._arrival(outcome)
        return None

    def look(self) -> None:
        """Takes note of who has arrived by now; what the others are at is left for `turn`."""
        while (outcome := self.calls.next(until=time.monotonic(), of=self.actors.keys() - self.nodes)) is not None:
            self._arrival(outcome)

    def released(self, names: Collection[str]) -> None:
        """These were proved to hold the weights that are wanted."""
        newcomers = [name for name in names if name not in self.fit and self._complete]
        self.fit.update(names)
        self._weigh()
        for name in newcomers:
            self._joined += 1
            self._say(f"{name} joined on {self.nodes[name]}: {len(self.fit)} of {self.wanted} generators")

    def scale(self, wanted: int) -> None:
        """So many slots from here on; the last ones are given up, new ones asked for. Nobody may be at work."""
        assert wanted >= self.minimum, f"{wanted} generators, at least {self.minimum}"
        for name in [name for name, slot in self.slots.items() if slot >= wanted]:
            del self.slots[name]
            self.nodes.pop(name, None)
            self.calls.forget([name])
            self.fit.discard(name)
            ray.kill(self.actors.pop(name))
            self._say(f"{name} was let go: {wanted} generators are wanted")
        for slot in range(self.wanted, wanted):
            self._say(f"asked for {self._fill(slot)}: {wanted} generators are wanted")
        self.wanted = wanted
        self._weigh()

    def remove(self, name: str, error: InfrastructureError) -> None:
        """Drops an actor that is dead or late, for good, and asks for another in its place."""
        if name not in self.actors:
            return
        ray.kill(self.actors.pop(name))
        slot, node = self.slots.pop(name), self.nodes.pop(name, None)
        ready = node is not None
        self.calls.forget([name])
        self.fit.discard(name)
        self._lost += ready
        self._cause = self._cause or error
        if self._closed:
            raise error
        self._starts[slot] = 0 if ready else self._starts[slot] + 1
        place = f" on {node}" if node else ""
        again = self._starts[slot] < STARTS
        after = f"asked for {self._fill(slot)} instead" if again else f"{STARTS} starts in a row failed, so no other"
        self._say(f"lost {name}{place}: {_why(error)}; {after}")
        self._weigh()

    def came_and_went(self) -> tuple[int, int]:
        """How many came late, and how many were ready and died, since this was last asked."""
        counts = self._joined, self._lost
        self._joined = self._lost = 0
        return counts

    def close(self) -> None:
        """Ends all of them; whoever is asked for anything afterwards is lost for good."""
        self._closed = True
        for actor in self.actors.values():
            ray.kill(actor)

    def _fill(self, slot: int) -> str:
        self._names[slot] += 1
        name = f"generator-{slot}" + (f".{self._names[slot]}" if self._names[slot] > 1 else "")
        self.slots[name] = slot
        self.actors[name] = self._ask(name)
        self.calls.add(name, self.actors[name].whereabouts.remote(), doing="starting")
        return name

    def _arrival(self, outcome: Outcome) -> None:
        name = outcome.name
        if outcome.error is None:
            self.nodes[name] = outcome.value
            self._starts[self.slots[name]] = 0
            if self.fit_on_arrival:
                self.released([name])
            return
        if not self._complete and not isinstance(outcome.error, ActorLost):
            raise outcome.error  # what the first ones raise, the others would raise too
        self.remove(name, outcome.error)

    def _ended(self, outcome: Outcome) -> Outcome:
        if isinstance(outcome.error, ActorLost | DeadlineExceeded):
            self.remove(outcome.name, outcome.error)
        elif outcome.error is not None:
            raise outcome.error  # it lives and raised: a mistake that another would make too
        return outcome

    def _weigh(self) -> None:
        """Notes since when it is short of its minimum."""
        if len(self.fit) >= self.minimum:
            self._complete, self._short_since, self._cause = True, None, None
        elif self._short_since is None:
            self._short_since = time.monotonic()

    def _patience(self) -> float:
        """Until when to wait."""
        if self._short_since is None:
            return math.inf
        if len(self.actors) < self.minimum:
            raise self._stopped()
        return self._short_since + self.start_deadline_s

    def _stopped(self) -> InfrastructureError:
        awaited = [name for name in self.actors if name not in self.nodes]
        return self._cause or DeadlineExceeded(
            f"{len(self.fit)} of at least {self.minimum} generators are ready after {self.start_deadline_s:g} s, "
            f"{', '.join(awaited[:5])} not; the same command resumes the run, a longer deadline is "
            "resources.start_deadline_s"
        )


def _why(error: InfrastructureError) -> str:
    """The line of an error that says most: Ray's reason for a death, or how a traceback ends."""
    told = str(error).partition("; the same command")[0].splitlines()
    lines = [line.strip() for line in told if line.strip() and not line.startswith("Its last words")]
    return (
        next((line for line in lines if line.startswith("The actor is dead because")), lines[-1])
        .partition(". ")[0]
        .rstrip(".")
    )

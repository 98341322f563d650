"""Whose turn it is to swap: one replica at a time, and everybody back when one fails.

Plain arithmetic on who holds what and what time it is; `versions.py` gives it the registry's word and a clock.

    settled    every live replica holds the wanted version
    swapping   another one is wanted: the replicas that do not hold it get the turn one after another
    failed     a replica could not take it, or took its turn and was not heard of again: the version that was wanted
               before is wanted again, and those that had swapped already get the turn to go back
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """The turn: it ends by itself, so that a dead replica blocks nobody."""

    replica: str
    number: int
    ends_at: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A version that a replica could not take."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What a replica held when it was last heard of."""

    holding: int
    at: float


class Turns:
    """Who holds which version, and whose turn it is."""

    def __init__(self, wanted: int, *, lease_s: float, alive_s: float, clock: Callable[[], float]) -> None:
        """A replica that was not heard of for `alive_s` counts as gone, unless it has the turn."""
        self.wanted = wanted
        self.settled: int | None = None
        """The last version that every live replica held: what those that start are given."""
        self.lease: Lease | None = None
        self.replicas: dict[str, Seen] = {}
        self.lease_s = lease_s
        self.alive_s = alive_s
        self.clock = clock
        self.heard_all_at = clock() + alive_s
        """Until then there may be replicas that have not asked yet."""

    def want(self, number: int) -> None:
        """The registry's word: this version is to be served."""
        self.wanted = number
        self._settle()

    def fall_back(self, number: int) -> None:
        """After a failure this version is wanted; it stood before, so a replica's trouble with it is the replica's."""
        self.settled = self.wanted = number

    def ask(self, replica: str, holding: int) -> int | None:
        """The version that this replica shall swap to now, None: stay with what it holds."""
        self._heard(replica, holding)
        if holding == self.wanted:
            return None
        if self.lease is None:
            self.lease = Lease(replica, self.wanted, self.clock() + self.lease_s)
        return self.lease.number if self.lease.replica == replica else None

    def report(self, replica: str, holding: int, *, tried: int, error: str | None) -> Failure | None:
        """The end of a turn. A failure is returned where it is the wanted version's, not the replica's."""
        if self.lease and self.lease.replica == replica:
            self.lease = None
        self._heard(replica, holding)
        return self._failure(tried, f"{replica}: {error}") if error is not None else None

    def expired(self) -> Failure | None:
        """Takes the turn from a replica that kept it too long."""
        if self.lease is None or self.clock() < self.lease.ends_at:
            return None
        lease, self.lease = self.lease, None
        self.replicas.pop(lease.replica, None)
        return self._failure(
            lease.number, f"{lease.replica}: not heard of for {self.lease_s:g} s after it got its turn"
        )

    def live(self) -> dict[str, int]:
        """What each replica holds that was heard of lately or has the turn."""
        since = self.clock() - self.alive_s
        turn = self.lease.replica if self.lease else None
        return {name: seen.holding for name, seen in self.replicas.items() if seen.at >= since or name == turn}

    def _heard(self, replica: str, holding: int) -> None:
        self.replicas[replica] = Seen(holding, self.clock())
        if self.lease and self.lease.replica == replica and self.lease.number == holding:
            self.lease = None  # it is through, and its report was lost
        self.replicas = {name: self.replicas[name] for name in self.live()}
        self._settle()

    def _settle(self) -> None:
        live = self.live()
        if live and set(live.values()) == {self.wanted} and self.clock() >= self.heard_all_at:
            self.settled = self.wanted

    def _failure(self, number: int, reason: str) -> Failure | None:
        """Only a version on trial can fail."""
        on_trial = number == self.wanted != self.settled
        return Failure(number, reason) if on_trial else None

"""Which policy version is served: the registry's word, carried to the replicas one at a time.

Replicas pull: each asks `turn` twice a second and is told to stay or to swap. The registry alone remembers, so that
this class may be restarted at any moment: the replicas' next questions tell it what they hold.
"""

import logging
import time
from collections.abc import Callable

from rlhf_ray.models.registry import Kind, Registry, Version
from rlhf_ray.serving.backends import ModelInfo, Readiness
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.turns import Failure, Turns

POLICY: Kind = "policy"
REWARD_MODEL: Kind = "reward_model"
ALIVE_S = 10.0
"""Replicas ask twice a second; one that was not heard of for so long is gone."""
REREAD_S = 1.0

log = logging.getLogger(__name__)


class Versions:
    """The registry and the swap."""

    def __init__(
        self,
        registry: Registry,
        *,
        lease_s: float,
        alive_s: float = ALIVE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`lease_s`: as long as a replica may take to drain, load, prove itself and, where that fails, go back."""
        self.registry = registry
        self.turns = Turns(0, lease_s=lease_s, alive_s=alive_s, clock=clock)
        self.clock = clock
        self._read_at = -REREAD_S

    async def first(self) -> Version:
        """The version that a replica loads when it starts: one that is proven, where there is one."""
        self._look()
        if not self.turns.wanted:
            raise ApiError(503, "no policy is promoted: rlhf policies promote NUMBER", retry_after=5)
        return self.registry.version(POLICY, self.turns.settled or self.turns.wanted)

    async def turn(self, replica: str, holding: int) -> Version | None:
        """The version that this replica shall swap to now, None: stay."""
        self._look()
        number = self.turns.ask(replica, holding)
        return None if number is None else self.registry.version(POLICY, number)

    async def report(self, replica: str, holding: int, *, tried: int, error: str | None) -> None:
        """How a replica's turn ended, and what it holds now."""
        log.info("%s took policy %d: %s", replica, tried, error or "done")
        failure = self.turns.report(replica, holding, tried=tried, error=error)
        if failure:
            self._fail(failure)

    async def models(self) -> list[ModelInfo]:
        """What answers now, by the name that a request gives as `model`."""
        self._look()
        policy = self.turns.settled or self.turns.wanted
        shown = [self.registry.version(POLICY, policy)] if policy else []
        infos = [_info(POLICY, version) for version in shown]
        reward_model = self.registry.promoted(REWARD_MODEL)
        return infos + ([_info(REWARD_MODEL, reward_model)] if reward_model else [])

    async def ready(self) -> Readiness:
        """Ready where a live replica holds a version that may be served; a swap under way does not change that."""
        self._look()
        live = self.turns.live()
        held = sum(number == self.turns.wanted for number in live.values())
        detail = f"policy {self.turns.wanted} is held by {held} of {len(live)} replicas"
        return Readiness(bool({self.turns.wanted, self.turns.settled} & set(live.values())), detail)

    def _look(self) -> None:
        """Ends a turn that lasted too long and, once a second, reads what is promoted."""
        expired = self.turns.expired()
        if expired:
            self._fail(expired)
        if self.clock() - self._read_at >= REREAD_S:
            self._read()

    def _read(self) -> None:
        promoted = self.registry.promoted(POLICY)
        self._read_at = self.clock()
        if promoted:
            self.turns.want(promoted.number)

    def _fail(self, failure: Failure) -> None:
        """The registry is told first: whoever restarts after that finds the old version promoted."""
        log.error("policy %d failed and is not promoted any more: %s", failure.number, failure.reason)
        self.registry.fail(POLICY, failure.number, reason=failure.reason)
        promoted = self.registry.promoted(POLICY)
        if promoted:
            self.turns.fall_back(promoted.number)


def _info(kind: Kind, version: Version) -> ModelInfo:
    created = int(version.created_at.timestamp())
    return ModelInfo(kind, kind, version.number, version.sha256, created, dict(version.lineage))

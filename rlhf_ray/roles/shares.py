"""Who samples what: a batch's requests in shares, handed out, taken back where a generator is lost, and checked."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.types import GenerationRequest, Rollout

WAVE = 1024
"""Most requests of one call, so that a call's deadline means the same for any number of requests."""
SHARES = 2
"""Shares for each generator that is wanted, so that one that comes late or is quick finds work within the batch.

More would find it more, and give the engines smaller batches, which cost nearly as much as large ones.
"""
TRIES = 3
"""Generators that may be lost over one share before the step fails: it may be the share that kills them."""


@dataclass(slots=True, eq=False)
class Share:
    """Requests that one call answers."""

    requests: Sequence[GenerationRequest]
    slot: int | None = None
    """The slot whose generator answers it; None: whoever is idle."""
    tries: int = 0


def fixed_shares(requests: Sequence[GenerationRequest], slots: int) -> Iterator[Share]:
    """Request i goes to slot i modulo their number, whatever the load, so that a redone batch is the same batch."""
    wave = WAVE * slots
    for start in range(0, len(requests), wave):
        for slot in range(slots):
            if share := requests[start + slot : start + wave : slots]:
                yield Share(share, slot)


def free_shares(requests: Sequence[GenerationRequest], slots: int) -> Iterator[Share]:
    """Small ones for whoever is idle."""
    size = min(WAVE, -(-len(requests) // (SHARES * slots)) or 1)
    for start in range(0, len(requests), size):
        yield Share(requests[start : start + size])


class Work:
    """A batch under way: every request is answered once, by one generator, or the batch fails."""

    def __init__(self, requests: Sequence[GenerationRequest], shares: Iterator[Share]) -> None:
        self.requests = requests
        self.given: dict[str, Share] = {}
        """By the generator that is at it."""
        self.retried = 0
        """Requests that went down with a generator and were handed out again."""
        self.sampled: Counter[str] = Counter()
        """Rollouts by the generator that gave them."""
        self._todo = deque(shares)
        self._done: dict[str, Rollout] = {}
        assert len({request.rollout_id for request in requests}) == len(requests), "two requests with one id"

    @property
    def done(self) -> bool:
        """Whether every request has its rollout."""
        return not self._todo and not self.given

    @property
    def rollouts(self) -> list[Rollout]:
        """In the order of the requests."""
        return [self._done[request.rollout_id] for request in self.requests]

    def take(self, name: str, slot: int) -> Share | None:
        """The next share for this generator; None where there is none for it."""
        for share in self._todo:
            if share.slot in (None, slot):
                self._todo.remove(share)
                self.given[name] = share
                return share
        return None

    def answered(self, name: str, rollouts: Sequence[Rollout], *, weights_step: int | None) -> None:
        """Takes a share's answer in; refuses one that is not exactly what was asked for, or of other weights."""
        share = self.given.pop(name)
        asked, got = [request.rollout_id for request in share.requests], [rollout.id for rollout in rollouts]
        if asked != got:
            missing = [id for id in asked if id not in set(got)]
            raise InfrastructureError(
                f"asked {name} for {len(asked)} rollouts, got {len(got)}, {len(missing)} missing"
                + (f", first {missing[0]}" if missing else "")
            )
        steps = {rollout.weights_step for rollout in rollouts}
        if weights_step is not None and steps != {weights_step}:
            raise InfrastructureError(f"{name} sampled at weights steps {sorted(steps)}, step {weights_step} is wanted")
        self._done.update(zip(asked, rollouts, strict=True))
        self.sampled[name] += len(asked)

    def lost(self, name: str, error: InfrastructureError) -> None:
        """Puts what this generator was at back in the front; raises the error where that has cost too many."""
        share = self.given.pop(name)
        share.tries += 1
        if share.tries >= TRIES:
            raise error
        self.retried += len(share.requests)
        self._todo.appendleft(share)

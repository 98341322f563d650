"""Who samples what: requests handed out, taken back where a generator is lost, and their answers checked."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heapreplace

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.roles.generator import Turn
from rlhf_ray.types import GenerationRequest, Rollout

WAVE = 1024
"""Most requests that one generator is at, so that a call's deadline means the same for any number of requests."""
SHARES = 2
"""Where anybody may take anything, a generator is at first given one part in `SHARES` of its share, and more as it
gets on, so that one that comes late or is quick finds work within the batch.

More parts would find it more, and give the engines smaller batches, which cost nearly as much as large ones.
"""
TRIES = 3
"""Generators that may be lost over one request before the step fails: it may be the request that kills them."""


class Dispatch:
    """Requests under way: every one is answered once, by one generator, or the batch fails.

    With a fixed map the i-th request goes to slot i modulo their number, whatever the load, so that a redone batch is
    the same batch. Without one, the next request goes to the generator with the fewest outstanding tokens.
    """

    def __init__(self, *, slots: int, fixed: bool, max_staleness: int = 0) -> None:
        """`max_staleness`: weights steps that a rollout's first token may lie behind the wanted one."""
        self.slots, self.fixed, self.max_staleness = slots, fixed, max_staleness
        self.given: dict[str, dict[str, GenerationRequest]] = {}
        """What each generator is at, by rollout."""
        self._retried = 0
        self._sampled: Counter[str] = Counter()
        self._outstanding: Counter[str] = Counter()
        """Tokens, prompts included, that each generator may still have to go through."""
        self._queues: list[deque[GenerationRequest]] = [deque() for _ in range(slots if fixed else 1)]
        self._slots: dict[str, int] = {}
        self._homes: dict[str, int] = {}
        """By rollout, which queue it is in: a dialogue's later turns go where its first one went."""
        self._open: set[str] = set()
        self._tries: Counter[str] = Counter()
        self._window = WAVE if fixed else 1

    @property
    def done(self) -> bool:
        """Whether every request has its rollout."""
        return not any(self._queues) and not any(self.given.values())

    def ask(self, requests: Sequence[GenerationRequest]) -> None:
        """Queues requests; a rollout that was given may be asked for again, as the next turn of a dialogue."""
        for place, request in enumerate(requests):
            id = request.rollout_id
            assert id not in self._open, f"two requests for {id}"
            self._open.add(id)
            self._queues[self._homes.setdefault(id, place % len(self._queues))].append(request)
        if not self.fixed:
            unanswered = sum(map(len, self._queues)) + sum(map(len, self.given.values()))
            self._window = min(WAVE, max(self._window, -(-unanswered // (SHARES * self.slots))))

    def hand_out(self, idle: Mapping[str, int]) -> dict[str, list[GenerationRequest]]:
        """New requests for each of these generators, given with their slots, that has anything to do."""
        self._slots.update(idle)
        new: dict[str, list[GenerationRequest]] = {name: [] for name in idle}
        least = [(self._outstanding[name], place, name) for place, name in enumerate(idle)]
        heapify(least)
        while least:
            _, place, name = least[0]
            queue, given = self._queue(idle[name]), self.given.setdefault(name, {})
            if not queue or len(given) >= self._window:
                heappop(least)
                continue
            request = queue.popleft()
            new[name].append(request)
            given[request.rollout_id] = request
            self._outstanding[name] += self._tokens(request)
            heapreplace(least, (self._outstanding[name], place, name))
        return {name: requests for name, requests in new.items() if self.given[name]}

    def answered(self, name: str, turn: Turn, *, weights_step: int | None) -> list[Rollout]:
        """Takes a generator's rollouts in; refuses any that were not asked of it, are missing or of other weights."""
        given = self.given[name]
        asked = len(given)
        for rollout in turn.rollouts:
            request = given.pop(rollout.id, None)
            if request is None:
                raise InfrastructureError(f"{name} gave {rollout.id}, which it was not asked for, or gave it twice")
            self._outstanding[name] -= self._tokens(request)
            self._open.discard(rollout.id)
            if weights_step is not None:
                self._check_weights(name, rollout, weights_step)
        if len(given) != turn.under_way:
            raise InfrastructureError(
                f"asked {name} for {asked} rollouts, got {len(turn.rollouts)}, {turn.under_way} are under way: "
                f"{len(given) - turn.under_way} missing, the first of {', '.join(list(given)[:3])}"
            )
        self._sampled[name] += len(turn.rollouts)
        return turn.rollouts

    def forget(self, ids: Iterable[str]) -> None:
        """These are done for good, and nothing more will be asked for them."""
        for id in ids:
            self._homes.pop(id, None)
            self._tries.pop(id, None)

    def told(self) -> tuple[Counter[str], int]:
        """Rollouts by the generator that gave them, and how many requests were handed out again, since last asked."""
        sampled, retried = self._sampled, self._retried
        self._sampled, self._retried = Counter(), 0
        return sampled, retried

    def lost(self, name: str, error: InfrastructureError) -> None:
        """Puts what this generator was at back in the front; raises the error where that has cost too many."""
        given = self.given.pop(name)
        del self._outstanding[name]
        self._tries.update(given.keys())
        if any(self._tries[id] >= TRIES for id in given):
            raise error
        self._retried += len(given)
        self._queue(self._slots[name]).extendleft(reversed(given.values()))

    def _queue(self, slot: int) -> deque[GenerationRequest]:
        return self._queues[slot if self.fixed else 0]

    def _tokens(self, request: GenerationRequest) -> int:
        return len(request.prompt_ids) + request.sampling.max_tokens

    def _check_weights(self, name: str, rollout: Rollout, wanted: int) -> None:
        if not wanted - self.max_staleness <= rollout.weights_step <= rollout.last_step <= wanted:
            steps = sorted({rollout.weights_step, *(swap.weights_step for swap in rollout.swaps)})
            raise InfrastructureError(f"{name} sampled {rollout.id} at weights steps {steps}, step {wanted} is wanted")

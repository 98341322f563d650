"""A step's answers, sampled and scored ahead while the learner learns from the steps before it.

Up to `rollout.max_staleness` steps are under way beside the learner; new weights are handed over in between, and what
is under way goes on with them. So the first token of a rollout is at most as many weights steps behind as there are
steps ahead of the one that is learnt from: the bound holds by the order of things, and the group refuses what would
break it.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from rlhf_ray.roles.generators import GeneratorGroup, Session
from rlhf_ray.training.replacing import Answers
from rlhf_ray.training.sampling import Asked
from rlhf_ray.types import Exchange, Rollout, Sampling, Scores

T = TypeVar("T")
TURN_S = 0.1
"""Between two turns of so long a generator takes new requests and new weights."""
AT_ONCE = 16
"""More generators than that take longer turns, so that the driver's work, some milliseconds a turn, does not grow with
their number."""
SCORED_AT_ONCE = 4
"""A step's answers are scored in at most so many parts, as they end."""


class Upcoming:
    """A step's rollouts as they end, and what they earn."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.order = [request.rollout_id for request in asked.requests]
        self.began = time.monotonic()
        self.took = 0.0
        """Seconds from the first request to the last rollout."""
        self.rollouts: dict[str, Rollout] = {}
        self.exchanges: dict[str, Exchange] = {}
        self.waiting: list[str] = []
        """Ended, and not yet given to the scorers."""
        self.scoring: list[tuple[list[str], Future[Scores]]] = []

    @property
    def whole(self) -> bool:
        """Whether every rollout has ended."""
        return len(self.rollouts) == len(self.order)

    def ended(self, last: Rollout) -> None:
        """Takes one in, by the last that was asked for it."""
        self.rollouts[last.id], self.exchanges[last.id] = self.asked.whole(last)
        self.waiting.append(last.id)
        self.took = time.monotonic() - self.began


class Ahead:
    """Samples and scores the steps to come in a session of its own, until `close`."""

    def __init__(
        self,
        generators: GeneratorGroup,
        ask: Callable[[int], Asked],
        score: Callable[[Sequence[Exchange]], Scores],
        *,
        sampling: Sampling,
        steps: int,
        last: int,
    ) -> None:
        """`ask`: what a step asks for; `steps`: how many ahead; `last`: the run's last step."""
        self.ask, self.score = ask, score
        self.sampling, self.steps, self.last = sampling, steps, last
        self._open = ExitStack()
        turn_s = TURN_S * max(1.0, generators.fleet.wanted / AT_ONCE)
        self._session: Session = self._open.enter_context(generators.session(turn_s=turn_s, max_staleness=steps))
        self._beside = self._open.enter_context(ThreadPoolExecutor(1, thread_name_prefix="learn"))
        self._scoring = self._open.enter_context(ThreadPoolExecutor(1, thread_name_prefix="score"))
        self._next: int | None = None
        """The first step that nothing was asked for yet."""
        self._batches: dict[int, Upcoming] = {}
        self._step_of: dict[str, int] = {}
        """By rollout under way."""

    def close(self) -> None:
        """Gives up whatever is under way."""
        self._open.close()

    def answers(self, step: int) -> tuple[Answers, list[Scores], float]:
        """A step's answers with what they earned, all that the scorers had to say, and seconds of sampling."""
        self._ask_until(step)
        batch = self._batches[step]
        while not batch.whole:
            self._turn()
        del self._batches[step]
        self._session.dispatch.forget(batch.order)
        scores, earned = [], dict[str, float | None]()
        for ids, scoring in batch.scoring:
            scores.append(scoring.result())
            earned.update(zip(ids, scores[-1].rewards, strict=True))
        order = batch.order
        answers = Answers(
            [batch.rollouts[id] for id in order], [batch.exchanges[id] for id in order], [earned[id] for id in order]
        )
        return answers, scores, batch.took

    def meanwhile(self, step: int, work: Callable[[], T]) -> T:
        """What `work`, the learning of a step, comes to; the steps after it are sampled beside it."""
        self._ask_until(min(step + self.steps, self.last))
        working, session = self._beside.submit(work), self._session
        session.refits = False
        while not (working.done() or session.done or session.stuck):
            self._turn()
        session.refits = True
        return working.result()

    def _ask_until(self, step: int) -> None:
        """Asks for what is not asked for yet, up to this step; the first call says where a run begins."""
        self._next = step if self._next is None else self._next
        while self._next <= step:
            batch = self._batches[self._next] = Upcoming(self.ask(self._next))
            self._step_of.update(dict.fromkeys(batch.order, self._next))
            self._session.ask(batch.asked.requests, self.sampling)
            self._next += 1

    def _turn(self) -> None:
        for rollout in self._session.turn():
            batch = self._batches[self._step_of[rollout.id]]
            if (request := batch.asked.follow(rollout)) is not None:
                self._session.ask([request], self.sampling)
                continue
            del self._step_of[rollout.id]
            batch.ended(rollout)
            if batch.whole or len(batch.waiting) * SCORED_AT_ONCE >= len(batch.order):
                ids, batch.waiting = batch.waiting, []
                exchanges = [batch.exchanges[id] for id in ids]
                batch.scoring.append((ids, self._scoring.submit(self.score, exchanges)))

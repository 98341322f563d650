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
from rlhf_ray.types import Exchange, GenerationRequest, Prompt, Rollout, Sampling, Scores

T = TypeVar("T")
TURN_S = 0.1
"""Between two turns of so long a generator takes new requests and new weights."""
SCORED_AT_ONCE = 4
"""A step's answers are scored in at most so many parts, as they end."""


class Upcoming:
    """A step's rollouts as they end, and what they earn."""

    def __init__(self, prompts: Sequence[Prompt], requests: Sequence[GenerationRequest]) -> None:
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.order = [request.rollout_id for request in requests]
        self.began = time.monotonic()
        self.took = 0.0
        """Seconds from the first request to the last rollout."""
        self.rollouts: dict[str, Rollout] = {}
        self.waiting: list[str] = []
        """Ended, and not yet given to the scorers."""
        self.exchanges: dict[str, Exchange] = {}
        self.scoring: list[tuple[list[str], Future[Scores]]] = []

    @property
    def whole(self) -> bool:
        """Whether every rollout has ended."""
        return len(self.rollouts) == len(self.order)

    def ended(self, rollout: Rollout) -> None:
        """Takes one in."""
        self.rollouts[rollout.id] = rollout
        self.waiting.append(rollout.id)
        self.took = time.monotonic() - self.began


class Ahead:
    """Samples and scores the steps to come in a session of its own, until `close`."""

    def __init__(
        self,
        generators: GeneratorGroup,
        ask: Callable[[int], tuple[Sequence[Prompt], Sequence[GenerationRequest]]],
        text_of: Callable[[Rollout, Prompt], Exchange],
        score: Callable[[Sequence[Exchange]], Scores],
        *,
        sampling: Sampling,
        steps: int,
        last: int,
    ) -> None:
        """`ask`: a step's prompts and requests; `steps`: how many ahead; `last`: the run's last step."""
        self.ask, self.text_of, self.score = ask, text_of, score
        self.sampling, self.steps, self.last = sampling, steps, last
        self._open = ExitStack()
        self._session: Session = self._open.enter_context(generators.session(turn_s=TURN_S, max_staleness=steps))
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
            prompts, requests = self.ask(self._next)
            self._batches[self._next] = Upcoming(prompts, requests)
            self._step_of.update((request.rollout_id, self._next) for request in requests)
            self._session.ask(requests, self.sampling)
            self._next += 1

    def _turn(self) -> None:
        for rollout in self._session.turn():
            batch = self._batches[self._step_of.pop(rollout.id)]
            batch.ended(rollout)
            if batch.whole or len(batch.waiting) * SCORED_AT_ONCE >= len(batch.order):
                self._score(batch)

    def _score(self, batch: Upcoming) -> None:
        ids, batch.waiting = batch.waiting, []
        for id in ids:
            rollout = batch.rollouts[id]
            batch.exchanges[id] = self.text_of(rollout, batch.prompts[rollout.prompt_id])
        batch.scoring.append((ids, self._scoring.submit(self.score, [batch.exchanges[id] for id in ids])))

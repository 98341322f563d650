"""The driver's end of the roles: blocking, typed methods over the actors of one role, each with a deadline.

Generators, which may come and go, have a group of their own (`generators.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import ray

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.models.checkpoint import Checkpoint
from rlhf_ray.roles.calls import each, gather
from rlhf_ray.transport.parcels import Sent
from rlhf_ray.types import Exchange, Rollout, Sampling, Scored, Scores

T = TypeVar("T")


class Group:
    """Actors of one role by name."""

    def __init__(self, actors: Mapping[str, Any], *, deadline_s: float) -> None:
        self.actors = dict(actors)
        self.deadline_s = deadline_s
        self.nodes: dict[str, str] = {}
        """Where each actor lives; known once it is ready."""

    def ready(self) -> dict[str, ray.ObjectRef]:
        """What each actor says once it is ready: where it lives."""
        return {name: actor.whereabouts.remote() for name, actor in self.actors.items()}

    def close(self) -> None:
        """Ends the actors and frees what they hold."""
        for actor in self.actors.values():
            ray.kill(actor)

    def _gather(self, calls: Mapping[str, ray.ObjectRef], doing: str) -> dict[str, Any]:
        return gather(calls, deadline_s=self.deadline_s, doing=doing, nodes=self.nodes)


class ScorerGroup(Group):
    """All scorers as one."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        """A reward for each exchange, in their order; `InfrastructureError` where one has none."""
        scores = self.ask(exchanges)
        rewards = [reward for reward in scores.rewards if reward is not None]
        if len(rewards) < len(exchanges):
            raise InfrastructureError(
                f"{len(exchanges) - len(rewards)} of {len(exchanges)} answers have no reward ({trouble([scores])}); "
                "the same command resumes the run"
            )
        return rewards

    def ask(self, exchanges: Sequence[Exchange]) -> Scores:
        """What each exchange earned, in their order, where its sources had a reward to give."""
        names = list(self.actors)[: max(1, len(exchanges))]
        calls = {name: self.actors[name].score.remote(exchanges[i :: len(names)]) for i, name in enumerate(names)}
        answers: dict[str, Scores] = self._gather(calls, f"scoring {len(exchanges)} answers")
        parts = [answers[name] for name in names]
        counts: Counter[str] = Counter()
        for part in parts:
            counts.update(part.counts)
        return Scores(
            _dealt_back([part.rewards for part in parts]),
            {source: _dealt_back([part.by_source[source] for part in parts]) for source in parts[0].by_source},
            {source: _dealt_back([part.spreads[source] for part in parts]) for source in parts[0].spreads},
            dict(counts),
            {source: _dealt_back([part.strange[source] for part in parts]) for source in parts[0].strange},
        )


def trouble(batches: Sequence[Scores]) -> str:
    """Why rewards are missing, in a line."""
    missing: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for scores in batches:
        missing.update({name: sum(value is None for value in values) for name, values in scores.by_source.items()})
        counts.update(scores.counts)
    told = [f"{name} lacks {n}" for name, n in missing.items() if n]
    return ", ".join([*told, *(f"{what} {n}" for what, n in sorted(counts.items()))])


def _dealt_back(parts: Sequence[Sequence[T]]) -> list[T]:
    """One list of what was dealt out row by row."""
    whole: list[T | None] = [None] * sum(map(len, parts))
    for i, part in enumerate(parts):
        whole[i :: len(parts)] = part  # a wrong count raises
    return cast("list[T]", whole)


class LearnerGroup(Group):
    """The learner's ranks as one; `weights.WeightsSource`. All are asked the same, the first one's answer counts."""

    def __init__(self, actors: Mapping[str, Any], *, deadline_s: float, starting: Mapping[str, ray.ObjectRef]) -> None:
        """`starting`: what each rank says once it is made."""
        super().__init__(actors, deadline_s=deadline_s)
        self._starting = starting

    def ready(self) -> dict[str, ray.ObjectRef]:
        """What each rank says once it is made."""
        return dict(self._starting)

    def prepare(self, sampled: Scored, greedy: Scored | None = None) -> dict[str, float]:
        """Advantages for a step's rollouts, kept with the learner for `update`; returns metrics."""
        doing = f"preparing {len(sampled.rollouts)} rollouts"
        given = ray.put((sampled, greedy))
        metrics: dict[str, float] = self._ask(lambda rank: rank.prepare.remote(given), doing)
        return metrics

    def update(self) -> dict[str, float]:
        """Learns from what was prepared last; returns metrics."""
        metrics: dict[str, float] = self._ask(lambda rank: rank.update.remote(), "updating")
        return metrics

    def push_weights(self, to: Sequence[str]) -> "Pushed":
        """Begins to send the policy's weights, which do not pass through this process."""
        return Pushed(self, to)

    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        """Log-probs of each (prompt, response)'s response tokens under the policy as it stands."""
        doing = f"computing log-probs of {len(sequences)} responses"
        logprobs: list[list[float]] = self._ask(lambda rank: rank.logprobs_of.remote(sequences, sampling), doing)
        return logprobs

    def mean_kl(self, rollouts: Sequence[Rollout]) -> float:
        """KL to the reference in nats a response, estimated on rollouts of the policy as it stands."""
        doing = f"estimating KL on {len(rollouts)} rollouts"
        kl: float = self._ask(lambda rank: rank.mean_kl.remote(rollouts), doing)
        return kl

    def save(self, folder: Path, step: int, *, best: int | None = None) -> str | None:
        """Begins to write a checkpoint; says why the disk refused the one before, if it did."""
        doing = f"copying the checkpoint of step {step}"
        refused: str | None = self._ask(lambda rank: rank.save.remote(folder, step, best), doing)
        return refused

    def finish_saving(self) -> str | None:
        """Returns once the last checkpoint is on the disk; says why the disk refused it, if it did."""
        refused: str | None = self._ask(lambda rank: rank.finish_saving.remote(), "writing the last checkpoint")
        return refused

    def load(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint."""
        given = ray.put(checkpoint)
        self._ask(lambda rank: rank.load.remote(given), f"loading the checkpoint of step {checkpoint.step}")

    def adopt(self, folder: Path) -> None:
        """Takes a folder's policy in place of its own, as one step of learning."""
        self._ask(lambda rank: rank.adopt.remote(folder), f"loading the policy {folder}")

    def take_average(self) -> None:
        """The average of all steps' weights in place of the last one's, as one step more."""
        self._ask(lambda rank: rank.take_average.remote(), "taking the averaged weights")

    def save_policy(self, folder: Path) -> None:
        """Writes the policy as a plain Hugging Face folder."""
        self._ask(lambda rank: rank.save_policy.remote(folder), "saving the policy")

    @property
    def _first(self) -> str:
        return next(iter(self.actors))

    def _ask(self, call: Callable[[Any], ray.ObjectRef], doing: str) -> Any:
        return self._gather({name: call(rank) for name, rank in self.actors.items()}, doing)[self._first]


class Pushed:
    """`weights.Push`: references to parcels, as the learner makes them."""

    def __init__(self, learner: LearnerGroup, to: Sequence[str]) -> None:
        self._learner = learner
        self._tasks = {
            name: rank.push.options(num_returns="streaming").remote(to) for name, rank in learner.actors.items()
        }
        self._sent: Sent | None = None

    def __iter__(self) -> Iterator[ray.ObjectRef]:
        learner, doing = self._learner, "sending weights"
        last = None
        for _, last in each(self._tasks, deadline_s=learner.deadline_s, doing=doing, nodes=learner.nodes):
            yield last
        self._sent = learner._ask(lambda rank: rank.what_was_sent.remote(), doing)
        if self._sent is None:  # it failed, and the last reference is to the reason
            learner._gather({learner._first: last}, doing)
            raise AssertionError("a learner sent nothing, and did not say why")

    @property
    def sent(self) -> Sent:
        """What was sent in all, once the last parcel is out."""
        assert self._sent is not None, "not all of it has been sent"
        return self._sent

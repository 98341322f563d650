"""The driver's ends of the roles: blocking, typed methods over the actors of one role, each with a deadline.

Generators may come and go while a run goes on (`fleet.py` keeps them, `shares.py` the work). What holds throughout:

- A rollout is asked for by its id and its seed, which derive from run, step, prompt and sample. So what goes down with
  a generator is asked for again, from another, as the very same request.
- Each call's answer must be exactly the rollouts that it asked for, of the weights step that is wanted. An answer is
  taken from the call that is waited for; whatever a dropped actor still says reaches no one. So none is lost, none is
  doubled, none is stale.
- A newcomer samples only once the hand-off has brought it to the wanted weights and verified that, by the same rule as
  for all (`GeneratorGroup.refit`): in the middle of a batch on its own, between two with the others.
- With `rollout.min_generators` left out there is a fixed map of requests to generators. A lost one is waited for, and
  its successor gets the same share whole, so the batch is the same batch. With fewer, small shares go to whoever is
  idle.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray

from rlhf_ray.models.checkpoint import Checkpoint
from rlhf_ray.roles.calls import gather
from rlhf_ray.roles.fleet import Ask, Fleet
from rlhf_ray.roles.generator import Sampled
from rlhf_ray.roles.shares import Work, fixed_shares, free_shares
from rlhf_ray.roles.weights import PushedWeights, WeightsSinks
from rlhf_ray.types import Exchange, GenerationRequest, Rollout, Sampling, Scored, WeightsReceipt


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


class Refit(Protocol):
    """`weights.WeightsHandoff.publish`."""

    def __call__(self, weights_step: int, *, to: WeightsSinks) -> object:
        """Brings some generators to the weights of this step, verified."""


class GeneratorGroup:
    """All generators as one; `weights.WeightsSinks`. `ask` asks Ray for an actor by name."""

    def __init__(
        self,
        ask: Ask,
        *,
        wanted: int,
        minimum: int | None = None,
        deadline_s: float,
        start_deadline_s: float = 300.0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.fleet = Fleet(ask, wanted=wanted, minimum=minimum, start_deadline_s=start_deadline_s, say=say)
        self.deadline_s = deadline_s
        self.weights_step: int | None = None
        """What was released last; once there is one, rollouts of any other step are refused."""
        self.refit: Refit | None = None
        """How one that comes late is brought to the weights; without it, it waits for the next hand-over to all."""
        self._sampled: Counter[str] = Counter()
        self._retried = 0

    @property
    def actors(self) -> Mapping[str, Any]:
        """All that were asked for and are not lost, by name."""
        return self.fleet.actors

    @property
    def nodes(self) -> Mapping[str, str]:
        """Where each ready one lives."""
        return self.fleet.nodes

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Rollout]:
        """A rollout for each request, in their order, whoever is lost or comes meanwhile."""
        shares = fixed_shares if self.fleet.minimum == self.fleet.wanted else free_shares
        work = Work(requests, shares(requests, self.fleet.wanted))
        try:
            while not work.done:
                self._refit_newcomers()
                self._hand_out(work, sampling)
                self._take_in(work)
        finally:
            self.fleet.calls.forget(work.given)
        self._sampled, self._retried = work.sampled, work.retried
        return work.rollouts

    def load_weights(self, pushed: PushedWeights) -> dict[str, WeightsReceipt]:
        """Every generator that is ready loads what the learner pushed; none may sample until `release`."""
        self.fleet.look()
        return _Some(self, self.nodes).load_weights(pushed)

    def probe(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> dict[str, list[Sampled]]:
        """Every generator's responses to every prompt, whether it may sample or not."""
        return _Some(self, self.nodes).probe(prompts, sampling, seeds=seeds)

    def release(self, weights_step: int) -> None:
        """Lets every generator sample with this step's weights."""
        _Some(self, self.nodes).release(weights_step)
        self.weights_step = weights_step
        self.fleet.fit_on_arrival = False

    def census(self) -> dict[str, float]:
        """`rollout/` metrics of the last batch, and of who came and went since this was last asked."""
        joined, lost = self.fleet.came_and_went()
        return {
            "rollout/generators": float(len(self.fleet.fit)),
            "rollout/share_max": max(self._sampled.values(), default=0) / max(1, self._sampled.total()),
            "rollout/retried": float(self._retried),
            "rollout/joined": float(joined),
            "rollout/lost_generators": float(lost),
        }

    def close(self) -> None:
        """Ends the actors and frees what they hold."""
        self.fleet.close()

    def _refit_newcomers(self) -> None:
        newcomers = self.fleet.unfit
        if newcomers and self.refit is not None and self.weights_step is not None:
            self.refit(self.weights_step, to=_Some(self, newcomers))

    def _hand_out(self, work: Work, sampling: Sampling) -> None:
        """One share to each generator that may sample and has none."""
        fleet = self.fleet
        for name in sorted(fleet.fit - work.given.keys(), key=fleet.slots.__getitem__):
            if share := work.take(name, fleet.slots[name]):
                ref = fleet.actors[name].generate.remote(share.requests, sampling, weights_step=self.weights_step)
                doing = f"generating {len(share.requests)} rollouts"
                fleet.calls.add(name, ref, doing=doing, node=fleet.nodes[name], deadline_s=self.deadline_s)

    def _take_in(self, work: Work) -> None:
        """Whatever comes next: an answer, a loss, or a newcomer."""
        outcome = self.fleet.turn()
        if outcome is None:
            return
        if outcome.error is not None:
            work.lost(outcome.name, outcome.error)
        else:
            work.answered(outcome.name, outcome.value, weights_step=self.weights_step)


class _Some:
    """Some of a group's generators, as the hand-off sees them. One that is lost under it is left out from there on."""

    def __init__(self, group: GeneratorGroup, names: Collection[str]) -> None:
        self.group, self.names = group, list(names)

    def load_weights(self, pushed: PushedWeights) -> dict[str, WeightsReceipt]:
        doing = f"loading weights of step {pushed.weights_step}"
        return self._each(lambda actor: actor.load_weights.remote(pushed.handle), doing)

    def probe(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> dict[str, list[Sampled]]:
        doing = f"answering {len(prompts)} probes"
        return self._each(lambda actor: actor.probe.remote(prompts, sampling, seeds=seeds), doing)

    def release(self, weights_step: int) -> None:
        doing = f"being released at weights step {weights_step}"
        self.group.fleet.released(self._each(lambda actor: actor.release.remote(weights_step), doing))

    def _each(self, call: Callable[[Any], ray.ObjectRef], doing: str) -> dict[str, Any]:
        fleet = self.group.fleet
        calls = {name: call(fleet.actors[name]) for name in self.names if name in fleet.nodes}
        return gather(
            calls, deadline_s=self.group.deadline_s, doing=doing, nodes=dict(fleet.nodes), on_lost=fleet.remove
        )


class ScorerGroup(Group):
    """All scorers as one."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        """A reward for each exchange, in their order."""
        names = list(self.actors)
        shares = {name: exchanges[i :: len(names)] for i, name in enumerate(names)}
        calls = {name: self.actors[name].score.remote(share) for name, share in shares.items() if share}
        answers = self._gather(calls, f"scoring {len(exchanges)} answers")
        scores = [0.0] * len(exchanges)
        for i, name in enumerate(names):
            if name in answers:
                scores[i :: len(names)] = answers[name]  # a wrong count raises
        return scores


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

    def push_weights(self) -> PushedWeights:
        """The policy's weights in the object store; they do not pass through this process."""
        pushed = {name: rank.push.options(num_returns=2).remote() for name, rank in self.actors.items()}
        headers = self._gather({name: header for name, (_, header) in pushed.items()}, "exporting weights")
        return PushedWeights(pushed[self._first][0], *headers[self._first])

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

"""The driver's ends of the roles: blocking, typed methods over the actors of one role, each with a deadline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.models.checkpoint import Checkpoint
from rlhf_ray.roles.calls import gather
from rlhf_ray.roles.generator import Sampled
from rlhf_ray.roles.weights import PushedWeights
from rlhf_ray.types import Exchange, GenerationRequest, Rollout, Sampling, WeightsReceipt

WAVE = 1024
"""Requests of one call to one generator, so that a call's deadline means the same for any number of requests."""


class Group:
    """Actors of one role by name."""

    def __init__(self, actors: Mapping[str, Any], *, deadline_s: float) -> None:
        self.actors = dict(actors)
        self.deadline_s = deadline_s
        self.nodes: dict[str, str] = {}
        """Where each actor lives; known once it is ready."""

    def _gather(self, calls: Mapping[str, ray.ObjectRef], doing: str) -> dict[str, Any]:
        return gather(calls, deadline_s=self.deadline_s, doing=doing, nodes=self.nodes)


class GeneratorGroup(Group):
    """All generators as one; `weights.WeightsSinks`."""

    weights_step: int | None = None
    """What was released last; once there is one, rollouts of any other step are refused."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Rollout]:
        """A rollout for each request, in their order.

        Request i goes to generator i modulo their number, whatever the load, so that a redone batch is the same batch.
        """
        rollouts: list[Rollout] = []
        wave = WAVE * len(self.actors)
        for start in range(0, len(requests), wave):
            rollouts += self._wave(requests[start : start + wave], sampling)
        return rollouts

    def load_weights(self, pushed: PushedWeights) -> dict[str, WeightsReceipt]:
        """Every generator loads what the learner pushed; none may sample until `release`."""
        calls = {name: actor.load_weights.remote(pushed.handle) for name, actor in self.actors.items()}
        return self._gather(calls, f"loading weights of step {pushed.weights_step}")

    def probe(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> dict[str, list[Sampled]]:
        """Every generator's responses to every prompt, whether it may sample or not."""
        calls = {name: actor.probe.remote(prompts, sampling, seeds=seeds) for name, actor in self.actors.items()}
        return self._gather(calls, f"answering {len(prompts)} probes")

    def release(self, weights_step: int) -> None:
        """Lets every generator sample with this step's weights."""
        calls = {name: actor.release.remote(weights_step) for name, actor in self.actors.items()}
        self._gather(calls, f"being released at weights step {weights_step}")
        self.weights_step = weights_step

    def _wave(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Rollout]:
        names = list(self.actors)
        shares = {name: requests[i :: len(names)] for i, name in enumerate(names)}
        calls = {
            name: self.actors[name].generate.remote(share, sampling, weights_step=self.weights_step)
            for name, share in shares.items()
            if share
        }
        answers = self._gather(calls, f"generating {len(requests)} rollouts")
        by_id = {rollout.id: rollout for name in calls for rollout in answers[name]}
        missing = [request.rollout_id for request in requests if request.rollout_id not in by_id]
        if missing or sum(map(len, answers.values())) != len(requests):
            raise InfrastructureError(
                f"asked for {len(requests)} rollouts, got {sum(map(len, answers.values()))}, {len(missing)} missing"
                + (f", first {missing[0]}" if missing else "")
            )
        return [by_id[request.rollout_id] for request in requests]


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
    """The learner; `weights.WeightsSource`."""

    @property
    def actor(self) -> Any:
        """Its one actor's handle."""
        (actor,) = self.actors.values()
        return actor

    def prepare(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> dict[str, float]:
        """Advantages for a step's rollouts, kept with the learner for `update`; returns metrics."""
        metrics: dict[str, float] = self._answer(
            self.actor.prepare.remote(rollouts, scores), f"preparing {len(rollouts)} rollouts"
        )
        return metrics

    def update(self) -> dict[str, float]:
        """Learns from what was prepared last; returns metrics."""
        metrics: dict[str, float] = self._answer(self.actor.update.remote(), "updating")
        return metrics

    def push_weights(self) -> PushedWeights:
        """The policy's weights in the object store; they do not pass through this process."""
        weights, header = self.actor.push.options(num_returns=2).remote()
        return PushedWeights(weights, *self._answer(header, "exporting weights"))

    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        """Log-probs of each (prompt, response)'s response tokens under the policy as it stands."""
        doing = f"computing log-probs of {len(sequences)} responses"
        logprobs: list[list[float]] = self._answer(self.actor.logprobs_of.remote(sequences, sampling), doing)
        return logprobs

    def mean_kl(self, rollouts: Sequence[Rollout]) -> float:
        """KL to the reference in nats a response, estimated on rollouts of the policy as it stands."""
        kl: float = self._answer(self.actor.mean_kl.remote(rollouts), f"estimating KL on {len(rollouts)} rollouts")
        return kl

    def save(self, folder: Path, step: int) -> str | None:
        """Writes a checkpoint; where the disk refuses it, says why."""
        refused: str | None = self._answer(
            self.actor.save.remote(folder, step), f"saving the checkpoint of step {step}"
        )
        return refused

    def load(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint."""
        self._answer(self.actor.load.remote(checkpoint), f"loading the checkpoint of step {checkpoint.step}")

    def save_policy(self, folder: Path) -> None:
        """Writes the policy as a plain Hugging Face folder."""
        self._answer(self.actor.save_policy.remote(folder), "saving the policy")

    def _answer(self, ref: ray.ObjectRef, doing: str) -> Any:
        (name,) = self.actors
        return self._gather({name: ref}, doing)[name]

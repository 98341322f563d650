"""What lives in an actor's process: a role, made there from a recipe, and word of where that is."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ray

from rlhf_ray.config import ResourcesConfig
from rlhf_ray.models.checkpoint import Checkpoint
from rlhf_ray.rewards.combined import CombinedRewards
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.busy import Notes, noting
from rlhf_ray.roles.generator import Engine, Generator
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.ranks import free_port, join_ranks
from rlhf_ray.transport.parcels import Parcel, Sent
from rlhf_ray.transport.sending import Sender
from rlhf_ray.transport.transports import make_transport
from rlhf_ray.types import Exchange, Rollout, Sampling, Scored, Scores


class _Resident(Notes):
    """What every actor can say of itself."""

    def whereabouts(self) -> str:
        """Node and process; the first answer also says that the actor is ready."""
        return f"{socket.gethostname()} ({ray.util.get_node_ip_address()}, pid {os.getpid()})"


@noting("generate", "load_weights", "probe", "release", "sleep", "wake")
class GeneratorActor(_Resident, Generator):
    """A generator that makes its engine where it runs."""

    def __init__(self, make_engine: Callable[[], Engine], *, name: str, weights_step: int | None) -> None:
        super().__init__(make_engine(), name=name, weights_step=weights_step)


@noting("score")
class ScorerActor(_Resident):
    """Sources of rewards, made where the scorer runs."""

    def __init__(self, load: Callable[[], CombinedRewards]) -> None:
        self.rewards = load()

    def score(self, exchanges: Sequence[Exchange]) -> Scores:
        """See `CombinedRewards.score`."""
        return self.rewards.score(exchanges)


@noting("prepare", "update", "push", "logprobs_of")
class LearnerActor(_Resident):
    """A rank of the learner, made where it runs; what it has prepared stays with it."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self.batch: Batch | None = None
        self.sent: Sent | None = None

    def meeting_point(self) -> str:
        """Where the other ranks find this one."""
        return f"{ray.util.get_node_ip_address()}:{free_port()}"

    def make(self, make_learner: Callable[..., Learner], meeting_point: str | None, deadline_s: float) -> str:
        """Joins the other ranks and makes the learner; says where that is."""
        ranks = join_ranks(self.index, self.count, meeting_point, deadline_s=deadline_s)
        self.learner = make_learner(ranks=ranks)
        self.sender = sender_for(self.learner.config.resources)
        return self.whereabouts()

    def prepare(self, given: tuple[Scored, Scored | None]) -> dict[str, float]:
        """Keeps the batch, returns its metrics."""
        self.batch = self.learner.prepare(*given)
        return self.batch.metrics

    def update(self) -> dict[str, float]:
        """Learns from the batch once."""
        assert self.batch is not None, "update follows prepare"
        batch, self.batch = self.batch, None
        return self.learner.update(batch)

    def push(self, to: Sequence[str]) -> Iterator[Parcel]:
        """Sends the policy's weights; see `Learner.push`. Only the first rank has something to give."""
        self.sent = None
        self.sent = yield from self.learner.push(self.sender, to)

    def what_was_sent(self) -> Sent | None:
        """By the last `push`; None where it failed, or on the other ranks."""
        return self.sent

    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        """See `Learner.logprobs_of`."""
        return self.learner.logprobs_of(sequences, sampling)

    def mean_kl(self, rollouts: Sequence[Rollout]) -> float:
        """See `Learner.mean_kl`."""
        return self.learner.mean_kl(rollouts)

    def save(self, folder: Path, step: int, best: int | None) -> str | None:
        """See `Learner.save`."""
        return self.learner.save(folder, step, best=best)

    def finish_saving(self) -> str | None:
        """See `Learner.finish_saving`."""
        return self.learner.finish_saving()

    def load(self, checkpoint: Checkpoint) -> None:
        """See `Learner.load`."""
        self.learner.load(checkpoint)

    def adopt(self, folder: Path) -> None:
        """See `Learner.adopt`."""
        self.learner.adopt(folder)

    def take_average(self) -> None:
        """See `Learner.take_average`."""
        self.learner.take_average()

    def save_policy(self, folder: Path) -> None:
        """See `Learner.save_policy`."""
        self.learner.save_policy(folder)


def sender_for(resources: ResourcesConfig) -> Sender:
    """What sends weights to generators from this process."""
    transport = make_transport(
        resources.weights_transport,
        host=ray.util.get_node_ip_address(),
        workers=resources.engine_tensor_parallel * resources.engine_pipeline_parallel,
        deadline_s=resources.call_deadline_s,
    )
    return Sender(transport)

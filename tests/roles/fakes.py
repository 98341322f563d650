"""Roles' insides without vLLM and without models: what they answer follows from their input alone."""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config import load_config
from rlhf_ray.errors import WeightsMismatch
from rlhf_ray.models.sureness import Considered
from rlhf_ray.rewards.combined import CombinedRewards, Weighted
from rlhf_ray.rewards.model import ModelSource
from rlhf_ray.roles.generator import Sampled
from rlhf_ray.transport.intake import Intake
from rlhf_ray.transport.object_store import ObjectStore
from rlhf_ray.transport.parcels import Parcel, Receiver, Sent
from rlhf_ray.transport.sending import Sender
from rlhf_ray.types import Exchange, GenerationRequest, Message, Prompt, Sampling, Span, WeightsReceipt

END = 2


class EchoEngine:
    """Answers a prompt with its own last tokens, one a step; each log-prob is the value of its one weight."""

    def __init__(self, logprob: float = -1.0) -> None:
        self.logprob, self.weights_step = logprob, -1
        self.waiting: dict[str, list[int]] = {}
        self.begun: dict[str, tuple[list[int], list[float], list[Span]]] = {}
        self.seeds: list[int] = []
        self.intake: Intake | None = None

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        self.waiting[id] = [*prompt[-(sampling.max_tokens - 1) :], END]
        self.begun[id] = ([], [], [])
        self.seeds.append(seed)

    def step(self) -> list[tuple[str, Sampled]]:
        ended = []
        for id, left in list(self.waiting.items()):
            ids, logprobs, spans = self.begun[id]
            if not spans or spans[-1].weights_step != self.weights_step:
                spans.append(Span(len(ids), self.weights_step))
            ids.append(left.pop(0))
            logprobs.append(self.logprob)
            if not left:
                del self.waiting[id], self.begun[id]
                ended.append((id, Sampled(tuple(ids), tuple(logprobs), "stop", tuple(spans))))
        return ended

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def load(self, parcel: Parcel, receiver: str) -> str | None:
        self.intake = self.intake or Intake(Receiver(receiver))
        for _, tensor in self.intake.take(parcel):
            self.take_over(float(tensor))
        return self.intake.sha256() if parcel.last else None

    def take_over(self, logprob: float) -> None:
        self.logprob = logprob

    def stamp(self, weights_step: int) -> None:
        self.weights_step = weights_step

    def sleep(self) -> None:
        self.logprob = 0.0

    def wake(self) -> None:
        pass


class LengthScorer:
    """A reward model that likes long answers."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        return [float(len(exchange.response)) for exchange in exchanges]

    def consider(self, exchanges: Sequence[Exchange]) -> Considered:
        return Considered(self.score(exchanges), [], [])


def length_rewards() -> CombinedRewards:
    return CombinedRewards({"length": Weighted(ModelSource([LengthScorer()]))})


class LocalPush:
    """Parcels that go from hand to hand in one process."""

    def __init__(self, parcels: Generator[Parcel, None, Sent | None]) -> None:
        self.parcels = parcels
        self.sent: Any = None

    def __iter__(self) -> Iterator[Parcel]:
        self.sent = yield from self.parcels


def sent_by(learner: Any, base: Path | None = None) -> dict[str, Tensor]:
    """What a learner's generators would get, by name; `base`: their model folder, which an adapter is laid over."""
    intake, found = Intake(Receiver("generator"), base=base), dict[str, Tensor]()
    for parcel in learner.push(Sender(ObjectStore()), ["generator"]):
        found.update(intake.take(parcel))
    return found


class FakeLearner:
    """One weight, which is every token's log-prob."""

    def __init__(
        self, logprob: float = -1.0, weights_step: int = 0, *, ranks: object = None, settings: Sequence[str] = ()
    ) -> None:
        self.logprob, self.weights_step = logprob, weights_step
        self.config = load_config(None, ["run.id=fake", *settings])

    def push(self, sender: Sender, to: Sequence[str]) -> Generator[Parcel, None, Sent]:
        weights = [("logprob", torch.tensor(self.logprob))]
        return sender.send(weights, to, weights_step=self.weights_step)

    def parcel(self) -> Parcel:
        """All of it: one weight fills no more."""
        (parcel,) = self.push(Sender(ObjectStore()), ["generator"])
        return parcel

    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        return [[self.logprob] * len(response) for _, response in sequences]


class Recorder:
    """A learner and its generators for the hand-off, which notes what it is asked for."""

    def __init__(self, learner: FakeLearner, **generators: Any) -> None:
        self.learner, self.generators = learner, generators
        self.events: list[str] = []

    def push_weights(self, to: Sequence[str]) -> LocalPush:
        self.events.append("push")
        return LocalPush(self.learner.push(Sender(ObjectStore()), to))

    def names(self) -> list[str]:
        return list(self.generators)

    answering = names

    def load_weights(self, pushed: LocalPush) -> dict[str, WeightsReceipt]:
        self.events.append("load")
        receipts: dict[str, WeightsReceipt] = {}
        for parcel in pushed:
            receipts = {name: generator.load_weights(parcel) for name, generator in self.generators.items()}
        return receipts

    def retire(self, name: str, error: WeightsMismatch) -> None:
        self.events.append(f"retire {name}")
        del self.generators[name]

    def probe(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> dict[str, list[Sampled]]:
        self.events.append("verify")
        self.prompts = prompts
        return {name: generator.probe(prompts, sampling, seeds=seeds) for name, generator in self.generators.items()}

    def release(self, weights_step: int) -> None:
        self.events.append("release")
        for generator in self.generators.values():
            generator.release(weights_step)

    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        return self.learner.logprobs_of(sequences, sampling)


def make_request(i: int = 0, **overrides: Any) -> GenerationRequest:
    fields = {"rollout_id": f"run/0/p{i}/0", "prompt_id": f"p{i}", "prompt_ids": (5, 6, 7 + i % 50), "seed": i}
    return GenerationRequest(**{**fields, **overrides})


def make_exchange(response: str = "Sorry to hear that.", prompt_id: str = "p0") -> Exchange:
    return Exchange(Prompt(prompt_id, (Message("user", "My lamp broke."),), group=prompt_id), response)

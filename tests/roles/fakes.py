"""Roles' insides without vLLM and without models: what they answer follows from their input alone."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.rewards.combined import CombinedRewards, Weighted
from rlhf_ray.rewards.model import ModelSource
from rlhf_ray.roles.generator import Sampled
from rlhf_ray.roles.weights import FlatWeights, PushedWeights, flatten
from rlhf_ray.types import Exchange, GenerationRequest, Message, Prompt, Sampling, Span, WeightsReceipt

END = 2


class EchoEngine:
    """Answers a prompt with its own last tokens, one a step; each log-prob is the value of its one weight."""

    def __init__(self, logprob: float = -1.0) -> None:
        self.logprob, self.weights_step = logprob, -1
        self.waiting: dict[str, list[int]] = {}
        self.begun: dict[str, tuple[list[int], list[float], list[Span]]] = {}
        self.seeds: list[int] = []

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

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.logprob = float(dict(weights)["logprob"])

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


def length_rewards() -> CombinedRewards:
    return CombinedRewards({"length": Weighted(ModelSource([LengthScorer()]))})


class FakeLearner:
    """One weight, which is every token's log-prob."""

    def __init__(self, logprob: float = -1.0, weights_step: int = 0, *, ranks: object = None) -> None:
        self.logprob, self.weights_step = logprob, weights_step

    def export_weights(self) -> FlatWeights:
        return flatten({"logprob": torch.tensor(self.logprob)}, self.weights_step)

    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        return [[self.logprob] * len(response) for _, response in sequences]


class Recorder:
    """A learner and its generators for the hand-off, which notes what it is asked for."""

    def __init__(self, learner: FakeLearner, **generators: Any) -> None:
        self.learner, self.generators = learner, generators
        self.events: list[str] = []

    def push_weights(self) -> PushedWeights:
        self.events.append("push")
        flat = self.learner.export_weights()
        return PushedWeights(flat, flat.weights_step, flat.sha256, flat.buffer.nbytes)

    def load_weights(self, pushed: PushedWeights) -> dict[str, WeightsReceipt]:
        self.events.append("load")
        return {name: generator.load_weights(pushed.handle) for name, generator in self.generators.items()}

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

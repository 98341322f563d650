"""Roles without Ray, vLLM or torch: they note the order in which they are called."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_ray.models.checkpoint import Checkpoint
from rlhf_ray.types import Exchange, GenerationRequest, Message, Prompt, Rollout, Sampling, Scored, Scores


class Tokenizer:
    """Characters as tokens; 0 ends."""

    model_max_length = 64
    eos_token_id = 0
    all_special_tokens: tuple[str, ...] = ()

    def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
        return turns[-1]["content"]

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(chr(i) for i in ids if i)


class Roles:
    """All four, with one log of events."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.sampling: list[Sampling] = []
        self.weights_step = 0
        self.prepared: tuple[list[Rollout], list[float]] = ([], [])
        self.greedy: Scored | None = None
        self.loaded: Path | None = None
        self.generators = self.scorers = self.learner = self.handoff = self

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, **_: object) -> list[Rollout]:
        self.events.append("generate")
        self.requests = list(requests)
        self.sampling.append(sampling)
        return [
            Rollout(
                r.rollout_id, r.prompt_id, r.prompt_ids, (65 + r.seed % 26, 0), (-1.0, -0.5), self.weights_step, "stop"
            )
            for r in requests
        ]

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        self.events.append("score")
        return [float(ord(exchange.response[0])) for exchange in exchanges]

    def ask(self, exchanges: Sequence[Exchange]) -> Scores:
        rewards = self.score(exchanges)
        return Scores(rewards, {"reward_model": rewards}, {}, {})

    def prepare(self, sampled: Scored, greedy: Scored | None = None) -> dict[str, float]:
        self.events.append("prepare")
        self.prepared, self.greedy = (list(sampled.rollouts), list(sampled.scores)), greedy
        return {"objective/kl": 0.5, "objective/scores": sum(sampled.scores) / len(sampled.scores)}

    def update(self) -> dict[str, float]:
        self.events.append("update")
        self.weights_step += 1
        return {"loss/policy_avg": 0.1}

    def publish(self, step: int) -> dict[str, float]:
        assert step == self.weights_step
        self.events.append("publish")
        return {"sync/verified": 1.0}

    def census(self) -> dict[str, float]:
        return {"rollout/generators": 1.0}

    def save(self, folder: Path, step: int, *, best: int | None = None) -> str | None:
        self.events.append(f"save {step}" + (f" best {best}" if best is not None else ""))
        return None

    def finish_saving(self) -> str | None:
        self.events.append("saved")
        return None

    def load(self, checkpoint: Checkpoint) -> None:
        self.loaded = checkpoint.path


def make_prompts(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", (Message("user", f"question {i}"),), f"p{i}") for i in range(n)]


def stale(rollout: Rollout, by: int) -> Rollout:
    return replace(rollout, weights_step=rollout.weights_step - by)


def loss_and_terms(objective: Any, model: Any, batch: Any) -> tuple[Any, int]:
    """What an objective sums over a batch, and over how many terms."""
    return objective.loss(model, batch), objective.terms(batch)

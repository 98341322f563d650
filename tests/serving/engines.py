"""Engines, registries and backends that a test holds in its hand."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.models.policy import load_policy, load_tokenizer, save_policy
from rlhf_ray.models.registry import Registry, Version
from rlhf_ray.serving.backends import GenerateCall, TokenLogprob
from rlhf_ray.serving.canary import Piece
from rlhf_ray.serving.worker import digest_of
from rlhf_ray.types import FinishReason
from tests.models.tiny import make_policy, make_tokenizer

END = 2
Pieces = AsyncGenerator[Piece, None]


def make_policy_folder(folder: Path, seed: int, **overrides: Any) -> Path:
    """A tiny policy that answers in its own way: each seed's weights are loud enough to be told apart."""
    tokenizer = make_tokenizer()
    policy = make_policy(tokenizer, seed=seed, **overrides)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(10.0)
    save_policy(folder, policy, tokenizer)
    return folder


def make_registry(root: Path, *, policies: int = 3) -> Registry:
    """A registry of policies 1, 2, ... that answer differently; the first is promoted."""
    registry = Registry(root / "registry")
    for seed in range(1, policies + 1):
        registry.publish("policy", make_policy_folder(root / f"policy-{seed}", seed), lineage={"seed": seed})
    registry.promote("policy", 1, by="test")
    return registry


def make_version(number: int = 1, folder: Path = Path("nowhere")) -> Version:
    """A version that only its number matters of."""
    return Version("policy", number, folder, "0" * 64, {}, datetime(2026, 1, 1, tzinfo=UTC))


class FakeRegistry:
    """Promotions in a list, the last the one that holds."""

    def __init__(self, *numbers: int, promoted: Sequence[int] = (1,)) -> None:
        self.known = {number: make_version(number) for number in numbers}
        self.promotions = list(promoted)
        self.failures: list[tuple[int, str]] = []

    def promote(self, number: int) -> None:
        self.promotions.append(number)

    def promoted(self, kind: str) -> Version | None:
        return self.known[self.promotions[-1]] if kind == "policy" and self.promotions else None

    def version(self, kind: str, number: int) -> Version:
        assert kind == "policy"
        return self.known[number]

    def fail(self, kind: str, number: int, *, reason: str) -> None:
        assert kind == "policy"
        self.failures.append((number, reason))
        self.promotions = [other for other in self.promotions if other != number]


class TorchEngine:
    """Transformers behind the face of a serving engine: real weights and log-probs, one token at a time."""

    exact = True

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load_policy(folder), load_tokenizer(folder)
        self.keeps_old_weights = False
        self.fails_to_load: set[int] = set()
        self.dead = self.closed = False
        self.running = self.aborted = 0
        self.loaded: list[int] = []
        self.step = asyncio.Event()
        self.step.set()
        """Cleared, answers stand still."""

    async def begin(self) -> None:
        self.begun = True

    async def generate(self, prompt_ids: Sequence[int], call: GenerateCall, *, max_tokens: int) -> Pieces:
        self.running += 1
        whole = False
        try:
            for index in range(call.n):
                async for piece in self._choice(index, list(prompt_ids), call, max_tokens):
                    yield piece
            whole = True
        finally:
            self.running -= 1
            self.aborted += not whole

    async def _choice(self, index: int, ids: list[int], call: GenerateCall, max_tokens: int) -> Pieces:
        for left in reversed(range(max_tokens)):
            await asyncio.sleep(0)
            if not call.id.startswith("canary"):
                await self.step.wait()
            if self.dead:
                raise InfrastructureError("the engine failed")
            with torch.no_grad():
                logprobs = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(logprobs.argmax())
            text = "" if token == END else self.tokenizer.decode([token])
            reason: FinishReason | None = "stop" if token == END else "length" if left == 0 else None
            kept = None if call.logprobs is None else (TokenLogprob(text, token, float(logprobs[token])),)
            yield Piece(index, text, (token,), reason, kept)
            ids.append(token)
            if reason == "stop":
                return

    async def load(self, folder: Path) -> str:
        number = int(folder.name)
        assert self.running == 0, "loaded while somebody is answered"
        if number in self.fails_to_load:
            raise InfrastructureError("the worker raised")
        if not self.keeps_old_weights:
            self.model = load_policy(folder)
        self.loaded.append(number)
        return digest_of(folder)

    async def check_health(self) -> None:
        if self.dead:
            raise InfrastructureError("the engine's process has died")

    def close(self) -> None:
        self.closed = True

"""The canary: a version that was loaded must answer fixed prompts as its own weights say."""

import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.models.policy import load_policy
from rlhf_ray.roles.weights import check_probe, probe_prompts
from rlhf_ray.serving.backends import GenerateCall, TokenLogprob
from rlhf_ray.types import FinishReason

TOKENS = 8
TOLERANCE = 1e-3
"""Nats, in float32; one wrong layer is off by far more."""
COMPARED_BYTES = 1 << 30
"""Larger models are not loaded a second time to compare with: their canary has to be finite and not empty."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one choice has grown by, as an engine gives it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] | None = None


class ServingEngine(Protocol):
    """What answers: vLLM (`engine.py`), or a fake in tests. Whatever goes wrong in it is an `InfrastructureError`."""

    exact: bool
    """Whether it computes in float32, so that its log-probs can be held against another implementation's."""

    async def begin(self) -> None:
        """What needs a running event loop; once, before anything else."""

    def generate(
        self, prompt_ids: Sequence[int], call: GenerateCall, *, max_tokens: int
    ) -> AsyncGenerator[Piece, None]:
        """The answers as they grow; closing the iterator aborts the request."""

    async def load(self, folder: Path) -> str:
        """Replaces the weights in place and forgets what was computed with the old ones; the worker's sha256."""

    async def check_health(self) -> None:
        """Raises where it is dead."""

    def close(self) -> None:
        """Ends its process."""


@dataclass(frozen=True, slots=True)
class Canary:
    """The prompts, and a second implementation to compare with where that is cheap."""

    prompts: list[list[int]]
    model: Any | None

    @classmethod
    def of(cls, folder: Path, number: int, *, vocabulary: int, context: int, exact: bool) -> "Canary":
        """Fresh prompts show the weights; standing ones would show a prefix cache that outlived its weights."""
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        model = load_policy(folder) if exact and size <= COMPARED_BYTES else None
        return cls(probe_prompts(number, vocabulary=vocabulary, context=context), model)

    async def sing(self, engine: ServingEngine, number: int) -> None:
        """Raises `InfrastructureError` where an answer is empty, not finite, or not this version's."""
        name = f"the engine with policy {number}"
        for i, prompt in enumerate(self.prompts):
            call = GenerateCall(f"canary-{number}-{i}", temperature=0, logprobs=0)
            pieces = [piece async for piece in engine.generate(prompt, call, max_tokens=TOKENS)]
            ids = [token for piece in pieces for token in piece.token_ids]
            found = [token.logprob for piece in pieces for token in piece.logprobs or ()]
            if not ids or len(found) != len(ids) or not all(map(math.isfinite, found)):
                raise InfrastructureError(
                    f"{name} answered the canary with {len(ids)} tokens and {len(found)} log-probs: "
                    "each token needs a finite one"
                )
            if self.model is not None:
                expected = _greedy_logprobs(self.model, prompt, ids)
                check_probe(name, number, [expected], [found], tolerance=TOLERANCE)


def _greedy_logprobs(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]  # (T, V)
    logprobs = logits.float().log_softmax(-1)
    found: list[float] = logprobs.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1).tolist()
    return found

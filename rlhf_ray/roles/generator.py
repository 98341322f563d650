"""The generator: prompts in, rollouts out, each stamped with the weights step that sampled it."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from rlhf_ray.errors import InfrastructureError, WeightsMismatch
from rlhf_ray.roles.weights import FlatWeights, digest, unflatten
from rlhf_ray.types import FinishReason, GenerationRequest, Rollout, Sampling, WeightsReceipt


class Sampled(NamedTuple):
    """One response as an engine gives it."""

    ids: tuple[int, ...]
    """(T); ends with the end token where `finish_reason` is "stop"."""
    logprobs: tuple[float, ...]
    """(T) of the distribution sampled from, after temperature and top-p."""
    finish_reason: FinishReason


class Engine(Protocol):
    """What samples: vLLM (`vllm_engine.py`), or a fake in tests."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Sampled]:
        """One response a prompt, in the prompts' order; equal seeds draw equal numbers."""

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces all weights and forgets whatever was computed with the old ones."""


class Generator:
    """An engine that samples only with weights known to be the right ones.

    With a `weights_step` the weights that the engine has read from its model folder count as that step. Without one,
    and after every `load_weights`, it refuses to generate until the hand-off has verified what it holds and released
    it.
    """

    def __init__(self, engine: Engine, *, name: str = "generator", weights_step: int | None = None) -> None:
        self.engine = engine
        self.name = name
        self.weights_step = weights_step
        self.released = weights_step is not None

    def ping(self) -> int | None:
        """The weights step that it may sample with; None where there is none."""
        return self.weights_step if self.released else None

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, *, weights_step: int | None = None
    ) -> list[Rollout]:
        """A rollout for each request, in their order; refuses where it does not hold the weights that are wanted."""
        step = self._may_sample(weights_step)
        sampled = self._sample([r.prompt_ids for r in requests], sampling, [r.seed for r in requests])
        return [
            Rollout(
                id=request.rollout_id,
                prompt_id=request.prompt_id,
                prompt_ids=request.prompt_ids,
                response_ids=answer.ids,
                logprobs=answer.logprobs,
                weights_step=step,
                finish_reason=answer.finish_reason,
            )
            for request, answer in zip(requests, sampled, strict=True)
        ]

    def load_weights(self, flat: FlatWeights) -> WeightsReceipt:
        """Loads what was pushed once its hash holds, and hands back the proof; it may sample again after `release`."""
        start = time.monotonic()
        self.released = False
        sha256 = digest(flat.index, flat.buffer)
        if sha256 != flat.sha256:
            raise WeightsMismatch(
                f"{self.name} received other bytes for weights step {flat.weights_step} than were sent: "
                f"sha256 expected {flat.sha256}, got {sha256}"
            )
        self.weights_step = None  # until the load is through it holds no step at all
        self.engine.load(unflatten(flat))
        self.weights_step = flat.weights_step
        return WeightsReceipt(flat.weights_step, sha256, flat.buffer.nbytes, time.monotonic() - start)

    def probe(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]) -> list[Sampled]:
        """Responses that only serve to verify the weights; needs no release."""
        return self._sample(prompts, sampling, seeds)

    def release(self, weights_step: int) -> None:
        """Lets it sample: the hand-off has verified that it holds this step."""
        assert self.weights_step == weights_step, f"released step {weights_step}, holds {self.weights_step}"
        self.released = True

    def _may_sample(self, wanted: int | None) -> int:
        if not self.released or self.weights_step is None:
            raise InfrastructureError(
                f"{self.name} holds weights step {self.weights_step} unverified and must not sample; "
                "weights are handed over by WeightsHandoff.publish"
            )
        if wanted is not None and wanted != self.weights_step:
            raise InfrastructureError(f"{self.name} holds weights step {self.weights_step}, step {wanted} is wanted")
        return self.weights_step

    def _sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Sampled]:
        sampled = self.engine.generate(prompts, sampling, seeds)
        if len(sampled) != len(prompts):
            raise InfrastructureError(f"{self.name} was given {len(prompts)} prompts and answered {len(sampled)}")
        for answer in sampled:
            if (
                not answer.ids
                or len(answer.ids) != len(answer.logprobs)
                or not all(map(math.isfinite, answer.logprobs))
            ):
                raise InfrastructureError(
                    f"{self.name} sampled {len(answer.ids)} tokens with log-probs {answer.logprobs[:8]}: "
                    "each token needs a finite one"
                )
        return sampled
